"""Ragged pooling, forward and backward, as one Triton kernel: every output row is a small weighted sum of rows."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import choose
from .geometry import RowWindows
from .rounding import OPTIONS, round_to


class PoolConfig(NamedTuple):
    """One program makes ``rows`` output rows x ``channel_bytes`` of each."""

    rows: int
    channel_bytes: int
    num_warps: int


# Every thread holds 16 bytes of a row: rows * channel_bytes = 16 * 32 * num_warps. 256 bytes divide the rows of all
# vision widths in use (1024, 1152, 1280, 3200), so no lane idles.
CONFIGS = (PoolConfig(8, 256, 4), PoolConfig(16, 256, 8), PoolConfig(4, 512, 4), PoolConfig(4, 256, 2))
CELLS_UNROLLED = 8  # widest line read in one unrolled step; wider ones loop


@triton.jit
def pool_rows(
    source, out, table, weight, num_rows, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, CELLS: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """out[r] = sum over r's window of source rows, times 1 / area (UNIFORM) or the windows' weights.

    ``table`` is int32 [6, num_rows]: first source row, rows per line, lines, cells, offsets of both weights.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    block = tl.program_id(0) % blocks  # neighbours share rows: the row's next bytes, then the next rows
    r = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    in_rows = r < num_rows
    in_channels = c < channels
    rows64 = tl.zeros((), tl.int64) + num_rows
    first = tl.load(table + r, mask=in_rows, other=0).to(tl.int64)
    pitch = tl.load(table + rows64 + r, mask=in_rows, other=0)
    lines = tl.load(table + 2 * rows64 + r, mask=in_rows, other=0)
    cells = tl.load(table + 3 * rows64 + r, mask=in_rows, other=0)
    if not UNIFORM:
        line_weight = weight + tl.load(table + 4 * rows64 + r, mask=in_rows, other=0)
        cell_weight = weight + tl.load(table + 5 * rows64 + r, mask=in_rows, other=0)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    most_lines = tl.max(lines, 0)
    most_cells = tl.max(cells, 0)
    for i in range(most_lines):
        line_first = first + i * pitch
        for start in range(0, most_cells, CELLS):
            for k in tl.static_range(CELLS):
                j = start + k
                used = (i < lines) & (j < cells)
                values = tl.load(
                    source + (line_first + j)[:, None] * channels + c[None, :],
                    mask=used[:, None] & in_channels[None, :], other=0.0,
                ).to(tl.float32)  # fmt: skip
                if UNIFORM:
                    total += values
                else:
                    share = tl.load(line_weight + i, mask=used, other=0.0) * tl.load(
                        cell_weight + j, mask=used, other=0.0
                    )
                    total += values * share[:, None]
    if UNIFORM:
        total = total / tl.maximum(lines * cells, 1).to(tl.float32)[:, None]
    tl.store(
        out + r[:, None] * channels + c[None, :],
        round_to(total, out.dtype.element_ty), mask=in_rows[:, None] & in_channels[None, :],
    )  # fmt: skip


def pool_cells(widest: int) -> int:
    """The unroll factor for lines of at most ``widest`` cells: few values, so few compilations."""
    return next(cells for cells in (1, 2, 3, 4, 5, 6, CELLS_UNROLLED) if cells >= min(widest, CELLS_UNROLLED))


def launch(source: Tensor, windows: RowWindows, uniform: bool, config: PoolConfig) -> Tensor:
    """Run ``pool_rows`` on contiguous ``source`` [any, C]; returns [windows.num_rows, C]."""
    channels = source.shape[1]
    out = source.new_empty(windows.num_rows, channels)
    block = max(config.channel_bytes // source.element_size(), 16)
    grid = (triton.cdiv(windows.num_rows, config.rows) * triton.cdiv(channels, block),)
    pool_rows[grid](
        source, out, windows.table, windows.weight, windows.num_rows, channels,
        ROWS=config.rows, CHANNELS=block, CELLS=pool_cells(windows.widest), UNIFORM=uniform, num_warps=config.num_warps,
        **OPTIONS,
    )  # fmt: skip
    return out


def pool(source: Tensor, windows: RowWindows, uniform: bool) -> Tensor:
    """The windows' sums of ``source`` [any, C] as [windows.num_rows, C]; ``uniform`` means weights of 1 / area."""
    source = source.contiguous()
    if windows.num_rows == 0 or source.shape[1] == 0:
        return source.new_empty(windows.num_rows, source.shape[1])
    key = choose.key("pool", source, source.shape[1], windows.widest, uniform, rows=windows.num_rows)
    candidates = [choose.Candidate(str(config), config) for config in CONFIGS]
    with choose.on_device(source):
        return choose.run(key, candidates, lambda config: launch(source, windows, uniform, config), source.device)
