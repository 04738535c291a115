"""Pooling, LayerNorm, gate and up and SwiGLU in one persistent launch: a candidate beside the two launches it replaces.

Programs first share out the rows of the pooling by tickets, then take the tiles of the product in turns; a tile waits
until the rows that it reads are counted as done. No program can wait in vain, however few of them run at a time: a ticket
is held only by a program that runs, and its rows need nobody. Results do not depend on who makes a row: the only atomics
are the counters', which every launch gets anew as zeros (a CUDA graph clears them in every replay).

Order in memory: a program's plain stores, a barrier of its threads, one atomic add with release; on the other side one
atomic read with acquire, then the loads, both of scope gpu. Descriptors load by another way ("proxy") than plain
stores: a fence on either side orders the two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import choose, gated, pool, target
from .choose import UNFUSED
from .gated import TileConfig, gated_tile, tile_of
from .geometry import PoolPlan
from .pool import pool_tile
from .reference import NormOf
from .rounding import INTERPRETED


@triton.jit
def _order_ways(TMA: tl.constexpr):
    """Plain stores before this come before descriptors' loads after it."""
    if TMA and not INTERPRETED:
        tl.inline_asm_elementwise("fence.proxy.async.global; mov.b32 $0, 0;", "=r", [], tl.int32, False, 1)


@triton.jit
def _read(counter):
    return tl.atomic_add(counter, 0, sem="acquire", scope="gpu")


@triton.jit(do_not_specialize=["M", "num_images", "halvings"])
def pooled_gated_rows(
    source, stride, table, num_images, halvings, scale, shift, eps, out, hat, rstd, counters,
    tokens, weight, bias, inner, gate_up, M, N, K,
    ROWS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, CELLS: tl.constexpr,
    RESIZE: tl.constexpr, TRANSPOSED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``pool_rows`` to ``out`` [M, K], then ``gated_rows`` of ``tokens``, which is ``out`` as that one reads it.

    ``counters`` are int32 zeros [2 + cdiv(M, BM)]: tickets taken, tickets done, those done of each row tile.
    """
    tickets = tl.cdiv(M, ROWS)
    ticket = tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")
    while ticket < tickets:
        pool_tile(
            source, stride, table, num_images, halvings, scale, shift, eps, out, hat, rstd, M, K, ticket * ROWS, 0,
            ROWS, P0, P1, P2, CELLS, RESIZE, TRANSPOSED,
        )  # fmt: skip
        _order_ways(TMA)
        tl.debug_barrier()
        tl.atomic_add(counters + 2 + ticket * ROWS // BM, 1, sem="release", scope="gpu")
        tl.atomic_add(counters + 1, 1, sem="release", scope="gpu")
        ticket = tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")

    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    done = _read(counters + 1)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(index, tiles_m, tiles_n, GROUP)
        if done < tickets:  # once a program has seen that all are done, it asks no more
            wanted = tl.cdiv(tl.minimum(M - tile_m * BM, BM), ROWS)
            while _read(counters + 2 + tile_m) < wanted:
                pass
            done = _read(counters + 1)
        _order_ways(TMA)
        gated_tile(
            tokens, weight, bias, inner, gate_up, tile_m * BM, tile_n * BN, M, N, K, BM, BN, BK, TMA
        )  # fmt: skip


def rows_per_ticket(config: TileConfig, width: int) -> int:
    """Rows that a program pools at a time: few enough to be spread, and to be held in half of a pool's registers."""
    held = 16 * config.num_warps * pool.MAX_VALUES // width
    return min(config.num_warps // 2, 1 << held.bit_length() - 1)


def launch(
    config: TileConfig | str, source: Tensor, plan: PoolPlan | None, norm: NormOf | None, weight: Tensor, bias: Tensor | None, store_gate_up: bool
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Tokens, hat and rstd as ``pool.pooled``, inner and gate_up as ``gated.gated``; by one configuration."""
    if config == UNFUSED:
        made = pool.pooled(source, plan, norm=norm)
        return (*made, *gated.gated(made[0], weight, bias, True, store_gate_up))
    made, read, constants = pool.prepare(source, plan, False, norm, source.shape[1])
    (num_rows, depth), width = made[0].shape, weight.shape[0] // 2
    inner = source.new_empty(num_rows, width)
    gate_up = source.new_empty(num_rows, 2 * width) if store_gate_up else None
    counters = torch.zeros(2 + target.cdiv(num_rows, config.m), dtype=torch.int32, device=source.device)
    pooled_gated_rows[(gated.num_programs(config, num_rows, width, source.device),)](
        *read, *made, counters, gated.operand(config, made[0], config.m, config.k), gated.weight_of(config, weight), bias,
        gated.output(config, inner, 1, 1, config.n), gated.output(config, gate_up, 2, 1, config.n),
        num_rows, width, depth, ROWS=rows_per_ticket(config, depth), **constants, **gated.options_of(config),
    )  # fmt: skip
    return (*made, inner, gate_up)


def pooled_gated(
    source: Tensor, plan: PoolPlan | None, norm: NormOf | None, weight: Tensor, bias: Tensor | None, store_gate_up: bool
) -> tuple[Tensor | None, ...]:
    """``reference.pooled_gated``: two launches, or one where it is allowed (``set_one_launch``), right and faster."""
    width = source.shape[1]
    if plan is None or not choose.allows_one_launch() or width > pool.SHARED_ROW_WIDTH:
        return launch(UNFUSED, source, plan, norm, weight, bias, store_gate_up)
    source, weight = pool.strided(source), gated.dense(weight)
    inner, num_rows = weight.shape[0] // 2, plan.num_tokens
    aligned = gated.is_aligned(inner, width, weight)
    flags = (0,) if norm is None else (1, norm.scale is not None, norm.shift is not None, norm.keep)
    key = choose.key(
        "pooled_gated", source, num_rows, width, inner, plan.cells, plan.is_resize, *flags, bias is not None, store_gate_up, aligned
    )  # fmt: skip
    # The two launches come first: without a timing they are what runs.
    found = lambda: gated.candidates(gated.GATED_CONFIGS, source, num_rows, inner, aligned)  # noqa: E731
    return choose.run(
        key,
        lambda: sorted(found() if aligned else found()[:1], key=lambda candidate: candidate.name != UNFUSED),
        lambda config: launch(config, source, plan, norm, weight, bias, store_gate_up),
    )
