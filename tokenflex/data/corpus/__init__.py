"""The embedded corpus: real digits, photographs and fonts composed into questions that need few or many visual tokens."""

from .build import build_corpus
from .tokenizer import build_tokenizer

__all__ = ["build_corpus", "build_tokenizer"]
