"""Watches one rank from outside: a process of its own, because what hangs cannot tell that it does.

Every rank starts one (`Heartbeat` in `heartbeat.py`) and writes its pulse into a small shared file; the watchdog looks at it four
times a second. It ends its rank, whatever state that is in, when

- the rank makes no progress for longer than its limit: every watchdog of the job then writes down where its rank stands,
  with the stacks of all threads, and the one of the lowest rank names the culprit;
- another rank has died: within a second, instead of when a collective runs into its timeout.

Watchdogs speak through files in the run's folder, which all ranks share: one file per event, and one listing per second for
each node. The watchdog that holds the node's lock lists, and leaves what it saw on the node's own disk for the others; when it
ends another has the lock. Until there is an alarm a rank's stacks are on the node's own disk too.
Run as a script without site packages, so it imports nothing but the standard library: tokenflex is not importable here.
"""

import contextlib
import fcntl
import json
import mmap
import os
import shutil
import signal
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PULSE = struct.Struct("<QqddH62s")
"""count of pulses; step; time of the last one (monotonic seconds); seconds until it is missed; length of phase; phase."""
FINISHED = "finished"
LOOK_S = 0.25
LIST_S = 1.0
STALE_S = 4.0
"""Age at which what the lister has left is believed no longer (it is frozen, say): then a watchdog lists for itself."""
REPORTS_S = 3.0
"""How long the lowest rank's watchdog waits for the others' reports."""
STACK_SIGNAL = signal.SIGUSR2
"""On it a rank writes the stacks of all its threads (`faulthandler`), even from within a call that never returns."""
Report = dict[str, Any]
"""Where a rank stands, as its watchdog writes it down for the others: see `settle_hang`."""
IN_COLLECTIVE = ("torch/distributed/", "deepspeed/comm/")


class Listing:
    """The names in the run's folder, with one listing per node and second; `local` is on the node's own disk."""

    def __init__(self, folder: Path, local: Path):
        self.folder, self.local = folder, local
        self._lock = open(local / "lister", "w")  # noqa: SIM115  held until the process ends
        self._listed, self._names = 0.0, set[str]()
        self.is_lister = False

    def names(self) -> set[str]:
        """What was there a second ago at most (two for one who does not list himself)."""
        if not self.is_lister:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.is_lister = True
        now = time.monotonic()
        if now - self._listed <= LIST_S:
            return self._names if self.is_lister else left_names(self.local, self._names)
        if self.is_lister or time.time() - age_of(self.local / "names") > STALE_S:
            self._listed, self._names = now, set(os.listdir(self.folder))
            if self.is_lister:
                write(self.local / "names", sorted(self._names))
            return self._names
        return left_names(self.local, self._names)


def left_names(local: Path, otherwise: set[str]) -> set[str]:
    """What the node's lister has left, or `otherwise` where there is nothing yet."""
    try:
        return set(json.loads((local / "names").read_text()))
    except FileNotFoundError:
        return otherwise


def age_of(path: Path) -> float:
    """When a file was last written; 0 where it was not."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def watch(rank: int, num_ranks: int, process: int, pulse_path: str, places: tuple[Path, Path], label: str) -> None:
    """Watch process `process` until it ends or must be ended. places: the folder that all share, and the node's own."""
    folder, local = places
    with open(pulse_path, "rb") as file:
        pulse = mmap.mmap(file.fileno(), PULSE.size, prot=mmap.PROT_READ)
    listing = Listing(folder, local)
    while True:
        time.sleep(LOOK_S)
        count, step, at, limit, phase = read_pulse(pulse)
        now = time.monotonic()
        if is_gone(process):
            if phase != FINISHED and not (folder / f"failed-{rank}").exists():
                announce(folder, "dead", rank, {"step": step, "phase": phase, "label": label})
            return
        if phase == FINISHED:
            continue
        if now - at > limit:
            announce(folder, "hung", rank, {"step": step, "phase": phase, "label": label, "seconds": now - at})
        events = listing.names()
        if now - at > limit or any(name.startswith("hung-") for name in events):
            report: Report = {"rank": rank, "count": count, "step": step, "phase": phase, "age_s": round(now - at, 1)}
            report |= {"label": label, "is_lister": listing.is_lister}
            settle_hang(places, num_ranks, process, report)
            return
        lost = sorted(name for name in events if name.startswith(("dead-", "failed-")) and name != f"failed-{rank}")
        if lost:
            time.sleep(2.0)  # the rank may find out for itself and end in order
            if is_gone(process) or read_pulse(pulse)[-1] == FINISHED:
                continue
            if rank == min(set(range(num_ranks)) - {int(name.partition("-")[2]) for name in lost}):
                say(f"rank {rank}: ended with all others, because {describe_loss(folder, lost[0])}")
            end(process)
            return


def settle_hang(places: tuple[Path, Path], num_ranks: int, process: int, report: Report) -> None:
    """Write down where this rank stands; the lowest of those that list also names the culprit. Then end the rank."""
    folder, local = places
    rank = report["rank"]
    stack = stacks_of(local, rank, process)
    report |= {"state": state_of(process), "stopped_children": stopped_children(process), "stack": stack}
    write(folder / f"report-{rank}", report)
    deadline = time.monotonic() + REPORTS_S
    found: dict[str, Report] = {f"report-{rank}": report}
    while report["is_lister"] and time.monotonic() < deadline and len(found) < num_ranks:
        time.sleep(0.1)
        new = [name for name in os.listdir(folder) if name.startswith("report-") and name not in found]
        found |= {name: json.loads((folder / name).read_text()) for name in new}
    reports = list(found.values())
    if rank == min((entry["rank"] for entry in reports if entry["is_lister"]), default=None):
        verdict, culprits = judge(reports, num_ranks)
        write(folder / "verdict", {"culprits": culprits, "reason": verdict})
        lines = [f"hang: {verdict}; all ranks are ended, their stacks are in {folder}"]
        lines += [
            f"  rank {e['rank']} ({e['label']}): step {e['step']}, {e['phase']} for {e['age_s']} s, {WORDS.get(e['state'], 'running')}"
            for e in sorted(reports, key=lambda e: e["rank"])[:64]
        ]
        say("\n".join(lines))
    else:
        wait_for(folder / "verdict", REPORTS_S + 1)
    end(process)


def judge(reports: Sequence[Report], num_ranks: int) -> tuple[str, list[int]]:
    """(reason in words, culprit ranks) from what the watchdogs wrote down; pulses are counted alike on every rank."""
    missing = sorted(set(range(num_ranks)) - {entry["rank"] for entry in reports})
    if missing:
        return f"rank {listed(missing)} does not answer: its host is gone or stuck", missing
    frozen = [entry for entry in reports if entry["state"] in "TtD"]
    if frozen:
        return because(frozen, WORDS[frozen[0]["state"]])
    lowest, highest = min(e["count"] for e in reports), max(e["count"] for e in reports)
    behind = [entry for entry in reports if entry["count"] == lowest]
    if lowest == highest:
        outside = [entry for entry in reports if not waits_in_collective(entry)]
        if outside and len(outside) < len(reports):
            return because(outside, f"does not take part in {behind[0]['phase']}, where the others wait")
        return (
            f"all ranks stand in {behind[0]['phase']} of step {behind[0]['step']}: the network, or ranks at different collectives",
            [],
        )
    if all(waits_in_collective(entry) for entry in behind):
        ahead = [entry for entry in reports if entry["count"] > lowest]
        return because(ahead, f"went on without taking part in {behind[0]['phase']}, where the others wait")
    reason = f"is stuck in {behind[0]['phase']}"
    stopped = [child for entry in behind for child in entry["stopped_children"]]
    return because(behind, reason + (f": its worker process {listed(stopped)} is stopped" if stopped else ""))


WORDS = {
    "T": "is stopped",
    "t": "is stopped by a debugger",
    "D": "waits for a disk or device",
    "S": "sleeping",
    "R": "running",
}


def because(entries: Sequence[Report], reason: str) -> tuple[str, list[int]]:
    """A verdict on the ranks of some reports."""
    ranks = sorted(entry["rank"] for entry in entries)
    return f"rank {listed(ranks)} ({entries[0]['label']}) {reason} (step {entries[0]['step']})", ranks


def listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def waits_in_collective(entry: Report) -> bool:
    """Whether any thread of the rank is inside a collective."""
    return any(part in entry["stack"] for part in IN_COLLECTIVE)


def read_pulse(pulse: mmap.mmap) -> tuple[int, int, float, float, str]:
    """(count, step, time, limit, phase); see `PULSE`."""
    count, step, at, limit, length, phase = PULSE.unpack(pulse[: PULSE.size])
    return count, step, at, limit, phase[:length].decode(errors="replace")


def stacks_of(local: Path, rank: int, process: int) -> str:
    """The rank's own account of its threads, or why there is none."""
    path = local / f"stacks-{rank}"
    if state_of(process) in "Tt":
        return "stopped: it cannot write its stacks"
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, STACK_SIGNAL)
    time.sleep(0.5)
    return path.read_text(errors="replace")[-20_000:] if path.exists() else "none written"


def state_of(process: int) -> str:
    """The kernel's letter: R running, S sleeping, D in the kernel, T stopped, Z dead, X gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def is_gone(process: int) -> bool:
    return state_of(process) in "ZX" or os.getppid() != process


def stopped_children(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [int(child) for child in children if state_of(int(child)) in "Tt"]


def announce(folder: Path, kind: str, rank: int, record: Report) -> None:
    """Leave an event for all watchdogs, once."""
    if not (folder / f"{kind}-{rank}").exists():
        write(folder / f"{kind}-{rank}", record)


def describe_loss(folder: Path, name: str) -> str:
    """An event of a rank's end in words."""
    record = json.loads((folder / name).read_text())
    who = f"rank {name.partition('-')[2]} ({record['label']})"
    return (
        f"{who} failed: {record['error']}"
        if "error" in record
        else f"{who} died in {record['phase']} of step {record['step']}"
    )


def write(path: Path, record: Report | list[str]) -> None:
    temporary = path.with_name("." + path.name)
    temporary.write_text(json.dumps(record))
    os.replace(temporary, path)


def leave(local: Path, rank: int) -> None:
    """Take a rank's stacks from the node's own disk, and with the last of them the folder."""
    (local / f"stacks-{rank}").unlink(missing_ok=True)
    if not any(local.glob("stacks-*")):
        shutil.rmtree(local, ignore_errors=True)


def wait_for(path: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def end(process: int) -> None:
    """SIGKILL is the one signal that a stopped or wedged process obeys."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what stops the rank is the rank's to handle
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    _rank, _num_ranks, _process = map(int, sys.argv[1:4])
    _pulse, _folder, _local, _label = sys.argv[4:8]
    watch(_rank, _num_ranks, _process, _pulse, (Path(_folder), Path(_local)), _label)
    leave(Path(_local), _rank)
