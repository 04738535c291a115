"""What a run says: a progress bar, one JSON line per logging interval, what happened besides, and wandb where it is wanted."""

import json
import os
import secrets
import sys
import time

from tqdm import tqdm

from ..config import RunConfig
from ..files import write_whole
from ..layout import RunLayout
from ..parallel import Ranks
from .observers import Observer
from .progress import StepOutcome


class EventLog:
    """`events.jsonl`: saves, skipped steps with their samples, ways back; written by rank 0."""

    def __init__(self, layout: RunLayout, ranks: Ranks):
        self.path = layout.events if ranks.is_main else None

    def __call__(self, event: dict) -> None:
        """Write down that something happened."""
        if self.path:
            _append(self.path, event)


class SampleTrace(Observer):
    """`samples-RANK.jsonl`: each step's sample ids on this rank (`train.log_samples`)."""

    def __init__(self, layout: RunLayout, ranks: Ranks):
        self.path, self.num_ranks = layout.samples(ranks.rank), ranks.num_ranks

    def on_step(self, outcome: StepOutcome) -> None:
        position = [outcome.position.epoch, outcome.position.step]
        place = {"step": outcome.step, "num_ranks": self.num_ranks, "position": position}
        _append(self.path, {**place, "ids": outcome.sample_ids})


class MetricLog(Observer):
    """Progress of a run, told by rank 0 alone.

    `metrics.jsonl` gets one line per interval: step, loss, learning rates, gradient norm, tokens per second (text and
    visual, over all ranks), visual tokens, images per count, skipped steps, seconds.
    """

    def __init__(self, layout: RunLayout, config: RunConfig, first_step: int):
        self.path = layout.metrics
        _forget_steps_from(self.path, first_step)
        self.num_steps, self.first_step = config.train.num_steps, first_step
        self.is_terminal = sys.stdout.isatty()
        self.bar = tqdm(
            total=self.num_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            file=sys.stdout,
            disable=not self.is_terminal,
        )
        self.wandb = _start_wandb(layout, config)
        self.start = self.begin = time.perf_counter()

    def on_step(self, outcome: StepOutcome) -> None:
        self.bar.update(1)

    def on_log(self, record: dict) -> None:
        now = time.perf_counter()
        record = {**record, "seconds": round(now - self.begin, 3)}
        record["tokens_per_s"] = round(record["num_tokens"] / max(record["seconds"], 1e-9), 1)
        self.begin = now
        _append(self.path, record)
        if self.wandb:
            self.wandb.log({key: value for key, value in record.items() if isinstance(value, (int, float))})
        self._show(record, now)

    def _show(self, record, now):
        counts = " ".join(f"{count}:{number}" for count, number in record["images_per_count"].items())
        loss = "all skipped" if record["loss"] is None else f"loss {record['loss']:.3f}"
        figures = f"{loss} | {record['tokens_per_s']:.0f} tokens/s | images per count {counts}"
        if self.is_terminal:
            self.bar.set_postfix_str(figures, refresh=False)
        else:  # a log file gets lines, not a bar that is drawn over and over
            left = (now - self.start) / (record["step"] - self.first_step) * (self.num_steps - record["step"])
            print(f"step {record['step']}/{self.num_steps} | {figures} | {tqdm.format_interval(left)} left", flush=True)

    def on_rewind(self, step: int) -> None:
        _forget_steps_from(self.path, step)
        self.bar.n = self.first_step = step
        self.start = time.perf_counter()

    def close(self) -> None:
        self.bar.close()
        if self.wandb:
            self.wandb.finish()


def _append(path, record):
    """Add one line in one write, so that a kill leaves no half of it but the last."""
    with open(path, "ab", buffering=0) as file:
        file.write(json.dumps(record).encode() + b"\n")


def _forget_steps_from(path, first_step):
    """Drop lines of steps that a resumed run is about to do again, and a line that a kill cut off."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        records = [(json.loads(line), line) for line in lines if line.endswith(b"\n")]
        write_whole(path, b"".join(line for record, line in records if record["step"] <= first_step))


def _start_wandb(layout, config):
    """The run's record in wandb, one for all its starts: its id lies in the run's folder. None where it is not wanted."""
    if config.train.wandb == "off":
        return None
    try:
        import wandb
    except ImportError:
        return None
    if not layout.wandb_id.exists():
        write_whole(layout.wandb_id, secrets.token_hex(4))
    run = wandb.init(
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
    run.define_metric("*", step_metric="step")
    return run
