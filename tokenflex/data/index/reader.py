"""An index opened: its columns, memory-mapped, and what the planner and the loader ask of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ...layout import MANIFEST
from ..processor import Processor
from ..shards import Shard, ShardLike, as_shards
from .freshness import fingerprint, stamp_of

COLUMNS = {
    "text_tokens": np.uint32,
    "learned_tokens": np.uint32,
    "num_images": np.uint16,
    "num_tiles": np.uint16,
    "offset": np.uint64,
    "num_bytes": np.uint32,
}
"""One number per sample."""
RAGGED = {
    "image_sizes": (np.uint32, 2),
    "cuts": (np.int64, 5),
}
"""Records of which a sample has none or several: see `Index`."""
INDEX_COMMAND = "python launch/index.py --config RECIPE"


@dataclass(frozen=True, kw_only=True)
class Index:
    """The samples of a list of shards, in the shards' order.

    text_tokens [S]: tokens without visual ones (image markers counted). learned_tokens [S]: those the loss looks at.
    num_images, num_tiles [S]: images, and the tiles that they are cut into. offset, num_bytes [S]: place in the shard.
    image_sizes [images, 2]: height and width in pixels, 0 where the header cannot be read. cuts [answers, 5]: where
    conversations with several answers may end: sample, messages, text tokens, learned tokens, tiles up to there; sorted.
    entries: what the manifest says of each shard. first_sample [shards + 1]: ids per shard.
    """

    shards: list[Shard]
    entries: list[dict[str, Any]]
    first_sample: np.ndarray
    text_tokens: np.ndarray
    learned_tokens: np.ndarray
    num_images: np.ndarray
    num_tiles: np.ndarray
    offset: np.ndarray
    num_bytes: np.ndarray
    image_sizes: np.ndarray
    cuts: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.text_tokens)

    @property
    def shard_sizes(self) -> np.ndarray:
        """Samples per shard: [shards] int64."""
        return np.diff(self.first_sample)

    def shard_of(self, sample_id: int) -> Shard:
        """The shard that holds a sample."""
        return self.shards[int(np.searchsorted(self.first_sample, sample_id, side="right")) - 1]

    def place(self, sample_id: int) -> tuple[Shard, int, int]:
        """(shard, offset, bytes) of a sample."""
        return self.shard_of(sample_id), int(self.offset[sample_id]), int(self.num_bytes[sample_id])

    def num_skipped(self) -> int:
        """How many bad samples the shards hold that the index leaves out."""
        return sum(len(entry["skipped"]) for entry in self.entries)

    def num_answered(self) -> int:
        """How many samples have something to learn."""
        return sum(entry["num_answered"] for entry in self.entries)

    def longest_text(self) -> np.ndarray:
        """Text tokens of the longest sample with each number of tiles, -1 where there is none: [tiles + 1] int64."""
        longest = np.full(max([1, *(len(entry["longest_text"]) for entry in self.entries)]), -1)
        for entry in self.entries:
            longest[: len(entry["longest_text"])] = np.maximum(
                longest[: len(entry["longest_text"])], entry["longest_text"]
            )
        return longest

    def cut(
        self, sample_id: int, visual_tokens: int, max_tokens: int, max_tiles: int, num_views: int = 1
    ) -> tuple[int, int, int, int] | None:
        """The last answer after which a conversation fits a pack, its text `num_views` times and `visual_tokens` per tile.

        Returns (messages, text tokens, learned tokens, tiles) up to there, or None where not even the first fits.
        """
        cuts = self._cuts_of(sample_id)
        tokens = num_views * cuts[:, 2] + cuts[:, 4] * visual_tokens
        fits = np.flatnonzero((tokens <= max_tokens) & (cuts[:, 4] <= max_tiles))
        if not len(fits):
            return None
        messages, text, learned, tiles = cuts[fits[-1], 1:].tolist()
        return messages, text, learned, tiles

    def text_of_cut(self, sample_id: int, num_messages: int) -> tuple[int, int]:
        """(text tokens, tiles) of a conversation that ends after `num_messages`."""
        cut = next(cut for cut in self._cuts_of(sample_id) if cut[1] == num_messages)
        return int(cut[2]), int(cut[4])

    def _cuts_of(self, sample_id: int) -> np.ndarray:
        begin, end = np.searchsorted(self._cut_samples, [sample_id, sample_id + 1])
        return np.asarray(self.cuts[begin:end])

    @cached_property
    def _cut_samples(self) -> np.ndarray:
        return self.cuts[:, 0]


def load_index(folder: str | PathLike, shards: Sequence[ShardLike], processor: Processor) -> Index:
    """Open an index, memory-mapped.

    Raises:
        UserError: its fingerprint is not this processor's; the message has both and the way to mend it.
    """
    check_fingerprint(folder, read_manifest(folder), processor)
    return open_index(folder, shards)


def open_index(folder: str | PathLike, shards: Sequence[ShardLike] | None = None) -> Index:
    """Open an index without its tokenizer, memory-mapped; `shards` are by default the names in the index.

    Raises:
        UserError: no index there.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        beside = [str(path.parent) for path in sorted(folder.parent.glob(f"{folder.name}-*/{MANIFEST}"))]
        others = f"; there is {', '.join(beside)}" if beside else ""
        raise UserError(f"{folder}: no index there (no {MANIFEST}){others}; build one with: {INDEX_COMMAND}")
    entries = manifest["shards"]
    named = as_shards(shards or [entry["name"] for entry in entries])
    columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in (*COLUMNS, *RAGGED)}
    return Index(
        shards=[shard.at(stamp_of(entry)) for shard, entry in zip(named, entries)],
        entries=entries,
        first_sample=np.cumsum([0, *(entry["num_samples"] for entry in entries)]),
        fingerprint=manifest["fingerprint"],
        **columns,
    )


def read_manifest(folder: str | PathLike) -> dict[str, Any] | None:
    """What an index says of itself; None where there is none."""
    path = Path(folder) / MANIFEST
    return json.loads(path.read_text()) if path.exists() else None


def check_fingerprint(folder: str | PathLike, manifest: dict[str, Any] | None, processor: Processor) -> None:
    """That the lengths of an index were counted as this processor counts.

    Raises:
        UserError: they were not; the message has both fingerprints.
    """
    wanted = fingerprint(processor)
    if manifest is not None and manifest["fingerprint"] != wanted:
        raise UserError(
            f"index {folder}: made with tokenizer, template and tiling {manifest['fingerprint']}, this run has {wanted}; "
            f"remove the folder or run: {INDEX_COMMAND} --rebuild, with this run's recipe"
        )
