"""The runs of a study: steps for equal tokens, kills that lose nothing, failures that are named and stop nobody."""

import dataclasses
import functools
import json
import signal
import threading

import pytest
from conftest import TINY

from tokenflex.config import load_config
from tokenflex.corpus import resolve_embedded
from tokenflex.layout import RunLayout
from tokenflex.study.arms import Arm
from tokenflex.study.jobs import Job, Runs, Workers, jobs_of
from tokenflex.study.times import measure

ARMS = [
    Arm(name="flexible", title="", counts=(4, 12)),
    Arm(name="fixed-4", title="", overrides={"budget.num_visual_tokens": [4], "budget.probabilities": [1]}, equal="tokens", specialist=4, counts=(4,)),
    Arm(name="fixed-12", title="", overrides={"budget.num_visual_tokens": [12], "budget.probabilities": [1]}, equal="tokens", specialist=12, counts=(12,)),
]  # fmt: skip


@pytest.fixture
def runs(cache_dir, tmp_path):
    overrides = (f"output_dir={tmp_path}", f"data.cache_dir={cache_dir}", "train.num_steps=12", "evaluate.at_end=true")
    base = resolve_embedded(load_config(TINY, list(overrides)))
    return Runs(TINY, overrides, base, ())


resolved = functools.partial(resolve_embedded, say=lambda text: None)


def test_equal_tokens_are_reached_to_the_nearest_step(runs):
    from tokenflex.study.jobs import _tokens

    jobs = {job.arm.name: job for job in jobs_of(runs, resolved, ARMS, [3])}
    assert jobs["flexible"].num_steps == 12
    wanted = _tokens(runs, resolved, jobs["flexible"], 12)[-1]
    for name in ("fixed-4", "fixed-12"):
        steps = jobs[name].num_steps
        sums = _tokens(runs, resolved, jobs[name], steps + 1)
        assert abs(sums[steps - 1] - wanted) == min(
            abs(sums[place] - wanted) for place in (steps - 2, steps - 1, steps)
        )
    assert jobs["fixed-4"].num_steps >= 12 >= jobs["fixed-12"].num_steps


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_stopped_goes_on_to_the_same_answers_and_a_failure_stops_nobody(runs, tmp_path):
    broken = Arm(name="broken", title="", overrides={"data.pack_length": 3}, counts=(4,))
    jobs = [Job(ARMS[0], 1, 40), Job(broken, 1, 40), Job(ARMS[1], 1, 40)]
    told, done = [], []

    def workers():
        return Workers(runs, 2, "code", done.append, told.append)

    pool = workers()
    timer = threading.Thread(target=_stop_at, args=(runs.layout(jobs[0]), 5))
    timer.start()
    left = pool.run(jobs)
    timer.join()
    assert pool.is_stopped and jobs[0] in left and jobs[2] in left
    left = workers().run(jobs)
    assert left == [jobs[1]] and {job.name for job in done} == {"flexible-seed1", "fixed-4-seed1"}
    assert any(line.startswith("failed    broken-seed1 with status 2: error: data.pack_length=3") for line in told)
    answers = json.loads(runs.layout(jobs[0]).answers.read_text())
    whole = Runs(runs.recipe_path, (*runs.overrides, f"output_dir={tmp_path / 'whole'}"), runs.base, ())
    assert Workers(whole, 1, "code", done.append, told.append).run([jobs[0]]) == []
    assert json.loads(whole.layout(jobs[0]).answers.read_text()) == answers


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_are_timed_by_turns_and_the_first_lines_are_left_out(runs, tmp_path):
    arms = [*(dataclasses.replace(arm, equal="samples") for arm in ARMS), Arm(name="other", title="", counts=(4,))]
    for _ in range(2):  # a second time begins anew
        times = measure(runs, arms, num_steps=6, rounds=2, say=lambda text: None)
        assert set(times["arms"]) == {"flexible", "fixed-4", "fixed-12"} and times["num_steps"] == 6
        for name, its in times["arms"].items():
            assert len(its) == 2 and all(run["seconds"] > 0 for run in its)
            assert name == "flexible" or [list(run["images"]) for run in its] == [[name.removeprefix("fixed-")]] * 2
    lines = [json.loads(line) for line in (tmp_path / "times/flexible-seed2/metrics.jsonl").read_text().splitlines()]
    assert times["arms"]["flexible"][1]["seconds"] == sum(line["seconds"] for line in lines[1:])
    assert not (tmp_path / "times/flexible-seed2/answers.json").exists()


def _stop_at(layout: RunLayout, step: int) -> None:
    """Send this process a stop signal once a run has done so many steps."""
    while not (layout.metrics.exists() and len(layout.metrics.read_text().splitlines()) >= step):
        threading.Event().wait(0.1)
    signal.raise_signal(signal.SIGTERM)
