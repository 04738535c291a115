"""Packing as load balancing: a given set of samples into a given number of packs of equal tokens and equal tiles.

Dense packing is easy and solved; what costs time on many ranks is that the fullest pack of each micro-step holds the others
up. So packs are not filled one after the other: samples go, longest first, to the least loaded pack, then pairs of packs
(the most with the least loaded) exchange the two samples that bring both nearest to each other, in tokens and tiles
together. After a few rounds all packs hold the same to within some tokens, and the number of packs decides how full
they are. Everything is whole numbers and stable sorts, so each machine gets the same plan.
"""

import bisect

import numpy as np

CANDIDATES = 12
"""Samples per pack that are tried in an exchange; 12 x 12 pairs land within a few tokens of any difference."""
ROUNDS = 20
MAX_LEFT_OVER = 40
"""Samples that a caller may accept as left over. More packs than this that hold too much are not repaired but given up."""
REPAIR_ROUNDS = 6
"""Tries of a pack that holds too much, each with another partner."""
REPAIR_CANDIDATES = 40
TOKENS_PER_TILE = 32
"""What a tile of difference counts against tokens of difference while packs are levelled."""


TRIM_ROUNDS = 6
TRIM_SHARE = 16
"""One in this many packs of a row may be an outlier that is trimmed."""
TRIM_FROM = 12
"""Rows that wait for fewer tiles than this, in 1/1,000 of all, are left as they are."""
TRIM_PAIRS = 512
"""Pairs of packs that are tried in a round, whether few outliers try many partners each or many try one."""


def balance(tokens, tiles, num_packs, max_tokens, max_tiles, is_kept=None):
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
    pack = _deal(tokens, tiles, num_packs)
    if num_packs > 1 and len(tokens):
        _level(pack, tokens, tiles, num_packs)
        over = _is_over(pack, tokens, tiles, num_packs, max_tokens, max_tiles)
        if over.sum() > max(MAX_LEFT_OVER, num_packs // 10):  # too coarse for so few packs: the caller tries with less
            pack[_smallest_of_each(pack, tokens, over)] = -1
            return pack
        _repair(pack, tokens, tiles, num_packs, max_tokens, max_tiles)
    _take_out(pack, tokens, tiles, num_packs, max_tokens, max_tiles, is_kept)
    return pack


def _is_over(pack, tokens, tiles, num_packs, max_tokens, max_tiles):
    load = np.bincount(pack, weights=tokens, minlength=num_packs)
    return (load > max_tokens) | (np.bincount(pack, weights=tiles, minlength=num_packs) > max_tiles)


def _smallest_of_each(pack, tokens, chosen):
    """The smallest sample of each chosen pack: their places."""
    order = np.lexsort((tokens, pack))
    order = order[chosen[pack[order]]]
    return order[np.append(True, np.diff(pack[order]) != 0)]


def _deal(tokens, tiles, num_packs):
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


def _to_least_loaded(sizes, load):
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


def _level(pack, tokens, tiles, num_packs):
    """Exchange samples between pairs of packs, in place, until nothing moves or the rounds are over."""
    tokens_S = np.append(tokens, 0).astype(np.int32)
    tiles_S = np.append(tiles, 0).astype(np.int32) * TOKENS_PER_TILE
    load = np.bincount(pack, weights=tokens, minlength=num_packs).astype(np.int32)
    tile_load = np.bincount(pack, weights=tiles, minlength=num_packs).astype(np.int32) * TOKENS_PER_TILE
    slots = _slots(pack, num_packs)
    half = num_packs // 2
    for number in range(ROUNDS):
        key = tile_load.astype(np.int64) * 2**31 + load if number % 3 == 1 else load
        order = np.argsort(key, kind="stable")
        low, high = order[:half], order[::-1][:half]
        apart = np.abs(load[low] - load[high]) + np.abs(tile_load[low] - tile_load[high])
        uneven = apart > 4
        if not uneven.any():
            break
        low, high, apart = low[uneven], high[uneven], apart[uneven]
        first, second, after = _best_exchange(
            slots[low], slots[high], load[low] - load[high], tile_load[low] - tile_load[high], tokens_S, tiles_S
        )
        better = np.flatnonzero(after < apart)
        low, high, first, second = low[better], high[better], first[better], second[better]
        ours, theirs = slots[low, first], slots[high, second]
        slots[low, first], slots[high, second] = theirs, ours
        for sizes, loads in ((tokens_S, load), (tiles_S, tile_load)):
            change = sizes[theirs] - sizes[ours]
            loads[low] += change
            loads[high] -= change
        pack[ours[ours >= 0]] = high[ours >= 0]
        pack[theirs[theirs >= 0]] = low[theirs >= 0]
        slots[:, -1] = -1  # what was moved into the free place stays in its pack, out of the exchange


def trim(pack, tokens, tiles, num_packs, row_packs, max_tokens):
    """Lower the most tiles of rows by exchanges, in place: a row waits for its fullest pack, and levelling leaves outliers.

    Rows are the packs in the order of their tiles, `row_packs` at a time. A pack above nearly all of its row gives tiles to a
    pack of any row that has room below nearly all of its own, in exchange for a sample of as many tokens. Images mostly
    have odd numbers of tiles, so exchanges move two or four: room for one is of no use, and few pairs have what fits.

    Args:
        pack, tokens, tiles: [S] per sample; every sample has a pack, and no pack holds too much before or after.
        num_packs, row_packs, max_tokens: packs (whole rows), packs side by side, and what a pack may hold.
    """
    tokens_S, tiles_S = np.append(tokens, 0).astype(np.int32), np.append(tiles, 0).astype(np.int32)
    load = np.bincount(pack, weights=tokens, minlength=num_packs).astype(np.int32)
    tile_load = np.bincount(pack, weights=tiles, minlength=num_packs).astype(np.int32)
    for number in range(TRIM_ROUNDS):
        order = np.argsort(-tile_load, kind="stable")
        by_row = tile_load[order].reshape(-1, row_packs)
        if (by_row[:, :1] - by_row).sum() * 1000 <= TRIM_FROM * by_row.sum():
            return
        room = by_row[:, row_packs // TRIM_SHARE][:, None] - by_row
        num_above = np.repeat((room < 0).sum(1), row_packs)
        room = room.reshape(-1)
        givers = np.flatnonzero(room < 0)
        givers = givers[np.argsort(num_above[givers], kind="stable")][
            :TRIM_PAIRS
        ]  # a row counts only when all are done
        takers = np.flatnonzero(room > 1)
        if not len(givers) or not len(takers):
            return
        tries = min(TRIM_PAIRS // len(givers), len(takers))
        partner = (
            np.arange(tries * len(givers)) * len(takers) // (tries * len(givers)) + 7 * number
        )  # others each round
        takers, column = np.unique(takers[partner % len(takers)], return_inverse=True)
        column = column.reshape(tries, len(givers)).T
        excess, room = -room[givers], room[takers]
        givers, takers = order[givers], order[takers]
        slots = _members(pack, np.concatenate([givers, takers]), num_packs)
        ours, theirs = slots[: len(givers), None, :, None], slots[len(givers) :][column][:, :, None, :]
        more, more_tiles = (
            tokens_S[ours] - tokens_S[theirs],
            tiles_S[ours] - tiles_S[theirs],
        )  # [givers, tries, ours, theirs]
        fits = (more <= max_tokens - load[takers][column][:, :, None, None]) & (more_tiles > 0)
        fits &= (more >= load[givers][:, None, None, None] - max_tokens) & (
            more_tiles <= room[column][:, :, None, None]
        )
        gain = np.minimum(more_tiles, excess[:, None, None, None])
        worth = np.where(fits, gain * 2**20 - np.abs(more), -1).reshape(len(givers), -1)
        best = worth.argmax(1)
        done = np.flatnonzero(worth[np.arange(len(givers)), best] >= 0)
        tried, mine, other = np.unravel_index(best[done], (tries, slots.shape[1], slots.shape[1]))
        taker = column[done, tried]
        taker, first = np.unique(taker, return_index=True)  # a pack exchanges with one at a time
        mine, other = slots[done[first], mine[first]], slots[len(givers) + taker, other[first]]
        giver, taker = givers[done[first]], takers[taker]
        for sizes, loads in ((tokens_S, load), (tiles_S, tile_load)):
            change = sizes[mine] - sizes[other]
            loads[giver] -= change
            loads[taker] += change
        pack[mine[mine >= 0]] = taker[mine >= 0]
        pack[other[other >= 0]] = giver[other >= 0]


def _repair(pack, tokens, tiles, num_packs, max_tokens, max_tiles):
    """Packs that still hold too much exchange with others far below, among many samples of both, in place."""
    tokens_S, tiles_S = np.append(tokens, 0), np.append(tiles, 0)
    load = np.bincount(pack, weights=tokens, minlength=num_packs).astype(np.int64)
    tile_load = np.bincount(pack, weights=tiles, minlength=num_packs).astype(np.int64)
    for number in range(REPAIR_ROUNDS):
        is_over = (load > max_tokens) | (tile_load > max_tiles)
        over, others = np.flatnonzero(is_over), np.flatnonzero(~is_over)
        if not len(over) or not len(others):
            return
        lightest = others[np.argsort(load[others] + tile_load[others] * TOKENS_PER_TILE, kind="stable")]
        over = over[: len(lightest)]
        lightest = np.roll(lightest[: 2 * len(over)], number * len(over) // 2)[: len(over)]  # other partners next time
        slots = _members(pack, np.concatenate([over, lightest]), num_packs)
        ours, theirs = slots[: len(over)], slots[len(over) :]
        left = 0
        for sizes, loads, most, worth in (
            (tokens_S, load, max_tokens, 1),
            (tiles_S, tile_load, max_tiles, TOKENS_PER_TILE),
        ):
            more = sizes[ours][:, :, None] - sizes[theirs][:, None, :]
            heavy, light = loads[over][:, None, None] - more, loads[lightest][:, None, None] + more
            excess = np.maximum(heavy - most, 0) + np.maximum(light - most, 0)
            left = left + worth * (np.abs(heavy - light) + excess * 2**20)
        best = left.reshape(len(over), -1).argmin(1)
        rows = np.arange(len(over))
        mine, other = ours[rows, best // ours.shape[1]], theirs[rows, best % ours.shape[1]]
        for sizes, loads in ((tokens_S, load), (tiles_S, tile_load)):
            change = sizes[mine] - sizes[other]
            loads[over] -= change
            loads[lightest] += change
        pack[mine[mine >= 0]] = lightest[mine >= 0]
        pack[other[other >= 0]] = over[other >= 0]


def _members(pack, chosen, num_packs):
    """Samples of the chosen packs, up to `REPAIR_CANDIDATES` spread over each, and one free place: [chosen, width + 1]."""
    row = np.full(num_packs, -1)
    row[chosen] = np.arange(len(chosen))
    places = np.flatnonzero(row[pack] >= 0)
    slots = _slots(
        row[pack[places]], len(chosen), min(REPAIR_CANDIDATES, int(np.bincount(pack[places]).max(initial=1)))
    )
    return np.where(slots >= 0, places[slots], -1)


def _best_exchange(slots_low, slots_high, token_gap, tile_gap, tokens, tiles):
    """Per pair of packs the two places whose exchange leaves the least difference: (place, place, difference left)."""
    low, high = 2 * tokens[slots_low], 2 * tokens[slots_high]
    left = np.abs((token_gap[:, None] - low)[:, :, None] + high[:, None, :])
    low, high = 2 * tiles[slots_low], 2 * tiles[slots_high]
    left += np.abs((tile_gap[:, None] - low)[:, :, None] + high[:, None, :])
    left = left.reshape(len(left), -1)
    best = left.argmin(1)
    width = slots_low.shape[1]
    return best // width, best % width, left[np.arange(len(left)), best]


def _slots(pack, num_packs, width=CANDIDATES):
    """Up to `width` samples of each pack, spread over its samples, and one free place: [packs, width + 1]."""
    order = np.argsort(pack, kind="stable")
    number = np.bincount(pack, minlength=num_packs)
    step = np.maximum(number, width)[:, None] * np.arange(width) // width
    places = np.minimum((np.cumsum(number) - number)[:, None] + step, len(order) - 1)
    chosen = np.where(step < number[:, None], order[places], -1)
    return np.concatenate([chosen, np.full((num_packs, 1), -1)], axis=1)


def _take_out(pack, tokens, tiles, num_packs, max_tokens, max_tiles, is_kept):
    """Take samples out of packs that hold too much (the smallest that will do) and put them where they still fit."""
    load = np.bincount(pack, weights=tokens, minlength=num_packs).astype(np.int64)
    tile_load = np.bincount(pack, weights=tiles, minlength=num_packs).astype(np.int64)
    taken = []
    for number in np.flatnonzero((load > max_tokens) | (tile_load > max_tiles)):
        inside = np.flatnonzero(pack == number)
        while load[number] > max_tokens or tile_load[number] > max_tiles:
            over = max(load[number] - max_tokens, 0), max(tile_load[number] - max_tiles, 0)
            enough = (tokens[inside] >= over[0]) & (tiles[inside] >= over[1])
            cost = tokens[inside] + np.where(enough, 0, 2**40)
            if not enough.any():
                cost = -tokens[inside] - tiles[inside] * TOKENS_PER_TILE
            if is_kept is not None:
                cost = cost + is_kept[inside] * 2**50
            place = inside[np.argmin(cost)]
            inside = inside[inside != place]
            pack[place] = -1
            load[number] -= tokens[place]
            tile_load[number] -= tiles[place]
            taken.append(place)
    for place in sorted(taken, key=lambda place: (-tokens[place], place)):
        fits = (load + tokens[place] <= max_tokens) & (tile_load + tiles[place] <= max_tiles)
        if fits.any():
            number = int(np.argmax(np.where(fits, load, -1)))
            pack[place] = number
            load[number] += tokens[place]
            tile_load[number] += tiles[place]


def best_fit(tokens, tiles, num_packs, max_tokens, max_tiles):
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


def first_fit(tokens, tiles, num_packs, max_tokens, max_tiles):
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
