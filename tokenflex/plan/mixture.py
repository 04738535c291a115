"""What the planner reads: one or several sources of samples with their shares, and the order of an epoch over them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .order import MixtureOrder, SourceOrder


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of samples.

    index: columns `text_tokens`, `learned_tokens`, `num_tiles` [S], `shard_sizes` [shards], and `shard_of(sample)`; see
    `tokenflex.data.index.Index`. name: in messages. weight: its share of an epoch's samples relative to the others' weights;
    0 takes every source whole. epochs: passes over it per epoch at most, may be a fraction. over_long: error, drop, truncate.
    """

    index: Any
    name: str = "data.train"
    weight: float = 0.0
    epochs: float = 1.0
    over_long: str = "error"


class Mixture:
    """Sources as one range of sample ids.

    Without weights each source comes `epochs` times per epoch. With weights an epoch has the sources in that proportion and
    ends when the first has come `epochs` times; the others go on in the next epoch where they stopped.

    Raises:
        UserError: a source without samples, or weights for some sources only.
    """

    def __init__(self, sources):
        self.sources = list(sources)
        self.base = np.cumsum([0, *(len(source.index.text_tokens) for source in self.sources)])
        for source, size in zip(self.sources, np.diff(self.base)):
            if not size:
                raise UserError(f"{source.name}: holds no sample; wanted at least one: remove it or add shards")
        weights = [source.weight for source in self.sources]
        if any(weights) and not all(weights):
            without = next(source.name for source in self.sources if not source.weight)
            raise UserError(
                f"{without}: has no weight but other sources of data.train have; give all of them one, or none"
            )
        sizes = [size * source.epochs for source, size in zip(self.sources, np.diff(self.base))]
        if any(weights):
            length = min(size / weight for size, weight in zip(sizes, weights))
            sizes = [length * weight for weight in weights]
        self.per_epoch = [max(1, int(round(size))) for size in sizes]

    def __len__(self):
        return int(self.base[-1])

    def order(self, seed, block_shards, window):
        """The order of epochs: `MixtureOrder`."""
        orders = [
            SourceOrder(np.asarray(source.index.shard_sizes), seed + number, block_shards, window)
            for number, source in enumerate(self.sources)
        ]
        return MixtureOrder(orders, self.per_epoch, seed)

    def columns(self, ids):
        """(text tokens, learned tokens, tiles) of samples: each [S] int64."""
        if len(self.sources) == 1:
            return self._columns(self.sources[0], ids)
        columns = tuple(np.empty(len(ids), np.int64) for _ in range(3))
        for number, at in self.parts(ids):
            for whole, part in zip(columns, self._columns(self.sources[number], ids[at] - self.base[number])):
                whole[at] = part
        return columns

    @staticmethod
    def _columns(source, ids):
        index = source.index
        names = ("text_tokens", "learned_tokens", "num_tiles")
        return tuple(getattr(index, name)[ids].astype(np.int64) for name in names)

    def parts(self, ids):
        """Yield (source number, places in `ids` [N] of its samples)."""
        owner = np.searchsorted(self.base, ids, side="right") - 1
        for number in np.unique(owner):
            yield int(number), np.flatnonzero(owner == number)

    def locate(self, sample_id):
        """(source, its own number for the sample)."""
        number = int(np.searchsorted(self.base, sample_id, side="right")) - 1
        return self.sources[number], int(sample_id - self.base[number])

    def shard_of(self, sample_id):
        """Path of the shard that holds a sample."""
        source, own = self.locate(sample_id)
        return source.index.shard_of(own)
