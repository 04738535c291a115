"""What the kernel tests share: shapes, one tolerance table, errors against float64, poisoned allocations."""

import contextlib
import types

import torch
from tokenflex_kernels import choose

# (grids, sides): the release's grids at its three budgets, grids below the side, non-square, one cell, wide windows.
SINGLE = [
    ((27, 27), (8, 8)),
    ((27, 27), (12, 12)),
    ((27, 27), (16, 16)),
    ((32, 32), (12, 12)),
    ((5, 5), (16, 16)),
    ((1, 1), (1, 1)),
    ((7, 13), (3, 5)),
    ((20, 19), (2, 1)),
    ((4, 6), (4, 6)),
]
RAGGED = ([(7, 13), (1, 1), (5, 5), (9, 4), (5, 5)], [(3, 5), (1, 1), (8, 8), (2, 2), (4, 5)])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative Frobenius error that rounding once to the dtype cannot pass.
ROUNDING = {torch.float64: 1e-14, torch.float32: 4e-7, torch.float16: 4e-4, torch.bfloat16: 3e-3}


def num_rows(pairs):
    return sum(h * w for h, w in pairs)


def relative_error(got, exact):
    """Frobenius norm of the difference over that of ``exact``, in float64."""
    assert got.shape == exact.shape, (got.shape, exact.shape)
    difference = (got.double() - exact.double()).norm()
    return (difference / exact.double().norm().clamp_min(1e-300)).item()


def poison_allocations(monkeypatch):
    """Fill every tensor that torch hands out uninitialised with NaN: a missed write shows."""

    def poisoned(function):
        def call(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@contextlib.contextmanager
def poisoned_allocations():
    """``poison_allocations`` where there is no pytest."""
    kept = (torch.empty, torch.empty_like, torch.Tensor.new_empty)
    try:
        poison_allocations(types.SimpleNamespace(setattr=setattr))
        yield
    finally:
        torch.empty, torch.empty_like, torch.Tensor.new_empty = kept


def same_bits(a, b):
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


@contextlib.contextmanager
def pinned(kernel, name):
    """Within the block, ``kernel`` (pool, gated, dgated) runs the candidate called ``name``, compared with nothing."""
    choosing = choose.run

    def run(key, candidates, launch, trial=None):
        if key[0] != kernel:
            return choosing(key, candidates, launch, trial)
        return launch(dict(candidates())[name])

    choose.run = run
    try:
        yield
    finally:
        choose.run = choosing


def leave_out(kernel, name):
    """Never run ``kernel``'s configuration ``name`` in this process, unless it is pinned."""
    assert name != choose.UNFUSED, "that is what the others are compared with"
    choosing = choose.run

    def run(key, candidates, launch, trial=None):
        some = lambda: [c for c in candidates() if (key[0], c.name) != (kernel, name)]  # noqa: E731
        return choosing(key, some, launch, trial)

    choose.run = run
