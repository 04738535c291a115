"""Which of a kernel's few shipped configurations runs, and whether one may run at all.

A configuration is trusted after it was compared: at the first call of a key (kernel, device, dtype, widths, what is
stored, rows to the next power of two) its output is held against that of the unfused statement, which is always among
the candidates. One that differs, does not compile or fails is left out with one warning that names it. Of those left the
fastest is kept (mode ``measure``, the default) or the first (mode ``rule``, which never times): so the same input twice
in one process gives the same bits. A winner of a timing can differ between processes; a run that must repeat across
restarts makes its choices once (``warm_up``), keeps ``export_choices()`` and hands it to ``import_choices`` ever after.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import target

logger = logging.getLogger(__name__)
TUNING_MODES = ("measure", "rule")
UNFUSED = "unfused"  # the name of the candidate that all others are compared with, and that nothing displaces
# Error of a row or column, relative to its own norm, past which a candidate is wrong. Two right ones differ by their
# roundings, 0.3 % in bfloat16; a single element that was not written shows in its row at 2.4 % or more.
WRONG = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
_COMPARED_ROWS = 2048  # at a time: a comparison must fit beside a full training step


class Candidate(NamedTuple):
    """A configuration under the name that tables and reports use."""

    name: str
    config: Any


class _State:
    """The process's choices; kernel launches are process-wide, so their choices are too."""

    def __init__(self) -> None:
        self.mode = "measure"
        self.allows_one_launch = False
        self.chosen: dict[str, str] = {}
        self.timings_ms: dict[str, dict[str, float]] = {}
        self.dropped: dict[str, dict[str, str]] = {}
        self.resolved: dict[tuple, Any] = {}  # key -> configuration that was compared in this process


_state = _State()


def set_tuning(mode: str) -> None:
    """``measure``: time the candidates at the first call of each key (the default). ``rule``: take the first right one.

    Raises ``ValueError`` on another word.
    """
    if mode not in TUNING_MODES:
        raise ValueError(f"tuning mode is {mode!r}; it must be one of {TUNING_MODES}")
    _state.mode = mode


def set_one_launch(is_allowed: bool) -> None:
    """Let pooling, LayerNorm and the gated product be one launch (fused.py) where that was compared, timed and is faster.

    Off by default, as no GPU has run it. Set it before ``warm_up``; mode ``rule`` takes it only from imported choices.
    """
    _state.allows_one_launch = is_allowed


def allows_one_launch() -> bool:
    """What ``set_one_launch`` was told."""
    return _state.allows_one_launch


def export_choices() -> dict[str, dict]:
    """The choices made or imported so far, the times behind them and what was left out, and why; plain JSON data."""
    copied = {name: dict(times) for name, times in _state.timings_ms.items()}
    dropped = {name: dict(reasons) for name, reasons in _state.dropped.items()}
    return {"chosen": dict(_state.chosen), "timings_ms": copied, "dropped": dropped}


def import_choices(choices: Mapping[str, Any]) -> None:
    """Take the choices of an ``export_choices``; keys that it lacks are chosen as before.

    Each is compared at its first call like any other. A name that this release does not ship is chosen anew. Raises
    ``ValueError`` if the data is not of that form.
    """
    chosen = choices.get("chosen") if isinstance(choices, Mapping) else None
    if not isinstance(chosen, Mapping) or not all(isinstance(x, str) for pair in chosen.items() for x in pair):
        raise ValueError("choices must be what export_choices() returned: {'chosen': {key: name, ...}, ...}")
    _state.chosen.update(chosen)
    _state.resolved.clear()


def key(kernel: str, tensor: Tensor, rows: int, *shape: Any) -> tuple:
    """What a choice is made for; row counts of one ``bucket`` share it."""
    return (kernel, tensor.device, tensor.dtype, bucket(rows), *shape)


def text_of(key: tuple) -> str:
    """``key`` as tables of choices have it: the device by its model."""
    kernel, device, dtype, rows, *shape = key
    shape = (int(x) if isinstance(x, bool) else x for x in shape)
    words = (kernel, target.device_name(device), str(dtype).removeprefix("torch."), *shape, rows)
    return "|".join(map(str, words))


def bucket(rows: int) -> int:
    """The power of two that ``rows`` goes up to: ragged batches differ in every step, and must not time anew."""
    return 1 << max(rows - 1, 0).bit_length()


def run(
    key: tuple,
    candidates: Callable[[], Sequence[Candidate]],
    launch: Callable[[Any], Any],
    trial: Callable[[Any], Any] | None = None,
) -> Any:
    """``launch`` with the configuration chosen for ``key``; of ``candidates()`` the first is the rule's.

    ``trial`` is what is compared and timed in its stead, for a launch that writes over what it reads.
    """
    with on_device(key[1]):
        config = _state.resolved.get(key)
        return launch(_resolve(key, candidates(), trial or launch) if config is None else config)


def _resolve(key: tuple, candidates: Sequence[Candidate], launch: Callable[[Any], Any]) -> Any:
    device, by_name, text = key[1], dict(candidates), text_of(key)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Nothing can be compared or timed under capture: what needs no trust runs, and a later plain call chooses.
        return by_name.get(UNFUSED, candidates[0].config)
    is_stored = _state.chosen.get(text) in by_name
    if is_stored:  # first in line; the others stand behind it in case it fails here
        candidates = sorted(candidates, key=lambda candidate: candidate.name != _state.chosen[text])
    name = candidates[0].name
    if device.type == "cuda" and len(candidates) > 1:
        name = _compare(text, candidates, launch, _state.mode == "measure" and not is_stored)
        if name is None:
            return by_name[UNFUSED]
    _state.chosen[text] = name
    _state.resolved[key] = by_name[name]
    return by_name[name]


def _compare(text: str, candidates: Sequence[Candidate], launch: Callable[[Any], Any], is_timed: bool) -> str | None:
    """The name of the fastest, or first, candidate whose output is the unfused one's; None if that is not finite."""
    from triton.testing import do_bench

    by_name = dict(candidates)
    wanted = launch(by_name[UNFUSED]) if UNFUSED in by_name else None
    if not _is_finite(wanted):
        return None  # a step that is spoilt already proves nothing
    right, times = [], {}
    for name, config in candidates:
        try:
            why = None if name == UNFUSED else difference(launch(config), wanted)
            if why is None and is_timed:
                times[name] = do_bench(functools.partial(launch, config), warmup=5, rep=20, return_mode="median")
        except torch.OutOfMemoryError:  # no fault of its own; it ran before it could not be compared or timed
            if name != UNFUSED:
                continue
        except Exception as error:  # whatever a compiler or driver throws: there is one that runs
            if name == UNFUSED:
                raise
            why = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        if why is not None:
            logger.warning("%s: %s is left out: %s", text, name, why)
            _state.dropped.setdefault(text, {})[name] = why
            continue
        right.append(name)
        if not is_timed:
            break
    if times:
        _state.timings_ms[text] = times
    return min(times, key=times.__getitem__) if times else right[0]


def _tensors(output: Any) -> list[Tensor | None]:
    return list(output) if isinstance(output, (tuple, list)) else [output]


def _is_finite(output: Any) -> bool:
    # A sum is finite unless a term is not, or it overflows: the widest tensors are not copied to find out.
    return all(t is None or bool(t.sum(dtype=torch.float32).isfinite()) for t in _tensors(output))


def difference(got: Any, wanted: Any) -> str | None:
    """In words what is wrong with ``got``, tensors or None as a launch returns them; None if nothing is."""
    if wanted is None:
        return None
    for index, (ours, theirs) in enumerate(zip(_tensors(got), _tensors(wanted), strict=True)):
        if ours is None and theirs is None:
            continue
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return f"output {index} has another shape"
        error, limit = _worst_error(ours, theirs), max(WRONG[t.dtype] for t in _tensors(wanted) if t is not None)
        if not error <= limit:  # NaN fails as well
            return f"output {index} is off by {error:.2g} in a row or column (at most {limit:.2g} is rounding)"
    return None


def _worst_error(got: Tensor, wanted: Tensor) -> float:
    """The largest relative error of a row or column; small rows and columns count as average ones."""
    got, wanted = (t.reshape(1, -1) if t.dim() == 1 else t for t in (got, wanted))
    if got.numel() == 0:
        return 0.0
    rows, columns = [], torch.zeros(2, wanted.shape[1], device=wanted.device, dtype=torch.float32)
    for a, b in zip(got.split(_COMPARED_ROWS), wanted.split(_COMPARED_ROWS), strict=True):
        squares = torch.stack(((a.float() - b.float()).square(), b.float().square()))
        rows.append(squares.sum(2))
        columns += squares.sum(1)
    errors = []
    for squares in (torch.cat(rows, 1), columns):
        off, size = squares
        errors.append((off / torch.maximum(size, size.mean()).clamp_min(1e-30)).max())
    return float(torch.stack(errors).max().sqrt())


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Make ``device`` current: Triton launches on the current one."""
    if device.index is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


_HERE = contextlib.nullcontext()
