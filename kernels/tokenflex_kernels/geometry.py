"""Which patches make up each pooled token, and the plan that tells it to a launch.

Pooling a grid [H, W] to [n_h, n_w] is linear and separable: P = A_h X A_w'. One axis is one small matrix A [n, size]
whose rows sum to 1 and whose nonzeros lie side by side, so a row is a *window*. The backward pass multiplies by A',
whose rows are windows as well: a gather, with no atomics. The reference reads ``axis_matrix``; the kernels compute
every window from the six integers per image that a ``PoolPlan`` holds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

MODES = ("adaptive", "resize")
MAX_ROWS = 2**31 - 1  # row numbers are int32; addresses are int64
MAX_SIDE = 512  # the kernels divide in float32, which is exact for sides and grids up to this (test_kernel_geometry.py)


class PoolPlan(NamedTuple):
    """How to pool a batch: made once by ``pool_plan`` where the batch is put together, then moved with it.

    ``table`` is int32 [images + 1, 6]: first patch, first token, H, W, n_h, n_w of each image, and a last row with the
    two totals. The other fields stay on the host: rows in and out, and the widest window along a line in the forward
    and the backward pass (2 at least, so that torch.compile never meets a size of 1).
    """

    table: Tensor
    num_patches: int
    num_tokens: int
    cells: int
    patch_cells: int
    is_resize: bool

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PoolPlan:
        """The plan on ``device``."""
        return self._replace(table=self.table.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PoolPlan:
        """The plan in page-locked memory, from where a copy to a GPU overlaps with its work."""
        return self._replace(table=self.table.pin_memory())


def pool_plan(
    grids: Sequence[tuple[int, int]],
    sides: Sequence[tuple[int, int]],
    mode: str = "adaptive",
    device: torch.device | str = "cpu",
) -> PoolPlan:
    """The plan of a batch: image i of ``grids[i]`` = (H, W) patches becomes ``sides[i]`` = (n_h, n_w) tokens.

    Args:
        grids, sides: any mix, non-square, sides above the grid's too; numbers from 1 to 512.
        mode: ``adaptive`` (average over floor/ceil windows; arXiv 2504.03154) or ``resize`` (the released projector:
            bilinear resize with aligned corners to the next multiple of the side, then average).
        device: where the features will be. A plan made on the CPU can be pinned and moved with its batch instead.

    Raises:
        ValueError: numbers out of range, lists of unequal length, an unknown mode, more than 2**31 - 1 rows.
        RuntimeError: ``device`` is a GPU whose stream is being captured: a replay would copy from freed host memory.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {MODES}")
    if len(grids) != len(sides):
        raise ValueError(f"{len(grids)} grids but {len(sides)} sides: give one (n_h, n_w) per image")
    for name, pairs in (("grids", grids), ("sides", sides)):
        for index, pair in enumerate(pairs):
            if not (1 <= pair[0] <= MAX_SIDE and 1 <= pair[1] <= MAX_SIDE):
                least = "at least 1" if min(pair) < 1 else f"at most {MAX_SIDE}"
                raise ValueError(f"{name}[{index}] is {tuple(pair)}: both numbers must be {least}")
    patches = [0, *accumulate(h * w for h, w in grids)]
    tokens = [0, *accumulate(h * w for h, w in sides)]
    if max(patches[-1], tokens[-1]) > MAX_ROWS:
        raise ValueError(f"the batch has more than {MAX_ROWS} rows: split it")
    rows = [(p, t, *grid, *side) for p, t, grid, side in zip(patches, tokens, grids, sides)]
    table = torch.tensor([*rows, (patches[-1], tokens[-1], 1, 1, 1, 1)], dtype=torch.int32, device="cpu")
    device = torch.device(device)
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured: make the plan before, and keep it as long as the graph, like the features"
            )
        table = table.pin_memory().to(device, non_blocking=True)
    elif device.type != "cpu":
        table = table.to(device)
    axes = {(grid[1], side[1]) for grid, side in zip(grids, sides)}
    widest = (max([2, *(_widest(*axis, mode, back) for axis in axes)]) for back in (False, True))
    return PoolPlan(table, patches[-1], tokens[-1], *widest, mode == "resize")


def rows_of(source: Tensor, plan: PoolPlan | None, transposed: bool = False) -> int:
    """How many rows ``plan`` makes of those of ``source``; without one as many as there are."""
    if plan is None:
        return source.shape[0]
    return plan.num_patches if transposed else plan.num_tokens


def images_of(table: Tensor) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """((H, W), (n_h, n_w)) of every image of a plan's table; waits for the device if it lies on one."""
    return [((h, w), (n_h, n_w)) for _, _, h, w, n_h, n_w in table[:-1].tolist()]


@functools.lru_cache(maxsize=4096)
def _widest(size: int, side: int, mode: str, transposed: bool) -> int:
    """The most entries in a row of ``axis_matrix``, or in a column."""
    return int((axis_matrix(size, side, mode) != 0).sum(0 if transposed else 1).max())


@functools.lru_cache(maxsize=4096)
@torch.inference_mode(False)  # the cached tensor also serves later calls that train
def axis_matrix(size: int, side: int, mode: str) -> Tensor:
    """The pooling matrix of one axis, float64 [side, size]; its rows sum to 1.

    ``adaptive`` averages ``floor(i * size / side) ... ceil((i + 1) * size / side) - 1`` (the paper). ``resize`` is the
    released projector: bilinear interpolation with aligned corners to the next multiple of ``side``, then an average.
    """
    matrix = torch.zeros(side, size, dtype=torch.float64, device="cpu")
    if mode == "adaptive":
        for i in range(side):
            start, stop = i * size // side, -((-(i + 1) * size) // side)
            matrix[i, start:stop] = 1.0 / (stop - start)
        return matrix
    resized = -(-size // side) * side
    per_token = resized // side
    for row in range(resized):
        # Exact integers: row * (size - 1) / (resized - 1) = left + rest / (resized - 1).
        left, rest = divmod(row * (size - 1), max(resized - 1, 1))
        share = rest / max(resized - 1, 1)
        matrix[row // per_token, left] += (1.0 - share) / per_token
        if rest:
            matrix[row // per_token, left + 1] += share / per_token
    return matrix
