"""What the planner reads: one or several sources of samples with their shares, and the order of an epoch over them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import UserError
from .order import MixtureOrder, SourceOrder


class Lengths(Protocol):
    """What planning reads of samples: an index (`tokenflex.data.index.Index`), or a table without any shard (`LengthTable`)."""

    @property
    def text_tokens(self) -> np.ndarray:
        """[S] tokens without visual ones."""

    @property
    def learned_tokens(self) -> np.ndarray:
        """[S] tokens that the loss looks at."""

    @property
    def num_tiles(self) -> np.ndarray:
        """[S] tiles of all images."""

    @property
    def shard_sizes(self) -> np.ndarray:
        """[shards] samples of each."""

    def shard_of(self, sample_id: int) -> object:
        """Where a sample comes from; its text names it in messages."""

    def num_answered(self) -> int:
        """How many samples have something to learn."""

    def longest_text(self) -> np.ndarray:
        """[tiles + 1] text tokens of the longest sample with each number of tiles, -1 where there is none."""

    def cut(
        self, sample_id: int, visual_tokens: int, max_tokens: int, max_tiles: int, num_views: int = 1
    ) -> tuple[int, int, int, int] | None:
        """(messages, text tokens, learned tokens, tiles) up to the last answer that fits a pack; None where none does.

        The text is there `num_views` times; `visual_tokens` per tile are those of all views.
        """


def draw_key(pass_number: int) -> int:
    """Under which key samples draw their counts in a pass over their source, so that one that comes again draws anew."""
    return 2 * pass_number + 1


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of samples.

    index: its samples' lengths. name: in messages. weight: its share of an epoch's samples relative to the others' weights;
    0 takes every source whole. epochs: passes over it per epoch at most, may be a fraction. over_long: error, drop, truncate.
    """

    index: Lengths
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

    def __init__(self, sources: Sequence[Source]):
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

    def __len__(self) -> int:
        return int(self.base[-1])

    def order(self, seed: int, block_shards: int, window: int) -> MixtureOrder:
        """The order of epochs: `MixtureOrder`."""
        orders = [
            SourceOrder(np.asarray(source.index.shard_sizes), seed + number, block_shards, window)
            for number, source in enumerate(self.sources)
        ]
        return MixtureOrder(orders, self.per_epoch, seed)

    def columns(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(text tokens, learned tokens, tiles) of samples: each [S] int64."""
        if len(self.sources) == 1:
            return self._columns(self.sources[0], ids)
        columns = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
        for number, at in self.parts(ids):
            for whole, part in zip(columns, self._columns(self.sources[number], ids[at] - self.base[number])):
                whole[at] = part
        return columns

    @staticmethod
    def _columns(source: Source, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        text, learned, tiles = source.index.text_tokens, source.index.learned_tokens, source.index.num_tiles
        return text[ids].astype(np.int64), learned[ids].astype(np.int64), tiles[ids].astype(np.int64)

    def parts(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (source number, places in `ids` [N] of its samples)."""
        owner = np.searchsorted(self.base, ids, side="right") - 1
        for number in np.unique(owner):
            yield int(number), np.flatnonzero(owner == number)

    def locate(self, sample_id: int) -> tuple[Source, int]:
        """(source, its own number for the sample)."""
        number = int(np.searchsorted(self.base, sample_id, side="right")) - 1
        return self.sources[number], int(sample_id - self.base[number])

    def shard_of(self, sample_id: int) -> object:
        """The shard that holds a sample."""
        source, own = self.locate(sample_id)
        return source.index.shard_of(own)
