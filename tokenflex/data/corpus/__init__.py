"""The embedded corpus: real digits, photographs and fonts composed into questions that need few or many visual tokens."""

from .build import RECIPE_VERSION, build_corpus
from .encoder import ENCODER_VERSION, build_encoder
from .tokenizer import build_tokenizer

__all__ = ["ENCODER_VERSION", "RECIPE_VERSION", "build_corpus", "build_encoder", "build_tokenizer"]
