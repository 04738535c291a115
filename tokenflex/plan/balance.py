"""Packing as load balancing: a given set of samples into a given number of packs of equal tokens and equal tiles.

Dense packing is easy and solved; what costs time on many ranks is that the fullest pack of each micro-step holds the others
up. So packs are not filled one after the other: samples go, longest first, to the least loaded pack, then pairs of packs
(the most with the least loaded) exchange the two samples that bring both nearest to each other, in tokens and tiles
together. After a few rounds all packs hold the same to within some tokens, and the number of packs decides how full
they are. Everything is whole numbers and stable sorts, so each machine gets the same plan.
"""

import bisect
from typing import NamedTuple

import numpy as np

from .loads import Capacity, Loads, members_of, slots_of

ROUNDS = 20
MAX_LEFT_OVER = 40
"""Samples that a caller may accept as left over. More packs than this that hold too much are not repaired but given up."""
REPAIR_ROUNDS = 6
"""Tries of a pack that holds too much, each with another partner."""
TOKENS_PER_TILE = 32
"""What a tile of difference counts against tokens of difference while packs are levelled."""


TRIM_ROUNDS = 6
TRIM_SHARE = 16
"""One in this many packs of a row may be an outlier that is trimmed."""
TRIM_FROM = 12
"""Rows that wait for fewer tiles than this, in 1/1,000 of all, are left as they are."""
TRIM_PAIRS = 512
"""Pairs of packs that are tried in a round, whether few outliers try many partners each or many try one."""


def balance(
    tokens: np.ndarray,
    tiles: np.ndarray,
    num_packs: int,
    max_tokens: int,
    max_tiles: int,
    is_kept: np.ndarray | None = None,
) -> np.ndarray:
    """Samples -> packs, level in tokens and tiles.

    Args:
        tokens, tiles: [S] per sample.
        num_packs, max_tokens, max_tiles: packs and what each may hold.
        is_kept: [S] samples that must not be left over where another can be.

    Returns:
        [S] int64, the pack of each sample, or -1 for those that were left over so that no pack holds too much. With more than
        `MAX_LEFT_OVER` left over it is a failed try: packs may then hold too much.
    """
    tokens, tiles = np.asarray(tokens, np.int64), np.asarray(tiles, np.int64)
    capacity = Capacity(max_tokens, max_tiles)
    pack = _deal(tokens, tiles, num_packs)
    if num_packs > 1 and len(tokens):
        _level(pack, tokens, tiles, num_packs)
    loads = Loads.of(pack, tokens, tiles, num_packs)
    if num_packs > 1 and len(tokens):
        over = loads.is_over(capacity)
        if over.sum() > max(MAX_LEFT_OVER, num_packs // 10):  # too coarse for so few packs: the caller tries with less
            pack[_smallest_of_each(pack, tokens, over)] = -1
            return pack
        _repair(loads, capacity)
    _take_out(loads, capacity, np.zeros(len(tokens), bool) if is_kept is None else is_kept)
    return pack


def _smallest_of_each(pack: np.ndarray, tokens: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The smallest sample of each chosen pack: their places."""
    order = np.lexsort((tokens, pack))
    order = order[chosen[pack[order]]]
    return order[np.append(True, np.diff(pack[order]) != 0)]


def _deal(tokens: np.ndarray, tiles: np.ndarray, num_packs: int) -> np.ndarray:
    """Longest first to the least loaded pack: images by tokens and tiles together, then the text that has no image."""
    pack = np.empty(len(tokens), np.int64)
    has_image = tiles > 0
    exchange = int(tokens.sum()) // max(int(tiles.sum()), 1)
    load = np.zeros(num_packs, np.int64)
    for chosen, size in ((has_image, tokens + tiles * exchange), (~has_image, tokens)):
        places = np.flatnonzero(chosen)
        places = places[np.argsort(-size[places], kind="stable")]
        pack[places] = _to_least_loaded(size[places], load)
        load = np.bincount(pack[places], weights=tokens[places], minlength=num_packs).astype(np.int64)
    return pack


def _to_least_loaded(sizes: np.ndarray, load: np.ndarray) -> np.ndarray:
    """The greedy rule, many at a time: all packs that stay below the least one's next load get their sample together."""
    pack = np.empty(len(sizes), np.int64)
    done = 0
    while done < len(sizes):
        order = np.argsort(load, kind="stable")
        number = int(np.searchsorted(load[order], load[order[0]] + sizes[done], side="left"))
        number = min(max(number, 1), len(sizes) - done)
        pack[done : done + number] = order[:number]
        load[order[:number]] += sizes[done : done + number]
        done += number
    return pack


def _level(pack: np.ndarray, tokens: np.ndarray, tiles: np.ndarray, num_packs: int) -> None:
    """Exchange samples between pairs of packs, in place, until nothing moves or the rounds are over."""
    loads = Loads.of(pack, tokens, tiles * TOKENS_PER_TILE, num_packs, np.int32)
    slots = slots_of(pack, num_packs)
    half = num_packs // 2
    for number in range(ROUNDS):
        key = loads.tiles.astype(np.int64) * 2**31 + loads.tokens if number % 3 == 1 else loads.tokens
        order = np.argsort(key, kind="stable")
        low, high = order[:half], order[::-1][:half]
        apart = np.abs(loads.tokens[low] - loads.tokens[high]) + np.abs(loads.tiles[low] - loads.tiles[high])
        uneven = apart > 4
        if not uneven.any():
            break
        low, high, apart = low[uneven], high[uneven], apart[uneven]
        first, second, after = _best_exchange(loads, slots[low], slots[high], low, high)
        better = np.flatnonzero(after < apart)
        low, high, first, second = low[better], high[better], first[better], second[better]
        ours, theirs = slots[low, first], slots[high, second]
        slots[low, first], slots[high, second] = theirs, ours
        loads.exchange(ours, low, theirs, high)
        slots[:, -1] = -1  # what was moved into the free place stays in its pack, out of the exchange


def trim(
    pack: np.ndarray, tokens: np.ndarray, tiles: np.ndarray, num_packs: int, row_packs: int, max_tokens: int
) -> None:
    """Lower the most tiles of rows by exchanges, in place: a row waits for its fullest pack, and levelling leaves outliers.

    Rows are the packs in the order of their tiles, `row_packs` at a time. A pack above nearly all of its row gives tiles to a
    pack of any row that has room below nearly all of its own, in exchange for a sample of as many tokens. Images mostly
    have odd numbers of tiles, so exchanges move two or four: room for one is of no use, and few pairs have what fits.

    Args:
        pack, tokens, tiles: [S] per sample; every sample has a pack, and no pack holds too much before or after.
        num_packs, row_packs, max_tokens: packs (whole rows), packs side by side, and what a pack may hold.
    """
    loads = Loads.of(pack, tokens, tiles, num_packs, np.int32)
    for number in range(TRIM_ROUNDS):
        outliers = _outliers(loads.tiles, row_packs, number)
        if outliers is None:
            return
        _even_out(loads, outliers, max_tokens)


class _Outliers(NamedTuple):
    """Packs above nearly all of their row, and packs with room that each of them tries.

    givers [G], takers [K]: packs. excess [G], room [K]: tiles above, and below, nearly all of the row. column [G, tries]:
    which takers each giver tries.
    """

    givers: np.ndarray
    takers: np.ndarray
    excess: np.ndarray
    room: np.ndarray
    column: np.ndarray


def _outliers(tile_load: np.ndarray, row_packs: int, number: int) -> _Outliers | None:
    """What round `number` of trimming tries; None where rows are level enough, or none can give or take."""
    order = np.argsort(-tile_load, kind="stable")
    by_row = tile_load[order].reshape(-1, row_packs)
    if (by_row[:, :1] - by_row).sum() * 1000 <= TRIM_FROM * by_row.sum():
        return None
    room_by_row = by_row[:, row_packs // TRIM_SHARE][:, None] - by_row
    num_above = np.repeat((room_by_row < 0).sum(1), row_packs)
    room = room_by_row.reshape(-1)
    givers, takers = np.flatnonzero(room < 0), np.flatnonzero(room > 1)
    if not len(givers) or not len(takers):
        return None
    # a row counts only when all of its outliers are done: the rows with few of them first
    givers = givers[np.argsort(num_above[givers], kind="stable")][:TRIM_PAIRS]
    tries = min(TRIM_PAIRS // len(givers), len(takers))
    num_pairs = tries * len(givers)
    partner = np.arange(num_pairs) * len(takers) // num_pairs + 7 * number  # others each round
    takers, column = np.unique(takers[partner % len(takers)], return_inverse=True)
    return _Outliers(order[givers], order[takers], -room[givers], room[takers], column.reshape(tries, len(givers)).T)


def _even_out(loads: Loads, found: _Outliers, max_tokens: int) -> None:
    """Each giver's best exchange with one of its takers, a taker once."""
    givers, takers, excess, room, column = found
    slots = members_of(loads.pack, np.concatenate([givers, takers]), len(loads.tokens))
    ours, theirs = slots[: len(givers), None, :, None], slots[len(givers) :][column][:, :, None, :]
    more = loads.tokens_S[ours] - loads.tokens_S[theirs]  # [givers, tries, ours, theirs]
    more_tiles = loads.tiles_S[ours] - loads.tiles_S[theirs]
    fits = (more <= max_tokens - loads.tokens[takers][column][:, :, None, None]) & (more_tiles > 0)
    fits &= more >= loads.tokens[givers][:, None, None, None] - max_tokens
    fits &= more_tiles <= room[column][:, :, None, None]
    gain = np.minimum(more_tiles, excess[:, None, None, None])
    worth = np.where(fits, gain * 2**20 - np.abs(more), -1).reshape(len(givers), -1)
    best = worth.argmax(1)
    done = np.flatnonzero(worth[np.arange(len(givers)), best] >= 0)
    tried, mine, other = np.unravel_index(best[done], (column.shape[1], slots.shape[1], slots.shape[1]))
    taker, first = np.unique(column[done, tried], return_index=True)  # a pack exchanges with one at a time
    mine, other = slots[done[first], mine[first]], slots[len(givers) + taker, other[first]]
    loads.exchange(mine, givers[done[first]], other, takers[taker])


def _repair(loads: Loads, capacity: Capacity) -> None:
    """Packs that still hold too much exchange with others far below, among many samples of both, in place."""
    for number in range(REPAIR_ROUNDS):
        is_over = loads.is_over(capacity)
        over, others = np.flatnonzero(is_over), np.flatnonzero(~is_over)
        if not len(over) or not len(others):
            return
        lightest = others[np.argsort(loads.tokens[others] + loads.tiles[others] * TOKENS_PER_TILE, kind="stable")]
        over = over[: len(lightest)]
        lightest = np.roll(lightest[: 2 * len(over)], number * len(over) // 2)[: len(over)]  # other partners next time
        slots = members_of(loads.pack, np.concatenate([over, lightest]), len(loads.tokens))
        ours, theirs = slots[: len(over)], slots[len(over) :]
        left = np.zeros(1, np.int64)
        for sizes, held, most, worth in (
            (loads.tokens_S, loads.tokens, capacity.tokens, 1),
            (loads.tiles_S, loads.tiles, capacity.tiles, TOKENS_PER_TILE),
        ):
            more = sizes[ours][:, :, None] - sizes[theirs][:, None, :]
            heavy, light = held[over][:, None, None] - more, held[lightest][:, None, None] + more
            excess = np.maximum(heavy - most, 0) + np.maximum(light - most, 0)
            left = left + worth * (np.abs(heavy - light) + excess * 2**20)
        best = left.reshape(len(over), -1).argmin(1)
        pairs = np.arange(len(over))
        mine, other = ours[pairs, best // ours.shape[1]], theirs[pairs, best % ours.shape[1]]
        loads.exchange(mine, over, other, lightest)


def _best_exchange(
    loads: Loads, slots_low: np.ndarray, slots_high: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per pair of packs the two places whose exchange leaves the least difference: (place, place, difference left)."""
    ours, theirs = 2 * loads.tokens_S[slots_low], 2 * loads.tokens_S[slots_high]
    gap = loads.tokens[low] - loads.tokens[high]
    left = np.abs((gap[:, None] - ours)[:, :, None] + theirs[:, None, :])
    ours, theirs = 2 * loads.tiles_S[slots_low], 2 * loads.tiles_S[slots_high]
    gap = loads.tiles[low] - loads.tiles[high]
    left += np.abs((gap[:, None] - ours)[:, :, None] + theirs[:, None, :])
    left = left.reshape(len(left), -1)
    best = left.argmin(1)
    width = slots_low.shape[1]
    return best // width, best % width, left[np.arange(len(left)), best]


def _take_out(loads: Loads, capacity: Capacity, is_kept: np.ndarray) -> None:
    """Take samples out of packs that hold too much (the smallest that will do) and put them where they still fit."""
    tokens, tiles, taken = loads.tokens_S, loads.tiles_S, []
    for number in np.flatnonzero(loads.is_over(capacity)):
        inside = np.flatnonzero(loads.pack == number)
        while loads.tokens[number] > capacity.tokens or loads.tiles[number] > capacity.tiles:
            over = max(loads.tokens[number] - capacity.tokens, 0), max(loads.tiles[number] - capacity.tiles, 0)
            enough = (tokens[inside] >= over[0]) & (tiles[inside] >= over[1])
            cost = tokens[inside] + np.where(enough, 0, 2**40)
            if not enough.any():
                cost = -tokens[inside] - tiles[inside] * TOKENS_PER_TILE
            place = int(inside[np.argmin(cost + is_kept[inside] * 2**50)])
            inside = inside[inside != place]
            loads.move(place, -1)
            taken.append(place)
    for place in sorted(taken, key=lambda place: (-tokens[place], place)):
        fits = loads.tokens + tokens[place] <= capacity.tokens
        fits &= loads.tiles + tiles[place] <= capacity.tiles
        if fits.any():
            loads.move(place, int(np.argmax(np.where(fits, loads.tokens, -1))))


def best_fit(tokens: np.ndarray, tiles: np.ndarray, num_packs: int, max_tokens: int, max_tiles: int) -> np.ndarray:
    """Longest first, each into the pack with the least room that holds it: [S] packs, -1 for what fits nowhere.

    Less even than `balance`, denser where samples are so large that few combinations fill a pack.
    """
    pack = np.full(len(tokens), -1, np.int64)
    tile_room = [max_tiles] * num_packs
    rooms = [(max_tokens, number) for number in range(num_packs)]
    for place in np.argsort(-tokens, kind="stable").tolist():
        length, number_of_tiles = int(tokens[place]), int(tiles[place])
        at = bisect.bisect_left(rooms, (length, -1))
        while at < len(rooms) and tile_room[rooms[at][1]] < number_of_tiles:
            at += 1
        if at == len(rooms):
            continue
        room, number = rooms.pop(at)
        bisect.insort(rooms, (room - length, number))
        tile_room[number] -= number_of_tiles
        pack[place] = number
    return pack


def first_fit(tokens: np.ndarray, tiles: np.ndarray, num_packs: int, max_tokens: int, max_tiles: int) -> np.ndarray:
    """Samples in their order, each into the first pack that holds it; the first that fits nowhere ends it.

    The sure way where balancing leaves too much over: returns [n] packs of the n samples that went in.
    """
    load, tile_load = np.zeros(num_packs, np.int64), np.zeros(num_packs, np.int64)
    pack = []
    for length, number_of_tiles in zip(tokens, tiles):
        fits = (load + length <= max_tokens) & (tile_load + number_of_tiles <= max_tiles)
        number = int(np.argmax(fits))
        if not fits[number]:
            break
        load[number] += length
        tile_load[number] += number_of_tiles
        pack.append(number)
    return np.array(pack, np.int64)
