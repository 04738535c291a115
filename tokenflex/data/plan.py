"""The plan: which samples, at which visual-token counts, make which pack of which step. A pure function, no communication.

Every rank computes the same plan from (index, seed, epoch, position). Samples are shuffled by a keyed permutation, each
draws its count, samples of one count are packed together, and packs of one count stand in rows of `lockstep_packs`, so
that ranks meet equal shapes in every micro-step. Text-only samples fill the gaps of any pack. No sample is lost or doubled:
what fills no whole row is put into rows of mixed counts, and a last incomplete step is filled up with empty packs.
"""

import bisect
from dataclasses import dataclass

import numpy as np

from ..budget import keyed_uniform
from ..errors import UserError

LOSS_WEIGHTS = {
    "token": lambda num_learned: np.ones_like(num_learned, dtype=np.float64),
    "sample": lambda num_learned: 1.0 / np.maximum(num_learned, 1),
    "sqrt": lambda num_learned: 1.0 / np.sqrt(np.maximum(num_learned, 1)),
}
"""Weight of each learned token of a sample with n of them (the authors' release has `sqrt`)."""


@dataclass(frozen=True)
class Position:
    """Where in the data a run is: the next step to run is `step` of `epoch`."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Pack:
    """Samples of one pack and the visual-token count of each: both [samples] int64. May be empty."""

    sample_ids: np.ndarray
    counts: np.ndarray


EMPTY = Pack(np.empty(0, np.int64), np.empty(0, np.int64))
"""Fills up a last row or step; its rank runs one token that teaches nothing."""


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: `packs_per_step` packs, and the weight of all its learned tokens together."""

    position: Position
    packs: tuple
    total_weight: float


class Planner:
    """Plans epochs of an index.

    Args:
        index: lengths of all samples (`tokenflex.data.index.Index`).
        budget: the distribution of visual-token counts.
        data: the configuration's data section (pack sizes).
        seed: seed of order and draws.
        loss_weighting: a key of `LOSS_WEIGHTS`.

    Raises:
        UserError: samples longer than a pack under `over_long: error`, or too few samples for one step.
    """

    def __init__(self, index, budget, data, seed, loss_weighting):
        self.budget = budget
        self.data = data
        self.seed = seed
        self.text = np.asarray(index.text_tokens, dtype=np.int64)
        self.images = np.asarray(index.num_tiles, dtype=np.int64)
        learned = np.asarray(index.learned_tokens, dtype=np.int64)
        self.sample_weight = learned * LOSS_WEIGHTS[loss_weighting](learned)
        self.usable = np.flatnonzero(self._fits(index) & (learned > 0))
        self.num_without_answer = int((learned == 0).sum())
        if not len(self.usable):
            raise UserError("data.train: no sample is usable; each needs an assistant answer and must fit a pack")
        self._epoch, self._steps = None, []

    def _fits(self, index):
        longest = self.text + self.images * max(self.budget.counts)
        too_long = (longest > self.data.pack_length) | (self.images > self.data.max_images_per_pack)
        self.num_over_long = int(too_long.sum())
        if self.num_over_long and self.data.over_long == "error":
            first = int(np.flatnonzero(too_long)[0])
            raise UserError(
                f"{index.shard_of(first)}: sample {first} has up to {longest[first]} tokens and {self.images[first]} images, a pack holds "
                f"{self.data.pack_length} and {self.data.max_images_per_pack} ({self.num_over_long} such samples); raise data.pack_length "
                "or data.max_images_per_pack, or set data.over_long=drop"
            )
        return ~too_long

    def steps_from(self, position):
        """Yield `StepPlan`s without end, the first at `position`."""
        while True:
            steps = self.epoch(position.epoch)
            for step in range(position.step, len(steps)):
                packs = steps[step]
                ids = np.concatenate([pack.sample_ids for pack in packs])
                yield StepPlan(Position(position.epoch, step), packs, float(self.sample_weight[ids].sum()))
            position = Position(position.epoch + 1, 0)

    def epoch(self, epoch):
        """All steps of one epoch, each a tuple of `packs_per_step` packs."""
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self._plan_epoch(epoch)
        return self._steps

    def _plan_epoch(self, epoch):
        window = self.data.shuffle_window or len(self.usable)
        rows = []
        for begin in range(0, len(self.usable), window):
            rows += self._plan_window(epoch, begin, self.usable[begin : begin + window])
        per_step = self.data.packs_per_step // self.data.lockstep_packs
        num_steps = -(-len(rows) // per_step)
        rows += [[EMPTY] * self.data.lockstep_packs] * (num_steps * per_step - len(rows))
        return [
            tuple(pack for row in rows[s * per_step : (s + 1) * per_step] for pack in row) for s in range(num_steps)
        ]

    def _plan_window(self, epoch, begin, ids):
        """Rows of packs of the samples `ids`, of which `begin` samples of the epoch come before."""
        order = ids[np.argsort(keyed_uniform(self.seed, 2 * epoch, ids), kind="stable")]
        samples_seen = epoch * len(self.usable) + begin + np.arange(len(order))
        counts = self.budget.draw(self.seed, 2 * epoch + 1, order, samples_seen)
        counts[self.images[order] == 0] = 0
        lengths = self.text[order] + self.images[order] * counts
        rows = self._rows(self._pack(order, counts, lengths))
        shuffle = np.argsort(keyed_uniform(self.seed, 2 * epoch, np.arange(len(rows)) + begin + 2**62), kind="stable")
        return [rows[i] for i in shuffle]

    def _pack(self, order, counts, lengths):
        """First fit per count, then text-only samples into the gaps: a list of (count, places in `order`)."""
        bins = []
        for count in self.budget.counts:
            bins += _first_fit(count, np.flatnonzero(counts == count), lengths, self.images[order], self.data)
        return _fill_gaps(bins, np.flatnonzero(counts == 0), lengths, self.data.pack_length, order, counts)

    def _rows(self, bins):
        """Packs in rows of `lockstep_packs` of one count; leftovers in mixed rows at the end."""
        size = self.data.lockstep_packs
        by_count = {}
        for count, pack in bins:
            by_count.setdefault(count, []).append(pack)
        rows, leftovers = [], by_count.pop(0, [])  # packs of text alone fit any row
        for count in sorted(by_count):
            packs = by_count[count]
            whole = len(packs) // size * size
            rows += [packs[i : i + size] for i in range(0, whole, size)]
            leftovers += packs[whole:]
        leftovers += [EMPTY] * (-len(leftovers) % size)
        return rows + [leftovers[i : i + size] for i in range(0, len(leftovers), size)]


OPEN_BINS = 32
"""Bins that first fit keeps open; older ones are closed, so the work per sample is bounded."""


def _first_fit(count, places, lengths, images, data):
    open_bins, closed = [], []
    for place in places:
        length, num_images = int(lengths[place]), int(images[place])
        for entry in open_bins:
            if entry[0] + length <= data.pack_length and entry[1] + num_images <= data.max_images_per_pack:
                break
        else:
            entry = [0, 0, []]
            open_bins.append(entry)
            if len(open_bins) > OPEN_BINS:
                closed.append(open_bins.pop(0))
        entry[0] += length
        entry[1] += num_images
        entry[2].append(int(place))
    return [(count, used, places) for used, _, places in closed + open_bins]


def _fill_gaps(bins, text_places, lengths, pack_length, order, counts):
    """Best fit, longest first, of text-only samples into `bins` and new ones; then everything as `Pack`s."""
    gaps = sorted((pack_length - used, i) for i, (_, used, _) in enumerate(bins))
    bins = [(count, list(places)) for count, _, places in bins]
    for place in sorted(text_places, key=lambda p: -lengths[p]):
        length = int(lengths[place])
        at = bisect.bisect_left(gaps, (length, -1))
        if at == len(gaps):
            bins.append((0, []))
            gaps.append((pack_length, len(bins) - 1))
            at = len(gaps) - 1
        gap, i = gaps.pop(at)
        bins[i][1].append(int(place))
        bisect.insort(gaps, (gap - length, i))
    return [(count, Pack(order[places], counts[places])) for count, places in bins]
