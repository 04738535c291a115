"""The ranks of a job, and the one way to reduce, gather and agree over them."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from .. import failpoints
from ..errors import UserError
from .environment import Launch

T = TypeVar("T")


class Ranks:
    """The ranks of a job. Every method is collective: all ranks call it, in the same order.

    Small plain values travel over a gloo group of their own: on GPUs an agreement waits for no kernel, and a rank that leaves
    one out is found waiting in another group's collective instead of feeding it with the wrong bytes. Sums of tensors go
    where the gradients go.

    Args:
        launch: this process' place in the job, whose process group has been joined.
        device: this rank's.
    """

    def __init__(self, launch: Launch, device: torch.device):
        self.launch, self.device = launch, device
        self.rank, self.num_ranks = launch.rank, launch.num_ranks
        self._group = torch.distributed.new_group(backend="gloo")

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes for all."""
        return self.rank == 0

    def all_reduce_max(self, numbers: Sequence[float]) -> list[float]:
        """Element-wise maximum of a list of numbers over all ranks."""
        if failpoints.skips("agree"):
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self._group)
        return values.tolist()

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum of a 1-D tensor over all ranks, on this rank's device."""
        values = values.to(self.device, copy=True)
        torch.distributed.all_reduce(values)
        return values

    def all_gather(self, value: T) -> list[T]:
        """Every rank's `value` (plain, small), as a list on every rank."""
        values: list[Any] = [None] * self.num_ranks
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def check_same_plan(self, digest: str, where: str) -> None:
        """Every rank's digest of the plan of `where` (words) must be the same.

        Raises:
            UserError: on every rank, naming the first that differs from rank 0 and both digests.
        """
        digests = self.all_gather(digest)
        for rank, other in enumerate(digests):
            if other != digests[0]:
                raise UserError(
                    f"data, {where}: rank {rank} plans {other}, rank 0 plans {digests[0]}; do all nodes see the same index and "
                    "package versions?"
                )

    def barrier(self) -> None:
        """Wait for all ranks."""
        torch.distributed.barrier(group=self._group)

    def on_main(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 while the others wait; returns its (plain, small) result on every rank.

        Raises:
            UserError: what it raised on rank 0, on every rank, so that none waits for the others.
        """
        result: Any = None
        error: str | None = None
        if self.is_main:
            try:
                result = function()
            except UserError as raised:
                error = str(raised)
        result, error = self.all_gather((result, error))[0]
        if error is not None:
            raise UserError(error)
        return result
