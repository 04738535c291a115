"""Answers from an exported model, at any number of visual tokens."""

from .generate import Count, Generator, parse_num_visual_tokens

__all__ = ["Count", "Generator", "parse_num_visual_tokens"]
