"""What telemetry costs: CPU time within it, as a share of the CPU time of the steps of a real run on one rank.

    OMP_NUM_THREADS=1 python tests/benchmarks/telemetry_cost.py --steps 40

Counted are what `Telemetry` does per micro-batch, forward pass and step, and reading all metrics for a log line every ten steps.
CPU time, not the clock: a share of half a percent drowns in what else a machine does. Writes docs/results/telemetry.json.
"""

import argparse
import json
import platform
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from tokenflex import parallel
from tokenflex.config import load_config
from tokenflex.corpus import resolve_embedded
from tokenflex.layout import RunLayout
from tokenflex.train.guarding import SoleWriter, watched
from tokenflex.train.observers import Observer
from tokenflex.train.run import Run
from tokenflex.train.telemetry import Telemetry
from tokenflex.train.trainer import StopRequest

ROOT = Path(__file__).parent.parent.parent
TEXT = {
    "model_type": "qwen3", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 64, "intermediate_size": 768, "tie_word_embeddings": True,
}  # fmt: skip


class Spent:
    """CPU seconds within the functions that it wraps, and calls of each."""

    def __init__(self):
        self.seconds, self.calls = {}, {}

    @contextmanager
    def counted(self, name):
        begin = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - begin
        self.calls[name] = self.calls.get(name, 0) + 1

    def wrap(self, owner, name):
        inner = getattr(owner, name)

        def counted(*arguments):
            with self.counted(name):
                return inner(*arguments)

        setattr(owner, name, counted)


class Whole(Observer):
    """CPU time of all steps but the first `skipped`, and the point at which counting begins."""

    def __init__(self, skipped, spent):
        self.skipped, self.spent, self.begin, self.num_steps = skipped, spent, 0.0, 0

    def on_step(self, outcome):
        if outcome.step + 1 == self.skipped:
            self.spent.seconds.clear()
            self.spent.calls.clear()
            self.begin = time.process_time()
        self.num_steps = outcome.step + 1 - self.skipped
        self.seconds = time.process_time() - self.begin


def measure(num_steps, folder, cache_dir):
    """A run of `num_steps` steps after 5 that are not counted; the figures."""
    overrides = [f"output_dir={folder}", f"data.cache_dir={cache_dir}", f"model.text={json.dumps(TEXT)}"]
    overrides += [f"train.num_steps={num_steps + 5}", "train.log_every=10", "data.pack_length=1024"]
    config = resolve_embedded(load_config(ROOT / "tests" / "tiny.yaml", overrides))
    parallel.quiet_libraries()
    ranks = parallel.join_ranks(parallel.join())
    layout, spent = RunLayout.of(config), Spent()
    with StopRequest() as stop, SoleWriter(layout, ranks), watched(layout, config.train, ranks) as heartbeat:
        run = Run(config, config, {"zero_optimization": {"stage": 2}}, ranks, heartbeat)
        run.prepare()
        run.build()
        run.resume()
        (telemetry,) = [observer for observer in run.observers if isinstance(observer, Telemetry)]
        for name in ("on_batch", "on_loss", "on_step"):
            spent.wrap(telemetry, name)
        spent.wrap(run.metrics, "read")
        whole = Whole(5, spent)
        run.observers.append(whole)
        run.train(stop)
        run.close()
    return {
        "share": sum(spent.seconds.values()) / whole.seconds,
        "step_cpu_ms": 1000 * whole.seconds / whole.num_steps,
        "telemetry_cpu_us_per_step": {name: 1e6 * s / whole.num_steps for name, s in spent.seconds.items()},
        "micro_steps_per_step": run.grad_accum_steps,
        "num_steps": whole.num_steps,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--cache-dir", default="~/.cache/tokenflex")
    parser.add_argument("--out", default=str(ROOT / "docs" / "results" / "telemetry.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.steps, folder, arguments.cache_dir)
    command = f"OMP_NUM_THREADS=1 python tests/benchmarks/telemetry_cost.py --steps {arguments.steps}"
    machine = f"{platform.machine()} CPU, one thread, torch {torch.__version__}"
    record = {"command": command, "machine": machine, "date": time.strftime("%Y-%m-%d"), **figures}
    Path(arguments.out).write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
