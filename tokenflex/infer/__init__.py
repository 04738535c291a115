"""Answers from an exported model, at any number of visual tokens."""

from .generate import Generator, parse_num_visual_tokens

__all__ = ["Generator", "parse_num_visual_tokens"]
