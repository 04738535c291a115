"""Kill ranks with SIGKILL at every named point; the same command again must give the run that was never killed, to the bit.

The oracle: losses and gradient norms of every step, sample ids of every rank and step, and the checksums of the last
checkpoint's files (weights, moments, generators). No retries: one case that differs fails.
"""

import itertools
import random
import signal
import time

import pytest
from jobs import trace_of, write_result

from tokenflex.failpoints import POINTS

VICTIMS = ("0", "1", "all")
ACCUMULATION = {
    1: ["data.packs_per_micro_batch=4"],
    4: ["data.packs_per_micro_batch=1", "optimizer.vision.train=false"],
}
"""Micro-steps per step -> what makes it so; the runs of four have a frozen part, whose weights are in files of their own."""
STEPS = 20
COMMON = ["data.packs_per_step=8", f"train.num_steps={STEPS}", "train.keep_checkpoints=1"]


@pytest.fixture(scope="module")
def unbroken(forge, tmp_path_factory):
    """accumulation -> the trace of a run that was never stopped, and its overrides."""
    done = {}

    def get(accumulation, num_steps=STEPS):
        if (accumulation, num_steps) not in done:
            overrides = [*COMMON, *ACCUMULATION[accumulation], f"train.num_steps={num_steps}"]
            folder = tmp_path_factory.mktemp("unbroken")
            forge.done(folder, 2, *overrides)
            done[accumulation, num_steps] = trace_of(folder), overrides
        return done[accumulation, num_steps]

    return get


def fault(point, victim):
    """A kill at a point; points inside a step at their second passing, so that the run moves between two kills."""
    is_inside = point in ("fetch", "forward", "mid-backward", "before-step", "after-step")
    return f"kill@{point},rank={victim},count={2 if is_inside else 1}"


def assert_killed(job, point, victim):
    """The victims died of the signal, everyone else ended by itself, and nobody had to be waited for."""
    assert not job.hung, job.output[-4000:]
    for rank, status in enumerate(job.statuses):
        if victim in ("all", str(rank)):
            assert status == -signal.SIGKILL, f"rank {rank} ended with {status}\n{job.output[-4000:]}"
        else:
            assert status not in (0, 75), f"rank {rank} ended with {status} although another died at {point}"


# Every point and every victim at least once, over both accumulations, in two runs that are killed twelve times each.
SHORT = [(point, VICTIMS[number % 3]) for number, point in enumerate(POINTS)]
SHORT += [(point, VICTIMS[(number + 1) % 3]) for number, point in enumerate(POINTS) if number % 2]
CHAINS = {1: SHORT[0::2], 4: SHORT[1::2]}


@pytest.mark.parametrize("accumulation", CHAINS)
def test_a_run_killed_twelve_times_is_the_run_that_never_was(accumulation, forge, unbroken, tmp_path):
    expected, overrides = unbroken(accumulation)
    assert len(CHAINS[accumulation]) == 12
    if accumulation == 4:  # in the middle of the first file of frozen weights
        fault_in_frozen = "kill@shard-50,rank=1,step=1,count=2"
        assert_killed(forge(tmp_path, 2, *overrides, faults=fault_in_frozen), "frozen weights", "1")
    for point, victim in CHAINS[accumulation]:
        if point == "load":  # only a start that finds a checkpoint passes it
            assert_killed(forge(tmp_path, 2, *overrides, faults=fault("clean-up", victim)), point, victim)
        assert_killed(forge(tmp_path, 2, *overrides, faults=fault(point, victim)), point, victim)
    last = forge.done(tmp_path, 2, *overrides)
    assert "resumed   from" in last.output
    assert trace_of(tmp_path) == expected


def test_the_oracle_can_tell_runs_apart(forge, unbroken, tmp_path):
    """Another seed, and dropout switched off: each must change the trace, or equality above would show nothing."""
    expected, overrides = unbroken(1)
    forge.done(tmp_path / "seed", 2, *overrides, "train.seed=1")
    assert trace_of(tmp_path / "seed") != expected
    forge.done(
        tmp_path / "dropout", 2, *overrides, "model.text.attention_dropout=0", "model.vision.attention_dropout=0"
    )
    other = trace_of(tmp_path / "dropout")
    assert other.samples == expected.samples and other.losses != expected.losses


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_crash_matrix(forge, unbroken, tmp_path):
    """16 points x {rank 0, rank 1, both} x accumulation {1, 4}, each in a run of its own."""
    begin, failures = time.monotonic(), []
    cases = list(itertools.product(POINTS, VICTIMS, ACCUMULATION))
    for point, victim, accumulation in cases:
        expected, overrides = unbroken(accumulation, 5)
        folder = tmp_path / f"{point}-{victim}-{accumulation}"
        if point == "load":
            assert_killed(forge(folder, 2, *overrides, faults=fault("clean-up", "all")), point, "all")
        assert_killed(forge(folder, 2, *overrides, faults=fault(point, victim)), point, victim)
        forge.done(folder, 2, *overrides)
        if trace_of(folder) != expected:
            failures.append((point, victim, accumulation))
    figures = {"kills": len(cases), "with_frozen_part": sum(accumulation == 4 for *_, accumulation in cases)}
    seconds = time.monotonic() - begin
    write_result("crash matrix", **figures, failures=len(failures), retries=0, seconds=seconds)
    assert not failures and len(cases) == 96


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills_at_random_times(forge, tmp_path):
    """Ranks die at random moments, start-up and saving included, until a hundred have hit; then the run is finished."""
    overrides = [*COMMON, *ACCUMULATION[4], "train.num_steps=600", "train.save_every=10", "train.keep_checkpoints=2"]
    begin = time.monotonic()
    forge.done(tmp_path / "unbroken", 2, *overrides, timeout_s=600)
    unbroken_s = time.monotonic() - begin
    draw, num_kills, begin, starts = random.Random(0), 0, time.monotonic(), 0
    folder = tmp_path / "killed"
    while num_kills < 100:
        victim = draw.choice(["all", 0, 1])
        job = forge(folder, 2, *overrides, signals=[(draw.uniform(0.2, 6.0), victim, signal.SIGKILL)], timeout_s=600)
        starts += 1
        assert not job.hung
        if set(job.statuses) == {0}:  # it was done before the kill came: begin another
            assert trace_of(folder) == trace_of(tmp_path / "unbroken")
            folder = tmp_path / f"killed-{starts}"
        else:
            num_kills += 1
    forge.done(folder, 2, *overrides, timeout_s=600)
    wall_s = time.monotonic() - begin
    assert trace_of(folder) == trace_of(tmp_path / "unbroken")
    runs = len(list(tmp_path.glob("killed*")))
    write_result(
        "random kills",
        kills=num_kills,
        failures=0,
        runs_finished=runs,
        wall_s=wall_s,
        unbroken_run_s=unbroken_s,
        ettr=runs * unbroken_s / wall_s,
    )
