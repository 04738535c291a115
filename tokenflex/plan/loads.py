"""What packs hold, kept in step with the exchanges that level them, and the samples of a pack that an exchange tries."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CANDIDATES = 12
"""Samples per pack that are tried in an exchange; 12 x 12 pairs land within a few tokens of any difference."""
MORE_CANDIDATES = 40
"""Where a pack that holds too much is repaired, or an outlier trimmed."""


class Capacity(NamedTuple):
    """What a pack may hold."""

    tokens: int
    tiles: int


@dataclass
class Loads:
    """Samples in packs and what each pack holds, kept in step through exchanges.

    pack [S]: of each sample. tokens_S, tiles_S [S + 1]: of each sample, and 0 at the last place, which stands for none.
    tokens, tiles [packs]: what each pack holds.
    """

    pack: np.ndarray
    tokens_S: np.ndarray
    tiles_S: np.ndarray
    tokens: np.ndarray
    tiles: np.ndarray

    @classmethod
    def of(
        cls, pack: np.ndarray, tokens: np.ndarray, tiles: np.ndarray, num_packs: int, dtype: type = np.int64
    ) -> "Loads":
        """The loads of samples [S] in packs; `pack` itself is changed by exchanges. int32 is twice as fast."""

        def per_pack(sizes: np.ndarray) -> np.ndarray:
            return np.bincount(pack, weights=sizes, minlength=num_packs).astype(dtype)

        def with_none(sizes: np.ndarray) -> np.ndarray:
            return np.append(sizes, 0).astype(dtype)

        return cls(pack, with_none(tokens), with_none(tiles), per_pack(tokens), per_pack(tiles))

    def exchange(self, ours: np.ndarray, here: np.ndarray, theirs: np.ndarray, there: np.ndarray) -> None:
        """Samples `ours` of packs `here` for samples `theirs` of packs `there`: all [N], -1 is no sample.

        No pack comes twice.
        """
        for sizes, loads in ((self.tokens_S, self.tokens), (self.tiles_S, self.tiles)):
            change = sizes[theirs] - sizes[ours]
            loads[here] += change
            loads[there] -= change
        self.pack[ours[ours >= 0]] = there[ours >= 0]
        self.pack[theirs[theirs >= 0]] = here[theirs >= 0]

    def move(self, sample: int, pack: int) -> None:
        """Put a sample that is in no pack into one, or with -1 take it out of the one that it is in."""
        number, sign = (pack, 1) if pack >= 0 else (self.pack[sample], -1)
        self.tokens[number] += sign * self.tokens_S[sample]
        self.tiles[number] += sign * self.tiles_S[sample]
        self.pack[sample] = pack

    def is_over(self, capacity: Capacity) -> np.ndarray:
        """Which packs hold too much: [packs] bool."""
        return (self.tokens > capacity.tokens) | (self.tiles > capacity.tiles)


def slots_of(pack: np.ndarray, num_packs: int, width: int = CANDIDATES) -> np.ndarray:
    """Up to `width` samples of each pack, spread over its samples, and one free place: [packs, width + 1]."""
    order = np.argsort(pack, kind="stable")
    number = np.bincount(pack, minlength=num_packs)
    step = np.maximum(number, width)[:, None] * np.arange(width) // width
    places = np.minimum((np.cumsum(number) - number)[:, None] + step, len(order) - 1)
    chosen = np.where(step < number[:, None], order[places], -1)
    return np.concatenate([chosen, np.full((num_packs, 1), -1)], axis=1)


def members_of(pack: np.ndarray, chosen: np.ndarray, num_packs: int) -> np.ndarray:
    """Samples of the chosen packs, up to `MORE_CANDIDATES` spread over each, and one free place: [chosen, width + 1]."""
    row = np.full(num_packs, -1)
    row[chosen] = np.arange(len(chosen))
    places = np.flatnonzero(row[pack] >= 0)
    slots = slots_of(
        row[pack[places]], len(chosen), min(MORE_CANDIDATES, int(np.bincount(pack[places]).max(initial=1)))
    )
    return np.where(slots >= 0, places[slots], -1)
