"""Starts ranks of real training jobs fast: imports everything once, then forks a process per rank.

Reads one job per line on stdin as JSON: {"num_ranks", "arguments" of launch/train.py, "environment", "folder" for outputs,
"timeout_s"}. Answers with one line of JSON: {"statuses": [per rank, negative for a signal], "hung": bool, "seconds"}. Ranks
are ordinary processes: they may be killed, and a rank that is left behind 15 s after another's end is killed and counted as hung.
"""

import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LEFT_BEHIND_S = 15.0


def main():
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    import torch

    torch.set_num_threads(1)
    from tokenflex import parallel

    parallel.quiet_libraries()
    import transformers.models.qwen3.modeling_qwen3
    import transformers.models.siglip.modeling_siglip  # noqa: F401

    import tokenflex.evaluate
    import tokenflex.train.run  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


def run(job):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begin = time.monotonic()
    ranks = {}
    for rank in range(job["num_ranks"]):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["num_ranks"], "MASTER_PORT": port}
        variables |= {"LOCAL_WORLD_SIZE": job["num_ranks"], "MASTER_ADDR": "127.0.0.1", **job["environment"]}
        pid = os.fork()
        if pid == 0:
            be_rank({name: str(value) for name, value in variables.items()}, job["arguments"], rank, job["folder"])
        ranks[pid] = rank
    statuses = [None] * job["num_ranks"]
    deadline, is_hung, signals = begin + job["timeout_s"], False, list(job.get("signals", []))
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
            deadline = min(deadline, time.monotonic() + LEFT_BEHIND_S)
        elif time.monotonic() > deadline:
            is_hung = True
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.005)
            while signals and time.monotonic() - begin > signals[0][0]:
                _, victim, number = signals.pop(0)
                for pid, rank in ranks.items():
                    if victim in ("all", rank):
                        os.kill(pid, number)
    return {"statuses": statuses, "hung": is_hung, "seconds": time.monotonic() - begin}


def be_rank(variables, arguments, rank, folder):
    """Become a rank: its environment, its output file, then the entry point as `python launch/train.py` runs it."""
    status = 1
    try:
        os.setpgid(0, 0)
        os.environ.update(variables)
        output = os.open(Path(folder) / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["launch/train.py", *arguments]
        import tokenflex.failpoints

        tokenflex.failpoints.read_environment()
        runpy.run_path("launch/train.py", run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:  # as the interpreter does at the top of a program: print it, status 1
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
