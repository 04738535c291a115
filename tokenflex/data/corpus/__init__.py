"""The embedded corpus: real digits, photographs and fonts composed into questions that need few or many visual tokens."""

from .build import RECIPE_VERSION, build_corpus
from .tokenizer import build_tokenizer

__all__ = ["RECIPE_VERSION", "build_corpus", "build_tokenizer"]
