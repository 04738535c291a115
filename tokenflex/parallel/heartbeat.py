"""A rank's side of the watchdog: start it, give it a pulse at every phase of a step, tell it when the end is wanted."""

import faulthandler
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from os import PathLike
from pathlib import Path

from ..errors import UserError
from . import watchdog
from .environment import Launch

NUM_STEPS = 200
"""Steps whose duration decides what is too long."""
MIN_STEPS = 5
ECHO_S = 4.0
"""How long a rank whose peer is gone waits to hear what became of it; its watchdog looks every quarter of a second."""


class Heartbeat:
    """Pulses of this rank. Every rank has one; construct it before the first collective of the run that may hang.

    A phase lasts too long after max(`min_s`, 3 x the 99th percentile of the last 200 steps); before five steps are done,
    and in phases that say so, after `startup_s`. `seconds` has how long this rank has been in each phase so far.

    Args:
        folder: where the watchdogs of this start of the run meet; shared by all ranks. Its name is the start's own.
    """

    def __init__(self, launch: Launch, folder: str | PathLike, min_s: float, startup_s: float):
        self.rank, self.folder, self.min_s, self.startup_s = launch.rank, Path(folder), min_s, startup_s
        self._count = self._step = 0
        self._durations: deque[float] = deque(maxlen=NUM_STEPS)
        self._begin: float | None = None
        self._limit = startup_s
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._phase, self._since = "start", time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.local = Path(tempfile.gettempdir()) / f"tokenflex-{os.getuid()}-{self.folder.name}"
        self.local.mkdir(mode=0o700, exist_ok=True)
        if self.local.stat().st_uid != os.getuid():
            raise UserError(
                f"{self.local}: belongs to another user; set TMPDIR to a folder of your own on the node's disk"
            )
        with tempfile.NamedTemporaryFile(prefix="tokenflex-pulse-") as file:
            file.truncate(watchdog.PULSE.size)
            self._pulse = mmap.mmap(file.fileno(), watchdog.PULSE.size)
            self.phase("start", startup_s)
            self._stacks = open(self.local / f"stacks-{self.rank}", "w")  # noqa: SIM115  faulthandler writes to it later
            faulthandler.register(watchdog.STACK_SIGNAL, self._stacks, all_threads=True)
            self.label = f"{socket.gethostname()}, process {os.getpid()}"
            arguments = [
                self.rank,
                launch.num_ranks,
                os.getpid(),
                f"/proc/self/fd/{file.fileno()}",
                self.folder,
                self.local,
                self.label,
            ]
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-E", watchdog.__file__, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                pass_fds=[file.fileno()],
            )

    def phase(self, name: str, limit_s: float | None = None) -> None:
        """The rank enters a phase; `limit_s` where it may take longer than a step."""
        self._count += 1
        now, text = time.monotonic(), name.encode()
        self.seconds[self._phase] += now - self._since
        self._phase, self._since = name, now
        record = (self._count, self._step, now, limit_s or self._limit, len(text), text)
        self._pulse[: watchdog.PULSE.size] = watchdog.PULSE.pack(*record)

    def step(self, step: int) -> None:
        """A step begins."""
        now = time.monotonic()
        if self._begin is not None:
            self._durations.append(now - self._begin)
            if len(self._durations) >= MIN_STEPS:
                longest = sorted(self._durations)[int(0.99 * (len(self._durations) - 1))]
                self._limit = max(self.min_s, 3 * longest)
        self._begin, self._step = now, step

    def failed(self, error: BaseException) -> str:
        """This rank ends with an error: leave it for the others, and find out whether one of theirs came first.

        Returns the words about the rank that failed first, or an empty string where it is this one.
        """
        first = ""
        if _may_be_an_echo(error):
            deadline = time.monotonic() + ECHO_S
            while not first and time.monotonic() < deadline:
                time.sleep(0.1)
                first = self._first_failure()
        if not first:
            message = (str(error).strip() or "no message").splitlines()[0]
            record = {"error": f"{type(error).__name__}: {message}", "label": self.label}
            watchdog.write(self.folder / f"failed-{self.rank}", record)
        self.close()
        return first

    def close(self) -> None:
        """End the watchdog; the run is over, and the process may go on to something else."""
        self.phase(watchdog.FINISHED)
        faulthandler.unregister(watchdog.STACK_SIGNAL)
        self._process.kill()
        self._process.wait()
        self._stacks.close()
        watchdog.leave(self.local, self.rank)

    def _first_failure(self) -> str:
        for name in sorted(watchdog.left_names(self.local, set())):
            kind, _, rank = name.partition("-")
            if kind in ("dead", "failed") and rank != str(self.rank):
                return watchdog.describe_loss(self.folder, name)
        return ""


def _may_be_an_echo(error: BaseException) -> bool:
    """Whether an error may be but the echo of another rank's end: what gloo and NCCL raise where a peer is gone."""
    words = ("connection", "gloo", "nccl", "peer", "store", "socket")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
