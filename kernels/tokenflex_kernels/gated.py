"""The SwiGLU kernels: gate and up as one matrix product, and the gradient of both as the epilogue of another.

Letters: M tokens, N the inner width H, K the width that a product sums over. ``gated`` is N-tiled over H and computes
both halves of a tile, so that silu(gate) * up needs no second pass; ``dgated`` computes dY Wd and turns each tile into
dGate, dUp (side by side in one [T, 2H] buffer: two wide products follow instead of four) and S = silu(gate) * up once
more. Three ways to run either: ``tma`` (descriptors; compute capability 9 and 10), ``pointer`` (8.x and unaligned
shapes) and ``unfused`` (cuBLAS, then an elementwise kernel; always there, and the way of float32, where cuBLAS follows
torch's TF32 setting).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import choose, target
from .choose import UNFUSED
from .rounding import OPTIONS, fast_reciprocal, matmul, round_to


class TileConfig(NamedTuple):
    """A tile of m tokens x n inner columns, k at a time. ``pieces``: column strips in which the epilogue goes: fewer live registers."""

    path: str  # tma or pointer
    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    per_sm: int = 1  # persistent programs on one streaming multiprocessor
    pieces: int = 1
    major: int = 0  # the only major compute capability that it is for; 0: every


ELEMENTWISE = (16, 128, 4)  # rows, columns, warps: 16 bytes of a half-precision row per thread and turn

# Shared memory allows 99 KiB on 8.6, 8.9 and 12.x (the pointer configurations stay under that), 163 KiB on 8.0 and
# 227 KiB on 9.0 and 10.x. Two programs on one multiprocessor need 128 registers or fewer a thread and half of that.
_POINTER = (
    TileConfig("pointer", 128, 64, 32, 8, 4),
    TileConfig("pointer", 64, 64, 64, 4, 3),
    TileConfig("pointer", 64, 64, 32, 4, 4),
)
GATED_CONFIGS: dict[str, tuple[TileConfig, ...]] = {
    "tma": (
        TileConfig("tma", 128, 128, 64, 8, 4),
        TileConfig("tma", 128, 64, 64, 8, 3, per_sm=2),
        TileConfig("tma", 64, 128, 64, 4, 4),
    ),
    "pointer": _POINTER,
}
# In strips, or the epilogue spills; 128 x 256 does even in four, 16 bytes under Triton 3.6.
DGATED_CONFIGS: dict[str, tuple[TileConfig, ...]] = {
    "tma": (
        TileConfig("tma", 128, 128, 64, 8, 4, pieces=2),
        TileConfig("tma", 256, 128, 64, 8, 3, pieces=4, major=9),  # spills on 10.0
        TileConfig("tma", 64, 128, 64, 4, 4, pieces=4),
    ),
    "pointer": _POINTER,
}
GROUP_M = 8  # row tiles that share a column tile's weights while they are in L2


@triton.jit
def tile_of(index, tiles_m, tiles_n, GROUP: tl.constexpr):
    """The (row, column) tile of a linear index: columns outer within groups of GROUP row tiles."""
    per_group = GROUP * tiles_n
    first = (index // per_group) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + (index % per_group) % size, (index % per_group) // size


@triton.jit
def _split_columns(tile):
    """The left and right halves of [rows, columns]; within a thread's registers, as its columns lie in both."""
    rows: tl.constexpr = tile.shape[0]
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, half)), (0, 2, 1)))


@triton.jit
def _sigmoid(x, PURE: tl.constexpr):
    """1 / (1 + exp(-x)) with the fast reciprocal: two units in the last place of float32, a fifth of the instructions."""
    return fast_reciprocal(1.0 + tl.exp2(x * -1.4426950408889634), PURE)


@triton.jit
def _swiglu(gate, up):
    return gate * _sigmoid(gate, True) * up


@triton.jit
def _swiglu_grads(d_inner, gate, up, PURE: tl.constexpr):
    """(d_gate, d_up, silu(gate) * up) for inner = silu(gate) * up, in float32."""
    s = _sigmoid(gate, PURE)
    h = gate * s
    return d_inner * up * (s + h * (1.0 - s)), d_inner * h, h * up


@triton.jit
def _add_bias(gate, up, bias, n, N):
    if bias is not None:
        gate += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return gate, up


@triton.jit
def _store_sums(bias_sums, dg, du, tile_m, n, N):
    """This row tile's share of the bias gradient, [2N]."""
    at = bias_sums + tile_m.to(tl.int64) * 2 * N + n
    tl.store(at, tl.sum(dg, 0), mask=n < N)
    tl.store(at + N, tl.sum(du, 0), mask=n < N)


@triton.jit
def gated_tile(
    tokens, weight, bias, inner, gate_up, row, column, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """The tile of ``gated_tma`` at (row, column).

    One box [2, BN, BK] of the weight is one operand of 2 BN columns: a single wgmma m64n256k16 does both halves.
    """
    acc = tl.zeros((BM, 2 * BN), tl.float32)
    for k in range(tl.cdiv(K, BK)):
        a = tokens.load([row, k * BK])
        b = tl.reshape(weight.load([0, column, k * BK]), (2 * BN, BK))
        acc = matmul(a, b.T, acc)
    # Gate column j and up column j sit in the same thread: the split moves registers only.
    gate, up = _split_columns(acc)
    gate, up = _add_bias(gate, up, bias, column + tl.arange(0, BN), N)
    if gate_up is not None:
        # One after the other, all of one shape: they share the little memory that the pipeline leaves.
        gate_up.store([row, 0, column], tl.reshape(round_to(gate, gate_up.dtype), (BM, 1, BN)))
        gate_up.store([row, 1, column], tl.reshape(round_to(up, gate_up.dtype), (BM, 1, BN)))
    if inner is not None:
        inner.store([row, 0, column], tl.reshape(round_to(_swiglu(gate, up), inner.dtype), (BM, 1, BN)))


@triton.jit(do_not_specialize=["M"])
def gated_tma(
    tokens, weight, bias, inner, gate_up, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, NUM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """tokens [M, K], weight [2, N, K] -> inner [M, 1, N] and gate_up [M, 2, N]; None for what is not wanted.

    All but ``bias`` [2N] are descriptors.
    """
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, NUM_PROGRAMS):
        tile_m, tile_n = tile_of(index, tiles_m, tiles_n, GROUP)
        gated_tile(tokens, weight, bias, inner, gate_up, tile_m * BM, tile_n * BN, N, K, BM, BN, BK)


@triton.jit(do_not_specialize=["M"])
def gated_pointer(
    tokens, weight, bias, inner, gate_up, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``gated_tma`` through pointers: tokens [M, K], weight [2N, K] -> inner [M, N] and gate_up [M, 2N], contiguous."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # Rows past the end read row 0 and are not stored: no row mask in the loop. int64: M * K may pass 2^31.
    a_at = tokens + tl.where(m < M, m, 0).to(tl.int64)[:, None] * K + k[None, :]
    b_at = weight + tl.where(n < N, n, 0).to(tl.int64)[:, None] * K + k[None, :]
    up_at = (tl.zeros((), tl.int64) + N) * K  # not N.to: Triton makes a plain 1 of an N of 1
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        inside = (k < K - start)[None, :]
        a = tl.load(a_at + start, mask=inside, other=0.0)
        gate = matmul(a, tl.load(b_at + start, mask=inside, other=0.0).T, gate)
        up = matmul(a, tl.load(b_at + up_at + start, mask=inside, other=0.0).T, up)
    gate, up = _add_bias(gate, up, bias, n, N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    row = m.to(tl.int64)[:, None] * N
    if gate_up is not None:
        at = gate_up + 2 * row + n[None, :]
        tl.store(at, round_to(gate, gate_up.dtype.element_ty), mask=inside)
        tl.store(at + N, round_to(up, gate_up.dtype.element_ty), mask=inside)
    if inner is not None:
        tl.store(inner + row + n[None, :], round_to(_swiglu(gate, up), inner.dtype.element_ty), mask=inside)


@triton.jit
def _grad_strips(
    d_inner, gate_up, d_gate_up, inner, bias_sums, tile_m, row, column, N,
    BM: tl.constexpr, BN: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Turn ``d_inner`` [BM, BN] at (row, column) into dGate, dUp, S and this row tile's share of the bias gradient.

    In PIECES (1, 2 or 4) strips of columns, one after the other: fewer registers at a time. ``d_gate_up`` may be
    ``gate_up``: a box is written when it has been read, and by nobody else.
    """
    if PIECES > 1:
        HALF: tl.constexpr = BN // 2
        left, right = _split_columns(d_inner)
        _grad_strips(left, gate_up, d_gate_up, inner, bias_sums, tile_m, row, column, N, BM, HALF, PIECES // 2)
        _grad_strips(right, gate_up, d_gate_up, inner, bias_sums, tile_m, row, column + HALF, N, BM, HALF, PIECES // 2)
    else:
        # One box, one load and one store for gate and up.
        gate, up = tl.split(tl.permute(gate_up.load([row, 0, column]).to(tl.float32), (0, 2, 1)))
        # One sigmoid for outputs in two layouts, but where a tile leaves no registers for it: 256 rows would spill.
        dg, du, s = _swiglu_grads(d_inner, gate, up, BM > 128)
        dtype: tl.constexpr = d_gate_up.dtype
        d_gate_up.store([row, 0, column], tl.permute(tl.join(round_to(dg, dtype), round_to(du, dtype)), (0, 2, 1)))
        if inner is not None:
            inner.store([row, column], round_to(s, inner.dtype))
        if bias_sums is not None:
            _store_sums(bias_sums, dg, du, tile_m, column + tl.arange(0, BN), N)


@triton.jit(do_not_specialize=["M"])
def dgated_tma(
    d_out, weight, gate_up, d_gate_up, inner, bias_sums, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, NUM_PROGRAMS: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """d_out [M, K], weight [K, N], gate_up [M, 2, N] -> d_gate_up [M, 2, N], inner [M, N]; bias_sums [cdiv(M, BM), 2N].

    All but ``bias_sums`` are descriptors; rows and columns past the end read as 0, and so add 0 to the bias sums. The
    last two may be None.
    """
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, NUM_PROGRAMS):
        tile_m, tile_n = tile_of(index, tiles_m, tiles_n, GROUP)
        row = tile_m * BM
        column = tile_n * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(tl.cdiv(K, BK)):
            acc = matmul(d_out.load([row, k * BK]), weight.load([k * BK, column]), acc)
        _grad_strips(acc, gate_up, d_gate_up, inner, bias_sums, tile_m, row, column, N, BM, BN, PIECES)


@triton.jit
def _store_grads(d_inner, gate_up, d_gate_up, inner, bias_sums, tile_m, m, n, M, N):
    """``_grad_strips`` through pointers, in one piece."""
    inside = (m < M)[:, None] & (n < N)[None, :]
    row = m.to(tl.int64)[:, None] * N
    at = 2 * row + n[None, :]
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + N, mask=inside, other=0.0).to(tl.float32)
    dg, du, s = _swiglu_grads(d_inner, gate, up, False)
    tl.debug_barrier()  # ``d_gate_up`` may be ``gate_up``: no thread overwrites what another has yet to read
    tl.store(d_gate_up + at, round_to(dg, d_gate_up.dtype.element_ty), mask=inside)
    tl.store(d_gate_up + at + N, round_to(du, d_gate_up.dtype.element_ty), mask=inside)
    if inner is not None:
        tl.store(inner + row + n[None, :], round_to(s, inner.dtype.element_ty), mask=inside)
    if bias_sums is not None:
        _store_sums(bias_sums, tl.where(inside, dg, 0.0), tl.where(inside, du, 0.0), tile_m, n, N)


@triton.jit(do_not_specialize=["M"])
def dgated_pointer(
    d_out, weight, gate_up, d_gate_up, inner, bias_sums, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``dgated_tma`` through pointers: d_out [M, K], weight [K, N], gate_up [M, 2N] -> d_gate_up [M, 2N], inner [M, N]."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a_at = d_out + tl.where(m < M, m, 0).to(tl.int64)[:, None] * K + k[None, :]
    b_at = weight + k.to(tl.int64)[:, None] * N + n[None, :]
    next_rows = (tl.zeros((), tl.int64) + N) * BK
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        inside = k < K - start
        a = tl.load(a_at + start, mask=inside[None, :], other=0.0)
        b = tl.load(b_at, mask=inside[:, None] & (n < N)[None, :], other=0.0)
        acc = matmul(a, b, acc)
        b_at += next_rows
    _store_grads(acc, gate_up, d_gate_up, inner, bias_sums, tile_m, m, n, M, N)


@triton.jit(do_not_specialize=["M"])
def swiglu_rows(gate_up, inner, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """gate_up [M, 2N] -> inner = silu(gate) * up [M, N]."""
    blocks = tl.cdiv(N, COLUMNS)
    m = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = (m < M)[:, None] & (n < N)[None, :]
    row = m.to(tl.int64)[:, None] * N
    gate = tl.load(gate_up + 2 * row + n[None, :], mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + 2 * row + N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(inner + row + n[None, :], round_to(_swiglu(gate, up), inner.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def swiglu_grad_rows(
    d_inner, gate_up, d_gate_up, inner, bias_sums, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """d_inner [M, N], gate_up [M, 2N] -> d_gate_up [M, 2N], inner [M, N], bias_sums [cdiv(M, ROWS), 2N]."""
    blocks = tl.cdiv(N, COLUMNS)
    tile_m = tl.program_id(0) // blocks
    m = tile_m * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = (m < M)[:, None] & (n < N)[None, :]
    d = tl.load(d_inner + m.to(tl.int64)[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    _store_grads(d, gate_up, d_gate_up, inner, bias_sums, tile_m, m, n, M, N)


def gated(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, store_inner: bool, store_gate_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``reference.gated`` by the configuration chosen for its shape."""
    tokens, weight = dense(tokens), dense(weight)
    num_rows, width, depth = tokens.shape[0], weight.shape[0] // 2, tokens.shape[1]
    aligned = is_aligned(width, depth, tokens, weight)
    key = choose.key("gated", tokens, num_rows, depth, width, bias is not None, store_inner, store_gate_up, aligned)
    return choose.run(
        key,
        lambda: candidates(GATED_CONFIGS, tokens, num_rows, width, aligned),
        lambda config: launch_gated(config, tokens, weight, bias, store_inner, store_gate_up),
    )


def dgated(
    d_out: Tensor, weight: Tensor, gate_up: Tensor, sum_bias: bool, store_inner: bool, in_place: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``reference.dgated`` by the configuration chosen for its shape."""
    d_out, weight = dense(d_out), dense(weight)
    num_rows, (depth, width) = d_out.shape[0], weight.shape
    aligned = is_aligned(width, depth, d_out, weight, gate_up)
    key = choose.key("dgated", d_out, num_rows, depth, width, sum_bias, store_inner, aligned)
    operands = (d_out, weight, gate_up, sum_bias, store_inner)
    return choose.run(
        key,
        lambda: candidates(DGATED_CONFIGS, d_out, num_rows, width, aligned),
        lambda config: launch_dgated(config, *operands, in_place),
        lambda config: launch_dgated(config, *operands),
    )


def dense(matrix: Tensor) -> Tensor:
    """``matrix`` with rows one after another. A single row may call itself contiguous whatever its strides say."""
    matrix = matrix.contiguous()
    return matrix if matrix.stride(0) == matrix.shape[1] else matrix.as_strided(matrix.shape, (matrix.shape[1], 1))


def is_aligned(width: int, depth: int, *operands: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes, in half precision."""
    return width % 8 == 0 and depth % 8 == 0 and not any(t.data_ptr() % 16 for t in operands)


def configs_for(shipped: dict[str, tuple[TileConfig, ...]], path: str, capability: int) -> list[TileConfig]:
    """Those of ``shipped`` that go by ``path`` and are for ``capability`` (90 for 9.0)."""
    return [config for config in shipped[path] if config.major in (0, capability // 10)]


def candidates(
    shipped: dict[str, tuple[TileConfig, ...]], first: Tensor, rows: int, width: int, aligned: bool
) -> list[choose.Candidate]:
    """The configurations that can run this shape, the rule's choice first."""
    unfused = choose.Candidate(UNFUSED, UNFUSED)
    if first.element_size() != 2:
        return [unfused]
    capability = target.capability(first.device)
    has_tma = aligned and capability // 10 in target.TMA_CAPABILITIES
    # The first configuration with a tile for every multiprocessor; short of that, the one with the most tiles.
    wanted, rows = target.num_processors(first.device), choose.bucket(rows)
    configs = sorted(
        configs_for(shipped, "tma" if has_tma else "pointer", capability),
        key=lambda c: max(wanted - target.cdiv(rows, c.m) * target.cdiv(width, c.n), 0),
    )
    fused = [choose.Candidate(name_of(config), config) for config in configs]
    # Rows that are no multiple of 16 bytes are read 2 bytes at a time: there cuBLAS comes first.
    return [*fused, unfused] if aligned else [unfused, *fused]


def name_of(config: TileConfig) -> str:
    """How tables of choices call ``config``."""
    return f"{config.path}-{config.m}x{config.n}x{config.k}-w{config.num_warps}s{config.num_stages}"


def options_of(config: TileConfig) -> dict:
    """What every kernel of tiles is compiled with."""
    return dict(
        BM=config.m, BN=config.n, BK=config.k, GROUP=GROUP_M, num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS
    )  # fmt: skip


def launch_tiles(
    kernel: triton.JITFunction,
    config: TileConfig,
    operands: tuple,
    sizes: tuple[int, int, int],
    device: torch.device,
    **constants: int,
) -> None:
    """``kernel`` over tiles of M, N, K = ``sizes``: a program for each, or persistent ones, fewer in small batches."""
    programs = target.cdiv(sizes[0], config.m) * target.cdiv(sizes[1], config.n)
    if config.path == "tma":
        constants["NUM_PROGRAMS"] = target.num_processors(device) * config.per_sm
        programs = min(programs, constants["NUM_PROGRAMS"])
    kernel[(programs,)](*operands, *sizes, **constants, **options_of(config))


def _elementwise(kernel: triton.JITFunction, num_rows: int, width: int, *tensors: Tensor | None) -> None:
    rows, columns, num_warps = ELEMENTWISE
    grid = (target.cdiv(num_rows, rows) * target.cdiv(width, columns),)
    kernel[grid](*tensors, num_rows, width, ROWS=rows, COLUMNS=columns, num_warps=num_warps, **OPTIONS)


def launch_gated(
    config: TileConfig | str,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    store_inner: bool,
    store_gate_up: bool,
    kernel: triton.JITFunction | None = None,
    before: tuple = (),
    **constants: int,
) -> tuple[Tensor | None, Tensor | None]:
    """``gated`` by one configuration, on contiguous and non-empty operands.

    Another ``kernel`` than the configuration's own takes ``before`` ahead of its operands, and ``constants``.
    """
    (num_rows, depth), width = tokens.shape, weight.shape[0] // 2
    inner = tokens.new_empty(num_rows, width) if store_inner else None
    if config == UNFUSED:
        gate_up = torch.mm(tokens, weight.T) if bias is None else torch.addmm(bias, tokens, weight.T)
        if inner is not None:
            _elementwise(swiglu_rows, num_rows, width, gate_up, inner)
        return inner, gate_up if store_gate_up else None
    gate_up = tokens.new_empty(num_rows, 2 * width) if store_gate_up else None
    own, operands = gated_pointer, (tokens, weight, bias, inner, gate_up)
    if config.path == "tma":
        own, m, n, k = gated_tma, config.m, config.n, config.k
        operands = (
            descriptor(tokens, m, k), descriptor(weight.view(2, width, depth), 2, n, k), bias,
            parts_of(inner, 1, m, 1, n), parts_of(gate_up, 2, m, 1, n),
        )  # fmt: skip
    launch_tiles(kernel or own, config, (*before, *operands), (num_rows, width, depth), tokens.device, **constants)
    return inner, gate_up


def launch_dgated(
    config: TileConfig | str,
    d_out: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    sum_bias: bool,
    store_inner: bool,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``dgated`` by one configuration, on contiguous and non-empty operands."""
    num_rows, (depth, width) = d_out.shape[0], weight.shape
    d_gate_up = gate_up if in_place else torch.empty_like(gate_up)
    inner = d_out.new_empty(num_rows, width) if store_inner else None
    tile_rows = ELEMENTWISE[0] if config == UNFUSED else config.m
    sums = None
    if sum_bias:
        sums = torch.empty(target.cdiv(num_rows, tile_rows), 2 * width, dtype=torch.float32, device=d_out.device)
    sizes, made = (num_rows, width, depth), (gate_up, d_gate_up, inner, sums)
    if config == UNFUSED:
        _elementwise(swiglu_grad_rows, num_rows, width, torch.mm(d_out, weight), *made)
    elif config.path == "pointer":
        launch_tiles(dgated_pointer, config, (d_out, weight, *made), sizes, d_out.device)
    else:
        m, n, k, strip = config.m, config.n, config.k, config.n // config.pieces
        operands = (
            descriptor(d_out, m, k), descriptor(weight, k, n), parts_of(gate_up, 2, m, 2, strip),
            parts_of(d_gate_up, 2, m, 2, strip), descriptor(inner, m, strip), sums,
        )  # fmt: skip
        launch_tiles(dgated_tma, config, operands, sizes, d_out.device, PIECES=config.pieces)
    return d_gate_up, inner, None if sums is None else sums.sum(0)


def descriptor(tensor: Tensor | None, *block: int) -> TensorDescriptor | None:
    return None if tensor is None else TensorDescriptor.from_tensor(tensor, list(block))


def parts_of(tensor: Tensor | None, parts: int, rows: int, at_once: int, columns: int) -> TensorDescriptor | None:
    """Boxes [rows, at_once, columns] of a [tokens, parts, H] view."""
    return None if tensor is None else descriptor(tensor.view(tensor.shape[0], parts, -1), rows, at_once, columns)
