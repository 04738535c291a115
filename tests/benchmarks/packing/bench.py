#!/usr/bin/env python3
"""Packing side by side: ours and others on one workload, one cost model, one set of figures. `make bench-packing`.

Writes docs/results/packing.json and packing.svg. Speeds are samples per CPU-second of one core, packing only.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[3] / "build" / "peers"))  # last: our own packages come first
from peers import TABLE  # noqa: E402
from workload import workload  # noqa: E402

from tokenflex.budget import VisualTokenBudget
from tokenflex.config import CostConfig
from tokenflex.plan import Position
from tokenflex.plan.figures import Figures, totals
from tokenflex.plan.simulate import make_planner, simulate
from tokenflex.plan.table import LengthTable, load_table

ROOT = Path(__file__).resolve().parents[3]
COUNTS, PROBABILITIES = (64, 144, 256), (0.2, 0.3, 0.5)
RANKS = (8, 64, 1024)


def table_of(path, num_samples, seed):
    """(text, tiles) of the generated workload, or of a file: arrays text and tiles, or tables of two columns, bootstrapped."""
    if not path:
        return workload(num_samples, seed)
    with np.load(path, allow_pickle=False) as arrays:
        if {"text", "tiles"} <= set(arrays):
            table = load_table(path)
            return np.asarray(table.text), np.asarray(table.tiles)
        rows = np.concatenate([arrays[name] for name in sorted(arrays)]).astype(np.int64)
    rng = np.random.default_rng(seed)
    rows = rows[rng.integers(0, len(rows), num_samples)]
    _, made_up = workload(num_samples, seed)
    text, tiles = rows[:, 0].copy(), rows[:, 1].copy()
    text += np.minimum(rng.lognormal(4.6, 1.1, num_samples).astype(np.int64), 4000)
    alone = made_up == 0
    text[alone], tiles[alone] = rng.lognormal(6.2, 0.9, alone.sum()).clip(16, 7000), 0
    return text, tiles


def measure(packs, lengths, tiles, capacity, num_ranks):
    """Figures of packs of sample numbers, coverage and doubles among them."""
    cost, figures = CostConfig(), Figures(capacity, num_ranks, CostConfig())
    index = np.concatenate([np.asarray(pack, np.int64) for pack in packs])
    owner = np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])
    figures.add(totals(owner, lengths[index], tiles[index], len(packs), cost))
    distinct = len(np.unique(index))
    return figures.result() | {"coverage": distinct / len(lengths), "doubled": len(index) - distinct}


def settings(**changes):
    default = {
        "capacity": 8192,
        "max_tiles": 48,
        "ranks": 8,
        "counts": list(COUNTS),
        "probabilities": list(PROBABILITIES),
        "mixed_counts": False,
        "over_long": "drop",
        "window_rows": 16,
        "seed": 0,
    }
    return SimpleNamespace(**{**default, **changes})


def ours(text, tiles, **changes):
    """Figures of our plan."""
    lengths = LengthTable(text=text, tiles=tiles, name="workload")
    planner = make_planner(lengths, settings(**changes))
    result, _, _ = simulate(planner, 0)
    return result | {"coverage": result["coverage_of_what_fits"], "doubled": 0}


def side_by_side(path, num_samples, say):
    """Rows {packer, ranks, figures} of all packers that are installed."""
    text, tiles = table_of(path, num_samples, 0)
    ids = np.arange(len(text))
    count = VisualTokenBudget(counts=COUNTS, probabilities=PROBABILITIES).draw(0, 1, ids, ids)
    lengths = np.minimum(text + tiles * count, 8192)
    rows = []
    for name, (pack, is_shuffled) in TABLE.items():
        begin = time.process_time()
        try:
            packs = pack(lengths, tiles, 8192)
        except ImportError as error:
            say(f"{name}: not run, {error.name} is not installed")
            continue
        speed = len(lengths) / (time.process_time() - begin)
        if is_shuffled:
            packs = [packs[place] for place in np.random.default_rng(0).permutation(len(packs))]
        for ranks in RANKS[:2]:
            rows.append(row(name, ranks, {**measure(packs, lengths, tiles, 8192, ranks), "samples_per_cpu_s": speed}))
            say(shown(rows[-1]))
    for ranks in RANKS:
        part = text, tiles
        if ranks == max(RANKS) and len(text) < 800_000:
            part = table_of(path, 800_000, 1)
        for name, mixed in (("TokenFLEX, lockstep", False), ("TokenFLEX, mixed counts", True)):
            rows.append(row(name, ranks, ours(*part, ranks=ranks, mixed_counts=mixed)))
            say(shown(rows[-1]))
    return rows


KEPT = (
    "samples",
    "packs",
    "coverage",
    "doubled",
    "utilisation",
    "llm_waste",
    "vision_waste",
    "z3_waste",
    "effective",
    "max_tiles",
    "packs_without_image",
    "samples_per_cpu_s",
)


def row(packer, ranks, figures):
    values = {name: figures[name] for name in KEPT}
    return {"packer": packer, "ranks": ranks, **{k: round(float(v), 5) for k, v in values.items()}}


def shown(row):
    return (
        f"{row['packer']:26s} {row['ranks']:5d} ranks: coverage {100 * row['coverage']:6.2f} %, utilisation "
        f"{100 * row['utilisation']:5.2f} %, waste vision {100 * row['vision_waste']:5.2f} % ZeRO-3 {100 * row['z3_waste']:5.2f} %, "
        f"effective {100 * row['effective']:5.2f} %, {row['samples_per_cpu_s']:9.0f} samples/s"
    )


def hard_mixes(say):
    """Ours where it is hard, at 64 ranks (8 where the corpus is small)."""
    rng = np.random.default_rng(1)
    text, tiles = workload(200_000)
    mixes = {
        "60 % text-only": (*workload(200_000, text_only=0.6), {}),
        "packs of 32k": (*workload(400_000), {"capacity": 32768, "max_tiles": 192}),
        "heavy-tailed documents": (np.minimum(rng.pareto(0.9, 400_000) * 30 + 5, 8000).astype(np.int64), tiles[:1].repeat(400_000) * 0, {}),
        "one count at 90 %": (text, tiles, {"probabilities": [0.05, 0.05, 0.9]}),
        "every image 12 tiles": (text, np.where(tiles, 12, 0), {}),
        "every image 12 tiles, mixed counts": (text, np.where(tiles, 12, 0), {"mixed_counts": True}),
        "fewer samples than a window": (text[:700], tiles[:700], {"ranks": 8}),
    }  # fmt: skip
    rows = []
    for name, (mix_text, mix_tiles, changes) in mixes.items():
        changes = {"ranks": 64, **changes}
        rows.append(row(name, changes["ranks"], ours(mix_text, mix_tiles, **changes)))
        say(shown(rows[-1]))
    return rows


def scale(sizes, say):
    """Memory and speed of `tokenflex plan` in a process of its own, and the time to the next plan after a resume."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            path, figures = Path(folder) / "lengths.npz", Path(folder) / "figures.json"
            text, tiles = workload(min(size, 2_000_000), seed=2)
            times = -(-size // len(text))
            text, tiles = np.tile(text.astype(np.int32), times)[:size], np.tile(tiles.astype(np.int16), times)[:size]
            np.savez(path, text=text, tiles=tiles)
            del text, tiles
            command = [
                sys.executable,
                "-m",
                "tokenflex.cli",
                "plan",
                "--lengths",
                path,
                "--ranks",
                "64",
                "--json",
                figures,
            ]
            subprocess.run([*map(str, command)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            result = json.loads(figures.read_text())
            rows.append(
                {
                    "samples": size,
                    "process_memory_mb": result["process_memory_mb"],
                    "samples_per_cpu_s": result["samples_per_cpu_s"],
                    "resume": [resume(path, ranks, size) for ranks in RANKS if size >= 10_000 * ranks],
                }
            )
            say(json.dumps(rows[-1]))
    return rows


def resume(path, ranks, size):
    """A position in the middle of an epoch, as JSON, and the CPU time from it to the next step."""
    planner = make_planner(load_table(path), settings(ranks=ranks))
    middle = size // 2 // planner.block * planner.block
    queues = planner.limits.num_queues
    start = Position(0, 1, middle, (middle,) * queues, (0,) * queues, (9975,) * queues)
    stream = planner.steps_from(start)
    for _ in range(20):
        state = next(stream).next_position.as_dict()
    text = json.dumps(state)
    fresh = make_planner(load_table(path), settings(ranks=ranks))
    begin = time.process_time()
    next(fresh.steps_from(Position(**json.loads(text))))
    return {"ranks": ranks, "state_bytes": len(text), "cpu_s": round(time.process_time() - begin, 3)}


def draw(rows, path):
    """Effective share at 8 and 64 ranks, one bar pair per packer."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "packing"
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["packer"] for row in rows))
    figure, axes = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    for number, ranks in enumerate(RANKS[:2]):
        values = {row["packer"]: 100 * row["effective"] for row in rows if row["ranks"] == ranks}
        bars = axes.barh(np.arange(len(names)) + 0.38 * number, [values[name] for name in names], 0.36)
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        bars.set_label(f"{ranks} ranks")
    axes.set_yticks(np.arange(len(names)) + 0.19, names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(60, 104), xlabel="percent of the GPUs' time that trains (fill x balance), by the cost model")
    axes.legend(loc="lower left")
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="", help=".npz: arrays text and tiles, or tables with two columns")
    parser.add_argument("--samples", type=int, default=60_000, help="samples of the side-by-side run")
    parser.add_argument("--scale", type=int, nargs="*", default=[1_000_000, 10_000_000], help="sizes of the memory run")
    parser.add_argument("--out", default=str(ROOT / "docs" / "results"), help="folder of packing.json and packing.svg")
    arguments = parser.parse_args()
    say = lambda text: print(text, flush=True)  # noqa: E731
    rows = side_by_side(arguments.lengths, arguments.samples, say)
    report = {
        "workload": Path(arguments.lengths).name if arguments.lengths else "generated",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"numpy {np.__version__}",
        "capacity": 8192,
        "max_tiles": 48,
        "counts": COUNTS,
        "probabilities": PROBABILITIES,
        "side_by_side": rows,
        "hard_mixes": hard_mixes(say),
        "scale": scale(arguments.scale, say),
    }
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "packing.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(rows, folder / "packing.svg")
    say(f"written to {folder}/packing.json and packing.svg")


if __name__ == "__main__":
    main()
