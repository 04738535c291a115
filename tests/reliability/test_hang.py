"""Hangs and deaths: found from outside, soon, the right rank named, every rank ended, and no alarm where nothing is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from jobs import write_result

from tokenflex.parallel.watchdog import judge

FAST = ["train.hang_timeout_s=5", "train.num_steps=400", "train.save_every=0"]
SETTLED = 20
"""Steps after which the limit is that of a step, no longer that of starting."""


def verdict(folder):
    (path,) = (folder / "crash" / "health").glob("*/verdict")
    return json.loads(path.read_text())


def alarm_seconds(folder, job):
    """From the last step that was logged to the end of the job."""
    records = (folder / "crash" / "metrics.jsonl").read_text().splitlines()
    assert len(records) >= SETTLED - 1, job.output[-2000:]
    return time.time() - (folder / "crash" / "metrics.jsonl").stat().st_mtime


def test_a_stopped_rank_is_named(forge, tmp_path):
    """SIGSTOP in the middle of a forward pass: it can't say anything itself."""
    job = forge(tmp_path, 2, *FAST, faults=f"stop@forward,rank=1,step={SETTLED}", timeout_s=100)
    took = alarm_seconds(tmp_path, job)
    assert job.statuses == [-signal.SIGKILL] * 2 and not job.hung, job.output[-3000:]
    found = verdict(tmp_path)
    assert found["culprits"] == [1] and "is stopped" in found["reason"], found
    assert re.search(rf"hang: rank 1 \(.*\) is stopped \(step {SETTLED}\)", job.output), job.output[-3000:]
    (health,) = (tmp_path / "crash" / "health").iterdir()
    stack = json.loads((health / "report-0").read_text())["stack"]
    assert "run_step" in stack and "torch/distributed" in stack, "the waiting rank's stacks show where it waits"
    assert took < 15, took
    write_result("hang: stopped rank", found_within_s=took, culprit_right=True)


@pytest.mark.slow
def test_a_stuck_data_worker_is_named(forge, tmp_path):
    """A rank whose data worker is stopped waits for it in `fetch`; the others wait for the rank."""
    faults = f"stop@worker,rank=0,count={SETTLED + 6}"  # it is up to five batches ahead
    job = forge(tmp_path, 2, *FAST, "data.num_workers=1", faults=faults, timeout_s=100)
    assert job.statuses == [-signal.SIGKILL] * 2 and not job.hung, job.output[-3000:]
    found = verdict(tmp_path)
    assert found["culprits"] == [0] and "stuck in fetch" in found["reason"] and "worker process" in found["reason"], (
        found
    )
    took = alarm_seconds(tmp_path, job)
    assert took < 15
    write_result("hang: stuck data worker", found_within_s=took, culprit_right=True)


@pytest.mark.slow
def test_a_rank_that_skips_a_collective_is_named(forge, tmp_path):
    job = forge(tmp_path, 2, *FAST, faults=f"skip@agree,rank=1,step={SETTLED}", timeout_s=100)
    assert not job.hung and 0 not in job.statuses, job.output[-3000:]
    found = verdict(tmp_path)
    assert found["culprits"] == [1] and "went on without taking part in" in found["reason"], found
    took = alarm_seconds(tmp_path, job)
    assert took < 15
    write_result("hang: skipped collective", found_within_s=took, culprit_right=True)


@pytest.mark.parametrize("point", [pytest.param("init", marks=pytest.mark.slow), "mid-backward"])
def test_a_dead_rank_ends_the_others_and_is_named(point, forge, tmp_path):
    begin = time.monotonic()
    job = forge(tmp_path, 2, faults=f"kill@{point},rank=1")
    assert job.statuses[1] == -signal.SIGKILL and job.statuses[0] not in (0, 75) and not job.hung
    assert "rank 1 (" in job.outputs[0] and "died in" in job.outputs[0], job.outputs[0][-3000:]
    assert "Traceback" not in job.outputs[0], "the echo of another rank's death must not hide it"
    assert time.monotonic() - begin < 40


def test_the_error_of_the_rank_that_failed_is_what_is_shown(forge, tmp_path):
    job = forge(tmp_path, 2, faults="raise@forward,rank=1,step=2")
    assert job.statuses == [1, 1] and not job.hung
    assert "Traceback" in job.outputs[1] and "raised on purpose" in job.outputs[1]
    assert "rank 0 ended, because rank 1 (" in job.outputs[0] and "raised on purpose" in job.outputs[0]
    assert "Traceback" not in job.outputs[0], job.outputs[0][-3000:]


def report(rank, count, phase="forward", state="S", stack="torch/distributed/x.py", children=()):
    return {
        "rank": rank, "count": count, "step": 3, "phase": phase, "age_s": 9.0, "label": "host, process 1",
        "state": state, "stopped_children": list(children), "stack": stack,
    }  # fmt: skip


@pytest.mark.parametrize("reports, culprits, words", [
    ([report(0, 7), report(1, 7, state="T"), report(2, 7)], [1], "is stopped"),
    ([report(0, 7), report(2, 7)], [1], "does not answer"),
    ([report(0, 7), report(1, 7), report(2, 7, stack="model.py")], [2], "does not take part"),
    ([report(0, 7), report(1, 6, "fetch", stack="loader.py"), report(2, 7)], [1], "stuck in fetch"),
    ([report(0, 7), report(1, 9), report(2, 7)], [1], "went on without taking part"),
    ([report(0, 7), report(1, 7), report(2, 7)], [], "the network"),
])  # fmt: skip
def test_the_culprit_is_judged_right(reports, culprits, words):
    reason, found = judge(reports, 3)
    assert found == culprits and words in reason, reason


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_false_alarm_in_two_thousand_steps_under_load(forge, tmp_path):
    """With more busy processes than cores, checkpoints in between, and the shortest limit."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * os.cpu_count())]
    try:
        begin = time.monotonic()
        overrides = ["train.hang_timeout_s=5", "train.num_steps=2000", "train.save_every=50", "train.log_samples=false"]
        job = forge.done(tmp_path, 2, *overrides, "train.log_every=100", timeout_s=1500)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert "hang" not in job.output and not list((tmp_path / "crash" / "health").glob("*/hung-*"))
    write_result("no false alarm", steps=2000, alarms=0, busy_processes=len(busy), seconds=time.monotonic() - begin)
