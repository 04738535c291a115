"""The planner: a pure function from (index, seed, epoch, position) to the packs of a step, the same on every rank.

It reads the epoch's order stretch by stretch, draws each sample's count, and turns what waits into rows of packs (`window`).
What it has to remember between two windows is a few positions, so a run's place in its data is well under 1 KB and the
next plan after a resume costs one window, however large the corpus is.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..budget import VisualTokenBudget
from ..config import DataConfig
from ..errors import UserError
from .mixture import Lengths, Mixture, Source, draw_key
from .steps import EMPTY, Dropped, Pack, Position, StepPlan
from .window import PackLimits, Samples, State, Window, plan_window

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

    def __init__(
        self, index: Lengths | Mixture, budget: VisualTokenBudget, data: DataConfig, seed: int, loss_weighting: str
    ):
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
        self.most_tiles = min(data.max_images_per_pack, budget.most_tiles)
        """Of a sample."""
        self.order = self.mixture.order(seed, data.shuffle_shards, data.shuffle_window)
        self.dropped = Dropped()
        """What the epochs planned so far have left out."""
        self.window_packs = max(data.window_rows * data.lockstep_packs, MIN_WINDOW_PACKS)
        self.block = 1 << (self.window_packs.bit_length() - 1)
        self._check()

    @property
    def epoch_size(self) -> int:
        """Samples per epoch, those that are left out counted."""
        return self.order.size

    def _check(self) -> None:
        """Refuse plans that cannot be before the first step."""
        data, views = self.data, self.budget.num_views
        largest = int(self._most_tokens(np.array(0), np.array(1)))
        if largest + views > data.pack_length:
            at = f"{largest} visual tokens" + (f" in {views} views" if views > 1 else "")
            raise UserError(
                f"data.pack_length={data.pack_length}: a pack holds no image of {at} and its text; "
                f"raise it above {largest} or take smaller counts (budget.num_visual_tokens)"
            )
        if self.epoch_size < data.packs_per_step:
            raise UserError(
                f"data.train: {self.epoch_size} samples per epoch cannot fill the {data.packs_per_step} packs of a step; add samples, "
                "raise the source's epochs, or lower data.packs_per_step"
            )
        num_usable = 0
        for source in self.mixture.sources:
            num_usable += self._check_source(source)
        if not num_usable:
            raise UserError("data.train: no sample is usable; each needs an assistant answer and must fit a pack")

    def _most_tokens(self, text: np.ndarray, tiles: np.ndarray) -> np.ndarray:
        """Tokens of samples at the largest count that they can get: [S]."""
        largest = np.full(tiles.shape, max(self.budget.counts))
        return self.budget.tokens(text, tiles, self.budget.visual_tokens(self.budget.within_total(largest, tiles)))

    def _may_be_too_long(self, text: np.ndarray, tiles: np.ndarray) -> np.ndarray:
        return (self._most_tokens(text, tiles) > self.data.pack_length) | (tiles > self.most_tiles)

    def _check_source(self, source: Source) -> int:
        """How many samples of a source have an answer and may fit; refuses over-long ones under `error`."""
        longest_text, num_usable = source.index.longest_text(), source.index.num_answered()
        tiles = np.arange(len(longest_text))
        too_long = (longest_text >= 0) & self._may_be_too_long(longest_text, tiles)
        if not too_long.any() or source.over_long != "error":
            return num_usable
        sample, number = self._first_too_long(source.index)
        text, tiles = int(source.index.text_tokens[sample]), int(source.index.num_tiles[sample])
        if tiles > self.budget.most_tiles:
            raise UserError(
                f"{source.index.shard_of(sample)}: sample {sample} has {tiles} images (or tiles, or frames), and budget.total={self.budget.total} "
                f"holds {self.budget.most_tiles} at {min(self.budget.counts)} visual tokens, the smallest count ({number} samples do not "
                "fit); raise budget.total, add a smaller count, or set data.over_long=drop"
            )
        tokens = int(self._most_tokens(np.array(text), np.array(tiles)))
        raise UserError(
            f"{source.index.shard_of(sample)}: sample {sample} has up to {tokens} tokens and {tiles} images, a pack "
            f"holds {self.data.pack_length} and {self.data.max_images_per_pack} ({number} such samples); raise data.pack_length or "
            "data.max_images_per_pack, or set data.over_long=drop"
        )

    def _first_too_long(self, index: Lengths) -> tuple[int, int]:
        """(the first sample that may be longer than a pack, how many there are)."""
        first, number = -1, 0
        for begin in range(0, len(index.text_tokens), 2**20):
            text = index.text_tokens[begin : begin + 2**20].astype(np.int64)
            tiles = index.num_tiles[begin : begin + 2**20].astype(np.int64)
            wrong = np.flatnonzero(self._may_be_too_long(text, tiles))
            if len(wrong) and first < 0:
                first = begin + int(wrong[0])
            number += len(wrong)
        return first, number

    def steps_from(self, position: Position) -> Iterator[StepPlan]:
        """Yield `StepPlan`s without end, the first at `position`."""
        epoch = position.epoch
        yield from self.epoch_steps(epoch, position)
        while True:
            epoch += 1
            yield from self.epoch_steps(epoch)

    def epoch_steps(self, epoch: int, position: Position | None = None) -> Iterator[StepPlan]:
        """Yield the steps of an epoch from `position` on (default: its start). The last is filled up with empty packs.

        Raises:
            UserError: no sample of the epoch is usable.
        """
        rows_per_step = self.data.packs_per_step // self.data.lockstep_packs
        start = position or Position(epoch)
        rows = self._rows(epoch, start)
        packs: list[Pack] = []
        weight, here, number = 0.0, start, start.step
        for row_packs, row_weight, after in rows:
            packs += row_packs
            weight += row_weight
            if len(packs) == rows_per_step * self.data.lockstep_packs:
                if after.epoch == epoch:
                    after = replace(after, step=number + 1)
                yield StepPlan(here, tuple(packs), weight, after)
                packs, weight, here, number = [], 0.0, after, number + 1
        if packs:
            packs += [EMPTY] * (self.data.packs_per_step - len(packs))
            yield StepPlan(here, tuple(packs), weight, Position(epoch + 1))
        elif number == 0:
            raise UserError("data.train: no sample is usable; each needs an assistant answer and must fit a pack")

    def _rows(self, epoch: int, position: Position) -> Iterator[tuple[list[Pack], float, Position]]:
        """Yield (packs of a row, their weight, position after it)."""
        skip = position.row
        for state, window, after in self.windows(epoch, self.state_at(position), self.dropped):
            bounds = np.searchsorted(window.pack, np.arange(window.num_packs + 1))
            samples, size = window.samples, window.row_packs
            weights = samples.learned * self.weight_of(samples.learned)
            weights = np.where(samples.tiles > 0, self.budget.num_views * weights, weights)
            for row in range(skip, len(window.row_queue)):
                packs = [
                    Pack(samples.id[low:high], samples.count[low:high], samples.num_messages[low:high])
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

    def state_at(self, position: Position) -> State:
        """The state of the window that a position is in."""
        if not position.cursors:
            return State.start(self.limits.num_queues)
        return State(position.frontier, position.cursors, position.waited, position.fills, position.left_over)

    def windows(
        self, epoch: int, state: State | None = None, dropped: Dropped | None = None
    ) -> Iterator[tuple[State, Window, State]]:
        """Yield (state before it, `Window`, state after it) from a state on to the end of the epoch.

        `dropped` (`Dropped`), if given, gets what is read on the way and left out.
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
                    parts.append(self.read(epoch, frontier, end, dropped))
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

    def _read_again(self, epoch: int, state: State) -> Samples:
        """The samples that wait at a state: those before its frontier that are not planned."""
        begin = min([state.frontier, *state.cursors, *state.left_over])
        parts = [
            self.read(epoch, at, min(at + self.block, state.frontier))
            for at in range(begin, state.frontier, self.block)
        ]
        parts = [part.take(state.still_waiting(part)) for part in parts]
        return Samples.join([self.read(epoch, 0, 0), *parts])

    def read(self, epoch: int, begin: int, end: int, dropped: Dropped | None = None) -> Samples:
        """Usable samples at positions [begin, end) of an epoch, with their counts drawn: `Samples`."""
        position = np.arange(begin, end)
        ids, passes = self.order.read(epoch, begin, end)
        lengths = _Lengths(*self.mixture.columns(ids), self._counts(epoch, position, ids, passes), np.zeros_like(ids))
        lengths.count = self.budget.within_total(lengths.count, lengths.tiles)
        lengths.count[lengths.tiles == 0] = 0
        too_long = self._is_too_long(lengths)
        if too_long.any():
            self._truncate(ids, np.flatnonzero(too_long), lengths)
            too_long = self._is_too_long(lengths)
            lengths.count[lengths.tiles == 0] = 0
        if dropped is not None:
            dropped.add("without an answer", ids[(lengths.learned == 0) & ~too_long])
            dropped.add("longer than a pack", ids[too_long])
            dropped.add("truncated at a turn", ids[lengths.num_messages > 0])
        samples = Samples(
            position=position,
            id=ids,
            queue=self._queues(lengths),
            count=lengths.count,
            tokens=self._all_tokens(lengths),
            tiles=lengths.tiles,
            learned=lengths.learned,
            num_messages=lengths.num_messages,
        )
        return samples.take(np.flatnonzero((lengths.learned > 0) & ~too_long))

    def _counts(self, epoch: int, position: np.ndarray, ids: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """The visual-token count that each sample draws: [N] int64."""
        count = np.empty(len(ids), np.int64)
        for pass_number in np.unique(passes):
            at = np.flatnonzero(passes == pass_number)
            seen = epoch * self.epoch_size + position[at]
            count[at] = self.budget.draw(self.seed, draw_key(int(pass_number)), ids[at], seen)
        return count

    def _all_tokens(self, lengths: "_Lengths") -> np.ndarray:
        return self.budget.tokens(lengths.text, lengths.tiles, self.budget.visual_tokens(lengths.count))

    def _is_too_long(self, lengths: "_Lengths") -> np.ndarray:
        return (self._all_tokens(lengths) > self.limits.max_tokens) | (lengths.tiles > self.most_tiles)

    def _queues(self, lengths: "_Lengths") -> np.ndarray:
        """The queue that each sample waits in: [N] int64."""
        queue = np.full(len(lengths.text), self.limits.text)
        has_image = lengths.tiles > 0
        if self.data.mixing == "lockstep":
            for number, value in enumerate(self.budget.counts):
                queue[has_image & (lengths.count == value)] = number
        else:
            queue[has_image] = 0
        return queue

    def _truncate(self, ids: np.ndarray, places: np.ndarray, lengths: "_Lengths") -> None:
        """Samples of sources that truncate: end the conversation after the last answer that fits, in place."""
        visual, views = self.budget.visual_tokens(lengths.count), self.budget.num_views
        most = self.limits.max_tokens, int(self.most_tiles)
        for number, at in self.mixture.parts(ids[places]):
            source = self.mixture.sources[number]
            if source.over_long != "truncate":
                continue
            for place in places[at]:
                own = int(ids[place] - self.mixture.base[number])
                cut = source.index.cut(own, int(visual[place]), *most, views if lengths.tiles[place] else 1)
                if cut is not None:
                    lengths.end_early(int(place), cut)


@dataclass
class _Lengths:
    """Columns [N] of samples while their lengths are settled; see `Samples`. text: tokens without visual ones."""

    text: np.ndarray
    learned: np.ndarray
    tiles: np.ndarray
    count: np.ndarray
    num_messages: np.ndarray

    def end_early(self, place: int, cut: tuple[int, int, int, int]) -> None:
        """Take the lengths of a conversation that is cut; see `Lengths.cut`."""
        self.num_messages[place], self.text[place], self.learned[place], self.tiles[place] = cut
