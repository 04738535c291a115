"""Saving and resuming a run."""

from .store import complete_checkpoints, load_newest_checkpoint, save_checkpoint

__all__ = ["complete_checkpoints", "load_newest_checkpoint", "save_checkpoint"]
