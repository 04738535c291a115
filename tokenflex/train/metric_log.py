"""What a run says: a progress bar, one record per logging interval for all sinks, and what happened besides."""

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from ..layout import RunLayout
from ..parallel import Ranks
from ..telemetry.sinks import Sink, append_line
from .observers import Observer
from .progress import StepOutcome


class EventLog:
    """`events.jsonl`: saves, skipped steps with their samples, ways back; written by rank 0."""

    def __init__(self, layout: RunLayout, ranks: Ranks):
        self.path = layout.events if ranks.is_main else None

    def __call__(self, event: dict) -> None:
        """Write down that something happened."""
        if self.path:
            append_line(self.path, event)


class SampleTrace(Observer):
    """`samples-RANK.jsonl`: each step's sample ids on this rank (`train.log_samples`)."""

    def __init__(self, layout: RunLayout, ranks: Ranks):
        self.path, self.num_ranks = layout.samples(ranks.rank), ranks.num_ranks

    def on_step(self, outcome: StepOutcome) -> None:
        position = [outcome.position.epoch, outcome.position.step]
        place = {"step": outcome.step, "num_ranks": self.num_ranks, "position": position}
        append_line(self.path, {**place, "ids": outcome.sample_ids})


class MetricLog(Observer):
    """Progress of a run, told by rank 0 alone: a record per interval to every sink, a bar or a line for a person.

    Besides what the metrics hold, a record has `seconds` (of the interval), `tokens_per_s` (text and visual, over all ranks),
    `flops_per_s` (over all ranks) and `mfu`; time that was spent on validation counts in none of the three.

    Args:
        first_step: where the run goes on.
        peak: FLOPs per second of all devices together at most; None where that is not known, and then there is no `mfu`.
    """

    def __init__(self, sinks: Sequence[Sink], num_steps: int, first_step: int, peak: float | None = None):
        self.sinks, self.peak = sinks, peak
        self.num_steps, self.first_step, self.logged_step = num_steps, first_step, first_step
        self.is_terminal = sys.stdout.isatty()
        self.bar = tqdm(
            total=self.num_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            file=sys.stdout,
            disable=not self.is_terminal,
        )
        self.start = self.begin = time.perf_counter()

    def on_step(self, outcome: StepOutcome) -> None:
        self.bar.update(1)

    def on_log(self, record: dict) -> None:
        now = time.perf_counter()
        record = {**record, **self._rates(record, now - self.begin)}
        self.begin, self.logged_step = now, record["step"]
        for sink in self.sinks:
            sink.write(record)
        self._show(record, now)

    def _rates(self, record, seconds):
        validating = (record.get("seconds_per_step", {}).get("validate") or 0) * (record["step"] - self.logged_step)
        training = max(seconds - validating, 1e-9)
        rates = {"seconds": round(seconds, 3), "tokens_per_s": round(record["num_tokens"] / training, 1)}
        if "flops" in record:
            rates["flops_per_s"] = record["flops"] / training
            if self.peak:
                rates["mfu"] = round(rates["flops_per_s"] / self.peak, 4)
        return rates

    def _show(self, record, now):
        counts = " ".join(f"{count}:{number}" for count, number in record["images_per_count"].items())
        loss = "all skipped" if record["loss"] is None else f"loss {record['loss']:.3f}"
        mfu = f" | MFU {100 * record['mfu']:.1f} %" if "mfu" in record else ""
        figures = f"{loss} | {record['tokens_per_s']:.0f} tokens/s{mfu} | images per count {counts}"
        if self.is_terminal:
            self.bar.set_postfix_str(figures, refresh=False)
        else:  # a log file gets lines, not a bar that is drawn over and over
            left = (now - self.start) / (record["step"] - self.first_step) * (self.num_steps - record["step"])
            print(f"step {record['step']}/{self.num_steps} | {figures} | {tqdm.format_interval(left)} left", flush=True)

    def on_rewind(self, step: int) -> None:
        for sink in self.sinks:
            sink.rewind(step)
        self.bar.n = self.first_step = self.logged_step = step
        self.start = time.perf_counter()

    def close(self) -> None:
        self.bar.close()
        for sink in self.sinks:
            sink.close()
