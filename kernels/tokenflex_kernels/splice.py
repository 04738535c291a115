"""One pass that builds a packed sequence from two sources of rows, and both gradients by the same kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import choose, target
from .rounding import OPTIONS

ROWS, COLUMN_BYTES, NUM_WARPS = 4, 512, 4  # 16 bytes per thread


@triton.jit
def route_rows(
    text, visual, source, out, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """out[r] = visual[source[r]] where source[r] >= 0, else text[r]; a source that is not there counts as zeros."""
    blocks = tl.cdiv(width, COLUMNS)
    r = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < num_rows)[:, None] & (c < width)[None, :]
    from_row = tl.load(source + r, mask=r < num_rows, other=-1).to(tl.int64)
    is_visual = (from_row >= 0)[:, None] & inside
    is_text = (from_row < 0)[:, None] & inside
    row = tl.zeros((ROWS, COLUMNS), out.dtype.element_ty)
    if text is not None:
        row = tl.load(text + r[:, None] * width + c[None, :], mask=is_text, other=0.0)
    if visual is not None:
        visual_row = tl.load(visual + from_row[:, None] * width + c[None, :], mask=is_visual, other=0.0)
        row = tl.where(is_visual, visual_row, row)
    tl.store(out + r[:, None] * width + c[None, :], row, mask=inside)


def _route(text: Tensor | None, visual: Tensor | None, source: Tensor) -> Tensor:
    like = visual if text is None else text
    out = like.new_empty(source.shape[0], like.shape[1])
    if out.numel() == 0:
        return out
    columns = COLUMN_BYTES // out.element_size()
    grid = (target.cdiv(out.shape[0], ROWS) * target.cdiv(out.shape[1], columns),)
    with choose.on_device(out.device):
        route_rows[grid](
            text, visual, source, out, *out.shape, ROWS=ROWS, COLUMNS=columns, num_warps=NUM_WARPS, **OPTIONS
        )
    return out


def source_of(positions: Tensor, num_rows: int) -> Tensor:
    """int32 [num_rows]: which visual row goes to each packed row, -1 for text. Out of range fails on the device."""
    source = torch.full((num_rows,), -1, dtype=torch.int32, device=positions.device)
    ranks = torch.arange(positions.shape[0], dtype=torch.int32, device=positions.device)
    return source.scatter_(0, positions, ranks)


def splice(text: Tensor, visual: Tensor, positions: Tensor) -> Tensor:
    """``reference.splice_rows``."""
    visual = visual.contiguous() if visual.shape[0] > 0 else None
    return _route(text.contiguous(), visual, source_of(positions, text.shape[0]))


def splice_backward(grad: Tensor, positions: Tensor, need_text: bool, need_visual: bool) -> tuple[Tensor, Tensor]:
    """``reference.splice_backward``."""
    grad = grad.contiguous()
    return (
        _route(grad, None, source_of(positions, grad.shape[0])) if need_text else grad.new_empty(0),
        _route(None, grad, positions) if need_visual else grad.new_empty(0),
    )
