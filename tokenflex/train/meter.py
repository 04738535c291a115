"""What a run says: a progress bar, one JSON line per logging interval, and wandb where it is wanted."""

import collections
import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm


class Meter:
    """Progress of a run on rank 0; on other ranks every call does nothing.

    `metrics.jsonl` gets one line per interval: step, loss, learning rates, gradient norm, tokens per second (text and
    visual, over all ranks), visual tokens, images per count, skipped steps, seconds.
    """

    def __init__(self, folder, config, first_step, is_main):
        self.is_main = is_main
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

    def log(self, record):
        """Write one interval's figures."""
        if not self.is_main:
            return
        now = time.perf_counter()
        record = {**record, "seconds": round(now - self.begin, 3)}
        record["tokens_per_s"] = round(record["num_tokens"] / max(record["seconds"], 1e-9), 1)
        self.begin = now
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb:
            self.wandb.log({k: v for k, v in record.items() if isinstance(v, (int, float))}, step=record["step"])
        counts = " ".join(f"{count}:{number}" for count, number in record["images_per_count"].items())
        figures = f"loss {record['loss']:.3f} | {record['tokens_per_s']:.0f} tokens/s | images per count {counts}"
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


def _forget_steps_from(path, first_step):
    """Drop lines of steps that a resumed run is about to do again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= first_step]
        path.write_text("".join(line + "\n" for line in lines))


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
