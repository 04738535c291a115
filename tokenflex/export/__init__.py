"""A trained model as a folder that any transformers process can load, without this package."""

from .card import add_figures
from .checkpoint import export_checkpoint
from .export import export_model, is_exported, loading_code
from .router import export_router

__all__ = ["add_figures", "export_checkpoint", "export_model", "export_router", "is_exported", "loading_code"]
