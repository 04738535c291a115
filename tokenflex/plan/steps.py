"""What a plan is made of: packs, steps, a place in the data, and the samples that no pack gets."""

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True)
class Position:
    """Where in the data a run is: the next step to run is `step` of `epoch`.

    The rest says where the window begins that this step begins in (`State`; empty at the start of an epoch) and how many of
    the window's rows are done.
    """

    epoch: int = 0
    step: int = 0
    frontier: int = 0
    cursors: tuple[int, ...] = ()
    waited: tuple[int, ...] = ()
    fills: tuple[int, ...] = ()
    left_over: tuple[int, ...] = ()
    row: int = 0

    def __post_init__(self) -> None:
        for name in ("cursors", "waited", "fills", "left_over"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def as_dict(self) -> dict[str, Any]:
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
    packs: tuple[Pack, ...]
    total_weight: float
    next_position: Position

    def digest(self) -> str:
        """16 hex digits that ranks compare to find out that they plan the same."""
        digest = hashlib.sha256()
        for pack in self.packs:
            digest.update(
                np.concatenate([[len(pack.sample_ids)], pack.sample_ids, pack.counts]).astype("<i8").tobytes()
            )
        return digest.hexdigest()[:16]


@dataclass
class Dropped:
    """Samples that no pack gets, or not whole: how many for which reason, and the first of their ids."""

    numbers: Counter[str] = field(default_factory=Counter)
    ids: dict[str, list[int]] = field(default_factory=dict)
    MAX_LISTED: ClassVar[int] = 1000

    def add(self, reason: str, ids: np.ndarray) -> None:
        if len(ids):
            self.numbers[reason] += len(ids)
            listed = self.ids.setdefault(reason, [])
            listed += [int(i) for i in ids[: self.MAX_LISTED - len(listed)]]
