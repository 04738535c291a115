"""Shards, index, plan, packs: everything between files on disk and the tensors of a micro-step."""

from .embedded import embedded_corpus, with_embedded_encoder
from .index import Index, build_index, index_folder, load_index, load_or_build_index
from .loader import PackDataset, batch_loader
from .plan import Planner, Position
from .sample import Sample, decode_image, parse_sample
from .shards import find_shards, walk_shard

__all__ = [
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
