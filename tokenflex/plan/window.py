"""One window of the plan: from the samples that are waiting to whole rows of packs, and what stays for the next window.

A row is `row_packs` packs that run side by side (the canonical slots of a micro-step). In lockstep all its packs hold images
of one visual-token count. The samples that are waiting fall into one queue per count and one for text without images,
each in the order of the epoch; a window takes a stretch from the head of each queue that fills whole rows, so what is left
is described by one position per queue: that is the whole state of a run in its data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np

from ..budget import keyed_uniform
from .balance import MAX_LEFT_OVER, balance, best_fit, first_fit, trim

FULLEST = 9975
"""Share of a pack's tokens that windows aim at, in 1/10,000; packs are level to within the rest."""
COARSE = 9900
"""Below this fill samples are too large to be levelled into full packs, and best fit is tried besides."""
LOWEST = 5000
TILE_FILL = 0.985
MAX_WINDOWS_WAITING = 8
"""A queue that filled no row in this many windows goes into rows of mixed counts, so no sample waits longer than that."""


@dataclass(frozen=True)
class Samples:
    """Columns of samples, in the order of the epoch; all [S] int64.

    position: place in the epoch. id: sample. queue: which queue it waits in. count: visual tokens per tile.
    tokens, tiles, learned: text and visual tokens, tiles, learned tokens. num_messages: how many of its messages are used; 0: all.
    """

    position: np.ndarray
    id: np.ndarray
    queue: np.ndarray
    count: np.ndarray
    tokens: np.ndarray
    tiles: np.ndarray
    learned: np.ndarray
    num_messages: np.ndarray

    def __len__(self) -> int:
        return len(self.position)

    def take(self, places: np.ndarray) -> "Samples":
        return Samples(*(getattr(self, field.name)[places] for field in fields(self)))

    @staticmethod
    def join(parts: Sequence["Samples"]) -> "Samples":
        return Samples(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Samples)))


@dataclass(frozen=True)
class State:
    """What a run has taken of an epoch: everything before `cursors` [queues] is planned, but for `left_over`.

    frontier: positions before it have been read. waited [queues]: windows in a row that took nothing of a queue that has
    something. fills [queues]: how full the last window could fill a queue's packs, in 1/10,000.
    """

    frontier: int
    cursors: tuple[int, ...]
    waited: tuple[int, ...]
    fills: tuple[int, ...]
    left_over: tuple[int, ...] = ()

    @staticmethod
    def start(num_queues: int) -> "State":
        return State(0, (0,) * num_queues, (0,) * num_queues, (FULLEST,) * num_queues)

    def is_done(self, epoch_size: int) -> bool:
        """Whether an epoch of `epoch_size` positions is planned to its end."""
        return self.frontier == epoch_size and min(self.cursors) == epoch_size and not self.left_over

    def still_waiting(self, samples: Samples) -> np.ndarray:
        """Which of the samples before the frontier are not planned yet: [S] bool."""
        is_ahead = samples.position >= np.asarray(self.cursors)[samples.queue]
        return is_ahead | np.isin(samples.position, np.asarray(self.left_over, np.int64))


@dataclass(frozen=True)
class Window:
    """Planned rows: `samples` sorted by pack, `pack` [S] with pack // row_packs the row; row_queue [rows], -1 is mixed."""

    samples: Samples
    pack: np.ndarray
    row_queue: np.ndarray
    row_packs: int

    @property
    def num_packs(self) -> int:
        return len(self.row_queue) * self.row_packs


@dataclass(frozen=True, kw_only=True)
class PackLimits:
    """What a pack holds, and what things cost: relative units, as whole numbers.

    row_packs: packs that run side by side. num_queues: one per count (or one for all) and, last, text without images.
    """

    max_tokens: int
    max_tiles: int
    row_packs: int
    num_queues: int
    token_cost: int
    pair_cost: int

    @property
    def text(self) -> int:
        return self.num_queues - 1


def plan_window(waiting: Samples, state: State, limits: PackLimits, is_end: bool, seed: int) -> tuple[Window, State]:
    """Whole rows from the heads of the queues: (Window, State after it).

    With `is_end` nothing more will come: everything that waits is planned, the last rows with mixed counts and perhaps
    empty packs. Without, the window may be empty: then more must be read first.
    """
    rows: list[_Rows] = []
    left = waiting
    while True:
        taken, fills, left_over = _whole_rows(left, state, limits)
        rows += taken
        used = np.concatenate([np.empty(0, np.int64), *(members.position for members, _, _, _ in taken)])
        state = _after(left, used, replace(state, fills=fills, left_over=left_over), bool(taken))
        left = left.take(~np.isin(left.position, used))
        if not taken or not is_end:
            break
    is_due = np.asarray(state.waited) >= MAX_WINDOWS_WAITING
    if len(left) and (is_end or is_due.any()):
        members, pack, number = _mixed_rows(left, is_due, limits, is_end)
        rows.append((members, pack, number, -1))
        left_over = tuple(sorted({*state.left_over} - set(members.position.tolist())))
        state = _after(left, members.position, replace(state, left_over=left_over), True)
        state = replace(state, waited=tuple(0 if due else number for number, due in zip(state.waited, is_due)))
    return _assemble(rows, limits, keyed_uniform(seed, state.frontier, np.arange(4096))), state


def _after(waiting: Samples, used: np.ndarray, state: State, is_progress: bool) -> State:
    """The state once the samples at positions `used` are planned; its fills and left-over samples are those given."""
    cursors, waited = list(state.cursors), list(state.waited)
    is_used = np.isin(waiting.position, used)
    is_left_over = np.isin(waiting.position, np.asarray(state.left_over, np.int64))
    for queue in range(len(cursors)):
        inside = waiting.queue == queue
        rest = waiting.position[inside & ~is_used & ~is_left_over]
        cursors[queue] = int(rest[0]) if len(rest) else state.frontier
        if is_progress:
            took_some = (inside & is_used).any()
            waited[queue] = waited[queue] + 1 if inside.any() and not took_some else 0
    return replace(state, cursors=tuple(cursors), waited=tuple(waited))


_Rows = tuple[Samples, np.ndarray, int, int]
"""Samples, the pack of each [S], how many packs, the queue (-1 is mixed)."""


def _whole_rows(waiting: Samples, state: State, limits: PackLimits) -> tuple[list[_Rows], tuple, tuple]:
    """Rows of one queue each: (rows, fills, positions left over)."""
    queues = [np.flatnonzero(waiting.queue == queue) for queue in range(limits.num_queues)]
    text = queues[limits.text]
    numbers, text_rows, spread = _rows_per_queue(waiting, queues, state.fills, limits)
    fills, text_done, rows, left_over = list(state.fills), 0, [], []
    for queue in range(limits.num_queues):
        is_text = queue == limits.text
        num_packs = (text_rows if is_text else numbers[queue]) * limits.row_packs
        if not num_packs:
            continue
        own = queues[queue][:0] if is_text else queues[queue]
        heads = _Heads(own, text[text_done:], num_packs, spread)
        places, pack, fills[queue], num_text = _fill_packs(waiting, heads, fills[queue], state.left_over, limits)
        text_done += num_text
        left_over += waiting.position[places[pack < 0]].tolist()
        places, pack = places[pack >= 0], pack[pack >= 0]
        trim(pack, waiting.tokens[places], waiting.tiles[places], num_packs, limits.row_packs, limits.max_tokens)
        rows.append((waiting.take(places), pack, num_packs, queue))
    untouched = set(waiting.position.tolist()) & set(state.left_over)
    used = {int(p) for members, _, _, _ in rows for p in members.position[np.isin(members.position, state.left_over)]}
    return rows, tuple(fills), tuple(sorted({*left_over, *(untouched - used)}))


def _room(tokens: np.ndarray, tiles: np.ndarray, limits: PackLimits) -> np.ndarray:
    """Tokens of pack that samples take up: their own, or those of the packs that their tiles fill, whichever is more."""
    return np.maximum(tokens, tiles * limits.max_tokens / (limits.max_tiles * TILE_FILL))


def _rows_per_queue(
    waiting: Samples, queues: list[np.ndarray], fills: tuple, limits: PackLimits
) -> tuple[np.ndarray, int, float]:
    """How many rows each queue of images can fill with its share of the text, and how many text fills alone.

    Text goes first where tiles, not tokens, fill the packs; the rest is spread over all.
    """
    images = queues[: limits.text]
    tokens = np.array([waiting.tokens[places].sum() for places in images], np.float64)
    room = np.array([_room(waiting.tokens[places].sum(), waiting.tiles[places].sum(), limits) for places in images])
    text = float(waiting.tokens[queues[limits.text]].sum())
    spread = max(text - float((room - tokens).sum()), 0.0) / max(float(room.sum()), 1.0)
    row = limits.row_packs * limits.max_tokens * np.asarray(fills) / 10_000
    by_room = room * (1 + spread) / row[: limits.text]
    by_number = np.array([len(places) // limits.row_packs for places in images])
    numbers = np.minimum(by_room.astype(np.int64), by_number)
    wanted = numbers * row[: limits.text] - tokens * np.minimum(1, numbers / np.maximum(by_room, 1e-9))
    waits = room * (1 + spread) - numbers * row[: limits.text]  # of images whose row is not full yet
    is_short = by_number < by_room.astype(np.int64)
    reserved = np.where(is_short, 0, np.maximum(waits, 0)).sum() * (1 if spread else 0)
    text_rows = int(max(text - np.maximum(wanted, 0).sum() - reserved, 0) // row[limits.text])
    return numbers, text_rows, spread


class _Heads(NamedTuple):
    """What may go into the packs of one queue: places of its own samples and of text, and how much text images leave room for."""

    own: np.ndarray
    text: np.ndarray
    num_packs: int
    spread: float


def _fill_packs(
    waiting: Samples, heads: _Heads, fill: int, kept: tuple, limits: PackLimits
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Heads of a queue and of the text into packs: (places, pack of each or -1, fill that worked, text samples taken)."""
    own, text, num_packs, spread = heads
    share = MAX_LEFT_OVER // limits.num_queues
    fill = min(fill + 10, FULLEST)
    room = _room(np.cumsum(waiting.tokens[own]), np.cumsum(waiting.tiles[own]), limits)
    own_tokens, text_tokens = np.cumsum(waiting.tokens[own]), np.cumsum(waiting.tokens[text])
    while fill >= LOWEST:
        budget = num_packs * limits.max_tokens * fill / 10_000
        number = int(np.searchsorted(room, budget / (1 + spread), side="right"))
        number = max(
            number, min(num_packs, int(np.searchsorted(own_tokens, budget, side="right")))
        )  # an image per pack
        budget -= own_tokens[number - 1] if number else 0
        num_text = int(np.searchsorted(text_tokens, budget, side="right"))
        places = np.concatenate([own[:number], text[:num_text]])
        is_kept = np.isin(waiting.position[places], np.asarray(kept, np.int64))
        tokens, tiles = waiting.tokens[places], waiting.tiles[places]
        pack = balance(tokens, tiles, num_packs, limits.max_tokens, limits.max_tiles, is_kept)
        if (pack < 0).sum() > share and fill < COARSE:
            dense = best_fit(tokens, tiles, num_packs, limits.max_tokens, limits.max_tiles)
            pack = dense if (dense < 0).sum() < (pack < 0).sum() else pack
        lost = pack < 0
        if lost.sum() <= share and not (lost & is_kept).any():
            return places, pack, fill, num_text
        too_much = tokens[lost].sum() / (num_packs * limits.max_tokens) * 10_000
        fill -= max(20, int(too_much))
    places = np.sort(np.concatenate([own, text]))
    places = places[np.argsort(waiting.position[places], kind="stable")]
    pack = first_fit(waiting.tokens[places], waiting.tiles[places], num_packs, limits.max_tokens, limits.max_tiles)
    places = places[: len(pack)]
    return places, pack, LOWEST, int(np.isin(places, text).sum())


def _mixed_rows(left: Samples, is_due: np.ndarray, limits: PackLimits, is_end: bool) -> tuple[Samples, np.ndarray, int]:
    """Rows of any counts: all that is left at the end of an epoch, else the queues that waited too long and what fills up."""
    must = np.ones(len(left), bool) if is_end else is_due[left.queue]
    room = float(_room(left.tokens[must].sum(), left.tiles[must].sum(), limits))
    number = int(np.ceil(room / (limits.max_tokens * FULLEST / 10_000)))
    number = max(number, 1)
    while True:
        if not is_end:
            number = -(-number // limits.row_packs) * limits.row_packs
        others = np.flatnonzero(~must)
        budget = number * limits.max_tokens * 0.98 - room
        cumulated = _room(np.cumsum(left.tokens[others]), np.cumsum(left.tiles[others]), limits)
        places = np.concatenate([np.flatnonzero(must), others[: int(np.searchsorted(cumulated, budget, side="right"))]])
        tokens, tiles = left.tokens[places], left.tiles[places]
        pack = balance(tokens, tiles, number, limits.max_tokens, limits.max_tiles)
        if (pack >= 0).all():
            return left.take(places), pack, number
        number += max(1, number // 200, int(tokens[pack < 0].sum() // limits.max_tokens))


def _assemble(rows: list[_Rows], limits: PackLimits, shuffle: np.ndarray) -> Window:
    """Packs of each queue in the order of tiles and cost, cut into rows; the rows shuffled so that counts alternate."""
    size = limits.row_packs
    parts: list[tuple[Samples, np.ndarray]] = []
    keys: list[np.ndarray] = []
    queues: list[int] = []
    first_row = 0
    for members, pack, number, queue in rows:
        new_place = _by_cost(members, pack, number, limits)
        num_rows = -(-number // size)
        parts.append((members, new_place[pack] + first_row * size))
        order = np.argsort(shuffle[(first_row + np.arange(num_rows)) % len(shuffle)], kind="stable")
        key = np.empty(num_rows)
        key[order] = (np.arange(num_rows) + shuffle[(first_row + 17 * queue) % len(shuffle)]) / num_rows
        # an incomplete last row stays last
        keys.append(key + (2 if queue < 0 else 0) + (np.arange(num_rows) == number // size) * 2)
        queues += [queue] * num_rows
        first_row += num_rows
    if not parts:
        empty = np.empty(0, np.int64)
        return Window(Samples(*[empty] * len(fields(Samples))), empty, empty, size)
    order = np.argsort(np.concatenate(keys), kind="stable")
    place_of_row = np.empty(first_row, np.int64)
    place_of_row[order] = np.arange(first_row)
    samples = Samples.join([members for members, _ in parts])
    pack = np.concatenate([pack for _, pack in parts])
    pack = place_of_row[pack // size] * size + pack % size
    by_pack = np.lexsort((samples.position, pack))
    return Window(samples.take(by_pack), pack[by_pack], np.asarray(queues)[order], size)


def _by_cost(members: Samples, pack: np.ndarray, number: int, limits: PackLimits) -> np.ndarray:
    """New number of each pack, so that neighbours have equal tiles and nearly equal cost."""
    tiles = np.bincount(pack, weights=members.tiles, minlength=number).astype(np.int64)
    cost = np.bincount(
        pack, weights=limits.token_cost * members.tokens + limits.pair_cost * members.tokens**2, minlength=number
    )
    used = np.bincount(pack, weights=members.tokens, minlength=number)
    assert used.max() <= limits.max_tokens and tiles.max() <= limits.max_tiles, "a pack holds too much"
    place = np.empty(number, np.int64)
    place[np.lexsort((-cost, -tiles))] = np.arange(number)
    return place
