"""The account of bad samples in a run: a line for each, a count over all ranks, and a stop when there are too many."""

import json
from pathlib import Path

import torch

from ..errors import UserError

MIN_SAMPLES = 1000
"""The allowed share is taken of at least this many samples, so that one bad sample early on stops no run."""


class BadSampleLog:
    """Writes `bad-samples/rank-00000.jsonl` (one line per bad sample met) and watches their share.

    Args:
        folder: of the run. rank: whose file. max_fraction: `data.max_bad_fraction`.
        progress: the run's, which carries the totals `num_samples` and `num_bad_samples` into checkpoints.
    """

    def __init__(self, folder, rank, max_fraction, progress):
        self.path = Path(folder) / "bad-samples" / f"rank-{rank:05d}.jsonl"
        self.max_fraction = max_fraction
        self.progress = progress
        self.forget()

    def forget(self):
        """Drop what was met since the last `count`: the run has gone back, and the totals with it."""
        self.num_samples = self.num_bad = 0

    def add(self, batch, step):
        """Log the bad samples of a `PackedBatch` of the optimizer step `step`."""
        self.num_samples += batch.sample_ids.shape[0]
        self.num_bad += len(batch.skipped)
        if batch.skipped:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **record}) + "\n" for record in batch.skipped)

    def count(self, sum_over_ranks):
        """Bring the totals up to date, for a check or a checkpoint; every rank calls it. sum_over_ranks: of a 1-D tensor."""
        sums = sum_over_ranks(torch.tensor([self.num_samples, self.num_bad], dtype=torch.float64)).tolist()
        self.progress["num_samples"] += int(sums[0])
        self.progress["num_bad_samples"] += int(sums[1])
        self.forget()

    def check(self):
        """Compare the totals with the limit; every rank calls it after `count`.

        Raises:
            UserError: more bad samples than the allowed share since the run began, resumed or not.
        """
        num_samples, num_bad = self.progress["num_samples"], self.progress["num_bad_samples"]
        if num_bad > self.max_fraction * max(num_samples, MIN_SAMPLES):
            raise UserError(
                f"data.train: {num_bad} of {num_samples} samples are bad, more than data.max_bad_fraction="
                f"{self.max_fraction:g} allows (of at least {MIN_SAMPLES}); {self.path.parent} names them: repair the shards "
                "(tokenflex data validate), or raise the limit"
            )
