"""Faults on purpose, for tests: die, freeze, or get an error or a NaN at a named point of a run.

Off unless TOKENFLEX_FAULTS is set; then `hit` at each point compares one empty list. The variable holds faults joined by
";", each `action@point` with conditions: `kill@forward,rank=1,step=3`, `kill@manifest,rank=all`, `stop@fetch,rank=0`,
`nan@loss,rank=1,micro=0`, `raise@forward`, `skip@agree`, `io@fsync,count=4,error=ENOSPC`, `io@write,count=2,error=short`.

rank: who suffers, a number or `all` (default). step: steps done before (default any). micro: the micro-step (default any).
count: at which passing of the point it happens, from 1 (default 1). TOKENFLEX_FAULTS_DIR: where ranks leave their process
ids, so that one of them can strike another at a point that only rank 0 passes.
"""

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

POINTS = (
    "init",
    "load",
    "fetch",
    "forward",
    "mid-backward",
    "before-step",
    "after-step",
    "snapshot",
    "shard-0",
    "shard-50",
    "shard-100",
    "fsync",
    "manifest",
    "rename",
    "latest",
    "clean-up",
)
"""Where a run can be made to die, in the order it meets them."""
MAIN_RANK_POINTS = ("manifest", "rename", "latest", "clean-up")
"""Points that only rank 0 passes."""

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}
"""Actions that send a signal."""
ACTIONS = (*SIGNALS, "raise")


@dataclass
class Fault:
    """One fault to come; see the module's description."""

    action: str
    point: str
    rank: str = "all"
    step: int | None = None
    micro: int | None = None
    count: int = 1
    error: str = "EIO"
    seen: int = field(default=0, compare=False)


class _State:
    """This process' place in the job and the faults that await it."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.rank = 0
        self.step: int | None = None
        self.micro: int | None = None
        self.lock = threading.Lock()


def _parse(text: str) -> Fault:
    what, *conditions = text.split(",")
    action, _, point = what.partition("@")
    values: dict[str, Any] = dict(condition.split("=") for condition in conditions)
    values |= {name: int(values[name]) for name in ("step", "micro", "count") if name in values}
    return Fault(action, point, **values)


_state = _State()


def read_environment() -> None:
    """Take up the faults that TOKENFLEX_FAULTS names; done once when this module is imported, and again after a fork."""
    _state.faults = [_parse(text) for text in os.environ.get("TOKENFLEX_FAULTS", "").split(";") if text]


read_environment()


def is_active() -> bool:
    """Whether any fault awaits this process."""
    return bool(_state.faults)


def enter(rank: int) -> None:
    """Say which rank this is, once it is known."""
    if _state.faults:
        _state.rank = rank
        folder = os.environ.get("TOKENFLEX_FAULTS_DIR")
        if folder:
            Path(folder, f"{rank}.tmp").write_text(str(os.getpid()))
            Path(folder, f"{rank}.tmp").rename(Path(folder, f"{rank}.pid"))


def at(step: int, micro: int | None = None) -> None:
    """Say which step (and micro-step) comes."""
    if _state.faults:
        _state.step, _state.micro = step, micro


def hit(point: str, step: int | None = None) -> None:
    """Pass a named point; a fault that awaits it strikes. `step` where the caller's is not the loop's."""
    if _state.faults:
        for fault in _due(point, ACTIONS, step):
            _strike(fault)


def corrupt(point: str, tensor: "torch.Tensor") -> "torch.Tensor":
    """`tensor`, or NaN in its place where a `nan` fault awaits this point ("loss", "activation", "gradient")."""
    if _state.faults and _due(point, ("nan",)):
        return tensor * float("nan")
    return tensor


def skips(point: str) -> bool:
    """Whether a `skip` fault awaits this point: the caller leaves out what the others do."""
    return bool(_state.faults) and bool(_due(point, ("skip",)))


def io_limit(operation: str, num_bytes: int = 0) -> int:
    """How many of `num_bytes` an operation may do: all of them, or half where a short write is due.

    Raises:
        OSError: an `io` fault awaits this operation ("write", "fsync", "rename" or "link").
    """
    if _state.faults:
        for fault in _due(operation, ("io",)):
            if fault.error == "short":
                return max(1, num_bytes // 2)
            code = getattr(errno, fault.error)
            raise OSError(code, os.strerror(code))
    return num_bytes


@contextlib.contextmanager
def planned(*faults: Fault) -> Iterator[None]:
    """Within this context the given `Fault`s await this process (for tests in one process)."""
    before, _state.faults = _state.faults, list(faults)
    try:
        yield
    finally:
        _state.faults = before


def _due(point: str, actions: Sequence[str], step: int | None = None) -> list[Fault]:
    """The faults of these kinds that strike at this passing."""
    due = []
    with _state.lock:
        for fault in _state.faults:
            acting = (
                "0" if point in MAIN_RANK_POINTS or (fault.rank == "all" and fault.action == "kill") else fault.rank
            )
            if (
                fault.point != point
                or fault.action not in actions
                or acting not in ("all", str(_state.rank))
                or fault.step not in (None, _state.step if step is None else step)
                or fault.micro not in (None, _state.micro)
            ):
                continue
            fault.seen += 1
            if fault.seen == fault.count:
                due.append(fault)
    return due


def _strike(fault: Fault) -> None:
    if fault.action == "raise":
        raise ArithmeticError(f"raised on purpose at {fault.point}")
    number = SIGNALS[fault.action]
    folder = os.environ.get("TOKENFLEX_FAULTS_DIR")
    if fault.rank == str(_state.rank) or not folder:
        victims = [os.getpid()]
    else:
        pids = {path.stem: int(path.read_text()) for path in Path(folder).glob("*.pid")}
        victims = [pid for rank, pid in pids.items() if fault.rank in ("all", rank)]
        victims.sort(key=lambda pid: pid == os.getpid())  # oneself last
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):  # it is gone already, as was wanted
            os.kill(pid, number)


def install_hooks(model: "torch.nn.Module") -> None:
    """Points inside the forward and backward pass of a model with a `projector`; without faults nothing is hooked."""
    if not is_active():
        return

    def backward_hook(module, grad_inputs, grad_outputs):
        hit("mid-backward")
        return tuple(None if grad is None else corrupt("gradient", grad) for grad in grad_inputs)

    model.projector.register_full_backward_hook(backward_hook)
    model.projector.register_forward_hook(lambda module, inputs, output: corrupt("activation", output))
