"""Where figures of a run are written: lines of JSON, wandb, TensorBoard. All of it happens on one rank."""

import importlib.util
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..config import RunConfig, TrainConfig
from ..errors import UserError
from ..files import write_whole
from ..layout import RunLayout
from .names import COUNTED, VALIDATION


class Sink(Protocol):
    """Takes records as they come: a log line's, or those of a `section` (`validation`), whose names it puts before theirs."""

    def write(self, record: Mapping[str, Any], section: str = "") -> None:
        """Figures of a step, which `record["step"]` says."""

    def rewind(self, step: int) -> None:
        """What was told of steps after `step` will be told anew."""

    def close(self) -> None:
        """The run ends."""


def check_sinks(settings: TrainConfig) -> None:
    """See that what the recipe wants to be written to is there.

    Raises:
        UserError: `train.tensorboard` without its package.
    """
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "train.tensorboard=true: the package tensorboard is not installed; pip install 'tokenflex[tensorboard]', or set it false"
        )


def open_sinks(layout: RunLayout, config: RunConfig, first_step: int) -> list[Sink]:
    """The sinks of a run that goes on at `first_step`."""
    sinks: list[Sink] = [JsonLines(layout.metrics, first_step), JsonLines(layout.validation, first_step, VALIDATION)]
    if config.train.wandb != "off" and importlib.util.find_spec("wandb") is not None:
        sinks.append(Wandb(layout, config))
    if config.train.tensorboard:
        sinks.append(TensorBoard(layout.tensorboard, first_step))
    return sinks


def scalars(record: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of every number in a nested record, names joined by slashes."""
    for key, value in record.items():
        name = f"{section}/{key}" if section else key
        if isinstance(value, Mapping):
            yield from scalars(value, name)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


class JsonLines:
    """A file with one line of JSON per record of a section, in the order of steps.

    Each line is written at once, so that a kill leaves no half of it but the last; lines of steps that are about to be done
    again are dropped.
    """

    def __init__(self, path: Path, first_step: int, section: str = ""):
        self.path, self.section = path, section
        self.rewind(first_step)

    def write(self, record: Mapping[str, Any], section: str = "") -> None:
        if section == self.section:
            append_line(self.path, record)

    def rewind(self, step: int) -> None:
        if self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)
            records = [(json.loads(line), line) for line in lines if line.endswith(b"\n")]
            write_whole(self.path, b"".join(line for record, line in records if record["step"] <= step))

    def close(self) -> None:
        """Every line is down already."""


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line of JSON in one write."""
    with open(path, "ab", buffering=0) as file:
        file.write(json.dumps(record).encode() + b"\n")


class Wandb:
    """The run's record in wandb, one for all its starts: its id lies in the run's folder. Offline without `WANDB_API_KEY`."""

    def __init__(self, layout: RunLayout, config: RunConfig):
        import wandb

        if not layout.wandb_id.exists():
            write_whole(layout.wandb_id, secrets.token_hex(4))
        self._histogram = wandb.Histogram
        self._run = wandb.init(
            project="tokenflex",
            name=config.name,
            id=layout.wandb_id.read_text(),
            resume="allow",
            dir=str(layout.root),
            mode="online" if os.environ.get("WANDB_API_KEY") else "offline",
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Drawn over the run's own step: what is logged anew after a way back or a resume lies over what was there.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, Any], section: str = "") -> None:
        figures: dict[str, Any] = dict(scalars({key: value for key, value in record.items() if key != "step"}, section))
        if record.get(COUNTED):
            numbers, edges = _bins(record[COUNTED])
            figures["count_histogram"] = self._histogram(np_histogram=(numbers, edges))
        self._run.log({**figures, "step": record["step"]})

    def rewind(self, step: int) -> None:
        """Nothing to do: later figures of the same step lie over earlier ones."""

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files under the run's folder; figures of steps that are done again replace those from before."""

    def __init__(self, folder: Path, first_step: int):
        self.folder = folder
        self._writer: Any = None
        self.rewind(first_step)

    def write(self, record: Mapping[str, Any], section: str = "") -> None:
        step = record["step"]
        for name, value in scalars({key: value for key, value in record.items() if key != "step"}, section):
            self._writer.add_scalar(name, value, step)
        if record.get(COUNTED):
            self._add_histogram(record[COUNTED], step)
        self._writer.flush()

    def _add_histogram(self, per_count: Mapping[str, int], step: int) -> None:
        numbers, edges = _bins(per_count)
        counts = sorted(map(int, per_count))
        self._writer.add_histogram_raw(
            "count_histogram",
            min=counts[0],
            max=counts[-1],
            num=sum(numbers),
            sum=sum(count * number for count, number in zip(counts, numbers)),
            sum_squares=sum(count * count * number for count, number in zip(counts, numbers)),
            bucket_limits=edges[1:],
            bucket_counts=numbers,
            global_step=step,
        )

    def rewind(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is not None:
            self._writer.close()
        self._writer = SummaryWriter(str(self.folder), purge_step=step + 1)

    def close(self) -> None:
        self._writer.close()


def _bins(per_count: Mapping[str, int]) -> tuple[list[int], list[float]]:
    """(numbers, edges) of a histogram with one bin per count, whose edges lie half way between counts."""
    counts = sorted(map(int, per_count))
    between = [(low + high) / 2 for low, high in zip(counts, counts[1:])]
    return [per_count[str(count)] for count in counts], [counts[0] - 0.5, *between, counts[-1] + 0.5]
