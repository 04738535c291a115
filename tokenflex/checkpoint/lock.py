"""One writer per run folder: a lock that the kernel gives back when its holder dies, however it dies.

It is a record lock (`lockf`), not `flock`: a data worker that outlives a killed rank must not keep the next start out, and
record locks are not inherited.
"""

import fcntl
import json
import os
import socket
import time
from os import PathLike
from pathlib import Path

from ..errors import UserError

WAIT_S = 10.0
"""How long a start waits for the one before to be gone: a requeued job may begin while the old one still ends."""


class RunLock:
    """Held from construction to `release` (or the end of the process).

    Raises:
        UserError: another process holds it; the message says which.
    """

    def __init__(self, folder: str | PathLike, wait_s: float = WAIT_S):
        self.path = Path(folder) / "lock"
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    holder = os.pread(self._descriptor, 4096, 0).decode(errors="replace") or "an unknown process"
                    os.close(self._descriptor)
                    raise UserError(
                        f"run {folder}: another job writes there ({holder}); wait for it, end it, or choose another name=..."
                    ) from None
                time.sleep(0.1)
        own = {"host": socket.gethostname(), "process": os.getpid(), "job": os.environ.get("SLURM_JOB_ID", "")}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(own).encode(), 0)

    def release(self) -> None:
        """Let another process in."""
        os.close(self._descriptor)
