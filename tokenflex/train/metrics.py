"""Figures by name, each with its way of being reduced: added where they are computed, read in one exchange when logged."""

from typing import Literal

import torch

from ..parallel import Ranks

Reduction = Literal["count", "sum", "mean", "step_mean", "max", "same", "last"]
"""How values of one name, added over time on many ranks, become one number.

count: sum over time and ranks, a whole number. sum: likewise, any number. mean: sum over time and ranks per value added.
step_mean: sum over ranks, mean over time, of values that each rank adds once per step. max: the largest. same: mean over
time of values that are equal on all ranks. last: the last one added on this rank; equal on all.
"""

SUMMED = ("count", "sum", "mean", "step_mean")


class Metrics:
    """The figures of one logging interval.

    Every rank declares the same names, so that what is exchanged has the same length and order everywhere. Values may be
    numbers or scalars on the device, which are not waited for until they are read.
    """

    def __init__(self):
        self._reductions: dict[str, Reduction] = {}
        self._values: dict[str, float | torch.Tensor] = {}
        self._numbers: dict[str, int] = {}

    def declare(self, name: str, reduction: Reduction) -> None:
        """Make a name known; `a/b` is logged as `{"a": {"b": ...}}`."""
        assert self._reductions.get(name, reduction) == reduction, f"{name} is declared twice, in two ways"
        self._reductions[name] = reduction

    def add(self, name: str, value: float | torch.Tensor) -> None:
        """Add a value to a declared name."""
        reduction = self._reductions[name]
        before = self._values.get(name)
        if before is None or reduction == "last":
            self._values[name] = value
        elif reduction == "max":
            self._values[name] = torch.maximum(*map(torch.as_tensor, (before, value)))
        else:
            self._values[name] = before + value
        self._numbers[name] = self._numbers.get(name, 0) + 1

    def clear(self) -> None:
        """Forget what was added: an interval begins."""
        self._values, self._numbers = {}, {}

    def read(self, ranks: Ranks) -> dict:
        """{name: number over all ranks}, nested by the names' slashes, and clear; every rank must call it.

        None where nothing was added that a mean, a maximum or a last value could be of.
        """
        summed = [name for name, reduction in sorted(self._reductions.items()) if reduction in SUMMED]
        values = {}
        if summed:
            numbers = torch.tensor([self._numbers.get(name, 0) for name in summed], dtype=torch.float64)
            sums = torch.cat([torch.stack([self._summand(name) for name in summed]), numbers])
            sums = ranks.all_reduce_sum(sums).tolist()
            values = {name: (total, number) for name, total, number in zip(summed, sums, sums[len(summed) :])}
        highest = [name for name, reduction in sorted(self._reductions.items()) if reduction == "max"]
        if highest:
            largest = ranks.all_reduce_max([float(self._values.get(name, float("-inf"))) for name in highest])
            values.update((name, (value, 1)) for name, value in zip(highest, largest))
        record: dict = {}
        for name, reduction in self._reductions.items():
            *sections, key = name.split("/")
            node = record
            for section in sections:
                node = node.setdefault(section, {})
            node[key] = self._final(name, reduction, values)
        self.clear()
        return record

    def _summand(self, name):
        return torch.as_tensor(self._values.get(name, 0.0), dtype=torch.float64).cpu()

    def _final(self, name, reduction, values):
        own = self._numbers.get(name, 0)
        total, number = values.get(name, (float(self._values.get(name, 0.0)), own))
        if reduction == "count":
            return int(total)
        if reduction == "sum":
            return total
        if reduction == "max":
            return None if total == float("-inf") else total
        if not number:
            return None
        return total if reduction == "last" else total / (own if reduction == "step_mean" else number)
