"""Who am I: rank, number of ranks and meeting point, from whatever started this process.

The deepspeed launcher and torchrun set torch's own variables; `srun` and `mpirun` set theirs, which are mapped here, so
that nothing later has to guess. A process that nothing started is rank 0 of 1.
"""

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from ..errors import UserError

DEFAULT_PORT = 29500


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Place of this process in the job."""

    rank: int
    num_ranks: int
    local_rank: int
    local_num_ranks: int
    master_addr: str
    master_port: int
    launcher: str

    def variables(self) -> dict[str, str]:
        """The environment variables that torch.distributed and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_num_ranks),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def discover(environment: Mapping[str, str]) -> Launch:
    """The `Launch` that environment variables describe.

    Raises:
        UserError: variables of a launcher that contradict each other or lack the meeting point.
    """
    get = environment.get
    address, port = get("MASTER_ADDR"), int(get("MASTER_PORT") or DEFAULT_PORT)
    if get("RANK") is not None and get("WORLD_SIZE") is not None:
        launcher, names = "torch", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif get("OMPI_COMM_WORLD_SIZE") is not None:
        names = (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        )
        launcher = "openmpi"
    elif get("PMI_SIZE") is not None and get("SLURM_PROCID") is None:
        launcher, names = "mpi", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    elif get("SLURM_PROCID") is not None and int(get("SLURM_NTASKS", "1")) > 1:
        return _discover_slurm(
            environment, address or first_host(get("SLURM_STEP_NODELIST") or get("SLURM_NODELIST") or "")
        )
    else:
        return Launch(
            rank=0,
            num_ranks=1,
            local_rank=0,
            local_num_ranks=1,
            master_addr="127.0.0.1",
            master_port=int(get("MASTER_PORT") or 0),  # 0 is any free one: no other rank has to find it
            launcher="none",
        )
    rank, num_ranks = int(environment[names[0]]), int(environment[names[1]])
    local_rank = int(get(names[2]) or rank)
    local_num_ranks = int(re.split(r"\D", get(names[3]) or str(num_ranks))[0])
    if not 0 <= rank < num_ranks:
        raise UserError(
            f"{launcher} start: {names[0]}={rank} and {names[1]}={num_ranks}; the rank must be below the number of ranks"
        )
    if address is None and num_ranks > local_num_ranks:
        raise UserError(
            f"{launcher} start: {num_ranks} ranks over several hosts but no MASTER_ADDR; export MASTER_ADDR=<host of rank 0>"
        )
    return Launch(
        rank=rank, num_ranks=num_ranks, local_rank=local_rank, local_num_ranks=local_num_ranks,
        master_addr=address or "127.0.0.1", master_port=port, launcher=launcher,
    )  # fmt: skip


def _discover_slurm(environment: Mapping[str, str], address: str) -> Launch:
    """A task of `srun` is a rank; the step's own variables count, the job's may speak of other steps."""
    get = environment.get
    rank = int(environment["SLURM_PROCID"])
    num_ranks = int(get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])
    tasks = get("SLURM_STEP_TASKS_PER_NODE") or get("SLURM_TASKS_PER_NODE") or get("SLURM_NTASKS_PER_NODE") or ""
    per_node = tasks_per_node(tasks or str(num_ranks))
    node = int(get("SLURM_NODEID") or 0)
    job, step = int(get("SLURM_JOB_ID") or 0), int(get("SLURM_STEP_ID") or 0)
    return Launch(
        rank=rank,
        num_ranks=num_ranks,
        local_rank=int(get("SLURM_LOCALID") or 0),
        local_num_ranks=per_node[node if node < len(per_node) else 0],
        master_addr=address,
        # jobs that share a node must not meet on one port; below the range that Linux hands out by itself
        master_port=int(get("MASTER_PORT") or 15000 + (job * 7 + step) % 15000),
        launcher="slurm",
    )


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form of tasks per node as a list: `4(x2),1` -> [4, 4, 1].

    Raises:
        UserError: it is no such form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError(f"SLURM tasks per node {text!r}: wanted numbers such as 8(x4),2; start ranks with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(node_list: str) -> str:
    """First host of a SLURM node list: `gpu[003-006,9],cpu1` -> `gpu003`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", node_list)
    if not match:
        raise UserError(
            f"SLURM node list {node_list!r}: wanted names such as node[01-04]; export MASTER_ADDR=<host of rank 0>"
        )
    return match[1] + (match[2] or "")


def join(environment: MutableMapping[str, str] = os.environ) -> Launch:
    """Discover the launch and export torch's variables for it; returns the `Launch`."""
    launch = discover(environment)
    environment.update(launch.variables())
    return launch
