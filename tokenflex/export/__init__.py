"""A trained model as a folder that any transformers process can load, without this package."""

from .checkpoint import export_checkpoint
from .export import export_model, is_exported, loading_code

__all__ = ["export_checkpoint", "export_model", "is_exported", "loading_code"]
