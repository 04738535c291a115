"""Watches one rank from outside: a process of its own, because what hangs cannot tell that it does.

Every rank starts one (`Heartbeat` in `heartbeat.py`) and writes its pulse into a small shared file; the watchdog looks at it four
times a second. It ends its rank, whatever state that is in, when

- the rank makes no progress for longer than its limit: every watchdog of the job then writes down where its rank stands,
  with the stacks of all threads, and the one of the lowest rank names the culprit;
- another rank has died: within a second, instead of when a collective runs into its timeout.

Watchdogs speak through files in the run's folder, which all ranks share: one listing per second each, one file per event.
Run as a script without site packages, so it imports nothing but the standard library: tokenflex is not importable here.
"""

import contextlib
import json
import mmap
import os
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
REPORTS_S = 3.0
"""How long the lowest rank's watchdog waits for the others' reports."""
STACK_SIGNAL = signal.SIGUSR2
"""On it a rank writes the stacks of all its threads (`faulthandler`), even from within a call that never returns."""
Report = dict[str, Any]
"""Where a rank stands, as its watchdog writes it down for the others: see `settle_hang`."""
IN_COLLECTIVE = ("torch/distributed/", "deepspeed/comm/")


def watch(rank: int, num_ranks: int, process: int, pulse_path: str, folder: str | Path, label: str) -> None:
    """Watch process `process` until it ends or must be ended."""
    folder = Path(folder)
    with open(pulse_path, "rb") as file:
        pulse = mmap.mmap(file.fileno(), PULSE.size, prot=mmap.PROT_READ)
    listed = 0.0
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
        if now - listed > LIST_S or now - at > limit:
            listed = now
            events = set(os.listdir(folder))
            if any(name.startswith("hung-") for name in events):
                settle_hang(folder, rank, num_ranks, process, (count, step, phase, now - at), label)
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


def settle_hang(
    folder: Path, rank: int, num_ranks: int, process: int, standing: tuple[int, int, str, float], label: str
) -> None:
    """Write down where this rank stands; on the lowest rank also name the culprit. Then end the rank."""
    count, step, phase, age = standing
    stack = stacks_of(folder, rank, process)
    report: Report = {
        "rank": rank,
        "count": count,
        "step": step,
        "phase": phase,
        "age_s": round(age, 1),
        "label": label,
    }
    report |= {"state": state_of(process), "stopped_children": stopped_children(process), "stack": stack}
    write(folder / f"report-{rank}", report)
    deadline = time.monotonic() + REPORTS_S
    reports: list[Report] = []
    while time.monotonic() < deadline and len(reports) < num_ranks:
        time.sleep(0.1)
        reports = [json.loads((folder / name).read_text()) for name in os.listdir(folder) if name.startswith("report-")]
    if rank == min(entry["rank"] for entry in reports):
        verdict, culprits = judge(reports, num_ranks)
        write(folder / "verdict", {"culprits": culprits, "reason": verdict})
        lines = [f"hang: {verdict}; all ranks are ended, their stacks are in {folder}"]
        lines += [
            f"  rank {e['rank']} ({e['label']}): step {e['step']}, {e['phase']} for {e['age_s']} s, {WORDS.get(e['state'], 'running')}"
            for e in sorted(reports, key=lambda e: e["rank"])[:64]
        ]
        say("\n".join(lines))
    else:
        wait_for(folder / "verdict", REPORTS_S)
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


def stacks_of(folder: Path, rank: int, process: int) -> str:
    """The rank's own account of its threads, or why there is none."""
    path = folder / f"stacks-{rank}"
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


def write(path: Path, record: Report) -> None:
    temporary = path.with_name("." + path.name)
    temporary.write_text(json.dumps(record))
    os.replace(temporary, path)


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
    watch(_rank, _num_ranks, _process, *sys.argv[4:7])
