"""Shards, index, plan, packs: everything between files on disk and the tensors of a micro-step."""

from .embedded import embedded_corpus, with_embedded_encoder
from .images import decode_image
from .index import Index, build_index, index_folder, load_index, load_or_build_index
from .loader import PackDataset, batch_loader
from .plan import Planner, Position
from .problems import BadSample, Limits, Tally
from .sample import Sample, parse_sample
from .scan import scan_shard
from .shards import find_shards, walk_shard

__all__ = [
    "BadSample",
    "Limits",
    "Tally",
    "scan_shard",
    "Index",
    "PackDataset",
    "Planner",
    "Position",
    "Sample",
    "batch_loader",
    "build_index",
    "decode_image",
    "embedded_corpus",
    "find_shards",
    "index_folder",
    "load_index",
    "load_or_build_index",
    "parse_sample",
    "walk_shard",
    "with_embedded_encoder",
]
