"""Shards, index and packed batches: everything between files on disk and the tensors of a micro-step."""

from .images import decode_image
from .index import Index, build_index, load_index, load_or_build_index
from .loader import PackDataset, batch_loader
from .problems import BadSample, Limits, Tally
from .sample import Sample, parse_sample
from .scan import scan_shard
from .shards import find_shards, walk_shard

__all__ = [
    "BadSample",
    "Index",
    "Limits",
    "PackDataset",
    "Sample",
    "Tally",
    "batch_loader",
    "build_index",
    "decode_image",
    "find_shards",
    "load_index",
    "load_or_build_index",
    "parse_sample",
    "scan_shard",
    "walk_shard",
]
