"""Answers from an exported model, at any number of visual tokens."""

from .generate import Generator, check_auto, parse_num_visual_tokens

__all__ = ["Generator", "check_auto", "parse_num_visual_tokens"]
