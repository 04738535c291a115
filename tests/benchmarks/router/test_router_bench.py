"""The time of the router: every case is answered, the page's table is the record's, and what has not been measured is said so."""

import importlib.util
import json
import re

import pytest
from conftest import ROOT

from tokenflex.errors import UserError
from tokenflex.router import FitSettings, policy_table, train_router

_spec = importlib.util.spec_from_file_location("router_bench", ROOT / "tests/benchmarks/router/bench.py")
bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)

RECORD = {
    "device": "CPU, 2 threads",
    "num_questions": 48,
    "rounds": 5,
    "effort": 0.4,
    "rows": [
        {"policy": 9, "batch_size": 1, "seconds": 0.01, "visual_tokens": 9.0},
        {"policy": 9, "batch_size": 16, "seconds": 0.001, "visual_tokens": 9.0},
        {"policy": 64, "batch_size": 1, "seconds": 0.02, "visual_tokens": 64.0},
        {"policy": 64, "batch_size": 16, "seconds": 0.004, "visual_tokens": 64.0},
        {"policy": "auto", "batch_size": 1, "seconds": 0.015, "visual_tokens": 20.5},
        {"policy": "auto", "batch_size": 16, "seconds": 0.003, "visual_tokens": 20.5},
    ],
}


def test_the_page_shows_the_time_that_was_measured():
    record = json.loads(bench.RESULTS.read_text()) if bench.RESULTS.exists() else None
    (shown,) = bench.BLOCK.findall(bench.PAGE.read_text())
    assert shown == bench.block(record)


def test_a_table_has_every_policy_at_both_batch_sizes():
    lines = [line for line in bench.block(RECORD).splitlines() if line.startswith("|")]
    assert lines[0].count("|") == lines[1].count("|") == 7
    assert lines[2:] == [
        "| always 9 | 9.0 | 10.0 | 50 | 1.0 | 25 |",
        "| always 64 | 64.0 | 20.0 | 100 | 4.0 | 100 |",
        "| auto, effort 0.4 | 20.5 | 15.0 | 75 | 3.0 | 75 |",
    ]
    assert bench.BLOCK.fullmatch(bench.block(RECORD)) and bench.BLOCK.fullmatch(bench.block(None))


def test_the_teacher_forced_table_is_its_records():
    record = json.loads((ROOT / "docs" / "results" / "router-teacher-forced.json").read_text())
    page = (ROOT / "docs" / "auto.md").read_text()
    (shown,) = re.findall(r"<!-- teacher-forced -->\n(.*?)\n<!-- end teacher-forced -->", page, re.DOTALL)
    assert shown == policy_table(record)
    generated = json.loads((ROOT / "docs" / "results" / "router.json").read_text())
    before = page[: page.index("<!-- teacher-forced -->")]
    rows = [line for line in before.splitlines() if re.match(r"\| (always|\**router|oracle)", line)]
    assert len(rows) >= 10 and set(rows) <= set(policy_table(generated).splitlines())


def test_every_policy_answers_every_question(tiny_export, tiny_config, tmp_path):
    folder = tmp_path / "model"
    train_router(tiny_export, tiny_config, lambda text: None, FitSettings(hidden_size=4, max_epochs=1), 12, folder)
    said = []
    record = bench.measure(folder, tiny_config, (1, 3), rounds=1, per_task=1, say=said.append)
    assert [(row["policy"], row["batch_size"]) for row in record["rows"]] == [
        (policy, size) for policy in (4, 12, "auto") for size in (1, 3)
    ]
    assert all(row["seconds"] > 0 for row in record["rows"]) and said == ["round 0 of 1 (warm-up)", "round 1 of 1"]
    tokens = {row["policy"]: row["visual_tokens"] for row in record["rows"]}
    assert tokens[12] == 3 * tokens[4] and tokens[4] <= tokens["auto"] <= tokens[12]
    with pytest.raises(UserError, match="has no router"):
        bench.measure(tiny_export, tiny_config)
