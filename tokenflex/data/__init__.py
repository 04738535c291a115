"""Shards, index, plan, packs: everything between files on disk and the tensors of a micro-step.

Names are looked up at first use: planning alone needs numpy and some 30 MB, and must not wait for torch.
"""

from importlib import import_module

_HOMES = {
    "embedded": ("embedded_corpus", "with_embedded_encoder"),
    "images": ("decode_image",),
    "index": ("Index", "build_index", "index_folder", "load_index", "load_or_build_index"),
    "loader": ("PackDataset", "batch_loader"),
    "plan": ("Planner", "Position"),
    "problems": ("BadSample", "Limits", "Tally"),
    "sample": ("Sample", "parse_sample"),
    "scan": ("scan_shard",),
    "shards": ("find_shards", "walk_shard"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
