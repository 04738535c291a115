"""The embedded corpus: real digits, photographs and fonts composed into questions that need few or many visual tokens.

`resolve_embedded` is all that the rest of the project calls.
"""

from .resolve import resolve_embedded

__all__ = ["resolve_embedded"]
