"""The visual-token budget: which counts are trained, how often, and the keyed draw (paper section 3.2).

A count is a pure function of (seed, epoch, sample id): it is drawn when a pack is planned, never in `forward`. So every
length is known before an image is decoded, every rank agrees without talking, and a resumed run draws the same counts.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike


def keyed_uniform(seed: int, epoch: int, sample_ids: ArrayLike) -> np.ndarray:
    """Uniform numbers in [0, 1) that depend on (seed, epoch, sample id) alone: [S] int64 ids -> [S] float64.

    A counter-based generator (two rounds of the SplitMix64 finaliser), vectorised; no state is carried.
    """
    key = mix64(mix64(np.array([seed], dtype=np.uint64)) ^ np.uint64(epoch))
    bits = mix64(mix64(np.asarray(sample_ids).astype(np.uint64) ^ key) + key)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64: [N] uint64 -> [N] uint64, a bijection whose outputs look independent (Steele et al., 2014)."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class BudgetSettings(Protocol):
    """The budget section of a configuration; see `tokenflex.config.BudgetConfig`."""

    @property
    def num_visual_tokens(self) -> tuple[int, ...]:
        """The trained counts."""

    @property
    def probabilities(self) -> tuple[float, ...]:
        """One per count."""

    @property
    def schedule(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """Points (samples seen, probabilities)."""

    @property
    def per_sample(self) -> str:
        """`one`, `all` or `largest_and_one`."""

    @property
    def total(self) -> int:
        """Visual tokens of a sample at most; 0 for no limit."""


@dataclass(frozen=True, kw_only=True)
class VisualTokenBudget:
    """Distribution over visual-token counts, possibly changing with the number of samples seen.

    counts: the counts that are drawn. probabilities: one per count. schedule: points (samples seen, probabilities), linear
    in between and constant outside; empty keeps `probabilities`. others: counts at which every image is shown besides the
    drawn one, the largest first. total: visual tokens that all images of a sample have at most, 0 for no limit: a sample whose drawn
    count does not fit gets the largest that does.
    """

    counts: tuple[int, ...]
    probabilities: tuple[float, ...]
    schedule: tuple[tuple[int, tuple[float, ...]], ...] = ()
    others: tuple[int, ...] = ()
    total: int = 0

    @classmethod
    def of(cls, config: BudgetSettings) -> "VisualTokenBudget":
        """The distribution that a configuration's budget section states.

        With `per_sample=all` the smallest count is always "drawn" and the others come with it; with `largest_and_one` the
        draw is among those below the largest, by their probabilities.
        """
        counts, probabilities, schedule = config.num_visual_tokens, config.probabilities, config.schedule
        if config.per_sample == "one":
            return cls(counts=counts, probabilities=probabilities, schedule=schedule, total=config.total)
        if config.per_sample == "all":
            smallest, *others = sorted(counts)
            return cls(counts=(smallest,), probabilities=(1.0,), others=tuple(others[::-1]))
        largest = counts.index(max(counts))
        return cls(
            counts=_without(counts, largest),
            probabilities=_shares_without(probabilities, largest),
            schedule=tuple((at, _shares_without(shares, largest)) for at, shares in schedule),
            others=(counts[largest],),
        )

    @property
    def num_views(self) -> int:
        """How many times a sample with images is in its pack, each time at another count."""
        return 1 + len(self.others)

    def views(self, count: int) -> tuple[int, ...]:
        """The counts at which a sample that drew `count` is shown, the largest first; (0,) for one without images."""
        return (*self.others, count) if count else (0,)

    @property
    def most_tiles(self) -> float:
        """Tiles with which a sample fits the total at the smallest count."""
        return self.total // min(self.counts) if self.total else float("inf")

    def within_total(self, counts: np.ndarray, tiles: np.ndarray) -> np.ndarray:
        """Counts of samples, each lowered to the largest with which its tiles fit the total: [S], [S] -> [S].

        With more than `most_tiles` it is the smallest. The same rule for one prompt is `tokenflex.model.sharing.even_count`.
        """
        counts = np.asarray(counts)
        if not self.total:
            return counts
        ascending = np.array(sorted(self.counts))
        most = self.total // np.maximum(tiles, 1)
        fitting = ascending[np.maximum(np.searchsorted(ascending, most, side="right") - 1, 0)]
        return np.minimum(counts, fitting)

    def visual_tokens(self, counts: np.ndarray) -> np.ndarray:
        """Visual tokens per tile over all views of samples that drew `counts`: [S] -> [S]; 0 stays 0."""
        return np.where(counts > 0, counts + sum(self.others), 0)

    def tokens(self, text: np.ndarray, tiles: np.ndarray, visual_tokens: np.ndarray | float) -> np.ndarray:
        """Tokens of samples over all their views, `visual_tokens` per tile: [S]. Text without images is there once."""
        return np.where(tiles > 0, self.num_views * text, text) + tiles * visual_tokens

    def probabilities_at(self, samples_seen: ArrayLike) -> np.ndarray:
        """Probability of each count after `samples_seen` samples: [S] -> [S, counts]."""
        samples_seen = np.asarray(samples_seen, dtype=np.float64)
        if not self.schedule:
            return np.broadcast_to(np.asarray(self.probabilities), (*samples_seen.shape, len(self.counts)))
        places = [place for place, _ in self.schedule]
        columns = zip(*(probabilities for _, probabilities in self.schedule))
        return np.stack([np.interp(samples_seen, places, column) for column in columns], axis=-1)

    def draw(self, seed: int, epoch: int, sample_ids: ArrayLike, samples_seen: ArrayLike) -> np.ndarray:
        """Counts of samples by the inverse distribution function of their keyed uniform: [S] ids -> [S] int64.

        `samples_seen` [S] is each sample's place in the training order, which a schedule looks at.
        """
        cumulative = np.cumsum(self.probabilities_at(samples_seen), axis=-1)[..., :-1]
        uniform = keyed_uniform(seed, epoch, sample_ids)
        return np.asarray(self.counts, dtype=np.int64)[(uniform[:, None] >= cumulative).sum(-1)]


def _without(values: tuple, place: int) -> tuple:
    return values[:place] + values[place + 1 :]


def _shares_without(shares: tuple[float, ...], place: int) -> tuple[float, ...]:
    rest = _without(shares, place)
    return tuple(share / sum(rest) for share in rest)
