"""Pooling, LayerNorm, gate and up and SwiGLU in one persistent launch: a candidate beside the two launches it replaces.

Programs share out the pooling's rows by tickets, then take the product's tiles in turns; a tile waits until the rows that
it reads are counted as done. Nobody waits in vain, however few programs run at a time: a ticket is held only by one that
runs, and its rows need nobody. What comes out does not depend on who makes a row: the only atomics are the counters',
zeros that every launch gets anew (a CUDA graph clears them in every replay), so that no call can meet another's.

Order in memory: a program's plain stores, a barrier of its threads, one thread's add with release; on the other side one
thread's read with acquire, a barrier, then the loads; scope gpu. Descriptors load by another way ("proxy") than plain
stores take: a fence on either side puts the two in order.
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

# Of gated's tiles those that do not spill beside a row's sums, on 9.0 and 10.0.
CONFIGS = (TileConfig("tma", 128, 128, 64, 8, 4), TileConfig("tma", 64, 128, 64, 4, 4))


@triton.jit
def _order_proxies():
    """Plain stores before this come before descriptors' loads after it."""
    if not INTERPRETED:
        tl.inline_asm_elementwise("fence.proxy.async.global; mov.b32 $0, 0;", "=r", [], tl.int32, False, 1)


@triton.jit
def _read(counter):
    return tl.atomic_add(counter, 0, sem="acquire", scope="gpu")


@triton.jit(do_not_specialize=["M", "num_images", "halvings"])
def pooled_gated_tma(
    source, stride, table, num_images, halvings, scale, shift, eps, rows, hat, rstd, counters,
    tokens, weight, bias, inner, gate_up, M, N, K,
    ROWS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, CELLS: tl.constexpr,
    RESIZE: tl.constexpr, TRANSPOSED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, NUM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """``pool_rows`` to ``rows`` [M, K], then ``gated_tma`` of ``tokens``, their descriptor.

    ``counters`` are int32 zeros [2 + cdiv(M, BM)]: tickets taken, tickets done, and those done of each row tile.
    """
    tickets = tl.cdiv(M, ROWS)
    ticket = tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")
    while ticket < tickets:
        pool_tile(
            source, stride, table, num_images, halvings, scale, shift, eps, rows, hat, rstd, M, K, ticket * ROWS, 0,
            ROWS, P0, P1, P2, CELLS, RESIZE, TRANSPOSED,
        )  # fmt: skip
        _order_proxies()
        tl.debug_barrier()  # the release below is one thread's: it speaks for the stores of all
        tl.atomic_add(counters + 2 + ticket * ROWS // BM, 1, sem="release", scope="gpu")
        tl.atomic_add(counters + 1, 1, sem="release", scope="gpu")
        ticket = tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")

    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    done = _read(counters + 1)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, NUM_PROGRAMS):
        tile_m, tile_n = tile_of(index, tiles_m, tiles_n, GROUP)
        if done < tickets:  # a program that has seen all of them done asks no more
            wanted = tl.cdiv(tl.minimum(M - tile_m * BM, BM), ROWS)
            while _read(counters + 2 + tile_m) < wanted:
                pass
            done = _read(counters + 1)
        _order_proxies()
        gated_tile(tokens, weight, bias, inner, gate_up, tile_m * BM, tile_n * BN, N, K, BM, BN, BK)


def rows_per_ticket(config: TileConfig, width: int) -> int:
    """Rows that a program pools at a time: few enough to be spread, and a quarter of what a pool alone holds in registers.

    More spills beside a tile's own registers on 10.0: half of it under Triton 3.7, three eighths under 3.8.
    """
    held = max(8 * config.num_warps * pool.MAX_VALUES // width, 1)
    return min(config.num_warps // 2, 1 << held.bit_length() - 1)


def launch(
    config: TileConfig | str, source: Tensor, plan: PoolPlan | None, norm: NormOf | None, weight: Tensor,
    bias: Tensor | None, store_gate_up: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """``pooled_gated`` by one configuration; the unfused are two launches."""
    if config == UNFUSED:
        made = pool.pooled(source, plan, norm=norm)
        return (*made, *gated.gated(made[0], weight, bias, True, store_gate_up))
    made, read, constants = pool.prepare(source, plan, False, norm, source.shape[1])
    num_rows, width = made[0].shape
    counters = torch.zeros(2 + target.cdiv(num_rows, config.m), dtype=torch.int32, device=source.device)
    inner_and_gate_up = gated.launch_gated(
        config, made[0], weight, bias, True, store_gate_up, pooled_gated_tma, (*read, *made, counters),
        ROWS=rows_per_ticket(config, width), **constants,
    )  # fmt: skip
    return (*made, *inner_and_gate_up)


def pooled_gated(
    source: Tensor, plan: PoolPlan | None, norm: NormOf | None, weight: Tensor, bias: Tensor | None, store_gate_up: bool
) -> tuple[Tensor | None, ...]:
    """``reference.pooled_gated`` in two launches, or in one by a configuration that was chosen."""
    width, inner = source.shape[1], weight.shape[0] // 2
    if plan is None or not choose.allows_one_launch() or width > pool.SHARED_ROW_WIDTH:
        return launch(UNFUSED, source, plan, norm, weight, bias, store_gate_up)
    weight, source = gated.dense(weight), pool.strided(source)
    has_tma = target.capability(source.device) // 10 in target.TMA_CAPABILITIES and source.element_size() == 2
    can = has_tma and gated.is_aligned(inner, width, weight)
    shape = (width, inner, plan.cells, plan.is_resize, *pool.flags_of(norm), bias is not None, store_gate_up, can)
    # The two launches come first: they are what runs where nothing is timed.
    found = [choose.Candidate(UNFUSED, UNFUSED), *(choose.Candidate(gated.name_of(c), c) for c in CONFIGS if can)]
    return choose.run(
        choose.key("pooled_gated", source, plan.num_tokens, *shape),
        lambda: found,
        lambda config: launch(config, source, plan, norm, weight, bias, store_gate_up),
    )
