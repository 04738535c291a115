"""The quick start as a user runs it, held to what it is meant to show; and the page's figures held to their file."""

import json
import os
import subprocess

import pytest
from conftest import ROOT
from quickstart_page import BLOCK

from tokenflex.evaluate import accuracy_table


def test_the_page_shows_the_table_that_was_measured():
    record = json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text())
    (shown,) = BLOCK.findall((ROOT / "docs" / "quickstart.md").read_text())
    assert shown == accuracy_table(record)
    assert (ROOT / "docs" / "results" / "quickstart.png").exists()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_quick_start_learns(tmp_path):
    """`make train`: coarse is read at the largest count, dense gains by the count, the control does not, unseen counts hold."""
    arguments = f"output_dir={tmp_path} data.cache_dir={tmp_path}/cache train.wandb=off"
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    subprocess.run(["make", "train", f"ARGS={arguments}"], cwd=ROOT, env=environment, check=True, timeout=1400)
    record = json.loads((tmp_path / "quickstart" / "accuracy.json").read_text())
    trained, counts = record["trained"], sorted(map(int, record["accuracy"]["coarse"]))
    at = lambda task, count: 100 * record["accuracy"][task][str(count)]
    assert at("coarse", trained[-1]) >= 90
    assert at("dense", trained[-1]) >= at("dense", trained[0]) + 25
    control = [at("control", count) for count in counts]
    assert max(control) - min(control) <= 5
    auto, largest = record["auto"], trained[-1]
    tasks = list(record["accuracy"])
    assert tasks == ["coarse", "control", "dense"]
    per_image = {task: auto["visual_tokens"][task] / auto["images"][task] for task in tasks}
    assert per_image["control"] < per_image["dense"] and sum(auto["visual_tokens"].values()) < 0.8 * largest * sum(
        auto["images"].values()
    )
    right = sum(auto["right"].values()) / sum(record["num_questions"].values())
    assert 100 * right >= 0.95 * sum(at(task, largest) for task in tasks) / len(tasks)
    for below, above in zip(trained, trained[1:]):
        for count in (count for count in counts if below < count < above):
            for task in record["accuracy"]:
                assert at(task, count) >= min(at(task, below), at(task, above)) - 3, (task, count)
