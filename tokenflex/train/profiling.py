"""`--profile`: a trace of chosen steps on chosen ranks, with the memory they took, into the run's folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ..data.collate import PackedBatch
from ..errors import UserError
from ..parallel import Heartbeat
from .observers import Observer
from .progress import StepOutcome

ROWS = 40
"""Lines of each table of operators."""
MAX_ALLOCATIONS = 200_000
"""Of the memory snapshot's history, on a GPU."""


@dataclass(frozen=True)
class ProfilePlan:
    """Which steps, counted from 1 as metrics.jsonl does, on which ranks."""

    first: int
    last: int
    ranks: tuple[int, ...] = (0,)

    def check(self, num_steps: int, num_ranks: int) -> None:
        """See that there are such steps and ranks.

        Raises:
            UserError: there are not.
        """
        if self.last > num_steps:
            raise UserError(f"--profile {self.first}-{self.last}: the run has {num_steps} steps (train.num_steps)")
        wrong = [rank for rank in self.ranks if rank >= num_ranks]
        if wrong:
            raise UserError(f"--profile-ranks: rank {wrong[0]} of {num_ranks}; ranks are counted from 0")


class Profiler(Observer):
    """Profiles the steps of a plan on this rank and writes, under the run's `profile/`: a trace for Perfetto or Chrome
    (`.trace.json.gz`), tables of operators by time and by memory (`.txt`), and on a GPU a snapshot of its memory (`.memory.pickle`,
    for torch's memory visualiser).

    Args:
        folder: where the files go.
        limit_s: how long writing them may take before it is a hang.
    """

    def __init__(
        self,
        plan: ProfilePlan,
        folder: Path,
        device: torch.device,
        heartbeat: Heartbeat,
        limit_s: float,
        say: Callable[[str], None],
    ):
        self.plan, self.folder, self.heartbeat, self.limit_s, self.say = plan, folder, heartbeat, limit_s, say
        self.is_gpu = device.type == "cuda"
        self._profile: profile | None = None

    def on_batch(self, step: int, batch: PackedBatch) -> None:
        if step + 1 == self.plan.first and self._profile is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.is_gpu:
                torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS)
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.is_gpu
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profile.start()

    def on_step(self, outcome: StepOutcome) -> None:
        if outcome.step + 1 == self.plan.last:
            self.close()

    def close(self) -> None:
        """End a profile that is under way and write it down."""
        if self._profile is None:
            return
        self.heartbeat.phase("profile", self.limit_s)
        found, self._profile = self._profile, None
        found.stop()
        place = self.folder / f"steps-{self.plan.first}-{self.plan.last}-rank-{self.heartbeat.rank:05d}"
        found.export_chrome_trace(f"{place}.trace.json.gz")
        kind = "cuda" if self.is_gpu else "cpu"
        figures = found.key_averages(group_by_input_shape=True)
        tables = [
            figures.table(sort_by=f"self_{kind}_{what}", row_limit=ROWS) for what in ("time_total", "memory_usage")
        ]
        Path(f"{place}.txt").write_text("\n\n".join(tables), encoding="utf-8")
        if self.is_gpu:
            torch.cuda.memory._dump_snapshot(f"{place}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        self.say(f"profile   {place}.trace.json.gz and .txt; open the trace in ui.perfetto.dev or chrome://tracing")
