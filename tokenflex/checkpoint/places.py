"""Which rank's file has which elements of a parameter: what a manifest says of it, and who must be read for a stretch.

Most parameters are cut by a rule, which takes one word whatever the number of ranks: `blocks` (equal ones, rounded up, as
ZeRO-3 cuts them) or a number of ranks that share one evenly, as what all of them hold. Others are listed piece by piece.
"""

from collections.abc import Iterable
from typing import Any

import torch

from .manifest import Manifest
from .shard import frozen_name, shard_name

BLOCKS = "blocks"
Place = str | int | list[list[int]]
"""`blocks`, how many ranks share it, or [[rank, start, length], ...]."""


def gathered_places(parts: Iterable[dict[str, Any]]) -> dict[str, Place]:
    """What all ranks' `places` say together: rules are the same on every rank, pieces are put one behind another."""
    places: dict[str, Place] = {}
    for part in parts:
        for name, place in part.items():
            known = places.setdefault(name, place if isinstance(place, str | int) else [])
            if isinstance(known, list):
                known += place
    return places


def files_with(manifest: Manifest, name: str, start: int, length: int) -> list[str]:
    """The files that have any of elements [start, start + length) of a parameter; all of them where the manifest is silent."""
    place = manifest.places.get(name)
    if place is None:
        return sorted(manifest.files)
    shape, _, is_trained = manifest.parameters[name]
    total, num_ranks = torch.Size(shape).numel(), manifest.num_ranks
    if place == BLOCKS:
        per_rank = -(-total // num_ranks)
        ranks: Iterable[int] = range(start // per_rank, min((start + length - 1) // per_rank, num_ranks - 1) + 1)
    elif isinstance(place, int):
        ends = [(rank, total * rank // place, total * (rank + 1) // place) for rank in range(place)]
        ranks = [rank for rank, begin, end in ends if begin < end and begin < start + length and end > start]
    else:
        ranks = [rank for rank, begin, size in place if begin < start + length and begin + size > start]
    name_of = shard_name if is_trained else frozen_name
    return [name_of(rank, num_ranks) for rank in ranks]
