"""Figures by name, each with its way of being reduced: added where they are computed, read in one exchange when logged."""

from collections.abc import Sequence
from typing import Literal

import torch

from ..parallel import Ranks

Reduction = Literal["count", "sum", "mean", "step_mean", "max", "same", "last", "spread", "lockstep"]
"""How values of one name, added over time on many ranks, become one number.

count: sum over time and ranks, a whole number. sum: likewise, any number. mean: sum over time and ranks per weight added,
which is 1 for each value unless said otherwise. step_mean: sum over ranks, mean over time, of values that each rank adds once
per step. max: the largest. same: mean over time of values that are equal on all ranks. last: the last one added on this rank;
equal on all. spread: of the ranks' own means over time, `{mean, max, rank}`: their mean, the highest and whose it is (not
negative, below 8,000, told to a millionth). lockstep: of values that ranks add at the same time, which all wait for the
highest of: the share of it that they have on average, in (0, 1]; all ranks add equally many.
"""

SUMMED = ("count", "sum", "mean", "step_mean", "spread", "lockstep")
MAX_RANKS = 2**20
PER_UNIT = 1e6
"""A spread's values travel as whole millionths with their rank behind: below 2**53, exact as floats, of which the highest wins."""


class Metrics:
    """The figures of one logging interval.

    Every rank declares the same names, so that what is exchanged has the same length and order everywhere. Values may be
    numbers or scalars on the device, which are not waited for until they are read.
    """

    def __init__(self):
        self._reductions: dict[str, Reduction] = {}
        self.clear()

    def declare(self, name: str, reduction: Reduction) -> None:
        """Make a name known; `a/b` is logged as `{"a": {"b": ...}}`."""
        assert self._reductions.get(name, reduction) == reduction, f"{name} is declared twice, in two ways"
        self._reductions[name] = reduction

    def add(self, name: str, value: float | torch.Tensor, weight: float = 1) -> None:
        """Add a value to a declared name; `weight` is what a mean divides by."""
        reduction = self._reductions[name]
        before = self._values.get(name)
        if reduction == "lockstep":
            self._together.setdefault(name, []).append(float(value))
        elif before is None or reduction == "last":
            self._values[name] = value
        elif reduction == "max":
            self._values[name] = torch.maximum(*map(torch.as_tensor, (before, value)))
        else:
            self._values[name] = before + value
        self._numbers[name] = self._numbers.get(name, 0) + weight

    def clear(self) -> None:
        """Forget what was added: an interval begins."""
        self._values: dict[str, float | torch.Tensor] = {}
        self._numbers: dict[str, float] = {}
        self._together: dict[str, list[float]] = {}

    def read(self, ranks: Ranks) -> dict:
        """{name: number over all ranks}, nested by the names' slashes, and clear; every rank must call it.

        None where nothing was added that a mean, a maximum or a last value could be of.
        """
        sums, highest = self._sums(ranks), self._highest(ranks)
        record: dict = {}
        for name in self._reductions:
            *sections, key = name.split("/")
            node = record
            for section in sections:
                node = node.setdefault(section, {})
            node[key] = self._final(name, sums, highest, ranks)
        self.clear()
        return record

    def _named(self, *reductions: str) -> list[str]:
        return [name for name, reduction in sorted(self._reductions.items()) if reduction in reductions]

    def _sums(self, ranks: Ranks) -> dict[str, tuple[float, float]]:
        """{name: (sum over ranks, sum of weights)} in one exchange."""
        names = self._named(*SUMMED)
        if not names:
            return {}
        numbers = torch.tensor([self._numbers.get(name, 0) for name in names], dtype=torch.float64)
        sums = torch.cat([self._summands(names), numbers])
        sums = ranks.all_reduce_sum(sums).tolist()
        return dict(zip(names, zip(sums, sums[len(names) :])))

    def _summands(self, names: Sequence[str]) -> torch.Tensor:
        """What this rank has of each name: [names] in fp64 on the host; what is on one device comes in one transfer."""
        own = {name: self._summand(name) for name in names}
        tensors = {name: value for name, value in own.items() if isinstance(value, torch.Tensor)}
        for device in {value.device for value in tensors.values()}:
            there = {name: value.double() for name, value in tensors.items() if value.device == device}
            own |= dict(zip(there, torch.stack(list(there.values())).tolist()))
        return torch.tensor([own[name] for name in names], dtype=torch.float64)

    def _summand(self, name: str) -> float | torch.Tensor:
        if name in self._together:
            return sum(self._together[name])
        return self._own_mean(name) if self._reductions[name] == "spread" else self._values.get(name, 0.0)

    def _highest(self, ranks: Ranks) -> dict[str, list[float]]:
        """{name: highest values over ranks} in one exchange."""
        own: dict[str, list[float]] = {
            name: [float(self._values.get(name, float("-inf")))] for name in self._named("max")
        }
        own |= {name: [_with_rank(self._own_mean(name), ranks.rank)] for name in self._named("spread")}
        own |= {name: self._together.get(name, []) for name in self._named("lockstep")}
        flat = [value for values in own.values() for value in values]
        found = iter(ranks.all_reduce_max(flat) if flat else [])
        return {name: [next(found) for _ in values] for name, values in own.items()}

    def _own_mean(self, name: str) -> float:
        return float(self._values.get(name, 0.0)) / max(self._numbers.get(name, 0), 1)

    def _final(self, name, sums, highest, ranks):
        reduction, own = self._reductions[name], self._numbers.get(name, 0)
        total, number = sums.get(name, (float(self._values.get(name, 0.0)), own))
        if reduction == "count":
            return int(total)
        if reduction == "sum":
            return total
        if reduction == "max":
            return None if highest[name][0] == float("-inf") else highest[name][0]
        if not number:
            return None
        if reduction == "spread":
            value, rank = divmod(int(highest[name][0]), MAX_RANKS)
            return {"mean": total / ranks.num_ranks, "max": value / PER_UNIT, "rank": rank}
        if reduction == "lockstep":
            waited_for = ranks.num_ranks * sum(highest[name])
            return total / waited_for if waited_for else None
        return total if reduction == "last" else total / (own if reduction == "step_mean" else number)


def _with_rank(value: float, rank: int) -> float:
    return float(int(min(value, 8e3) * PER_UNIT) * MAX_RANKS + rank)
