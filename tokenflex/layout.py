"""Names that several rooms agree on: folders and files of a run, checkpoints' tags, stop signals, exit statuses.

Standard library only, so that the SLURM side, which starts before any package is there, reads the same page.
"""

import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# Exit statuses: what they say to whoever started the process, and which of them means "start me again".

DONE = 0
"""The run is complete."""
FAILED = 1
"""An error that is none of the user's, or the end of another rank. (A rank that the watchdog ends dies of SIGKILL.)"""
USER_ERROR = 2
"""Something the user can mend; the one line on stderr says what."""
DIVERGED = 65
"""Too many steps in a row were not finite or far out, and going back did not help (EX_DATAERR)."""
BAD_NODE = 69
"""Of a job whose nodes did not pass the check (EX_UNAVAILABLE)."""
SAVE_FAILED = 74
"""Too many saves in a row failed: disk full or input/output errors (EX_IOERR)."""
REQUEUE = 75
"""Stopped by a signal with everything saved: the same command goes on from there (EX_TEMPFAIL). The only one to requeue."""
NO_PROGRESS = 76
"""Of a job that was started too often without a newer checkpoint."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, the end of a job, and SLURM's warning before its time limit: a run saves and ends."""

MANIFEST = "manifest.json"
"""Of a checkpoint and of an index: written last, so a folder without it is not whole."""

_TAG = re.compile(r"step-(\d{8,})")


def tag_of(step: int) -> str:
    """Folder name of the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(tag: str) -> int | None:
    """The step of a checkpoint's folder name; None where it is no such name."""
    match = _TAG.fullmatch(tag)
    return int(match[1]) if match else None


class RunSettings(Protocol):
    """What the place of a run depends on; see `tokenflex.config.RunConfig`."""

    @property
    def output_dir(self) -> str:
        """Folder of all runs."""

    @property
    def name(self) -> str:
        """Of the run."""


@dataclass(frozen=True)
class RunLayout:
    """Where a run keeps what, below its folder `root`."""

    root: Path

    @classmethod
    def of(cls, config: RunSettings) -> "RunLayout":
        """The layout of a configured run: `<output_dir>/<name>`."""
        return cls(Path(config.output_dir).expanduser() / config.name)

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint (`tag_of`), and `latest`."""
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The exported model."""
        return self.root / "model"

    @property
    def adapter(self) -> Path:
        """The exported adapters, where they are wanted apart."""
        return self.root / "adapter"

    @property
    def health(self) -> Path:
        """Where the watchdogs of the ranks meet."""
        return self.root / "health"

    @property
    def config(self) -> Path:
        """The recipe as it was run."""
        return self.root / "config.yaml"

    @property
    def plan(self) -> Path:
        """The settings that decide the order of the data."""
        return self.root / "plan.json"

    @property
    def doctor(self) -> Path:
        """What `tokenflex doctor` found on rank 0's machine when the run was last started."""
        return self.root / "doctor.json"

    @property
    def weights(self) -> Path:
        """The files of pretrained parts that the run was last started with, and their checksums."""
        return self.root / "weights.json"

    @property
    def data(self) -> Path:
        """What the samples were that the run was last started with."""
        return self.root / "data.json"

    @property
    def metrics(self) -> Path:
        """One line per logging interval."""
        return self.root / "metrics.jsonl"

    @property
    def validation(self) -> Path:
        """One line per validation while training."""
        return self.root / "validation.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files of TensorBoard, where they are wanted."""
        return self.root / "tensorboard"

    @property
    def profile(self) -> Path:
        """Traces of profiled steps."""
        return self.root / "profile"

    @property
    def report(self) -> Path:
        """The page that `tokenflex report` makes of the run."""
        return self.root / "report.html"

    @property
    def wandb_id(self) -> Path:
        """The id of the run's record in wandb."""
        return self.root / "wandb-id"

    @property
    def events(self) -> Path:
        """Saves, skipped steps, ways back."""
        return self.root / "events.jsonl"

    @property
    def accuracy(self) -> Path:
        """The accuracy table as JSON."""
        return self.root / "accuracy.json"

    @property
    def answers(self) -> Path:
        """Question by question, which are answered exactly at which count."""
        return self.root / "answers.json"

    @property
    def accuracy_plot(self) -> Path:
        """The accuracy table drawn."""
        return self.root / "accuracy.png"

    @property
    def slurm(self) -> Path:
        """Starts and logs of SLURM jobs, a folder per job."""
        return self.root / "slurm"

    def bad_samples(self, rank: int) -> Path:
        """The bad samples that a rank met."""
        return self.root / "bad-samples" / f"rank-{rank:05d}.jsonl"

    def samples(self, rank: int) -> Path:
        """The sample ids of a rank's steps, where they are logged."""
        return self.root / f"samples-{rank}.jsonl"
