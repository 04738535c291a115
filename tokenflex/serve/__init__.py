"""An exported model behind an OpenAI-compatible endpoint, for those without a serving engine."""

from .limits import RequestRefused, ServeLimits
from .pieces import TextPieces
from .server import serve

__all__ = ["RequestRefused", "ServeLimits", "TextPieces", "serve"]
