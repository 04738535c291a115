"""What a run says: a progress bar, one JSON line per logging interval, and wandb where it is wanted."""

import collections
import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm


class Meter:
    """Progress of a run, told by rank 0; on other ranks most calls do nothing.

    `metrics.jsonl` gets one line per interval: step, loss, learning rates, gradient norm, tokens per second (text and
    visual, over all ranks), visual tokens, images per count, skipped steps, seconds. `events.jsonl` gets what happened besides:
    saves, skipped steps with their samples, ways back. `samples-RANK.jsonl` gets each step's sample ids, if asked for.

    Args:
        name_of: (sample id) -> the words by which a person finds the sample.
    """

    def __init__(self, folder, config, first_step, launch, name_of=str):
        self.is_main = is_main = launch.rank == 0
        self.num_ranks = launch.num_ranks
        self.name_of = name_of
        self.events = Path(folder) / "events.jsonl"
        self.trace = Path(folder) / f"samples-{launch.rank}.jsonl" if config.train.log_samples else None
        self.bar = self.wandb = None
        if not is_main:
            return
        self.path = Path(folder) / "metrics.jsonl"
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
        self.wandb = _start_wandb(folder, config)
        self.start = self.begin = time.perf_counter()

    def event(self, record):
        """Write down that something happened; on rank 0."""
        if self.is_main:
            _append(self.events, record)

    def samples(self, step, position, ids):
        """Write down which samples this rank's part of a step held, if the configuration asks for it; on every rank."""
        if self.trace:
            place = {"step": step, "num_ranks": self.num_ranks, "position": [position.epoch, position.step]}
            _append(self.trace, {**place, "ids": ids})

    def names(self, ids, ranks):
        """Names of a step's samples over all ranks; every rank must call it."""
        return sorted({name for names in ranks.gather([self.name_of(i) for i in ids]) for name in names})

    def rewind(self, step):
        """The run has gone back: what was logged after `step` is told anew."""
        if self.is_main:
            _forget_steps_from(self.path, step)
            self.bar.n = self.first_step = step
            self.start = time.perf_counter()

    def log(self, record):
        """Write one interval's figures."""
        if not self.is_main:
            return
        now = time.perf_counter()
        record = {**record, "seconds": round(now - self.begin, 3)}
        record["tokens_per_s"] = round(record["num_tokens"] / max(record["seconds"], 1e-9), 1)
        self.begin = now
        _append(self.path, record)
        if self.wandb:
            self.wandb.log({k: v for k, v in record.items() if isinstance(v, (int, float))}, step=record["step"])
        counts = " ".join(f"{count}:{number}" for count, number in record["images_per_count"].items())
        loss = "all skipped" if record["loss"] is None else f"loss {record['loss']:.3f}"
        figures = f"{loss} | {record['tokens_per_s']:.0f} tokens/s | images per count {counts}"
        if self.is_terminal:
            self.bar.set_postfix_str(figures, refresh=False)
        else:  # a log file gets lines, not a bar that is drawn over and over
            left = (now - self.start) / (record["step"] - self.first_step) * (self.num_steps - record["step"])
            print(f"step {record['step']}/{self.num_steps} | {figures} | {tqdm.format_interval(left)} left", flush=True)

    def advance(self):
        """One optimizer step is done."""
        if self.is_main:
            self.bar.update(1)

    def close(self):
        if self.is_main:
            self.bar.close()
            if self.wandb:
                self.wandb.finish()


def count_images(batch):
    """Images of a batch by visual-token count; a blank stand-in is no image."""
    return collections.Counter() if batch.is_dummy_image else collections.Counter(batch.counts)


def _append(path, record):
    """Add one line in one write, so that a kill leaves no half of it but the last."""
    with open(path, "ab", buffering=0) as file:
        file.write(json.dumps(record).encode() + b"\n")


def _forget_steps_from(path, first_step):
    """Drop lines of steps that a resumed run is about to do again, and a line that a kill cut off."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        records = [(json.loads(line), line) for line in lines if line.endswith(b"\n")]
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(line for record, line in records if record["step"] <= first_step))
        os.replace(temporary, path)


def _start_wandb(folder, config):
    if config.train.wandb == "off":
        return None
    try:
        import wandb
    except ImportError:
        return None
    mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    settings = wandb.Settings(silent=True, console="off")
    return wandb.init(
        project="tokenflex",
        name=config.name,
        dir=str(folder),
        mode=mode,
        config=config.model_dump(mode="json"),
        settings=settings,
    )
