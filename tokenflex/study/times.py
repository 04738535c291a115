"""Does time follow tokens? Short runs of the flexible arm and of the specialists by turns, and what these predict of it.

Why this file exists: a record's times are of runs that shared the machine. Here one run follows another, in an order that
moves on by one each round, so that a slow minute is nobody's.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..layout import RunLayout
from .arms import FLEXIBLE, Arm
from .jobs import Job, Runs, Say, Workers
from .record import MadeBy

MIXED = "per-sample"
"""The arm that differs from the flexible one in lockstep alone: its counts are mixed within a pack."""


def timed_arms(arms: Sequence[Arm]) -> list[Arm]:
    """Those whose times are compared: the flexible one, the same without lockstep, and the specialists at equal samples."""
    wanted = [arm for arm in arms if arm.name in (FLEXIBLE, MIXED) or (arm.specialist and arm.equal == "samples")]
    off = {"evaluate.at_end": False, "train.save_every": 0}
    return [dataclasses.replace(arm, overrides={**arm.overrides, **off}) for arm in wanted]


def measure(runs: Runs, arms: Sequence[Arm], num_steps: int, rounds: int, say: Say) -> dict[str, Any]:
    """Train each of `timed_arms` `rounds` times for `num_steps`, one run at a time.

    Returns: {"made_by": ..., "num_steps": ..., "arms": {name: [`timing` of each round]}}.

    Raises:
        UserError: a run that did not reach its end.
    """
    arms, made_by = timed_arms(arms), MadeBy.here(runs.base)
    folder = Path(runs.base.output_dir) / "times"
    shutil.rmtree(folder, ignore_errors=True)  # what was timed before says nothing now
    runs = dataclasses.replace(runs, overrides=(*runs.overrides, f"output_dir={folder}"))
    found: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}

    def take_in(job: Job) -> None:
        found[job.arm.name].append(timing(runs.layout(job)))

    for turn in range(rounds):
        order = [*arms[turn % len(arms) :], *arms[: turn % len(arms)]]
        pool = Workers(runs, 1, "-".join(made_by), take_in, say)
        if left := pool.run([Job(arm, turn + 1, num_steps) for arm in order]):
            raise UserError(f"times: {left[0].name} did not reach its end; nothing is written")
    return {"made_by": made_by._asdict(), "num_steps": num_steps, "arms": found}


def timing(layout: RunLayout) -> dict[str, Any]:
    """{"seconds": of training without its first logging interval, "images": {count: images in them}} of a run."""
    lines = [json.loads(line) for line in layout.metrics.read_text().splitlines()][1:]
    counts = sorted({count for line in lines for count in line["images_per_count"]}, key=int)
    images = {count: sum(line["images_per_count"].get(count, 0) for line in lines) for count in counts}
    return {"seconds": sum(line["seconds"] for line in lines), "images": images}


def predicted(times: dict[str, Any], name: str) -> np.ndarray:
    """[rounds] seconds of an arm if each of its images took what it takes in the round's run of that count's specialist."""
    return np.array(
        [
            sum(
                number * times["arms"][f"fixed-{count}"][turn]["seconds"]
                / times["arms"][f"fixed-{count}"][turn]["images"][count]
                for count, number in run["images"].items()
            )
            for turn, run in enumerate(times["arms"][name])
        ]
    )  # fmt: skip


def times_table(times: dict[str, Any]) -> str:
    """Measured beside predicted, as ratios to the specialist of the largest count: medians (ranges) over rounds."""
    if not times:
        return "not measured yet"
    seconds = {name: np.array([run["seconds"] for run in its]) for name, its in times["arms"].items()}
    largest = max((name for name in seconds if name.startswith("fixed-")), key=lambda name: int(name.split("-")[1]))
    rows = [
        f"| arm | images/s | time / {largest} | predicted from the specialists | measured / predicted |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, its in times["arms"].items():
        rate = np.median([sum(run["images"].values()) / run["seconds"] for run in its])
        cells = [name, f"{rate:.1f}", f"{np.median(seconds[name] / seconds[largest]):.3f}"]
        if name.startswith("fixed-"):
            cells += ["", ""]
        else:
            wanted = predicted(times, name)
            ratio = seconds[name] / wanted
            cells += [
                f"{np.median(wanted / seconds[largest]):.3f}",
                f"{np.median(ratio):.3f} ({ratio.min():.3f} to {ratio.max():.3f})",
            ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
