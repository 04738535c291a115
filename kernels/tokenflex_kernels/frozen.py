"""Gradients of the gate and up weight and of the LayerNorm in one pass over the weight, for features without gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import choose, target
from .rounding import OPTIONS, round_to

ROWS, COLUMNS, NUM_WARPS, ROWS_PER_PROGRAM = 8, 128, 4, 64


@triton.jit
def weight_grad_rows(
    weight, product, row_sums, scale, shift, sums, num_rows, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """product E [num_rows, channels] becomes E * scale + e (x) shift, where e is float32 ``row_sums`` [num_rows].

    ``sums`` is float32 [programs, 2, channels]: each program's column sums of weight * E and of weight * e.
    """
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = c < channels
    d_scale = tl.zeros((ROWS, COLUMNS), tl.float32)
    d_shift = tl.zeros((ROWS, COLUMNS), tl.float32)
    for turn in range(TURNS):
        r = (tl.program_id(0) * TURNS + turn) * ROWS + tl.arange(0, ROWS)
        inside = (r < num_rows)[:, None] & in_columns[None, :]
        at = r.to(tl.int64)[:, None] * channels + c[None, :]
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        e = tl.load(product + at, mask=inside, other=0.0).to(tl.float32)
        row_sum = tl.load(row_sums + r, mask=r < num_rows, other=0.0)[:, None]
        d_scale += w * e
        d_shift += w * row_sum
        if scale is not None:
            e = e * tl.load(scale + c, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if shift is not None:
            e = e + row_sum * tl.load(shift + c, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        tl.store(product + at, round_to(e, product.dtype.element_ty), mask=inside)
    at = sums + tl.program_id(0).to(tl.int64) * 2 * channels + c
    tl.store(at, tl.sum(d_scale, 0), mask=in_columns)
    tl.store(at + channels, tl.sum(d_shift, 0), mask=in_columns)


def weight_grads(
    weight: Tensor, product: Tensor, row_sums: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``reference.weight_grads``; dW is written over ``product``."""
    weight = weight.contiguous()
    num_rows, channels = weight.shape
    grid = (target.cdiv(num_rows, ROWS_PER_PROGRAM), target.cdiv(channels, COLUMNS))
    sums = torch.empty(grid[0], 2, channels, dtype=torch.float32, device=weight.device)
    with choose.on_device(weight.device):
        weight_grad_rows[grid](
            weight, product, row_sums, scale, shift, sums, num_rows, channels, ROWS=ROWS, COLUMNS=COLUMNS,
            TURNS=ROWS_PER_PROGRAM // ROWS, num_warps=NUM_WARPS, **OPTIONS,
        )  # fmt: skip
    return product, sums.sum(0)
