"""Every way to start a job ends in the same six variables."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from tokenflex.errors import UserError
from tokenflex.parallel.environment import discover, first_host, join

STARTS = {
    "nothing": ({}, (0, 1, 0, 1, "127.0.0.1")),
    "torchrun": (
        {
            "RANK": "5",
            "WORLD_SIZE": "8",
            "LOCAL_RANK": "1",
            "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "a",
            "MASTER_PORT": "1",
        },
        (5, 8, 1, 4, "a"),
    ),
    "deepspeed": ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}, (1, 2, 1, 2, "a")),
    "openmpi": (
        {
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": "3",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
        },
        (3, 4, 3, 4, "127.0.0.1"),
    ),
    "mpich": (
        {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
        (1, 2, 1, 2, "127.0.0.1"),
    ),
    "srun": (
        {
            "SLURM_PROCID": "9",
            "SLURM_NTASKS": "16",
            "SLURM_LOCALID": "1",
            "SLURM_NTASKS_PER_NODE": "8",
            "SLURM_STEP_NODELIST": "gpu[03-04]",
        },
        (9, 16, 1, 8, "gpu03"),
    ),
    "inside an allocation of one": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (0, 1, 0, 1, "127.0.0.1")),
}


@pytest.mark.parametrize("start", STARTS)
def test_every_launcher_is_understood(start):
    environment, expected = STARTS[start]
    launch = discover(environment)
    assert (launch.rank, launch.num_ranks, launch.local_rank, launch.local_num_ranks, launch.master_addr) == expected
    exported = dict(environment)
    join(exported)
    assert discover(exported) == discover({**environment, **launch.variables()})
    assert exported["RANK"] == str(launch.rank) and exported["MASTER_PORT"].isdigit()


def test_contradictions_are_named():
    with pytest.raises(UserError, match="RANK=4 and WORLD_SIZE=4"):
        discover({"RANK": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "a"})
    with pytest.raises(UserError, match="export MASTER_ADDR"):
        discover(
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "8",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
            }
        )


@pytest.mark.parametrize(
    "text, host", [("node7", "node7"), ("gpu[003-006,9],cpu1", "gpu003"), ("a,b", "a"), ("n-[1,3]", "n-1")]
)
def test_first_host_of_a_node_list(text, host):
    assert first_host(text) == host


def test_mpirun_starts_ranks_that_find_each_other():
    """Real MPI: two processes, each of which knows its rank from the launcher's variables alone."""
    mpirun = shutil.which("mpirun", path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    code = "from tokenflex.parallel import join; launch = join(); print(launch.rank, launch.num_ranks, launch.launcher)"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    end = subprocess.run(
        [mpirun, "-n", "2", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=60,
    )
    assert end.returncode == 0, end.stderr
    assert sorted(line[:3] for line in end.stdout.splitlines()) == ["0 2", "1 2"]


def test_the_index_is_built_in_parallel_by_mpi(tmp_path, corpus, cache_dir, processor):
    import numpy as np
    from conftest import TINY

    from tokenflex.data import Limits, find_shards, load_index
    from tokenflex.data.index import build_index

    shards = find_shards([str(corpus / "train")])
    for number, shard in enumerate(shards * 3):
        shutil.copy(shard, tmp_path / f"{number}.tar")
    mpirun = shutil.which("mpirun", path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    command = [
        mpirun,
        "-n",
        "2",
        sys.executable,
        "launch/index.py",
        "--config",
        str(TINY),
        f"data.cache_dir={cache_dir}",
    ]
    command += [f"data.train=[{tmp_path}]", f"model.tokenizer={corpus}/tokenizer"]
    end = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert end.returncode == 0, end.stdout + end.stderr
    assert "by 2 processes" in end.stdout
    shards = find_shards([str(tmp_path)])
    build_index(shards, processor, tmp_path / "alone", Limits())
    one, two = load_index(tmp_path / "alone", shards, processor), load_index(tmp_path / "index", shards, processor)
    for column in ("text_tokens", "learned_tokens", "num_images", "offset", "num_bytes"):
        np.testing.assert_array_equal(getattr(one, column), getattr(two, column))
