"""The test cluster, and jobs of the tiny recipe on it."""

import json
import os
import signal
import time

import pytest
from conftest import ROOT, TINY
from slurm.cluster import Cluster, processes

SETTLED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"}
TIMING = ("seconds", "tokens_per_s")
"""Keys of metrics.jsonl that say how fast, not what."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    import tempfile

    # munge's socket needs a short path below folders that only root can write to
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/run") as folder:
        cluster = Cluster(folder)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


SITE = """
export TOKENFLEX_GPUS_PER_NODE=0 TOKENFLEX_RANKS_PER_NODE=1 TOKENFLEX_NETWORK_INTERFACE=lo
export TOKENFLEX_VENV={venv} TOKENFLEX_INDEX_RANKS_PER_NODE=1
"""


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """A filled-in site file."""
    import shlex
    import sys

    path = tmp_path_factory.mktemp("site") / "site.sh"
    path.write_text(SITE.format(venv=shlex.quote(sys.prefix)))
    return path


class Submitted:
    """One job of the tiny recipe, 2 ranks on 2 nodes under ZeRO-3."""

    def __init__(self, cluster, site, folder, cache_dir, script="pretrain"):
        self.cluster, self.folder, self.script = cluster, folder, script
        self.environment = {"TOKENFLEX_ROOT": str(ROOT), "TOKENFLEX_SITE": str(site)}
        self.arguments = ["--config", TINY, f"output_dir={json.dumps(str(folder))}", f"data.cache_dir={cache_dir}"]
        self.run = folder / "tiny"
        self.id = None

    def submit(self, *overrides, options=(), **environment):
        """sbatch it; returns the job's id."""
        command = ["sbatch", "--parsable", *options, ROOT / "slurm" / f"{self.script}.sh"]
        environment = {**self.environment, **environment}
        self.id = self.cluster.run(*command, *self.arguments, *overrides, cwd=self.folder, environment=environment)
        return self.id

    def metrics(self):
        """What was logged per step, without what depends on the machine's speed."""
        path = self.run / "metrics.jsonl"
        if not path.exists():
            return []
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]

    def output(self):
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"*-{self.id}.out")))

    def state(self):
        return self.cluster.job(self.id)["JobState"]

    def wait_for_step(self, step):
        """Wait until a step is logged by a job that runs."""
        self._wait(lambda: self.metrics() and self.metrics()[-1]["step"] >= step, f"step {step}")

    def wait_for_start(self, number):
        """Wait until the job's ranks run for the (number + 1)th time."""
        place = f"slurm/{self.id}/start-{number:03d}/rank-00000.log"
        self._wait(lambda: (self.run / place).exists(), f"start {number}")

    def wait_for_end(self):
        """Wait until SLURM has done with the job; returns its state."""
        return self.cluster.wait(
            lambda: (state := self.state()) in SETTLED and state,
            timeout_s=900,
            what=f"job {self.id}\n{self.output()}",
            interval_s=2,
        )

    def _wait(self, condition, what):
        deadline = time.monotonic() + 600
        while not condition():
            for _ in range(20):  # files are looked at often, SLURM is asked seldom
                time.sleep(0.1)
                if condition():
                    return
            state = self.state()
            assert state not in SETTLED, f"{state} before {what}\n{self.output()}"
            assert time.monotonic() < deadline, f"waited too long for {what}\n{self.output()}"

    def ranks(self):
        """{rank: pid} of the ranks that run (not the batch script nor srun, which carry their variables; not workers)."""
        found = {}
        for pid, environment in processes():
            is_task = "SLURM_STEP_NODELIST" in environment and "TOKENFLEX_STATUS_DIR" in environment
            if is_task and environment.get("SLURM_JOB_ID") == self.id:
                rank = int(environment["SLURM_PROCID"])
                found[rank] = min(pid, found.get(rank, pid))
        return found

    def rank_pid(self, rank):
        return self.ranks()[rank]

    def signal_rank(self, rank, number=signal.SIGUSR1):
        os.kill(self.rank_pid(rank), number)

    def starts(self):
        """The job's own record of its starts."""
        return json.loads((self.run / "slurm" / self.id / "starts.json").read_text())


@pytest.fixture
def job(cluster, site, tmp_path, cache_dir, corpus):
    job = Submitted(cluster, site, tmp_path, cache_dir)
    yield job
    if job.id:
        cluster.run("scancel", job.id, check=False)
        cluster.wait(lambda: job.state() in SETTLED)
        cluster.wait(lambda: not cluster.run("squeue", "-h"), what="the queue to empty")
