"""Ragged pooling, forward and backward, and the LayerNorm after it: one kernel, every output row a weighted sum of rows.

A program makes whole rows where it can: the search for its image and the arithmetic of its windows are paid once per
row, and a LayerNorm finds the row in registers. A row of C channels is held as up to three pieces of a power of two
each (1152 = 1024 + 128), as Triton's tensors must be, so that few lanes idle.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import choose, reference, target
from .choose import UNFUSED
from .geometry import PoolPlan, rows_of
from .reference import NormOf
from .rounding import OPTIONS, round_to


class PoolConfig(NamedTuple):
    """One program makes ``rows`` output rows, or ``span`` channels of each where that is not 0."""

    rows: int
    num_warps: int
    span: int = 0


CONFIGS = (PoolConfig(1, 2), PoolConfig(2, 2), PoolConfig(4, 4), PoolConfig(8, 4, 128))
INTERPRETED = PoolConfig(256, 4)  # Triton's interpreter takes as long for one row as for many
MAX_VALUES = 64  # float32 sums per thread: more would spill
SHARED_ROW_WIDTH = 4096  # channels of a program at most; a wider row is spanned by several, or normalised by torch
MAX_REGISTERS = 255  # said out loud: the assembler otherwise spills a few to fit more of these small blocks
CELLS_UNROLLED = 8  # widest line read in one unrolled step; wider ones loop


@triton.jit
def _divide(a, inverse):
    """floor(a / b) for int32 0 <= a < 2^20 and ``inverse`` = 1 / b: half a unit is far more than float32 is off."""
    return ((a.to(tl.float32) + 0.5) * inverse).to(tl.int32)


@triton.jit
def _window(index, size, side, RESIZE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(first, count) of what output ``index`` of one axis sums: patches of a token, or (TRANSPOSED) tokens of a patch."""
    if RESIZE:
        by_side = 1.0 / side.to(tl.float32)
        per = _divide(size + side - 1, by_side)  # resized rows per token; row k lies at patch k * step / span
        step, span = size - 1, tl.maximum(side * per - 1, 1)
        by_span, by_step = 1.0 / span.to(tl.float32), 1.0 / tl.maximum(step, 1).to(tl.float32)
        if TRANSPOSED:
            first = tl.where((index > 0) & (step > 0), _divide(tl.maximum(index - 1, 0) * span, by_step) + 1, 0)
            last = _divide((index + 1) * span + step - 1, by_step) - 1
            last = tl.where(step > 0, tl.minimum(last, side * per - 1), side * per - 1)
            by_per = 1.0 / per.to(tl.float32)
            first, last = _divide(first, by_per), _divide(last, by_per)
        else:
            first = _divide(index * per * step, by_span)
            last = _divide(((index + 1) * per - 1) * step + span - 1, by_span)
    else:
        summed, made = (side, size) if TRANSPOSED else (size, side)
        by_made = 1.0 / made.to(tl.float32)
        first = _divide(index * summed, by_made)
        last = _divide((index + 1) * summed + made - 1, by_made) - 1
    return first, last - first + 1


@triton.jit
def _rising(first, last, at, step, span):
    """The sum over k in first ... last of span - (at - k * step), an arithmetic series; 0 if there is none."""
    terms = tl.maximum(last - first + 1, 0)
    return (terms * (2 * (span - at) + (first + last) * step)).to(tl.float32) * 0.5


@triton.jit
def _share(index, inner, size, side, RESIZE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(a, b): along one axis the weight of ``inner``, which lies in the window of output ``index``, is a / b."""
    token, patch = (inner, index) if TRANSPOSED else (index, inner)
    by_side = 1.0 / side.to(tl.float32)
    if RESIZE:
        # Every resized row k of the token gives patch y the share max(0, 1 - |k * step / span - y|).
        per = _divide(size + side - 1, by_side)
        step, span = size - 1, tl.maximum(side * per - 1, 1)
        by_step = 1.0 / tl.maximum(step, 1).to(tl.float32)
        begin, end, at = token * per, token * per + per - 1, patch * span
        low = tl.where(patch > 0, _divide(tl.maximum(at - span, 0), by_step) + 1, 0)
        middle = tl.where(step > 0, _divide(at, by_step), end)
        high = _divide(at + span + step - 1, by_step) - 1
        rise = _rising(tl.maximum(begin, low), tl.minimum(end, middle), at, step, span)
        fall = _rising(tl.maximum(begin, middle + 1), tl.minimum(end, high), -at, -step, span)
        parts, whole = rise + fall, (per * span).to(tl.float32)
    else:
        whole = (_divide((token + 1) * size + side - 1, by_side) - _divide(token * size, by_side)).to(tl.float32)
        parts = whole * 0.0 + 1.0
    return parts, whole


@triton.jit
def _pieces(begin, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):
    """The channels from ``begin`` on, of each piece that there is."""
    c = (begin + tl.arange(0, P0),)
    if P1 > 0:
        c = c + (begin + P0 + tl.arange(0, P1),)
    if P2 > 0:
        c = c + (begin + P0 + P1 + tl.arange(0, P2),)
    return c


@triton.jit
def _add_rows(total, source, used, share, c, channels, WEIGHTED: tl.constexpr):
    """``total`` plus the channels ``c`` of the rows at ``source``, where ``used``, piece by piece."""
    added = ()
    for i in tl.static_range(len(c)):
        inside = used[:, None] & (c[i] < channels)[None, :]
        values = tl.load(source[:, None] + c[i][None, :], mask=inside, other=0.0).to(tl.float32)
        added = added + (total[i] + values * share[:, None] if WEIGHTED else total[i] + values,)
    return added


@triton.jit
def _centre(x, mean, c, channels):
    return tl.where((c < channels)[None, :], x - mean[:, None], 0.0)


@triton.jit
def _store_piece(
    x, factor, r, num_rows, c, channels, scale, shift, out, hat
):  # fmt: skip
    """Store x * factor in ``hat``, unless that is None or ``out``, and what scale and shift make of it in ``out``."""
    at = r.to(tl.int64)[:, None] * channels + c[None, :]
    inside = (r < num_rows)[:, None] & (c < channels)[None, :]
    y = round_to(x * factor[:, None], out.dtype.element_ty)
    if scale is not None or shift is not None:
        if hat is not None:
            tl.store(hat + at, y, mask=inside)
        y = _affine(y, scale, shift, c, channels)
    tl.store(out + at, y, mask=inside)


@triton.jit
def _affine(hat, scale, shift, c, channels):
    """hat * scale + shift in its dtype: from the rounded row, so that the backward pass makes the very same tokens."""
    y = hat.to(tl.float32)
    if scale is not None:
        y = y * tl.load(scale + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        y = y + tl.load(shift + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    return round_to(y, hat.dtype)


@triton.jit
def pool_tile(
    source, stride, table, num_images, halvings, scale, shift, eps, out, hat, rstd, num_rows, channels, first_row, begin,
    ROWS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, CELLS: tl.constexpr,
    RESIZE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """``pool_rows`` for the ROWS rows from ``first_row`` on and the channels from ``begin`` on."""
    r = first_row + tl.arange(0, ROWS)
    # of the 2^31 rows that there may be, the last block's numbers past the end must not wrap
    in_rows = (r >= 0) & (r < num_rows)
    c = _pieces(begin, P0, P1, P2)
    total = [tl.zeros((ROWS, x.shape[0]), tl.float32) for x in c]
    factor = tl.full((ROWS,), 1.0, tl.float32)
    if table is not None:
        WEIGHTED: tl.constexpr = RESIZE or TRANSPOSED
        OUT: tl.constexpr = 0 if TRANSPOSED else 1  # the table's column of output rows
        row = tl.where(in_rows, r, 0)
        image = tl.zeros((ROWS,), tl.int32)
        above = image + num_images
        for _ in range(halvings):
            middle = (image + above) // 2
            is_below = tl.load(table + middle * 6 + OUT) <= row
            image = tl.where(is_below, middle, image)
            above = tl.where(is_below, above, middle)
        entry = table + image * 6
        height, width = tl.load(entry + 2), tl.load(entry + 3)
        n_h, n_w = tl.load(entry + 4), tl.load(entry + 5)
        if TRANSPOSED:
            pitch, out_width = n_w, width
        else:
            pitch, out_width = width, n_w
        local = row - tl.load(entry + OUT)
        line = _divide(local, 1.0 / out_width.to(tl.float32))
        cell = local - line * out_width
        first_line, lines = _window(line, height, n_h, RESIZE, TRANSPOSED)
        first_cell, cells = _window(cell, width, n_w, RESIZE, TRANSPOSED)
        lines = tl.where(in_rows, lines, 0)
        first = tl.load(entry + 1 - OUT).to(tl.int64) + first_line * pitch + first_cell
        most_lines, most_cells = tl.max(lines, 0), tl.max(cells, 0)
        for i in range(most_lines):
            if WEIGHTED:
                line_share, line_parts = _share(line, first_line + i, height, n_h, RESIZE, TRANSPOSED)
            at_line = first + i * pitch
            for start in range(0, most_cells, CELLS):
                for k in tl.static_range(CELLS):
                    j = start + k
                    used = (i < lines) & (j < cells)
                    share = factor
                    if WEIGHTED:
                        cell_share, cell_parts = _share(cell, first_cell + j, width, n_w, RESIZE, TRANSPOSED)
                        share = line_share * cell_share / (line_parts * cell_parts)
                    at = source + (at_line + j) * stride
                    total = _add_rows(total, at, used, share, c, channels, WEIGHTED)
        if not WEIGHTED:
            factor = 1.0 / tl.maximum(lines * cells, 1).to(tl.float32)
    else:
        at = source + r.to(tl.int64) * stride
        total = _add_rows(total, at, in_rows, factor, c, channels, False)
    if eps is not None:
        # Mean and variance of the row before rounding, in registers, one after the other: no cancellation.
        mean = tl.sum(total[0], 1)
        for i in tl.static_range(1, len(c)):
            mean += tl.sum(total[i], 1)
        mean = mean / channels
        centred = (_centre(total[0], mean, c[0], channels),)
        squares = tl.sum(centred[0] * centred[0], 1)
        for i in tl.static_range(1, len(c)):
            centred = centred + (_centre(total[i], mean, c[i], channels),)
            squares += tl.sum(centred[i] * centred[i], 1)
        total = centred
        variance = squares * factor * factor / channels
        inverse = 1.0 / tl.sqrt(variance + eps)
        if rstd is not None:
            tl.store(rstd + r, inverse, mask=in_rows)
        factor = factor * inverse
    rows = tl.where(in_rows, r, num_rows)
    for i in tl.static_range(len(c)):
        _store_piece(total[i], factor, rows, num_rows, c[i], channels, scale, shift, out, hat)


@triton.jit(do_not_specialize=["num_rows", "num_images", "halvings"])
def pool_rows(
    source, stride, table, num_images, halvings, scale, shift, eps, out, hat, rstd, num_rows, channels,
    ROWS: tl.constexpr, SPAN: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, CELLS: tl.constexpr,
    RESIZE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """out [num_rows, channels] from source rows ``stride`` apart: pooled by ``table``, or as they are where it is None.

    Unless ``eps`` is None, out = LayerNorm of that; ``hat``, the rows before scale and shift, and ``rstd``, float32
    [num_rows], are stored unless None.
    """
    pool_tile(
        source, stride, table, num_images, halvings, scale, shift, eps, out, hat, rstd, num_rows, channels,
        tl.program_id(0) * ROWS, tl.program_id(1) * SPAN, ROWS, P0, P1, P2, CELLS, RESIZE, TRANSPOSED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "rows"])
def norm_grad_rows(
    d_tokens, hat, rstd, scale, d_source, sums, num_rows, rows, channels,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The LayerNorm's backward pass from its normalised rows: d_source [num_rows, channels], which may be ``d_tokens``.

    ``sums`` is float32 [programs, 2, channels]: each program's column sums of d_tokens * hat and of d_tokens. None for
    what is not wanted.
    """
    c = tl.arange(0, WIDTH)
    inside = c < channels
    d_scale = tl.zeros((WIDTH,), tl.float32)
    d_shift = tl.zeros((WIDTH,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows
    for r in range(first, tl.minimum(first + rows, num_rows)):
        at = r * channels + c
        d = tl.load(d_tokens + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(hat + at, mask=inside, other=0.0).to(tl.float32)
        if sums is not None:
            d_scale += d * x
            d_shift += d
        if d_source is not None:
            if scale is not None:
                d = d * tl.load(scale + c, mask=inside, other=0.0).to(tl.float32)
            along = tl.sum(d * x, 0) / channels
            d = (d - tl.sum(d, 0) / channels - x * along) * tl.load(rstd + r)
            tl.store(d_source + at, round_to(d, d_source.dtype.element_ty), mask=inside)
    if sums is not None:
        at = sums + tl.program_id(0).to(tl.int64) * 2 * channels + c
        tl.store(at, d_scale, mask=inside)
        tl.store(at + channels, d_shift, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def affine_rows(
    hat, scale, shift, out, num_rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """out = hat * scale + shift, all [num_rows, channels]: the LayerNorm's rows once more."""
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = r[:, None] * channels + c[None, :]
    inside = (r < num_rows)[:, None] & (c < channels)[None, :]
    y = _affine(tl.load(hat + at, mask=inside, other=0.0), scale, shift, c, channels)
    tl.store(out + at, y, mask=inside)


@functools.cache
def pieces_of(width: int) -> tuple[int, int, int]:
    """Up to three powers of two, 0 where there is none, that hold ``width`` channels with few to spare."""
    pieces, rest = [], width
    for is_last in (False, False, True):
        whole = triton.next_power_of_2(max(rest, 1))
        if rest <= 0:
            whole = 0
        elif not is_last and whole - rest > whole // 8:
            whole //= 2
        pieces.append(whole)
        rest -= whole
    return tuple(pieces)


def prepare(
    source: Tensor, plan: PoolPlan | None, transposed: bool, norm: NormOf | None, span: int
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], tuple, dict]:
    """(what ``launch`` returns, unwritten; what ``pool_rows`` reads; its constants for programs of ``span`` channels)."""
    out = source.new_empty(rows_of(source, plan, transposed), source.shape[1])
    scale, shift, eps, keep = norm or (None, None, None, False)
    hat, rstd = None, None
    if keep:
        rstd = torch.empty(out.shape[0], dtype=torch.float32, device=source.device)
        hat = out if scale is None and shift is None else torch.empty_like(out)
    table, num_images, cells, is_resize = None, 0, 1, False
    if plan is not None:
        table, num_images, is_resize = plan.table, plan.table.shape[0] - 1, plan.is_resize
        cells = min(plan.patch_cells if transposed else plan.cells, CELLS_UNROLLED)
    constants = dict(
        zip(("P0", "P1", "P2"), pieces_of(span)),
        CELLS=8 if cells == 7 else cells,
        RESIZE=is_resize,
        TRANSPOSED=transposed,
    )
    read = (source, source.stride(0), table, num_images, num_images.bit_length(), scale, shift, eps)
    return (out, hat, rstd), read, constants


def launch(
    config: PoolConfig | str, source: Tensor, plan: PoolPlan | None, transposed: bool, norm: NormOf | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``pooled`` by one configuration, on rows that lie close or ``stride(0)`` apart."""
    if config == UNFUSED:  # plain torch, the LayerNorm from rows that were not rounded in between
        if norm is None:
            return reference.pooled(source, plan, transposed)
        hat, rstd = reference.normalise(reference.pooled(source.float(), plan)[0], norm.eps)
        hat = hat.to(source.dtype)
        return reference.affine(hat, norm.scale, norm.shift), hat if norm.keep else None, rstd if norm.keep else None
    channels = source.shape[1]
    span = channels if norm is not None else min(config.span or SHARED_ROW_WIDTH, channels)
    made, read, constants = prepare(source, plan, transposed, norm, span)
    num_rows = made[0].shape[0]
    pool_rows[target.cdiv(num_rows, config.rows), target.cdiv(channels, span)](
        *read, *made, num_rows, channels, ROWS=config.rows, SPAN=span, **constants,
        num_warps=config.num_warps, maxnreg=MAX_REGISTERS, **OPTIONS,
    )  # fmt: skip
    return made


def strided(source: Tensor) -> Tensor:
    """``source``, or a copy where the values of a row do not lie side by side, or rows overlap."""
    return source if source.stride(1) == 1 and source.stride(0) >= source.shape[1] else source.contiguous()


def pooled(
    source: Tensor, plan: PoolPlan | None, transposed: bool = False, norm: NormOf | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``reference.pooled`` by the configuration chosen for its shape."""
    if plan is None and norm is None:
        return source, None, None
    width = source.shape[1]
    if norm is not None and width > SHARED_ROW_WIDTH:  # no program holds such a row
        return reference.pooled(pooled(source, plan)[0], None, norm=norm)
    source, num_rows = strided(source), rows_of(source, plan, transposed)
    shape = (width, 0, False, False)
    if plan is not None:
        shape = (width, plan.patch_cells if transposed else plan.cells, plan.is_resize, transposed)
    key = choose.key("pool", source, num_rows, *shape, *flags_of(norm))
    return choose.run(
        key, lambda: candidates(width, norm is not None), lambda c: launch(c, source, plan, transposed, norm)
    )


def flags_of(norm: NormOf | None) -> tuple:
    """What of ``norm`` a choice depends on."""
    return (0,) if norm is None else (1, norm.scale is not None, norm.shift is not None, norm.keep)


def candidates(width: int, has_norm: bool) -> list[choose.Candidate]:
    """The configurations that hold ``width`` channels without spills, then plain torch."""
    configs = [INTERPRETED, *CONFIGS] if target.is_interpreted() else CONFIGS
    fitting = [
        config
        for config in configs
        if (config == INTERPRETED or config.rows * min(config.span or width, SHARED_ROW_WIDTH) <= 32 * config.num_warps * MAX_VALUES)
        and not (has_norm and config.span)
    ]  # fmt: skip
    return [*(choose.Candidate(name_of(config), config) for config in fitting), choose.Candidate(UNFUSED, UNFUSED)]


def name_of(config: PoolConfig) -> str:
    """How tables of choices call ``config``."""
    return f"{config.rows}x{config.span or 'row'}-w{config.num_warps}"


def norm_grad(
    d_tokens: Tensor, hat: Tensor, rstd: Tensor, scale: Tensor | None, need_grad: bool, need_sums: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``reference.norm_grad``; the gradient of the rows is written over ``d_tokens``."""
    if hat.shape[1] > SHARED_ROW_WIDTH:
        return reference.norm_grad(d_tokens, hat, rstd, scale, need_grad, need_sums)
    num_rows, channels = hat.shape
    programs = min(num_rows, 4 * target.num_processors(hat.device))
    rows = target.cdiv(num_rows, programs)
    programs = target.cdiv(num_rows, rows)
    sums = None
    if need_sums:
        sums = torch.empty(programs, 2, channels, dtype=torch.float32, device=hat.device)
    with choose.on_device(hat.device):
        norm_grad_rows[(programs,)](
            d_tokens, hat, rstd, scale, d_tokens if need_grad else None, sums, num_rows, rows, channels,
            WIDTH=triton.next_power_of_2(channels), num_warps=4, **OPTIONS,
        )  # fmt: skip
    return d_tokens if need_grad else None, None if sums is None else sums.sum(0)


def affine(hat: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """``reference.affine``, to the same bits as the forward pass made them."""
    if scale is None and shift is None:
        return hat
    out = torch.empty_like(hat)
    with choose.on_device(hat.device):
        affine_rows[target.cdiv(hat.shape[0], 8), target.cdiv(hat.shape[1], 128)](
            hat, scale, shift, out, *hat.shape, ROWS=8, COLUMNS=128, num_warps=4, **OPTIONS
        )
    return out
