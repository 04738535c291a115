"""`--profile`: the steps that were asked for, on the ranks that were asked for, and nothing else; and what a start says."""

import gzip
import json
import re

import pytest

from tokenflex.cli.options import steps
from tokenflex.errors import UserError
from tokenflex.telemetry import stages
from tokenflex.train.profiling import ProfilePlan


@pytest.fixture(scope="module")
def profiled(tmp_path_factory, forge):
    """A run of two ranks of which the second is profiled for two steps."""
    folder = tmp_path_factory.mktemp("profiled")
    flags = ["--profile", "2-3", "--profile-ranks", "1"]
    return folder, forge.done(folder, 2, "train.num_steps=4", flags=flags, timeout_s=280)


def test_a_trace_and_tables_of_the_chosen_steps_and_ranks(profiled):
    folder = profiled[0] / "crash" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        "steps-2-3-rank-00001.trace.json.gz", "steps-2-3-rank-00001.txt",
    ]  # fmt: skip
    events = json.loads(gzip.decompress((folder / "steps-2-3-rank-00001.trace.json.gz").read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert any("aten::mm" in name for name in names) and any("[memory]" in name for name in names)
    tables = (folder / "steps-2-3-rank-00001.txt").read_text()
    assert "Self CPU Mem" in tables and tables.count("Self CPU time total") == 2


def test_each_stage_of_a_start_has_a_line_with_its_seconds(profiled):
    output = profiled[1].outputs[0]
    for name in ("import", "join", "prepare", "build", "engine", "probe", "resume", "kernels"):
        assert re.search(rf"(?m)^{name} +\S.*: \d+\.\d s$", output), (name, output)
    assert re.search(r"(?m)^first +batch after \d+\.\d s, step 1 took \d+\.\d s$", output)
    assert not re.search(r"(?m)^(prepare|first) ", profiled[1].outputs[1]), "other ranks keep silent"


def test_a_stage_that_takes_long_says_so_before_it_is_done(monkeypatch):
    monkeypatch.setattr(stages, "PATIENCE_S", 0.01)
    said = []
    with stages.stage("build", "the model", said.append):
        while not said:
            pass
    assert said[0] == "build     the model ..." and re.fullmatch(r"build     the model: \d+\.\d s", said[1])
    said.clear()
    with pytest.raises(UserError), stages.stage("build", "the model", said.append):
        raise UserError("no")
    assert not [line for line in said if line.endswith(" s")], "a stage that fails is not said to be done"


@pytest.mark.parametrize("text, found", [("5-7", (5, 7)), ("5", (5, 5)), ("12-12", (12, 12))])
def test_steps_as_typed(text, found):
    assert steps(text) == found


@pytest.mark.parametrize("text", ["", "0", "7-5", "-3", "a", "2-x", "1-2-3"])
def test_steps_that_are_none_are_refused(text):
    with pytest.raises(ValueError):
        steps(text)


def test_steps_and_ranks_that_the_run_has_not_are_refused_before_it_begins():
    with pytest.raises(UserError, match="the run has 6 steps"):
        ProfilePlan(5, 7).check(num_steps=6, num_ranks=2)
    with pytest.raises(UserError, match="rank 2 of 2"):
        ProfilePlan(5, 6, (0, 2)).check(num_steps=6, num_ranks=2)
    ProfilePlan(5, 6, (0, 1)).check(num_steps=6, num_ranks=2)
