"""What watchdogs ask of a shared file system: a listing per node and second, whatever the ranks; stacks stay on the node."""

import json
import os
import signal
import tempfile
import time

import pytest

from tokenflex.parallel import heartbeat
from tokenflex.parallel.environment import Launch
from tokenflex.parallel.heartbeat import Heartbeat

AUDITED = """
import os, runpy, sys
log = open({log!r} + str(os.getpid()), "w", buffering=1)
shared = {shared!r}


def hook(event, arguments):
    if event in ("os.listdir", "os.scandir", "open", "os.rename", "os.mkdir", "os.remove") and arguments:
        if str(arguments[0]).startswith(shared):
            log.write(event + chr(10))


sys.addaudithook(hook)
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""
SECONDS = 4.0


def launch_of(rank, num_ranks):
    return Launch(rank=rank, num_ranks=num_ranks, local_rank=rank, local_num_ranks=num_ranks, launcher="test",
                  master_addr="127.0.0.1", master_port=1)  # fmt: skip


@pytest.fixture
def ranks_of_a_node(tmp_path, monkeypatch):
    """start(number): processes that do nothing but pulse, each with its watchdog, whose file operations are written down."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local"))
    (tmp_path / "local").mkdir()
    (tmp_path / "log").mkdir()
    script = tmp_path / "audited.py"
    script.write_text(
        AUDITED.format(log=f"{tmp_path}/log/", shared=str(tmp_path / "shared"), script=heartbeat.watchdog.__file__)
    )
    monkeypatch.setattr(heartbeat.watchdog, "__file__", str(script))
    children = []

    def start(num_ranks, limit_s=60.0):
        for rank in range(num_ranks):
            child = os.fork()
            if child == 0:
                try:
                    beat = Heartbeat(launch_of(rank, num_ranks), tmp_path / "shared" / "start", limit_s, limit_s)
                    while True:
                        if not (tmp_path / "frozen").exists():
                            beat.phase("forward")
                        time.sleep(0.05)
                finally:
                    os._exit(1)
            children.append(child)
        return children

    yield start
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def operations(tmp_path):
    return sum(path.read_text().count("\n") for path in (tmp_path / "log").iterdir())


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def listers(tmp_path):
    return [path for path in (tmp_path / "log").iterdir() if "os.listdir" in path.read_text()]


def test_eight_ranks_of_a_node_ask_once_a_second(ranks_of_a_node, tmp_path):
    ranks_of_a_node(8)
    wait_until(lambda: len(list((tmp_path / "log").iterdir())) == 8 and operations(tmp_path) > 0)
    before, begin = operations(tmp_path), time.monotonic()
    time.sleep(SECONDS)
    took = time.monotonic() - begin
    assert 1 <= operations(tmp_path) - before <= took + 1
    assert len(listers(tmp_path)) == 1, "one of them lists"
    assert os.listdir(tmp_path / "shared" / "start") == [], "nothing is written there until there is an alarm"
    (local,) = (tmp_path / "local").glob("tokenflex-*")
    assert {f"stacks-{rank}" for rank in range(8)} <= set(os.listdir(local)) and local.stat().st_mode & 0o077 == 0


def test_another_lists_when_the_lister_is_gone_and_a_hang_is_still_told(ranks_of_a_node, tmp_path):
    """The watchdog that lists is killed; then all ranks stand still: every one is ended, and the reports have their stacks."""
    ranks_of_a_node(3, limit_s=6.0)
    wait_until(lambda: len(listers(tmp_path)) == 1)
    os.kill(int(listers(tmp_path)[0].name), signal.SIGKILL)
    wait_until(lambda: len(listers(tmp_path)) == 2)
    (tmp_path / "frozen").touch()
    shared = tmp_path / "shared" / "start"
    wait_until(lambda: (shared / "verdict").exists(), 30)
    verdict = json.loads((shared / "verdict").read_text())
    reports = {path.name: json.loads(path.read_text()) for path in shared.glob("report-*")}
    assert len(reports) == 2 and len(verdict["culprits"]) == 1 and "does not answer" in verdict["reason"]
    assert all("test_watchdog_load.py" in report["stack"] for report in reports.values())
