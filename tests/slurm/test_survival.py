"""The law of a job: however SLURM stops it, it ends with exactly the stream and the losses of one that nothing stopped."""

import signal
import time

import pytest
from slurm.jobs import Submitted

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

NUM_STEPS = 14
STOPS = [2, 6, 9]
RECIPE = (f"train.num_steps={NUM_STEPS}", "train.save_every=5")


@pytest.fixture(scope="module")
def uninterrupted(cluster, site, tmp_path_factory, cache_dir, corpus):
    """Metrics of the same job when nothing stops it."""
    job = Submitted(cluster, site, tmp_path_factory.mktemp("uninterrupted"), cache_dir)
    job.submit(*RECIPE)
    assert job.wait_for_end() == "COMPLETED", job.output()
    metrics = job.metrics()
    assert [line["step"] for line in metrics] == list(range(1, NUM_STEPS + 1))
    assert len({line["loss"] for line in metrics}) == NUM_STEPS  # a constant would equal anything
    return metrics


def assert_identical(job, uninterrupted, num_starts):
    """The job is done after so many starts, and every step is the uninterrupted run's."""
    assert job.wait_for_end() == "COMPLETED", job.output()
    assert job.metrics() == uninterrupted
    starts = job.starts()
    assert len(starts) == num_starts, starts
    assert starts[-1]["decision"] == "done"


def stop_each_start(job, stop, steps=STOPS):
    """Once the job has logged each of `steps`, `stop` it and wait for its next start."""
    for number, step in enumerate(steps):
        job.wait_for_start(number)
        job.wait_for_step(step)
        stop()
    job.wait_for_start(len(steps))


def decisions(job):
    return [start["decision"] for start in job.starts()]


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_to_all_ranks(job, cluster, uninterrupted, name):
    """As from SLURM before the limit. Data workers get it too, and must not die of it."""
    job.submit(*RECIPE, "data.num_workers=1")
    stop_each_start(job, lambda: cluster.run("scancel", f"--signal={name}", job.id))
    assert_identical(job, uninterrupted, 4)
    assert decisions(job) == ["requeue"] * 3 + ["done"]


def test_a_signal_to_one_rank_only(job, uninterrupted):
    """All ranks agree to stop within a step, whichever of them has been told."""
    ranks = iter([(1, signal.SIGUSR1), (0, signal.SIGUSR1), (1, signal.SIGTERM)])
    job.submit(*RECIPE)
    stop_each_start(job, lambda: job.signal_rank(*next(ranks)))
    assert_identical(job, uninterrupted, 4)
    assert decisions(job) == ["requeue"] * 3 + ["done"]


def test_a_double_signal(job, cluster, uninterrupted):
    """The second comes while the first is being dealt with, from at once to a second later."""
    gaps = iter([0.0, 0.2, 1.0])

    def twice():
        cluster.run("scancel", "--signal=USR1", job.id)
        time.sleep(next(gaps))
        cluster.run("scancel", "--signal=TERM", job.id, check=False)

    job.submit(*RECIPE)
    stop_each_start(job, twice)
    assert_identical(job, uninterrupted, 4)


def test_a_signal_during_a_save(job, cluster, uninterrupted):
    """Sent while a checkpoint's folder is there but the checkpoint is not whole yet."""
    job.submit(f"train.num_steps={NUM_STEPS}", "train.save_every=1")
    during = []

    def signal_in_a_save():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if saving := unfinished(job.run / "checkpoints"):
                cluster.run("scancel", "--signal=USR1", job.id)
                during.append(saving)
                return
            time.sleep(0.002)
        raise TimeoutError("no save was seen")

    stop_each_start(job, signal_in_a_save)
    assert len(during) == 3
    assert_identical(job, uninterrupted, 4)


def unfinished(checkpoints):
    """Names of checkpoint folders that are being written."""
    return [
        path.name
        for path in checkpoints.glob("*step-*")
        if path.is_dir() and (path.suffix or not (path / "manifest.json").exists())
    ]


def test_scontrol_requeue(job, cluster, uninterrupted):
    """SLURM ends the job with TERM and starts it again itself: the job must not ask for a second requeue."""
    job.submit(*RECIPE)
    stop_each_start(job, lambda: cluster.run("scontrol", "requeue", job.id), STOPS[:2])
    assert_identical(job, uninterrupted, 3)
    assert cluster.job(job.id)["Restarts"] == "2"
    saved = [start["step_before"] for start in job.starts()]
    assert all(after >= step for step, after in zip(STOPS, saved[1:])), saved  # saved when stopped, not just every 5


def test_preemption_by_a_partition_of_higher_priority(job, cluster, uninterrupted):
    def preempt():
        other = cluster.run(
            "sbatch",
            "--parsable",
            "--partition=urgent",
            "--nodes=4",
            "--exclusive",
            "--output=/dev/null",
            "--wrap=true",
        )
        cluster.wait(lambda: cluster.job(other)["JobState"] == "COMPLETED", what="the urgent job")  # fmt: skip

    job.submit(*RECIPE)
    stop_each_start(job, preempt, STOPS[:1])
    assert_identical(job, uninterrupted, 2)
    assert job.starts()[1]["step_before"] >= STOPS[0]


def test_the_time_limit(job, cluster, uninterrupted):
    """SLURM's own signal ahead of the limit, which is brought near once the job runs.

    SLURM looks at limits every half a minute; the ranks are held still until then: it sends CONT with its signal.
    """
    job.submit(*RECIPE, options=["--time=60", "--signal=USR1@1800"])
    job.wait_for_start(0)
    job.wait_for_step(STOPS[0])
    for rank in (0, 1):
        job.signal_rank(rank, signal.SIGSTOP)
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=20")
    cluster.wait(lambda: decisions(job)[0] == "requeue", what="the requeue")

    def is_far_again():
        cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60", check=False)  # not while it is requeued
        return cluster.job(job.id)["TimeLimit"] == "01:00:00"

    cluster.wait(is_far_again)
    assert_identical(job, uninterrupted, 2)


def test_scancel_ends_the_job_for_good_and_a_new_one_goes_on(job, cluster, uninterrupted):
    for step in STOPS[:2]:
        job.submit(*RECIPE)
        job.wait_for_step(step)
        cluster.run("scancel", job.id)
        assert job.wait_for_end() == "CANCELLED"
        cluster.wait(lambda: not cluster.run("squeue", "-h"), what="the job to be gone")
        time.sleep(3)  # a requeue in the wrong place would bring it back by now
        assert job.state() == "CANCELLED"
    job.submit(*RECIPE)
    assert_identical(job, uninterrupted, 1)
    assert job.starts()[0]["step_before"] >= STOPS[1]


def test_a_slurmd_that_dies_and_comes_back_costs_nothing(job, cluster, uninterrupted):
    job.submit(*RECIPE)
    job.wait_for_step(2)
    cluster.kill_slurmd("node1")
    time.sleep(2)
    cluster.start_node("node1")
    assert_identical(job, uninterrupted, 1)


@pytest.mark.parametrize("place", [1, 0], ids=["another node", "the node of the batch script"])
def test_a_node_that_dies(job, cluster, uninterrupted, place):
    """All of its processes at once. SLURM notices, frees the others and starts the job again on nodes that are left."""
    job.submit(*RECIPE)
    job.wait_for_step(6)
    node = job.starts()[0]["nodes"][place]
    cluster.kill_node(node)
    try:
        job.wait_for_start(1)
        assert node not in job.starts()[1]["nodes"]
        assert job.starts()[1]["step_before"] == 5
        assert_identical(job, uninterrupted, 2)
    finally:
        cluster.start_node(node)
        cluster.wait(lambda: "idle" in cluster.run("sinfo", "-h", "-n", node, "-p", "debug", "-o", "%T"))
