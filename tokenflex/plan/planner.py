"""The planner: a pure function from (index, seed, epoch, position) to the packs of a step, the same on every rank.

It reads the epoch's order stretch by stretch, draws each sample's count, and turns what waits into rows of packs (`window`).
What it has to remember between two windows is a few positions, so a run's place in its data is well under 1 KB and the
next plan after a resume costs one window, however large the corpus is.
"""

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from ..errors import UserError
from .mixture import Mixture, Source
from .window import PackLimits, Samples, State, plan_window

LOSS_WEIGHTS = {
    "token": lambda num_learned: np.ones_like(num_learned, dtype=np.float64),
    "sample": lambda num_learned: 1.0 / np.maximum(num_learned, 1),
    "sqrt": lambda num_learned: 1.0 / np.sqrt(np.maximum(num_learned, 1)),
}
"""Weight of each learned token of a sample with n of them (the authors' release has `sqrt`)."""

PLANNER_VERSION = 2
"""Raised with every change that gives some sample another pack or place: a run goes on under the version it began with."""
MIN_WINDOW_PACKS = 512
"""Fewer packs than this in a window leave too little choice for equal packs, and cost more time per sample."""


@dataclass(frozen=True)
class Position:
    """Where in the data a run is: the next step to run is `step` of `epoch`.

    The rest says where the window begins that this step begins in (`State`; empty at the start of an epoch) and how many of
    the window's rows are done.
    """

    epoch: int = 0
    step: int = 0
    frontier: int = 0
    cursors: tuple = ()
    waited: tuple = ()
    fills: tuple = ()
    left_over: tuple = ()
    row: int = 0

    def __post_init__(self):
        for name in ("cursors", "waited", "fills", "left_over"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def as_dict(self):
        """Plain JSON values, from which `Position(**values)` makes the position again."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Pack:
    """Samples of one pack and the visual-token count of each: both [samples] int64. May be empty.

    num_messages [samples]: how many messages of each conversation are used; 0 is all.
    """

    sample_ids: np.ndarray
    counts: np.ndarray
    num_messages: np.ndarray


EMPTY = Pack(*[np.empty(0, np.int64)] * 3)
"""Fills up a last row or step; its rank runs one token that teaches nothing."""


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: `packs_per_step` packs, the weight of all its learned tokens together, and where the next begins."""

    position: Position
    packs: tuple
    total_weight: float
    next_position: Position

    def digest(self):
        """16 hex digits that ranks compare to find out that they plan the same."""
        digest = hashlib.sha256()
        for pack in self.packs:
            digest.update(
                np.concatenate([[len(pack.sample_ids)], pack.sample_ids, pack.counts]).astype("<i8").tobytes()
            )
        return digest.hexdigest()[:16]


@dataclass
class LeftOut:
    """Samples that no pack gets, or not whole: how many for which reason, and the first of their ids."""

    numbers: Counter = field(default_factory=Counter)
    ids: dict = field(default_factory=dict)
    MAX_LISTED = 1000

    def add(self, reason, ids):
        if len(ids):
            self.numbers[reason] += len(ids)
            listed = self.ids.setdefault(reason, [])
            listed += [int(i) for i in ids[: self.MAX_LISTED - len(listed)]]


class Planner:
    """Plans epochs of an index or a `Mixture`.

    Args:
        index: lengths of all samples (`tokenflex.data.index.Index`), or a `Mixture` of several.
        budget: the distribution of visual-token counts.
        data: the configuration's data section (pack sizes).
        seed: seed of order and draws.
        loss_weighting: a key of `LOSS_WEIGHTS`.

    Raises:
        UserError: a plan that cannot be: packs below one image, samples longer than a pack under `over_long: error`, or
            fewer samples than packs in a step.
    """

    def __init__(self, index, budget, data, seed, loss_weighting):
        self.mixture = index if isinstance(index, Mixture) else Mixture([Source(index=index, over_long=data.over_long)])
        self.budget = budget
        self.data = data
        self.seed = seed
        self.weight_of = LOSS_WEIGHTS[loss_weighting]
        self.limits = PackLimits(
            max_tokens=data.pack_length,
            max_tiles=data.max_images_per_pack,
            row_packs=data.lockstep_packs,
            num_queues=(len(budget.counts) if data.mixing == "lockstep" else 1) + 1,
            token_cost=data.cost.per_token,
            pair_cost=data.cost.per_token_pair,
        )
        self.order = self.mixture.order(seed, data.shuffle_shards, data.shuffle_window)
        self.left_out = LeftOut()
        """What the epochs planned so far have left out."""
        self.window_packs = max(data.window_rows * data.lockstep_packs, MIN_WINDOW_PACKS)
        self.block = 1 << (self.window_packs.bit_length() - 1)
        self._check()

    @property
    def epoch_size(self):
        """Samples per epoch, those that are left out counted."""
        return self.order.size

    def _check(self):
        """Refuse plans that cannot be before the first step."""
        largest, data = max(self.budget.counts), self.data
        if largest >= data.pack_length:
            raise UserError(
                f"data.pack_length={data.pack_length}: a pack holds no image of {largest} visual tokens and its text; "
                f"raise it above {largest} or take smaller counts (budget.num_visual_tokens)"
            )
        if self.epoch_size < data.packs_per_step:
            raise UserError(
                f"data.train: {self.epoch_size} samples per epoch cannot fill the {data.packs_per_step} packs of a step; add samples, "
                "raise the source's epochs, or lower data.packs_per_step"
            )
        num_usable = 0
        for source in self.mixture.sources:
            num_usable += self._check_source(source, largest)
        if not num_usable:
            raise UserError("data.train: no sample is usable; each needs an assistant answer and must fit a pack")

    def _check_source(self, source, largest):
        """How many samples of a source have an answer and may fit; refuses over-long ones under `error`."""
        longest_text, num_usable = source.index.longest_text(), source.index.num_answered()
        tiles = np.arange(len(longest_text))
        too_long = (longest_text >= 0) & (
            (longest_text + tiles * largest > self.data.pack_length) | (tiles > self.data.max_images_per_pack)
        )
        if not too_long.any() or source.over_long != "error":
            return num_usable
        sample, number = self._first_too_long(source.index, largest)
        tokens = int(source.index.text_tokens[sample]) + int(source.index.num_tiles[sample]) * largest
        raise UserError(
            f"{source.index.shard_of(sample)}: sample {sample} has up to {tokens} tokens and {source.index.num_tiles[sample]} images, a pack "
            f"holds {self.data.pack_length} and {self.data.max_images_per_pack} ({number} such samples); raise data.pack_length or "
            "data.max_images_per_pack, or set data.over_long=drop"
        )

    def _first_too_long(self, index, largest):
        first, number = -1, 0
        for begin in range(0, len(index.text_tokens), 2**20):
            text = index.text_tokens[begin : begin + 2**20].astype(np.int64)
            tiles = index.num_tiles[begin : begin + 2**20].astype(np.int64)
            wrong = np.flatnonzero(
                (text + tiles * largest > self.data.pack_length) | (tiles > self.data.max_images_per_pack)
            )
            if len(wrong) and first < 0:
                first = begin + int(wrong[0])
            number += len(wrong)
        return first, number

    def steps_from(self, position):
        """Yield `StepPlan`s without end, the first at `position`."""
        epoch = position.epoch
        while True:
            yield from self.epoch_steps(epoch, position)
            epoch, position = epoch + 1, None

    def epoch_steps(self, epoch, position=None):
        """Yield the steps of an epoch from `position` on (default: its start). The last is filled up with empty packs.

        Raises:
            UserError: no sample of the epoch is usable.
        """
        rows_per_step = self.data.packs_per_step // self.data.lockstep_packs
        start = position or Position(epoch)
        rows = self._rows(epoch, start)
        packs, weight, here, number = [], 0.0, start, start.step
        for row_packs, row_weight, after in rows:
            packs += row_packs
            weight += row_weight
            if len(packs) == rows_per_step * self.data.lockstep_packs:
                if after.epoch == epoch:
                    after = replace(after, step=number + 1)
                yield self._step(here, packs, weight, after)
                packs, weight, here, number = [], 0.0, after, number + 1
        if packs:
            packs += [EMPTY] * (self.data.packs_per_step - len(packs))
            yield self._step(here, packs, weight, Position(epoch + 1))
        elif number == 0:
            raise UserError("data.train: no sample is usable; each needs an assistant answer and must fit a pack")

    def _step(self, here, packs, weight, after):
        return StepPlan(here, tuple(packs), weight, after)

    def _rows(self, epoch, position):
        """Yield (packs of a row, their weight, position after it)."""
        skip = position.row
        for state, window, after in self.windows(epoch, self.state_at(position), self.left_out):
            bounds = np.searchsorted(window.pack, np.arange(window.num_packs + 1))
            samples, size = window.samples, window.row_packs
            weights = samples.learned * self.weight_of(samples.learned)
            for row in range(skip, len(window.row_queue)):
                packs = [
                    Pack(samples.id[low:high], samples.count[low:high], samples.turns[low:high])
                    for low, high in zip(bounds[row * size :], bounds[row * size + 1 : (row + 1) * size + 1])
                ]
                weight = float(weights[bounds[row * size] : bounds[(row + 1) * size]].sum())
                is_last = row + 1 == len(window.row_queue)
                if is_last and after.is_done(self.epoch_size):
                    yield packs, weight, Position(epoch + 1)
                    return
                at, done = (after, 0) if is_last else (state, row + 1)
                yield (
                    packs,
                    weight,
                    Position(epoch, 0, at.frontier, at.cursors, at.waited, at.fills, at.left_over, done),
                )
            skip = 0

    def state_at(self, position):
        """The state of the window that a position is in."""
        if not position.cursors:
            return State.start(self.limits.num_queues)
        return State(position.frontier, position.cursors, position.waited, position.fills, position.left_over)

    def windows(self, epoch, state=None, left_out=None):
        """Yield (state before it, `Window`, state after it) from a state on to the end of the epoch.

        `left_out` (`LeftOut`), if given, gets what is read on the way and left out.
        """
        state = state or State.start(self.limits.num_queues)
        waiting = self._read_again(epoch, state)
        while state.frontier < self.epoch_size or len(waiting):
            before, frontier = state, state.frontier
            parts, tokens = [waiting], int(waiting.tokens.sum())
            window = None
            wanted = self.window_packs * self.limits.max_tokens
            while window is None or (not len(window.row_queue) and frontier < self.epoch_size):
                while tokens < wanted and frontier < self.epoch_size:
                    end = min(frontier + self.block, self.epoch_size)
                    parts.append(self.read(epoch, frontier, end, left_out))
                    tokens += int(parts[-1].tokens.sum())
                    frontier = end
                waiting = Samples.join(parts)
                reached = replace(state, frontier=frontier)
                window, after = plan_window(
                    waiting, reached, self.limits, frontier == self.epoch_size, self.seed + 31 * epoch
                )
                parts, wanted = [waiting], tokens + wanted  # no whole row yet: look further
            state = after
            waiting = waiting.take(state.still_waiting(waiting))
            if len(window.row_queue):
                yield before, window, state

    def _read_again(self, epoch, state):
        """The samples that wait at a state: those before its frontier that are not planned."""
        begin = min([state.frontier, *state.cursors, *state.left_over])
        parts = [
            self.read(epoch, at, min(at + self.block, state.frontier))
            for at in range(begin, state.frontier, self.block)
        ]
        parts = [part.take(state.still_waiting(part)) for part in parts]
        return Samples.join([self.read(epoch, 0, 0), *parts])

    def read(self, epoch, begin, end, left_out=None):
        """Usable samples at positions [begin, end) of an epoch, with their counts drawn: `Samples`."""
        position = np.arange(begin, end)
        ids, turns = self.order.read(epoch, begin, end)
        text, learned, tiles = self.mixture.columns(ids)
        count = np.empty(len(ids), np.int64)
        for turn in np.unique(turns):
            at = np.flatnonzero(turns == turn)
            seen = epoch * self.epoch_size + position[at]
            count[at] = self.budget.draw(self.seed, 2 * int(turn) + 1, ids[at], seen)
        count[tiles == 0] = 0
        num_messages = np.zeros(len(ids), np.int64)
        too_long = (text + tiles * count > self.limits.max_tokens) | (tiles > self.limits.max_tiles)
        if too_long.any():
            self._cut(ids, np.flatnonzero(too_long), count, text, learned, tiles, num_messages)
            too_long = (text + tiles * count > self.limits.max_tokens) | (tiles > self.limits.max_tiles)
            count[tiles == 0] = 0
        if left_out is not None:
            left_out.add("without an answer", ids[(learned == 0) & ~too_long])
            left_out.add("longer than a pack", ids[too_long])
            left_out.add("truncated at a turn", ids[num_messages > 0])
        usable = np.flatnonzero((learned > 0) & ~too_long)
        queue = np.full(len(ids), self.limits.text)
        has_image = tiles > 0
        if self.data.mixing == "lockstep":
            for number, value in enumerate(self.budget.counts):
                queue[has_image & (count == value)] = number
        else:
            queue[has_image] = 0
        samples = Samples(position, ids, queue, count, text + tiles * count, tiles, learned, num_messages)
        return samples.take(usable)

    def _cut(self, ids, places, count, text, learned, tiles, num_messages):
        """Samples of sources that truncate: end the conversation after the last answer that fits, in place."""
        for number, at in self.mixture.parts(ids[places]):
            source = self.mixture.sources[number]
            if source.over_long != "truncate":
                continue
            for place in places[at]:
                cut = source.index.cut(
                    int(ids[place] - self.mixture.base[number]),
                    int(count[place]),
                    self.limits.max_tokens,
                    self.limits.max_tiles,
                )
                if cut is not None:
                    num_messages[place], text[place], learned[place], tiles[place] = cut
