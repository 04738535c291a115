"""The SwiGLU kernels: gate and up as one matrix product, and the gradient of both as the epilogue of another.

Letters: M tokens, N the inner width H, K the width that a product sums over. ``gated`` is N-tiled over H and computes
both halves of a tile, so that silu(gate) * up needs no second pass; ``dgated`` computes dY Wd and turns each tile into
dGate, dUp (side by side in one [T, 2H] buffer: two wide products follow instead of four) and S = silu(gate) * up once
more. Operands are descriptors (``tma``: compute capability 9 and 10) or pointers (``pointer``: 8.x and unaligned
shapes) of one kernel; ``unfused`` is cuBLAS, then an elementwise kernel: always there, and the way of float32, where
cuBLAS follows torch's TF32 setting.
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
    pieces: int = 1
    major: int = 0  # the only major compute capability that it is for; 0: every


ELEMENTWISE = (16, 128, 4)  # rows, columns, warps: 16 bytes of a half-precision row per thread and turn

# Shared memory allows 99 KiB on 8.6, 8.9 and 12.x (the pointer configurations stay under that), 163 KiB on 8.0 and
# 227 KiB on 9.0 and 10.x. The last is for few rows: twice the tiles.
_POINTER = (TileConfig("pointer", 128, 64, 32, 8, 4), TileConfig("pointer", 64, 64, 64, 4, 3))
GATED_CONFIGS: dict[str, tuple[TileConfig, ...]] = {
    "tma": (TileConfig("tma", 128, 128, 64, 8, 4), TileConfig("tma", 64, 128, 64, 4, 4)),
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
def _sigmoid(x):
    """1 / (1 + exp(-x)) with the fast reciprocal: two units in the last place of float32, a fifth of the instructions."""
    return fast_reciprocal(1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _swiglu(gate, up):
    return gate * _sigmoid(gate) * up


@triton.jit
def _swiglu_grads(d_inner, gate, up):
    """(d_gate, d_up, silu(gate) * up) for inner = silu(gate) * up, in float32."""
    s = _sigmoid(gate)
    h = gate * s
    return d_inner * up * (s + h * (1.0 - s)), d_inner * h, h * up


@triton.jit
def _places(row, column, M, N, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr):
    """Offsets of [BM, BN] at (row, column) of part 0 of a [M, PARTS, N] tensor, and which of them are inside. int64."""
    m = row + tl.arange(0, BM)
    n = column + tl.arange(0, BN)
    inside = (m < M)[:, None] & (n < N)[None, :]
    return m.to(tl.int64)[:, None] * N * PARTS + n[None, :], inside


@triton.jit
def _load(matrix, row, column, M, N, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """[BM, BN] at (row, column) of a matrix [M, N], 0 past its end."""
    if TMA:
        tile = matrix.load([row, column])
    else:
        at, inside = _places(row, column, M, N, BM, BN, 1)
        tile = tl.load(matrix + at, mask=inside, other=0.0)
    return tile


@triton.jit
def _load_both(weight, column, k, N, K, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """[2 BN, BK] of a weight [2, N, K]: BN of the gate's rows above as many of the up's.

    As one box it is one operand of 2 BN columns: a single wgmma m64n256k16 does both halves.
    """
    if TMA:
        rows = tl.reshape(weight.load([0, column, k]), (2 * BN, BK))
    else:
        j = tl.arange(0, 2 * BN)
        n = column + j % BN
        c = k + tl.arange(0, BK)
        at = (n + j // BN * N).to(tl.int64)[:, None] * K + c[None, :]
        rows = tl.load(weight + at, mask=(n < N)[:, None] & (c < K)[None, :], other=0.0)
    return rows


@triton.jit
def _load_halves(pair, row, column, M, N, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """Gate and up, float32 [BM, BN], of a [M, 2, N] tensor."""
    if TMA:
        gate, up = tl.split(tl.permute(pair.load([row, 0, column]).to(tl.float32), (0, 2, 1)))
    else:
        at, inside = _places(row, column, M, N, BM, BN, 2)
        gate = tl.load(pair + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(pair + at + N, mask=inside, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _store(
    out, tile, part, row, column, M, N, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr
):
    """Store [BM, BN] in part ``part`` of a [M, PARTS, N] tensor."""
    if TMA:
        out.store([row, part, column], tl.reshape(round_to(tile, out.dtype), (BM, 1, BN)))
    else:
        at, inside = _places(row, column, M, N, BM, BN, PARTS)
        tl.store(out + at + part * N, round_to(tile, out.dtype.element_ty), mask=inside)


@triton.jit
def gated_tile(
    tokens, weight, bias, inner, gate_up, row, column, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """One tile of ``gated_rows``."""
    acc = tl.zeros((BM, 2 * BN), tl.float32)
    for k in range(tl.cdiv(K, BK)):
        a = _load(tokens, row, k * BK, M, K, BM, BK, TMA)
        acc = matmul(a, _load_both(weight, column, k * BK, N, K, BN, BK, TMA).T, acc)
    # Gate column j and up column j sit in the same thread of a wgmma: the split moves registers only.
    gate, up = _split_columns(acc)
    if bias is not None:
        n = column + tl.arange(0, BN)
        gate += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if gate_up is not None:  # one after the other, of one shape: they share the little memory that the pipeline leaves
        _store(gate_up, gate, 0, row, column, M, N, 2, BM, BN, TMA)
        _store(gate_up, up, 1, row, column, M, N, 2, BM, BN, TMA)
    if inner is not None:
        _store(inner, _swiglu(gate, up), 0, row, column, M, N, 1, BM, BN, TMA)


@triton.jit(do_not_specialize=["M"])
def gated_rows(
    tokens, weight, bias, inner, gate_up, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """tokens [M, K], weight [2, N, K], bias [2N] -> inner [M, 1, N] and gate_up [M, 2, N]; None for what is not wanted.

    With TMA all but ``bias`` are descriptors, else pointers. Any grid: programs take tiles in turns.
    """
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(index, tiles_m, tiles_n, GROUP)
        gated_tile(
            tokens, weight, bias, inner, gate_up, tile_m * BM, tile_n * BN, M, N, K, BM, BN, BK, TMA
        )  # fmt: skip


@triton.jit
def _grad_strips(
    d_inner, gate_up, d_gate_up, inner, bias_sums, tile_m, row, column, M, N,
    BM: tl.constexpr, BN: tl.constexpr, PIECES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Turn ``d_inner`` [BM, BN] at (row, column) into dGate, dUp, S and this row tile's share of the bias gradient.

    In PIECES (1, 2 or 4) strips of columns, one after the other: fewer registers at a time. ``d_gate_up`` may be
    ``gate_up``: what a strip overwrites it has read. ``d_inner`` is 0 past the end, which adds 0 to the bias sums.
    """
    if PIECES > 1:
        HALF: tl.constexpr = BN // 2
        left, right = _split_columns(d_inner)
        _grad_strips(left, gate_up, d_gate_up, inner, bias_sums, tile_m, row, column, M, N, BM, HALF, PIECES // 2, TMA)
        _grad_strips(
            right, gate_up, d_gate_up, inner, bias_sums, tile_m, row, column + HALF, M, N, BM, HALF, PIECES // 2, TMA
        )
    else:
        gate, up = _load_halves(gate_up, row, column, M, N, BM, BN, TMA)
        dg, du, s = _swiglu_grads(d_inner, gate, up)
        if TMA:  # one box, one store
            dtype: tl.constexpr = d_gate_up.dtype
            d_gate_up.store([row, 0, column], tl.permute(tl.join(round_to(dg, dtype), round_to(du, dtype)), (0, 2, 1)))
        else:
            tl.debug_barrier()  # no thread may overwrite what another has yet to read
            _store(d_gate_up, dg, 0, row, column, M, N, 2, BM, BN, TMA)
            _store(d_gate_up, du, 1, row, column, M, N, 2, BM, BN, TMA)
        if inner is not None:
            _store(inner, s, 0, row, column, M, N, 1, BM, BN, TMA)
        if bias_sums is not None:
            n = column + tl.arange(0, BN)
            at = bias_sums + tile_m.to(tl.int64) * 2 * N + n
            tl.store(at, tl.sum(dg, 0), mask=n < N)
            tl.store(at + N, tl.sum(du, 0), mask=n < N)


@triton.jit(do_not_specialize=["M"])
def dgated_rows(
    d_out, weight, gate_up, d_gate_up, inner, bias_sums, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PIECES: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """d_out [M, K], weight [K, N], gate_up [M, 2, N] -> d_gate_up, inner [M, 1, N]; bias_sums [cdiv(M, BM), 2N].

    With TMA all but ``bias_sums`` are descriptors, else pointers. Any grid.
    """
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(index, tiles_m, tiles_n, GROUP)
        row = tile_m * BM
        column = tile_n * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(tl.cdiv(K, BK)):
            a = _load(d_out, row, k * BK, M, K, BM, BK, TMA)
            acc = matmul(a, _load(weight, k * BK, column, K, N, BK, BN, TMA), acc)
        _grad_strips(acc, gate_up, d_gate_up, inner, bias_sums, tile_m, row, column, M, N, BM, BN, PIECES, TMA)


@triton.jit(do_not_specialize=["M"])
def swiglu_rows(gate_up, inner, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """gate_up [M, 2, N] -> inner = silu(gate) * up [M, N]."""
    blocks = tl.cdiv(N, COLUMNS)
    row, column = tl.program_id(0) // blocks * ROWS, tl.program_id(0) % blocks * COLUMNS
    gate, up = _load_halves(gate_up, row, column, M, N, ROWS, COLUMNS, False)
    _store(inner, _swiglu(gate, up), 0, row, column, M, N, 1, ROWS, COLUMNS, False)


@triton.jit(do_not_specialize=["M"])
def swiglu_grad_rows(
    d_inner, gate_up, d_gate_up, inner, bias_sums, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """d_inner [M, N], gate_up [M, 2, N] -> d_gate_up, inner [M, N], bias_sums [cdiv(M, ROWS), 2N]."""
    blocks = tl.cdiv(N, COLUMNS)
    tile_m = tl.program_id(0) // blocks
    row, column = tile_m * ROWS, tl.program_id(0) % blocks * COLUMNS
    d = _load(d_inner, row, column, M, N, ROWS, COLUMNS, False).to(tl.float32)
    _grad_strips(d, gate_up, d_gate_up, inner, bias_sums, tile_m, row, column, M, N, ROWS, COLUMNS, 1, False)


def gated(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, store_inner: bool, store_gate_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """silu(gate) * up [M, H] and the packed [gate | up] [M, 2H] of tokens [M, C] and weight [2H, C], as asked for."""
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
    """[dGate | dUp] [M, 2H], S [M, H] and the sum of [dGate | dUp] over M (float32 [2H]), the last two as asked for.

    d_out [M, D], weight [D, H], gate_up [M, 2H]; ``in_place`` writes [dGate | dUp] over it.
    """
    d_out, weight = dense(d_out), dense(weight)
    num_rows, (depth, width) = d_out.shape[0], weight.shape
    aligned = is_aligned(width, depth, d_out, weight, gate_up)
    key = choose.key("dgated", d_out, num_rows, depth, width, sum_bias, store_inner, aligned)
    launch = lambda config, in_place=False: launch_dgated(  # noqa: E731
        config, d_out, weight, gate_up, sum_bias, store_inner, in_place
    )
    return choose.run(
        key,
        lambda: candidates(DGATED_CONFIGS, d_out, num_rows, width, aligned),
        lambda config: launch(config, in_place),
        launch,
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


def operand(config: TileConfig, tensor: Tensor | None, *block: int) -> Tensor | TensorDescriptor | None:
    """``tensor`` as ``config``'s kernel takes it: by pointer, or by a descriptor of boxes of shape ``block``."""
    return tensor if tensor is None or config.path == "pointer" else TensorDescriptor.from_tensor(tensor, list(block))


def output(config: TileConfig, tensor: Tensor | None, parts: int, at_once: int, columns: int) -> object:
    """``operand`` of [tokens, parts * H], whose boxes are [m, at_once, columns] of [tokens, parts, H]."""
    return operand(
        config, None if tensor is None else tensor.view(tensor.shape[0], parts, -1), config.m, at_once, columns
    )


def num_programs(config: TileConfig, num_rows: int, width: int, device: torch.device) -> int:
    """Programs of a launch: persistent ones, that fill a multiprocessor each, or one for every tile of pointers."""
    tiles = target.cdiv(num_rows, config.m) * target.cdiv(width, config.n)
    return tiles if config.path == "pointer" else min(tiles, target.num_processors(device))


def options_of(config: TileConfig) -> dict:
    """What every kernel of tiles is compiled with."""
    return dict(
        BM=config.m, BN=config.n, BK=config.k, GROUP=GROUP_M, TMA=config.path == "tma",
        num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
    )  # fmt: skip


def weight_of(config: TileConfig, weight: Tensor) -> object:
    """``operand`` of gate and up's weight [2H, C]."""
    return operand(config, weight.view(2, -1, weight.shape[1]), 2, config.n, config.k)


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
) -> tuple[Tensor | None, Tensor | None]:
    """``gated`` by one configuration, on contiguous and non-empty operands."""
    (num_rows, depth), width = tokens.shape, weight.shape[0] // 2
    inner = tokens.new_empty(num_rows, width) if store_inner else None
    if config == UNFUSED:
        gate_up = torch.mm(tokens, weight.T) if bias is None else torch.addmm(bias, tokens, weight.T)
        if inner is not None:
            _elementwise(swiglu_rows, num_rows, width, gate_up, inner)
        return inner, gate_up if store_gate_up else None
    gate_up = tokens.new_empty(num_rows, 2 * width) if store_gate_up else None
    gated_rows[(num_programs(config, num_rows, width, tokens.device),)](
        operand(config, tokens, config.m, config.k), weight_of(config, weight), bias,
        output(config, inner, 1, 1, config.n), output(config, gate_up, 2, 1, config.n), num_rows, width, depth,
        **options_of(config),
    )  # fmt: skip
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
    if config == UNFUSED:
        d_inner = torch.mm(d_out, weight)
        _elementwise(swiglu_grad_rows, num_rows, width, d_inner, gate_up, d_gate_up, inner, sums)
    else:
        strip = config.n // config.pieces
        dgated_rows[(num_programs(config, num_rows, width, d_out.device),)](
            operand(config, d_out, config.m, config.k), operand(config, weight, config.k, config.n),
            output(config, gate_up, 2, 2, strip), output(config, d_gate_up, 2, 2, strip),
            output(config, inner, 1, 1, strip), sums, num_rows, width, depth,
            PIECES=config.pieces, **options_of(config),
        )  # fmt: skip
    return d_gate_up, inner, None if sums is None else sums.sum(0)
