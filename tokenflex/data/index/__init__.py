"""The sidecar index: per sample its lengths and its place, so that packs are planned without opening a shard.

An index is a folder of memory-mapped columns (`text_tokens.npy`, ...) and a `manifest.json` with the shards' names, sizes,
checksums and sample counts and a fingerprint of tokenizer, chat template and tiling: lengths counted by another tokenizer
are an error, not a surprise at step 10,000. The planner reads 12 bytes per sample, the loader 12 more.

`reader` opens one, `builder` makes one, `freshness` says what of one still holds, `places` where it lies, `together` builds
one with many processes.
"""

from .builder import ShardScanner, assemble_index, build_index, complete_index, load_or_build_index, shards_to_scan
from .freshness import file_sha256, fingerprint, tells_date, tiling_of
from .places import choose_indexes, find_indexes, index_folder, parts_folder, remove_index, sole_builder
from .reader import COLUMNS, RAGGED, Index, load_index, open_index
from .together import Alone, Communicator, communicator, index_together

__all__ = [
    "COLUMNS",
    "RAGGED",
    "Alone",
    "Communicator",
    "Index",
    "ShardScanner",
    "assemble_index",
    "build_index",
    "choose_indexes",
    "communicator",
    "complete_index",
    "file_sha256",
    "find_indexes",
    "fingerprint",
    "index_folder",
    "index_together",
    "load_index",
    "load_or_build_index",
    "open_index",
    "parts_folder",
    "remove_index",
    "shards_to_scan",
    "sole_builder",
    "tells_date",
    "tiling_of",
]
