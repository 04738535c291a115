"""How others pack, for a run side by side: their own packages where they install, else their published rule in our words.

Each function takes lengths [S] in tokens, tiles [S] and the capacity of a pack, and returns packs as lists of sample
numbers. `TABLE` names them, and says whether their trainers shuffle the packs (where a corpus is packed before training,
they do: the packs of best-fit decreasing come sorted by their longest sample otherwise); a package that is missing leaves
its row out.
"""

import bisect
from collections import defaultdict

import numpy as np

BATCH = 1000


def next_fit(lengths, tiles, capacity):
    """Samples as they come; a pack is closed by the first that does not fit (lmms-engine, Megatron-Core)."""
    packs, used = [[]], 0
    for sample, length in enumerate(lengths.tolist()):
        if used + length > capacity:
            packs.append([])
            used = 0
        packs[-1].append(sample)
        used += length
    return packs


def greedy_knapsack(lengths, tiles, capacity):
    """Of a batch, always the longest that still fits into the open pack (LLaMA-Factory's rule)."""
    packs = []
    for begin in range(0, len(lengths), BATCH):
        waiting = sorted((int(length), begin + place) for place, length in enumerate(lengths[begin : begin + BATCH]))
        while waiting:
            pack, room = [], capacity
            while (at := bisect.bisect_right(waiting, (room, len(lengths)))) > 0:
                length, sample = waiting.pop(at - 1)
                pack.append(sample)
                room -= length
            packs.append(pack)
    return packs


def best_fit_decreasing(lengths, tiles, capacity):
    """Longest first over the whole corpus, each into the pack with the least room that holds it (OLMo-core's rule)."""
    with_room, rooms, packs = defaultdict(list), [], []
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            packs.append([])
            number, room = len(packs) - 1, capacity
        else:
            room = rooms[at]
            number = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(at)
        packs[number].append(sample)
        if not with_room[room - length]:
            bisect.insort(rooms, room - length)
        with_room[room - length].append(number)
    return packs


def sorted_by_visual_tokens(lengths, tiles, capacity):
    """Samples in the order of their tiles, greedily by length within a batch of equal ones (NeMo Automodel's idea)."""
    order = np.argsort(-tiles, kind="stable")
    return [[int(order[place]) for place in pack] for pack in greedy_knapsack(lengths[order], tiles[order], capacity)]


def sorted_by_length(lengths, tiles, capacity):
    """Batches sorted by length and cut where a pack is full (length grouping without packing proper)."""
    packs = []
    for begin in range(0, len(lengths), BATCH):
        order = begin + np.argsort(lengths[begin : begin + BATCH], kind="stable")
        packs += [[int(order[place]) for place in pack] for pack in next_fit(lengths[order], tiles, capacity)]
    return packs


def ms_swift(lengths, tiles, capacity):
    """The package `binpacking` over batches of 1,000 samples, as ms-swift calls it."""
    import binpacking

    packs = []
    for begin in range(0, len(lengths), BATCH):
        items = [(sample, int(lengths[sample])) for sample in range(begin, min(begin + BATCH, len(lengths)))]
        packs += [
            [sample for sample, _ in pack] for pack in binpacking.to_constant_volume(items, capacity, weight_pos=1)
        ]
    return packs


def trl(lengths, tiles, capacity):
    """What TRL's `pack_dataset` runs on each batch of rows, best-fit decreasing; a sample is its number, `length` times over."""
    import pyarrow
    from trl.data_utils import _pack_bfd

    packs = []
    for begin in range(0, len(lengths), BATCH):
        part = lengths[begin : begin + BATCH]
        offsets = np.append(0, np.cumsum(part)).astype(np.int32)
        values = pyarrow.array(np.repeat(np.arange(begin, begin + len(part)), part))
        table = pyarrow.table({"input_ids": pyarrow.ListArray.from_arrays(offsets, values)})
        packed = _pack_bfd(table, capacity)
        for row in packed["input_ids"]:
            values = row.values.to_numpy()
            packs.append(values[np.append(True, np.diff(values) != 0)].tolist())
    return packs


def olmo_core(lengths, tiles, capacity):
    """OLMo-core's `InstancePacker`, best-fit decreasing over the whole corpus."""
    from olmo_core.data.utils import InstancePacker

    packer, packs = InstancePacker(capacity), defaultdict(list)
    for sample in np.argsort(-lengths, kind="stable").tolist():
        packs[packer._pack_document(sample, int(lengths[sample]))].append(sample)
    return list(packs.values())


TABLE = {
    "next-fit": (next_fit, False),
    "length groups": (sorted_by_length, True),
    "greedy knapsack": (greedy_knapsack, True),
    "best-fit decreasing": (best_fit_decreasing, True),
    "sorted by visual tokens": (sorted_by_visual_tokens, False),
    "binpacking (ms-swift)": (ms_swift, True),
    "TRL pack_dataset": (trl, True),
    "OLMo-core": (olmo_core, True),
}
"""Name: (packer, whether the packs are shuffled afterwards)."""
