"""Whole jobs on a real SLURM: where they run, what they refuse, and whose fault an end was."""

import json
import os
import signal
import time

import pytest
from conftest import ROOT
from slurm.jobs import Submitted

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

SHORT = ("train.num_steps=2",)


def ended(job):
    """(state, exit status) of a job once SLURM is done with it."""
    state = job.wait_for_end()
    return state, int(job.cluster.job(job.id)["ExitCode"].partition(":")[0])


def test_four_nodes_with_two_ranks_each(job, tmp_path, site):
    """World size and nodes are printed; every rank has a log, and the merged one holds them all."""
    wide = tmp_path / "wide.sh"
    wide.write_text(site.read_text() + "export TOKENFLEX_RANKS_PER_NODE=2\n")
    job.environment["TOKENFLEX_SITE"] = str(wide)
    job.submit(*SHORT, "data.packs_per_step=8", "data.lockstep_packs=8", options=["--nodes=4"])
    assert ended(job) == ("COMPLETED", 0), job.output()
    layout = "node0: 0-1, node1: 2-3, node2: 4-5, node3: 6-7"
    assert f"world     8 ranks on 4 nodes ({layout}), started by slurm" in job.output()
    folder = job.run / "slurm" / job.id / "start-000"
    assert len(list(folder.glob("rank-*.log"))) == 8
    assert sorted((path.name, path.read_text()) for path in (folder / "status").iterdir()) == [
        (f"rank-{rank}", "0\n") for rank in range(8)
    ]
    assert (folder / "rank-00000.log").read_text().count("step ") == (folder / "merged.log").read_text().count("step ")


def test_a_job_in_the_default_partition_is_handed_over_to_the_sites(job, cluster, site, tmp_path):
    theirs = tmp_path / "gpu.sh"
    theirs.write_text(site.read_text() + "export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=vision\n")
    job.environment["TOKENFLEX_SITE"] = str(theirs)
    first = job.submit(*SHORT, options=["--time=17", "--job-name=mine"])
    assert ended(job) == ("COMPLETED", 0), job.output()
    assert "handed over to partition gpu, account vision" in job.output()
    job.id = str(int(first) + 1)
    assert ended(job) == ("COMPLETED", 0), job.output()
    record = cluster.job(job.id)
    assert (record["Partition"], record["Account"], record["TimeLimit"]) == ("gpu", "vision", "00:17:00")
    assert record["JobName"] == "mine" and len(job.metrics()) == 2


def test_hostile_names_do_nothing_but_name(cluster, site, tmp_path, cache_dir, corpus):
    """Folders with blanks, quotes, line breaks, substitutions and SLURM's own patterns; overrides with the same."""
    place = tmp_path / 'it\'s $(touch pwned) `touch pwned` "a\\ b" %j %%\n* é'
    place.mkdir()
    (tmp_path / "out").mkdir()
    job = Submitted(cluster, site, place, cache_dir)
    hostile = "a '\"; touch pwned; $(touch pwned)\nb"
    job.submit(*SHORT, f"model.tokenizer={corpus / 'tokenizer'}", "data.evaluation=[" + json.dumps(hostile) + "]",
               options=[f"--output={tmp_path}/out/%x-%j.out"])  # fmt: skip
    job.folder = tmp_path / "out"
    assert ended(job) == ("COMPLETED", 0), job.output()
    assert len(job.metrics()) == 2
    assert not list(tmp_path.rglob("pwned")) and not (ROOT / "pwned").exists()
    from tokenflex.config import load_config

    assert load_config(job.run / "config.yaml").data.evaluation == (hostile,)
    assert (job.run / "slurm" / job.id / "start-000" / "rank-00001.log").exists()


def test_a_wrong_override_ends_the_job_with_one_line(job):
    job.submit("train.num_stps=3")
    assert ended(job) == ("FAILED", 2)
    lines = [line for line in job.output().splitlines() if "error:" in line and "srun" not in line]
    assert len(lines) == 1 and "did you mean train.num_steps?" in lines[0], job.output()


def test_the_bad_nodes_are_named_and_nothing_starts(job, cluster, tmp_path):
    fake = tmp_path / "other" / "torch-1.0.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    cluster.set_node_environment("node1", PYTHONPATH=str(fake.parent))
    cluster.set_node_environment("node2", PYTHONHOME="/nowhere")  # Python does not start there
    try:
        job.submit(*SHORT, options=["--nodes=4"])
        assert ended(job) == ("FAILED", 69), job.output()
    finally:
        for node in ("node1", "node2"):
            cluster.set_node_environment(node)
    assert "error: node1: has torch 1.0, the others have" in job.output()
    assert "error: node2: did not report" in job.output()
    assert "nodes not fit: node1,node2;" in job.output() and not job.metrics()
    assert not any(f"error: {node}:" in job.output() for node in ("node0", "node3"))


def test_a_killed_rank_ends_the_job_without_a_requeue(job):
    job.submit("train.num_steps=500")
    job.wait_for_step(2)
    before = time.monotonic()
    job.signal_rank(1, signal.SIGKILL)
    state, status = ended(job)
    assert state == "FAILED" and status not in (0, 75), job.output()
    assert time.monotonic() - before < 90
    assert job.starts()[-1]["decision"] == "failed: not requeued"
    assert job.cluster.job(job.id)["Restarts"] == "0"


def test_the_rank_that_failed_first_is_shown(job, tmp_path):
    """Rank 1 alone finds a wrong world; the other is ended for its sake."""
    job.cluster.set_node_environment("node1", TOKENFLEX_EXPECTED_NUM_RANKS="5")
    try:
        job.submit(*SHORT)
        assert ended(job) == ("FAILED", 2), job.output()
    finally:
        job.cluster.set_node_environment("node1")
    assert "rank 1 on node1 was the first to end, with status 2" in job.output()
    assert job.starts()[-1]["decision"] == "failed: not requeued"


def test_a_job_that_never_saves_is_not_requeued_for_ever(job, cluster):
    """Stopped before its first step each time; two starts without progress are allowed here."""
    job.submit("train.num_steps=500", TOKENFLEX_MAX_STARTS_WITHOUT_PROGRESS="2")
    for number in range(2):
        job.wait_for_start(number)
        cluster.wait(lambda: len(job.ranks()) == 2, what="two ranks")
        time.sleep(0.5)
        cluster.run("scancel", "--signal=USR1", job.id)
        if not number:
            job.wait_for_start(1)
    assert ended(job) == ("FAILED", 75), job.output()
    assert [start["decision"] for start in job.starts()] == [
        "requeue",
        "failed: no newer checkpoint after several starts",
    ]
    assert not (job.run / "checkpoints").exists()


def test_an_array_is_a_chain(job, cluster):
    """Each task goes on from the last; when the run is done the others have nothing to do."""
    job.submit("train.num_steps=60", options=["--array=1-4%1"])
    array, chain = job.id, job.run / "slurm" / job.id
    cluster.wait(lambda: job.metrics() and job.metrics()[-1]["step"] >= 2, timeout_s=300)
    # The signal arrives; scancel asks again all the same, and fails because the task has ended by then.
    cluster.run("scancel", "--signal=USR1", f"{array}_1", check=False)
    cluster.wait(lambda: not cluster.run("squeue", "-h"), timeout_s=300)
    starts = json.loads((chain / "starts.json").read_text())
    assert [start["decision"] for start in starts] == ["stopped: the next task of the array goes on", "done"]
    assert len(job.metrics()) == 60
    outputs = "".join(path.read_text() for path in job.folder.glob("*.out"))
    assert outputs.count("nothing to do, start 1 was the last (done)") == 2


def test_an_array_of_tasks_side_by_side_is_refused(job, cluster):
    job.submit(*SHORT, options=["--array=1-2"])
    cluster.wait(lambda: not cluster.run("squeue", "-h"), timeout_s=120)
    outputs = [path.read_text() for path in job.folder.glob("*.out")]
    assert len(outputs) == 2 and all("submit with --array=1-10%1" in text for text in outputs)


def test_fresh_begins_anew_once(job, cluster):
    job.submit(*SHORT)
    assert ended(job) == ("COMPLETED", 0), job.output()
    before = os.stat(job.run / "config.yaml").st_mtime_ns
    job.submit("--fresh", "train.num_steps=20")
    cluster.wait(lambda: os.stat(job.run / "config.yaml").st_mtime_ns > before)
    job.wait_for_step(4)
    cluster.run("scancel", "--signal=USR1", job.id)
    assert ended(job) == ("COMPLETED", 0), job.output()
    assert "--fresh was done by start 0: going on from step" in job.output()
    assert [line["step"] for line in job.metrics()] == list(range(1, 21))
    assert job.output().count("step 1/20") == 1


def test_index_train_evaluate_finetune(job, cluster, site, cache_dir, tmp_path):
    """The four scripts in turn on one run."""
    job.script = "index"
    job.submit("--rebuild", options=["--nodes=2"])
    assert ended(job) == ("COMPLETED", 0), job.output()
    assert "60 samples of" in job.output() and "by 2 processes" in job.output()
    job.script = "pretrain"
    job.submit(*SHORT)
    assert ended(job) == ("COMPLETED", 0), job.output()
    job.script = "evaluate"
    job.submit(options=["--nodes=2"])
    assert ended(job) == ("COMPLETED", 0), job.output()
    assert json.loads((job.run / "accuracy.json").read_text())["num_questions"]
    job.script = "finetune"
    job.submit(*SHORT, "name=next", f"model.init_from={job.run / 'model'}")
    assert ended(job) == ("COMPLETED", 0), job.output()
    assert (tmp_path / "next" / "model" / "config.json").exists()
