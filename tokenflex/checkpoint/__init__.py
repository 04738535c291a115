"""Saving and resuming a run: per-rank safetensors and a manifest, checked before use, readable by any number of ranks."""

from .disk import remove_folder
from .folder import Entry, Retention, check_files, checked_manifest, entries, latest_tag, run_entries, tags
from .frozen import checked_and_repaired
from .lock import RunLock
from .manifest import Damaged, Manifest
from .shard import ShardReader, shard_name
from .store import (
    CheckpointWriter,
    EarlyCheck,
    Loaded,
    Pieces,
    Saved,
    begin_folder,
    check_fits,
    load_newest,
    named_pieces,
    read_slices,
    read_whole,
)

__all__ = [
    "CheckpointWriter",
    "Damaged",
    "EarlyCheck",
    "Entry",
    "Loaded",
    "Manifest",
    "Pieces",
    "Retention",
    "RunLock",
    "Saved",
    "ShardReader",
    "begin_folder",
    "check_files",
    "check_fits",
    "checked_and_repaired",
    "checked_manifest",
    "entries",
    "latest_tag",
    "load_newest",
    "named_pieces",
    "read_slices",
    "read_whole",
    "run_entries",
    "remove_folder",
    "shard_name",
    "tags",
]
