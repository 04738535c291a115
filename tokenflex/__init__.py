"""TokenFLEX: train vision-language models that serve any number of visual tokens."""

__version__ = "0.1.0"
