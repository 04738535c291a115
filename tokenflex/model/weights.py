"""Which pretrained weights a run began with: every file of its parts, with its checksum."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import blake3
from huggingface_hub import try_to_load_from_cache

if TYPE_CHECKING:
    from ..config import ModelConfig


def weight_files(model: "ModelConfig") -> dict[str, dict[str, Any]]:
    """{key of the recipe: {"source": what it names, "files": {name: {"bytes", "blake3"}}}} of the parts that are pretrained."""
    keys = ("init_from",) if model.init_from else ("vision", "text")
    sources = {f"model.{key}": getattr(model, key) for key in keys}
    return {
        key: {
            "source": source,
            "files": {path.name: _identity(path) for path in sorted(_folder(source).glob("*.safetensors"))},
        }
        for key, source in sources.items()
        if isinstance(source, str)
    }


def _folder(source):
    """Where the files of a folder or hub id lie, which have been loaded."""
    if Path(source).exists():
        return Path(source)
    cached = try_to_load_from_cache(source, "config.json")
    return Path(cached).parent if isinstance(cached, str) else Path(source)


def _identity(path):
    digest = blake3.blake3(max_threads=blake3.blake3.AUTO).update_mmap(path.resolve())
    return {"bytes": path.stat().st_size, "blake3": digest.hexdigest()}
