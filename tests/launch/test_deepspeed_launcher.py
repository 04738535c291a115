"""The main command as it is typed, `deepspeed launch/train.py --ds_config ...`, on two ranks."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY

SECRET = "hunter2-" * 4
A_JOBS_OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that a test before this one may have left, as ranks set them; a shell has none."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def process_list():
    """The command lines of everything that runs on this machine."""
    lines = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.add(path.read_bytes())
        except OSError:  # ended meanwhile
            continue
    return lines


@pytest.mark.timeout(200)
def test_the_main_command_trains_and_keeps_secrets_to_itself(cache_dir, corpus, tmp_path):
    """Two ranks train to the end; no key of the environment is in a process list, in the output or in a file of the run."""
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators=2", f"--master_port={free_port()}",
        "launch/train.py", "--ds_config", "configs/zero3.json", "--config", str(TINY),
        f"output_dir={tmp_path}", f"data.cache_dir={cache_dir}", "train.num_steps=3", "train.save_every=2",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in A_JOBS_OWN}
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_API_KEY": SECRET, "HF_TOKEN": SECRET}
    seen = set()
    with open(tmp_path / "output", "w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                seen |= process_list()
                time.sleep(0.1)
        finally:
            process.kill()
        output.seek(0)
        said = output.read()
    assert process.returncode == 0, said[-4000:]
    records = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    ranks = [line for line in seen if str(tmp_path).encode() in line and b"--local_rank=" in line]
    assert {line.split(b"--local_rank=")[1][:1] for line in ranks} >= {b"0", b"1"}  # the watch saw the ranks themselves
    assert not [line for line in seen if SECRET.encode() in line]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
