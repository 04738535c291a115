"""A dry run takes the plan's fullest packs through a step on real ranks, says what they took, and leaves nothing behind."""

import re

import numpy as np
import pytest
from conftest import TINY, run_ranks

from tokenflex.data.sources import Here, open_data
from tokenflex.estimate.dry_run import worst_micro_batches
from tokenflex.estimate.workload import packs_of


@pytest.fixture(scope="module")
def planner(tiny_config, processor):
    return open_data(tiny_config, processor, Here(), say=lambda text: None).planner


@pytest.mark.parametrize("packs_at_once", [1, 2])
def test_no_micro_batch_of_the_plan_has_more(planner, packs_at_once):
    """Of tokens, tiles or visual tokens, over all packs of the epoch."""
    plans = dict(worst_micro_batches(planner, packs_at_once))
    every = [packs_of(window, planner.budget) for _, window, _ in planner.windows(0)]
    lengths = planner.mixture.columns(np.arange(len(planner.mixture)))
    for name, column in (("most tokens", "tokens"), ("most tiles", "tiles"), ("most visual tokens", "visual_tokens")):
        plan = plans[name]
        text, tiles = lengths[0][plan.sample_ids], lengths[2][plan.sample_ids]
        has = {"tokens": text + tiles * plan.counts, "tiles": tiles, "visual_tokens": tiles * plan.counts}[column].sum()
        most = np.sort(np.concatenate([getattr(packs, column) for packs in every]))[-packs_at_once:].sum()
        assert has == most, name


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_it_runs_on_two_ranks_and_leaves_no_trace(tmp_path, cache_dir, corpus, index):
    before = files_below(corpus.parent)
    command = [
        "launch/train.py",
        "--config",
        TINY,
        "--dry-run",
        f"output_dir={tmp_path / 'runs'}",
        f"data.cache_dir={cache_dir}",
    ]
    first, second = run_ranks(2, [*command, "train.spike_sigma=0"])
    assert first.status == second.status == 0, first.output[-3000:]
    rows = re.findall(
        r"^(most [a-z ]+?) +([\d,]+) +(\d+) +(\d+) +([\d,]+) +([\d.]+) +([\d.]+) +([\d.]+)$", first.output, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["most tokens", "most tiles", "most visual tokens"], first.output[-3000:]
    assert all(0 < float(row[5]) < 20 for row in rows), "a mean loss"
    assert all(float(row[6]) > 0.3 * float(row[7]) for row in rows), "less than a third of what was estimated"
    assert re.search(r"per rank +0: [\d.]+, 1: [\d.]+ GB; the most on rank [01] \(memory of the process", first.output)
    assert "dry run" not in second.output
    assert not (tmp_path / "runs").exists() and files_below(corpus.parent) == before
