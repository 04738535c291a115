"""Which of a kernel's few shipped configurations runs: a fixed rule, a loaded table, or the fastest of one timing.

The first call for a new key (kernel, dtype, widths, number of rows to the next power of two) times the candidates on
its own tensors and keeps the winner for the life of the process; so the same input twice gives the same bits. A winner
can differ between processes, and then the last bits can: for runs that must repeat bit by bit across restarts use
``set_tuning("rule")``, or ``save_choices`` once and ``load_choices`` in every run.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import target

logger = logging.getLogger(__name__)
TUNING_MODES = ("measure", "rule")


class Candidate(NamedTuple):
    """A configuration under the name that tables and reports use."""

    name: str
    config: Any


class _State:
    """The process's choices; kernel launches are process-wide, so their choices are too."""

    def __init__(self) -> None:
        self.mode = "measure"
        self.chosen: dict[str, str] = {}
        self.timings_ms: dict[str, dict[str, float]] = {}
        self.pinned: dict[str, str] = {}


_state = _State()


def set_tuning(mode: str) -> None:
    """``measure``: time the candidates at the first call of each key (the default). ``rule``: take the first one.

    Raises ``ValueError`` on another word.
    """
    if mode not in TUNING_MODES:
        raise ValueError(f"tuning mode is {mode!r}; it must be one of {TUNING_MODES}")
    _state.mode = mode


def save_choices(path: str | Path) -> None:
    """Write the choices made so far, and the times behind them, as JSON."""
    Path(path).write_text(
        json.dumps({"chosen": _state.chosen, "timings_ms": _state.timings_ms}, indent=1, sort_keys=True)
    )


def load_choices(path: str | Path) -> None:
    """Take the choices of a file that ``save_choices`` wrote; keys that it lacks are chosen as before."""
    _state.chosen.update(json.loads(Path(path).read_text())["chosen"])


def choices() -> dict[str, str]:
    """The choice of every key seen or loaded."""
    return dict(_state.chosen)


@contextlib.contextmanager
def pinned(kernel: str, name: str) -> Iterator[None]:
    """Within the block, ``kernel`` (pool, gated, dgated) runs the candidate called ``name``: for tests and benchmarks."""
    before = dict(_state.pinned)
    _state.pinned[kernel] = name
    try:
        yield
    finally:
        _state.pinned = before


def key(kernel: str, tensor: Tensor, *shape: Any, rows: int) -> str:
    """What a choice is made for; row counts of one ``bucket`` share it."""
    device = target.device_name(tensor.device)
    return "|".join(map(str, (kernel, device, str(tensor.dtype).removeprefix("torch."), *shape, bucket(rows))))


def bucket(rows: int) -> int:
    """The power of two that ``rows`` goes up to: ragged batches differ in every step, and must not time anew."""
    return 1 << max(rows - 1, 0).bit_length()


def run(key: str, candidates: Sequence[Candidate], launch: Callable[[Any], Any], device: torch.device) -> Any:
    """``launch`` with the configuration chosen for ``key``; the first candidate is the rule's."""
    by_name = {candidate.name: candidate.config for candidate in candidates}
    kernel = key.split("|", 1)[0]
    if kernel in _state.pinned:
        name = _state.pinned[kernel]
        if name not in by_name:
            raise KeyError(f"{kernel} is pinned to {name!r}, but this shape has only {sorted(by_name)}")
        return launch(by_name[name])
    name = _state.chosen.get(key)
    if name not in by_name:
        name = candidates[0].name
        # A stream under graph capture cannot be timed: take the rule's, and choose at the next plain call.
        if _state.mode == "measure" and len(candidates) > 1 and device.type == "cuda":
            if not torch.cuda.is_current_stream_capturing():
                name = _measure(key, candidates, launch)
        else:
            _state.chosen[key] = name
    return launch(by_name[name])


def _measure(key: str, candidates: Sequence[Candidate], launch: Callable[[Any], Any]) -> str:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times = {}
    for name, config in candidates:
        try:
            times[name] = do_bench(functools.partial(launch, config), warmup=5, rep=20, return_mode="median")
        except OutOfResources as error:  # a device with less shared memory than its generation's largest
            logger.info("%s: %s does not fit this device: %s", key, name, error)
    _state.timings_ms[key] = times
    _state.chosen[key] = min(times, key=times.__getitem__)
    return _state.chosen[key]


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Make ``tensor``'s device current: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
