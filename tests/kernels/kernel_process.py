"""Child processes of the kernel tests: the interpreter's switch and a compiler's abort stay out of the test process."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import tokenflex_kernels

HERE = Path(__file__).parent
PACKAGE_ROOT = Path(tokenflex_kernels.__file__).parent.parent


def python(*arguments, **variables):
    """Start ``python`` on a file of this folder with the package importable; returns the process."""
    paths = [str(PACKAGE_ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        cwd=HERE, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process, timeout_s):
    """Wait for ``process``; its standard output, or an error with all it said."""
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        raise AssertionError(f"no end within {timeout_s} s\n{output}\n{errors[-6000:]}") from None
    assert process.returncode == 0, f"status {process.returncode}\n{output[-6000:]}\n{errors[-6000:]}"
    return output


@contextmanager
def side_by_side(jobs, timeout_s=240):
    """Name -> future output of ``python(*arguments, **variables)`` for name -> (arguments, variables): two run at a time."""
    run = lambda arguments, variables: finish(python(*arguments, **variables), timeout_s)  # noqa: E731
    pool = ThreadPoolExecutor(max_workers=2)
    try:
        yield {name: pool.submit(run, *job) for name, job in jobs.items()}
    finally:
        pool.shutdown(cancel_futures=True)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
