#!/usr/bin/env python3
"""`tokenflex simulate` beside real steps: costs calibrated once, then other counts, pack lengths, mixes and ranks. `make bench-scaling`.

Writes docs/results/scaling.json. Real DeepSpeed on gloo; see worker.py for why CPU seconds are what is compared.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "tests")]

from conftest import run_ranks  # noqa: E402

from tokenflex.budget import VisualTokenBudget  # noqa: E402
from tokenflex.config import DataConfig  # noqa: E402
from tokenflex.estimate.scaling import busy, fitted  # noqa: E402
from tokenflex.estimate.workload import Packs, packs_of  # noqa: E402
from tokenflex.plan import Mixture, Planner, Source  # noqa: E402
from tokenflex.plan.table import LengthTable  # noqa: E402

NUM_PACKS = 8
ROW = 4
CALIBRATION = {
    "counts 4 and 64, 384 tokens": {"counts": (4, 64), "length": 384},
    "text alone, 384 tokens": {"counts": (16,), "length": 384, "tiles": (0,)},
    "count 16, 192 tokens": {"counts": (16,), "length": 192},
    "long texts, 768 tokens": {"counts": (16,), "length": 768, "text": 400},
}
HELD_OUT = {
    "counts 16 and 36, 384 tokens": {"counts": (16, 36), "length": 384},
    "counts 4, 16 and 64, 640 tokens": {"counts": (4, 16, 64), "length": 640},
    "five tiles an image, 512 tokens": {"counts": (16, 36), "length": 512, "tiles": (5,)},
    "half text alone, 512 tokens": {"counts": (36,), "length": 512, "tiles": (0, 1)},
    "long texts, 1024 tokens": {"counts": (16, 64), "length": 1024, "text": 300},
}


def plan(counts, length, tiles=(1, 2, 3), text=40, seed=0):
    """(packs as the worker takes them, their columns) of a workload planned for rows of `ROW` ranks."""
    rng = np.random.default_rng(seed)
    number = 6000
    texts = rng.lognormal(np.log(text), 0.5, number).astype(np.int64).clip(8, length // 2)
    table = LengthTable(text=texts, tiles=rng.choice(tiles, number), learned=texts // 2, name="made up")
    budget = VisualTokenBudget(counts=tuple(counts), probabilities=(1 / len(counts),) * len(counts))
    data = DataConfig(
        pack_length=length, max_images_per_pack=24, packs_per_step=ROW, lockstep_packs=ROW, over_long="drop"
    )
    planner = Planner(Mixture([Source(index=table, over_long="drop")]), budget, data, seed, "token")
    _, window, _ = next(planner.windows(0))
    samples, columns, packs = window.samples, packs_of(window, budget), []
    for pack in range(NUM_PACKS):
        mine = np.flatnonzero(window.pack == pack)
        packs.append({
            "lengths": samples.tokens[mine].tolist(), "tiles": samples.tiles[mine].tolist(), "counts": samples.count[mine].tolist(),
            "learned": int(samples.learned[mine].sum()),
        })  # fmt: skip
    return packs, Packs(**{name: getattr(columns, name)[:NUM_PACKS] for name in Packs.__annotations__})


def measure(workloads, num_ranks, stage):
    """{workload: [micro-steps, ranks, 3] seconds} of a run."""
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        plans, out = Path(folder) / "plans.json", Path(folder) / "out.json"
        plans.write_text(json.dumps({name: packs for name, (packs, _) in workloads.items()}))
        arguments = [Path(__file__).with_name("worker.py"), plans, stage, out]
        end = run_ranks(num_ranks, arguments, timeout_s=3600, environment=environment)[0]
        if end.status:
            sys.exit(end.output[-3000:])
        by_rank = json.loads(out.read_text())
    return {name: np.stack([np.array(times[name]) for times in by_rank], axis=1) for name in workloads}


def joined(parts):
    """`Packs` of several workloads, one after the other."""
    return Packs(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in Packs.__annotations__})


def predicted(columns, costs, fixed, num_ranks, stage):
    """(mean CPU seconds of a rank's micro-step, seconds until all ranks are through all of them)."""
    vision, language = (values.reshape(1, -1, num_ranks) for values in (costs.vision(columns), costs.language(columns)))
    number = vision.shape[1]
    mean = float((vision + language).mean()) + fixed
    return mean, float(busy(vision, language, stage)[0]) + fixed * number


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--out", default=str(ROOT / "docs" / "results" / "scaling.json"))
    arguments = parser.parse_args()
    stage = arguments.stage
    workloads = {name: plan(**how) for name, how in {**CALIBRATION, **HELD_OUT}.items()}
    rows, costs, sent = [], None, 0.0
    for num_ranks in map(int, arguments.ranks.split(",")):
        times = measure(workloads, num_ranks, stage)
        if costs is None:
            seconds = np.concatenate([times[name][:, 0, 0] for name in CALIBRATION])
            costs = fitted(joined([workloads[name][1] for name in CALIBRATION]), seconds)
        elif not sent:  # the network's one figure: what a micro-step costs more on two ranks, of the calibration alone
            more = [
                times[name][:, :, 0].mean()
                - predicted(workloads[name][1], costs, costs.micro_step, num_ranks, stage)[0]
                for name in CALIBRATION
            ]
            sent = float(np.mean(more)) / ((num_ranks - 1) / num_ranks)
        fixed = costs.micro_step + sent * (num_ranks - 1) / num_ranks
        for name, (_, columns) in workloads.items():
            cpu, wall = times[name][:, :, 0], times[name][:, :, 1]
            mean, through = predicted(columns, costs, fixed, num_ranks, stage)
            measured = float(cpu.mean()), float(cpu.max(axis=1).sum())
            rows.append({
                "ranks": num_ranks, "workload": name, "is_calibration": name in CALIBRATION,
                "cpu_ms": 1e3 * measured[0], "predicted_cpu_ms": 1e3 * mean, "error": mean / measured[0] - 1,
                "all_ranks_ms": 1e3 * measured[1], "predicted_all_ranks_ms": 1e3 * through, "all_ranks_error": through / measured[1] - 1,
                "wall_ms": 1e3 * float(np.median(wall)),
            })  # fmt: skip
            print(
                {key: round(value, 4) if isinstance(value, float) else value for key, value in rows[-1].items()},
                flush=True,
            )
        write(arguments.out, stage, costs, sent, rows)


def write(path, stage, costs, sent, rows):
    """The record so far: every number of ranks adds to it."""
    machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
    record = {"what": __doc__.splitlines()[0], "machine": machine, "stage": stage}
    record |= {"costs_s": asdict(costs), "sent_s": sent, "rows": rows}
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
