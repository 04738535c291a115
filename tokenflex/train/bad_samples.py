"""The account of bad samples in a run: a line for each, a count over all ranks, and a stop when there are too many."""

import json

import torch

from ..data.collate import PackedBatch
from ..errors import UserError
from ..layout import RunLayout
from .observers import Observer
from .progress import Progress
from .state import RunState

MIN_SAMPLES = 1000
"""The allowed share is taken of at least this many samples, so that one bad sample early on stops no run."""


class BadSampleLog(Observer):
    """Writes a line per bad sample met into the run's folder, and watches their share.

    The totals (`Progress.num_samples`, `num_bad_samples`) travel in checkpoints.

    Args:
        max_fraction: `data.max_bad_fraction`.
    """

    def __init__(self, layout: RunLayout, state: RunState, max_fraction: float):
        self.path = layout.bad_samples(state.ranks.rank)
        self.state, self.max_fraction = state, max_fraction
        self.on_rewind(0)

    def on_rewind(self, step: int) -> None:
        """Drop what was met since the totals were last brought up to date: they have gone back with the run."""
        self.num_samples = self.num_bad = 0

    def on_batch(self, step: int, batch: PackedBatch) -> None:
        self.num_samples += batch.sample_ids.shape[0]
        self.num_bad += len(batch.skipped)
        if batch.skipped:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **record}) + "\n" for record in batch.skipped)

    def on_save(self, progress: Progress) -> None:
        """Bring the totals up to date."""
        sums = torch.tensor([self.num_samples, self.num_bad], dtype=torch.float64)
        num_samples, num_bad = self.state.ranks.all_reduce_sum(sums).tolist()
        progress.num_samples += int(num_samples)
        progress.num_bad_samples += int(num_bad)
        self.num_samples = self.num_bad = 0

    def on_log(self, record: dict) -> None:
        """Compare the totals with the limit.

        Raises:
            UserError: more bad samples than the allowed share since the run began, resumed or not.
        """
        progress = self.state.progress
        self.on_save(progress)
        if progress.num_bad_samples > self.max_fraction * max(progress.num_samples, MIN_SAMPLES):
            raise UserError(
                f"data.train: {progress.num_bad_samples} of {progress.num_samples} samples are bad, more than "
                f"data.max_bad_fraction={self.max_fraction:g} allows (of at least {MIN_SAMPLES}); {self.path.parent} names "
                "them: repair the shards (tokenflex data validate), or raise the limit"
            )
