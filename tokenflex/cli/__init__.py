"""Command lines: one thin file per command over functions that a notebook can call, and what every entry point does."""

from .main import main

__all__ = ["main"]
