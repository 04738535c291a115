"""The order of an epoch in O(1) memory: any stretch of positions -> samples, without a permutation being stored.

Shards are permuted, laid out in blocks of `block_shards`, and samples are shuffled inside each block by a keyed
permutation, so that a reader has a few shards open at a time and still draws from many. With a `window` the samples keep
the order of the shards and are shuffled inside windows only (for corpora that go from easy to hard). Several sources are
interleaved by their shares of the epoch, evenly, and each source goes on in the next epoch where it stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..budget import keyed_uniform, mix64

ROUNDS = 4
MIXTURE_BLOCK = 1024
"""Positions over which sources hold their shares exactly."""


def permute(places: np.ndarray, size: int, key: int) -> np.ndarray:
    """A keyed permutation of range(size), place by place: [N] int64 -> [N] int64, no table.

    A Feistel network over the next power of two, walked until it lands inside (fewer than two walks on average).
    """
    if size <= 1:
        return np.zeros_like(places)
    bits = max(2, int(size - 1).bit_length())
    out = np.asarray(places).astype(np.uint64)
    outside: slice | np.ndarray = slice(None)
    while True:
        walked = _feistel(out[outside], bits, key)
        out[outside] = walked
        wrong = walked >= np.uint64(size)
        if not wrong.any():
            return out.astype(np.int64)
        outside = np.flatnonzero(wrong) if isinstance(outside, slice) else outside[wrong]


def _feistel(x: np.ndarray, bits: int, key: int) -> np.ndarray:
    high_bits, low_bits = bits - bits // 2, bits // 2
    for number in range(ROUNDS):
        high, low = x >> np.uint64(low_bits), x & np.uint64((1 << low_bits) - 1)
        with np.errstate(over="ignore"):
            mixed = mix64(low + np.uint64(key) + np.uint64(number << 56))
        x = (low << np.uint64(high_bits)) | (high ^ (mixed >> np.uint64(64 - high_bits)))
        high_bits, low_bits = low_bits, high_bits
    return x


def _key(*parts: int) -> int:
    """One 64-bit key of several whole numbers."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = mix64(key ^ np.uint64(part))
    return int(key[0])


@dataclass
class SourceOrder:
    """Order of one source: `ids(places, pass_number)`.

    shard_sizes [shards]: samples per shard. block_shards: shards that are shuffled together. window: samples shuffled
    together in the order of the shards; 0 permutes the shards and shuffles blocks of them.
    """

    shard_sizes: np.ndarray
    seed: int
    block_shards: int
    window: int

    def __post_init__(self) -> None:
        self.size = int(np.sum(self.shard_sizes))
        self._first = np.cumsum(self.shard_sizes) - self.shard_sizes
        self._pass = None

    def ids(self, places: np.ndarray, pass_number: int) -> np.ndarray:
        """Samples at `places` [N] of pass `pass_number` over the source: [N] int64."""
        blocks, starts = self._blocks(places, pass_number)
        ids = np.empty(len(places), np.int64)
        for block in np.unique(blocks):
            at = np.flatnonzero(blocks == block)
            begin, end = starts(block)
            ids[at] = begin + permute(places[at] - begin, end - begin, _key(self.seed, pass_number, block))
        return ids if self.window else self._through_shards(ids)

    def _blocks(self, places, pass_number):
        if self.window:
            return places // self.window, lambda b: (int(b) * self.window, min(self.size, (int(b) + 1) * self.window))
        if self._pass != pass_number:
            self._shards = np.argsort(
                keyed_uniform(self.seed, pass_number, np.arange(len(self.shard_sizes))), kind="stable"
            )
            self._starts = np.append(0, np.cumsum(np.asarray(self.shard_sizes)[self._shards]))
            self._bounds = np.append(self._starts[:-1][:: self.block_shards], self.size)
            self._pass = pass_number
        blocks = np.searchsorted(self._bounds, places, side="right") - 1
        return blocks, lambda b: (int(self._bounds[b]), int(self._bounds[b + 1]))

    def _through_shards(self, places: np.ndarray) -> np.ndarray:
        """Places in the permuted row of shards -> sample ids."""
        shard = np.searchsorted(self._starts, places, side="right") - 1
        return self._first[self._shards[shard]] + places - self._starts[shard]


class MixtureOrder:
    """Order of an epoch over several sources.

    Args:
        sources: one `SourceOrder` each.
        per_epoch: samples of each source per epoch; a source of another size goes on in the next epoch.
        seed: of the interleaving.
    """

    def __init__(self, sources: Sequence[SourceOrder], per_epoch: Sequence[int], seed: int):
        self.sources = sources
        self.per_epoch = [int(number) for number in per_epoch]
        self.seed = seed
        self.size = sum(self.per_epoch)
        self._num_blocks = max(1, self.size // MIXTURE_BLOCK)
        self._base = np.cumsum([0, *(source.size for source in sources)])

    def read(self, epoch: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions [begin, end) of an epoch -> (sample ids, pass over the source that each belongs to), both [N] int64."""
        if len(self.sources) == 1:
            return self._of_source(0, epoch, np.arange(begin, end))
        ids, passes = np.empty(end - begin, np.int64), np.empty(end - begin, np.int64)
        block = begin * self._num_blocks // max(self.size, 1)
        while self._start(block) > begin:
            block -= 1
        while self._start(block) < end:
            at, own, passes_of = self._read_block(epoch, block, begin, end)
            ids[at], passes[at] = own, passes_of
            block += 1
        return ids, passes

    def _start(self, block: int) -> int:
        return sum(number * block // self._num_blocks for number in self.per_epoch)

    def _read_block(self, epoch: int, block: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What of positions [begin, end) lies in a block: (places from `begin` on, sample ids, passes), all [N]."""
        first, last = self._start(block), self._start(block + 1)
        places = np.arange(max(first, begin), min(last, end))
        slots = permute(places - first, last - first, _key(self.seed, epoch, block, 1))
        ids, passes = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
        for number, share in enumerate(self.per_epoch):
            low, high = share * block // self._num_blocks, share * (block + 1) // self._num_blocks
            mine = np.flatnonzero((slots >= 0) & (slots < high - low))
            if len(mine):
                ids[mine], passes[mine] = self._of_source(number, epoch, low + slots[mine])
            slots = slots - (high - low)
        return places - begin, ids, passes

    def _of_source(self, number: int, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source = self.sources[number]
        consumed = epoch * self.per_epoch[number] + places
        passes, places = consumed // source.size, consumed % source.size
        ids = np.empty(len(places), np.int64)
        for pass_number in np.unique(passes):
            at = np.flatnonzero(passes == pass_number)
            ids[at] = source.ids(places[at], int(pass_number))
        return self._base[number] + ids, passes
