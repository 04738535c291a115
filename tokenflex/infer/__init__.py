"""Answers from an exported model, at any number of visual tokens."""

from .generate import Count, Generator, check_auto, parse_num_visual_tokens

__all__ = ["Count", "Generator", "check_auto", "parse_num_visual_tokens"]
