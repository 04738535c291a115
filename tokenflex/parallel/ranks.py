"""The few words that ranks exchange besides gradients: agreements and small plain values, over the CPU."""

import torch

from ..errors import UserError


class Ranks:
    """The ranks of a job. Every method is collective: all ranks call it, in the same order.

    It has a gloo group of its own: on GPUs an agreement waits for no kernel, and a rank that leaves one out is found waiting
    in another group's collective instead of feeding it with the wrong bytes.
    """

    def __init__(self, launch):
        self.rank, self.num_ranks = launch.rank, launch.num_ranks
        self._group = torch.distributed.new_group(backend="gloo")

    def agree(self, numbers):
        """Element-wise maximum of a list of numbers over all ranks."""
        values = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self._group)
        return values.tolist()

    def gather(self, value):
        """Every rank's `value` (plain, small), as a list on every rank."""
        values = [None] * self.num_ranks
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def check_same_plan(self, digest, where):
        """Every rank's digest of the plan of `where` (words) must be the same.

        Raises:
            UserError: on every rank, naming the first that differs from rank 0 and both digests.
        """
        digests = self.gather(digest)
        for rank, other in enumerate(digests):
            if other != digests[0]:
                raise UserError(
                    f"data, {where}: rank {rank} plans {other}, rank 0 plans {digests[0]}; do all nodes see the same index and "
                    "package versions?"
                )

    def barrier(self):
        """Wait for all ranks."""
        torch.distributed.barrier(group=self._group)

    def on_main(self, function):
        """Run `function` on rank 0 while the others wait; returns its (plain, small) result on every rank.

        Raises:
            UserError: what it raised on rank 0, on every rank, so that none waits for the others.
        """
        result = error = None
        if self.rank == 0:
            try:
                result = function()
            except UserError as raised:
                error = str(raised)
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise UserError(error)
        return result
