"""The figures that say whether a run is healthy and which count pays: per count, per phase of a step, and over ranks.

Everything here is counted from what the host has anyway (the plan's lengths, the phases of the heartbeat) or added up on the
device; the device is waited for when a line is logged, and not before.
"""

import numpy as np
import torch

from ..data.collate import PackedBatch
from ..parallel import Engine, Heartbeat
from ..telemetry.flops import ModelFlops, num_pairs
from ..telemetry.memory import peak_memory_gb
from ..telemetry.names import TEXT
from .metrics import Metrics
from .objective import Loss
from .observers import Observer
from .progress import StepOutcome

PHASES = {
    "fetch": "data_wait",
    "forward": "forward",
    "backward": "backward",
    "wait for the loss": "host_wait",
    "wait for the copy": "checkpoint_stall",
    "save": "checkpoint_stall",
    "step": "optimizer",
    "log": "log",
    "agree to go on": "agree",
    "validate": "validate",
}
"""Phases of the heartbeat, and as what their seconds are logged; those of others are `other`."""


class Telemetry(Observer):
    """Adds to the run's metrics what a log line has beside `StepFigures`.

    `loss_per_count`, `tokens_per_count`: of samples at each visual-token count, and of those without images. `fill`: share of
    the packs' tokens that is used. `balance`: what ranks have to do in a micro-step, on average, as a share of what the fullest has.
    `seconds_per_step`: by phase, mean over ranks. `work_s`: seconds per step that a rank fetches and computes: the slowest rank's are
    what all wait for. `memory_gb`: the most that a rank had. `flops`: of the model, over all ranks.

    Args:
        counts: the trained visual-token counts.
        pack_tokens: tokens that a micro-batch's packs hold.
        flops: of the model.
    """

    def __init__(
        self,
        metrics: Metrics,
        counts: list[int],
        pack_tokens: int,
        flops: ModelFlops,
        engine: Engine,
        heartbeat: Heartbeat,
    ):
        self.metrics, self.pack_tokens, self.flops = metrics, pack_tokens, flops
        self.engine, self.heartbeat = engine, heartbeat
        self.counts = np.array([0, *sorted(counts)])
        self.names = [TEXT, *map(str, self.counts[1:])]
        self.counts_G = torch.from_numpy(self.counts).to(engine.device)
        for name in self.names:
            metrics.declare(f"loss_per_count/{name}", "mean")
            metrics.declare(f"tokens_per_count/{name}", "count")
        metrics.declare("fill", "mean")
        metrics.declare("flops", "sum")
        for part in ("vision", "language"):
            metrics.declare(f"balance/{part}", "lockstep")
        for name in dict.fromkeys([*PHASES.values(), "other"]):
            metrics.declare(f"seconds_per_step/{name}", "mean")
        for name in ("work_s", "memory_gb"):
            metrics.declare(name, "spread")
        self._seconds: dict[str, float] | None = None  # until the first batch: what was before is a start, not a step
        self._begin_step()

    def _begin_step(self) -> None:
        self._losses_G = torch.zeros(len(self.counts), device=self.engine.device)
        self._weights_G = np.zeros(len(self.counts))

    def on_batch(self, step: int, batch: PackedBatch) -> None:
        add, flops = self.metrics.add, self.flops
        if self._seconds is None:
            self._seconds = dict(self.heartbeat.seconds)
        lengths = batch.cu_seq_lens.diff()
        group = np.searchsorted(self.counts, batch.counts.numpy())
        tokens = np.bincount(group, lengths.numpy(), len(self.names))
        for name, number in zip(self.names, tokens):
            add(f"tokens_per_count/{name}", number)
        of_learned = group[batch.learned_views.numpy()]
        self._weights_G += np.bincount(of_learned, batch.weights.numpy(), len(self.names))
        num_tokens = batch.input_ids.shape[1]
        vision = flops.vision(len(batch.images), batch.visual_positions.shape[0])
        language = flops.language(num_tokens, num_pairs(lengths), batch.targets.shape[0])
        add("fill", num_tokens, self.pack_tokens)
        add("flops", vision + language)
        add("balance/vision", 0.0 if batch.is_dummy_image else vision)
        add("balance/language", language)

    def on_loss(self, batch: PackedBatch, loss: Loss) -> None:
        is_of_GL = batch.counts[batch.learned_views] == self.counts_G[:, None]
        self._losses_G += is_of_GL.float() @ (loss.token_losses.float() * batch.weights)

    def on_step(self, outcome: StepOutcome) -> None:
        add = self.metrics.add
        if not outcome.problem:  # skipped steps count for nothing in the losses
            for number, name in enumerate(self.names):
                if self._weights_G[number]:
                    add(f"loss_per_count/{name}", self._losses_G[number], self._weights_G[number])
        self._begin_step()
        seconds = self._new_seconds()
        for name, value in seconds.items():
            add(f"seconds_per_step/{name}", value)
        add("work_s", seconds["data_wait"] + self.engine.stopwatch.take())
        add("memory_gb", peak_memory_gb(self.engine.device))

    def _new_seconds(self) -> dict[str, float]:
        """Seconds since the last call, by name."""
        now, before = dict(self.heartbeat.seconds), self._seconds or {}
        new = dict.fromkeys([*PHASES.values(), "other"], 0.0)
        for phase, total in now.items():
            new[PHASES.get(phase, "other")] += total - before.get(phase, 0.0)
        self._seconds = now
        return new

    def on_rewind(self, step: int) -> None:
        self._begin_step()
