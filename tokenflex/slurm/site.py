"""What the site file and SLURM say: resources, software, network and nodes of the job, strictly read."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class Site:
    """The settings of slurm/site.sh."""

    ranks_per_node: int
    gpus_per_node: int
    python: str
    container: str
    container_mounts: str
    interface: str
    writable: tuple[str, ...]
    max_starts_without_progress: int
    mpi: str
    index_ranks_per_node: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """This job as SLURM describes it."""

    id: str
    key: str
    array_task: str
    num_restarts: int
    nodes: tuple[str, ...]
    cpus_per_node: int
    folder: str

    @property
    def is_array(self) -> bool:
        """Whether it is a task of an array."""
        return bool(self.array_task)


def read_site(environment: Mapping[str, str], python: str) -> Site:
    """The `Site` of exported variables; `python` runs this process and, without a container, the ranks.

    Raises:
        UserError: a number that is none, or ranks that do not match the GPUs.
    """
    gpus = _number(environment, "TOKENFLEX_GPUS_PER_NODE", 8, least=0)
    ranks = _number(environment, "TOKENFLEX_RANKS_PER_NODE", gpus or 1, least=1)
    if gpus and ranks != gpus:
        raise UserError(
            f"site file: TOKENFLEX_RANKS_PER_NODE={ranks} with TOKENFLEX_GPUS_PER_NODE={gpus}; one rank is started per GPU: leave it out"
        )
    cpus = _cpus(environment)
    container = environment.get("TOKENFLEX_CONTAINER", "")
    return Site(
        ranks_per_node=ranks,
        gpus_per_node=gpus,
        python="python3" if container else python,
        container=container,
        container_mounts=environment.get("TOKENFLEX_CONTAINER_MOUNTS", ""),
        interface=environment.get("TOKENFLEX_NETWORK_INTERFACE", ""),
        writable=tuple(path for path in environment.get("TOKENFLEX_WRITABLE", "").split(":") if path),
        max_starts_without_progress=_number(environment, "TOKENFLEX_MAX_STARTS_WITHOUT_PROGRESS", 3, least=1),
        mpi=environment.get("TOKENFLEX_MPI", "pmi2"),
        index_ranks_per_node=_number(environment, "TOKENFLEX_INDEX_RANKS_PER_NODE", cpus, least=1),
    )


def read_job(environment: Mapping[str, str]) -> Job:
    """The `Job` that this process is the batch script of.

    Raises:
        UserError: it is none.
    """
    if not environment.get("SLURM_JOB_ID"):
        raise UserError("slurm/job.py: no SLURM_JOB_ID; it runs inside a job: sbatch slurm/pretrain.sh")
    names = _ask("scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]).split()
    return Job(
        id=environment["SLURM_JOB_ID"],
        key=environment.get("SLURM_ARRAY_JOB_ID") or environment["SLURM_JOB_ID"],
        array_task=environment.get("SLURM_ARRAY_TASK_ID", ""),
        num_restarts=_number(environment, "SLURM_RESTART_COUNT", 0, least=0),
        nodes=tuple(names),
        cpus_per_node=_cpus(environment),
        folder=os.getcwd(),
    )


def job_state(job_id: str) -> str:
    """SLURM's word for what the job is doing now (RUNNING, CANCELLED, ...); empty where SLURM does not answer."""
    fields = _ask("scontrol", "show", "job", "--oneliner", job_id, may_fail=True).split()
    return next((field.partition("=")[2] for field in fields if field.startswith("JobState=")), "")


def array_is_one_at_a_time(job_id: str) -> bool:
    """Whether the array that `job_id` belongs to runs one task at a time (`--array=1-10%1`)."""
    fields = _ask("scontrol", "show", "job", "--oneliner", job_id, may_fail=True).split()
    return "ArrayTaskThrottle=1" in fields


def _ask(*command: str, may_fail: bool = False) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode and not may_fail:
        raise UserError(f"{' '.join(command)}: status {done.returncode}: {' '.join(done.stderr.split())}")
    return done.stdout


def _cpus(environment: Mapping[str, str]) -> int:
    return _number(environment, "SLURM_CPUS_ON_NODE", 1, least=1)


def _number(environment: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"site file: {name}={text!r}; wanted a whole number of at least {least}")
    return int(text)
