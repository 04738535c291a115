"""A trained model as a folder that any transformers process can load, without this package."""

from .export import export_model, is_exported, loading_code

__all__ = ["export_model", "is_exported", "loading_code"]
