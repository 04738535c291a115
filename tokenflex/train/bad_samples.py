"""The account of bad samples in a run: a line for each, a count over all ranks, and a stop when there are too many."""

import json
from pathlib import Path

from ..errors import UserError

MIN_SAMPLES = 1000
"""The allowed share is taken of at least this many samples, so that one bad sample early on stops no run."""


class BadSampleLog:
    """Writes `bad-samples/rank-00000.jsonl` (one line per bad sample met) and watches their share.

    Args:
        folder: of the run. rank: whose file. max_fraction: `data.max_bad_fraction`.
    """

    def __init__(self, folder, rank, max_fraction):
        self.path = Path(folder) / "bad-samples" / f"rank-{rank:05d}.jsonl"
        self.max_fraction = max_fraction
        self.num_samples = self.num_bad = 0

    def add(self, batch, step):
        """Log the bad samples of a `PackedBatch` of the optimizer step `step`."""
        if batch.skipped:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **record}) + "\n" for record in batch.skipped)

    def check(self, num_samples, num_bad):
        """Count an interval's samples over all ranks; every rank calls it with the same figures.

        Raises:
            UserError: more bad samples than the allowed share since this process began.
        """
        self.num_samples += num_samples
        self.num_bad += num_bad
        if self.num_bad > self.max_fraction * max(self.num_samples, MIN_SAMPLES):
            raise UserError(
                f"data.train: {self.num_bad} of {self.num_samples} samples are bad, more than data.max_bad_fraction="
                f"{self.max_fraction:g} allows (of at least {MIN_SAMPLES}); {self.path.parent} names them: repair the shards "
                "(tokenflex data validate), or raise the limit"
            )
