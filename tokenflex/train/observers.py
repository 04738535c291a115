"""Who is told what a run does: an ordered list without priorities, and nobody in it steers the loop.

The trainer tells every observer the same things in the order of the list, which stands in `run.py`. All of it happens on
every rank in the same order, so an observer may use collectives.
"""

import time
from collections import Counter
from collections.abc import Callable

from ..data.collate import PackedBatch
from ..parallel import Engine
from .metrics import Metrics
from .objective import Loss
from .progress import Progress, StepOutcome


class Observer:
    """Told what a run does; one that has nothing to do with a thing leaves its method as it is."""

    def on_batch(self, step: int, batch: PackedBatch) -> None:
        """A micro-batch of `step` (0-based) is about to be run."""

    def on_loss(self, batch: PackedBatch, loss: Loss) -> None:
        """A micro-batch, on its device now, has been through the forward pass."""

    def on_step(self, outcome: StepOutcome) -> None:
        """A step is done; the run's progress has been moved on."""

    def on_log(self, record: dict) -> None:
        """An interval's figures are there: what goes into metrics.jsonl."""

    def on_save(self, progress: Progress) -> None:
        """A checkpoint is about to be begun."""

    def on_rewind(self, step: int) -> None:
        """The run has gone back: what was told since `step` will be told anew."""

    def close(self) -> None:
        """The run ends, well or not."""


class WeightAverage(Observer):
    """Moves the average of the weights (`train.ema_decay`) after every step that moved them."""

    def __init__(self, engine: Engine, decay: float):
        self.engine, self.decay = engine, decay
        engine.slices()  # a new run's average begins at the weights before its first step

    def on_step(self, outcome: StepOutcome) -> None:
        if not outcome.problem:
            self.engine.update_average(self.decay)


class FirstStep(Observer):
    """Says how long the first batch and the first step took, after which a run tells of itself by its steps."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self._begin, self._read = say, time.monotonic(), 0.0

    def on_batch(self, step: int, batch: PackedBatch) -> None:
        if self._begin and not self._read:
            self._read = time.monotonic()

    def on_step(self, outcome: StepOutcome) -> None:
        if self._begin:
            batch_s, step_s = self._read - self._begin, time.monotonic() - self._read
            self.say(f"first     batch after {batch_s:.1f} s, step {outcome.step + 1} took {step_s:.1f} s")
            self._begin = 0.0


class StepFigures(Observer):
    """Adds what every log line has to the run's metrics: loss, norm, tokens, samples, images per count.

    Args:
        counts: the trained visual-token counts.
        part_names: terms of the loss, logged by themselves where there are several.
    """

    def __init__(self, metrics: Metrics, counts: list[int], part_names: tuple[str, ...] = ()):
        self.metrics = metrics
        self.part_names = part_names if len(part_names) > 1 else ()
        metrics.declare("loss", "same")
        metrics.declare("grad_norm", "last")
        for name in ("num_tokens", "num_visual_tokens", "num_samples", "num_bad_samples"):
            metrics.declare(name, "count")
        for count in sorted(counts):
            metrics.declare(f"images_per_count/{count}", "count")
        for name in self.part_names:
            metrics.declare(f"loss_parts/{name}", "step_mean")

    def on_batch(self, step: int, batch: PackedBatch) -> None:
        add = self.metrics.add
        add("num_tokens", batch.input_ids.shape[1])
        add("num_visual_tokens", batch.visual_positions.shape[0])
        add("num_samples", batch.sample_ids.shape[0])
        add("num_bad_samples", len(batch.skipped))
        for count, number in count_images(batch).items():
            add(f"images_per_count/{count}", number)

    def on_step(self, outcome: StepOutcome) -> None:
        self.metrics.add("grad_norm", outcome.grad_norm)
        if not outcome.problem:  # skipped steps count for nothing in the loss
            self.metrics.add("loss", outcome.loss)
            for name in self.part_names:
                self.metrics.add(f"loss_parts/{name}", outcome.loss_parts[name])


def count_images(batch: PackedBatch) -> Counter:
    """Images (or tiles) of a batch by visual-token count; a blank stand-in is no image."""
    return Counter() if batch.is_dummy_image else Counter(batch.tile_counts)
