"""Rounding a float32 tile to the output's dtype, to nearest even, compiled or interpreted."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Triton 3.10 turns fused multiply-add off unless asked; results and speed shall not depend on the release.
OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """``x`` (float32) as ``dtype``. The interpreter cuts bfloat16 off instead of rounding: round by hand there."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def matmul(a, b, acc):
    """acc + a b. The interpreter's dot multiplies bfloat16 bit patterns: widen there."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def fast_reciprocal(x, PURE: tl.constexpr):
    """1 / x for float32 1 <= x, infinity included, by the hardware's approximation (one unit in the last place).

    A pure one the compiler computes anew, its argument's exponential and all, in every layout that it is wanted in; one
    that is not stays where it is written, between stores.
    """
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=PURE, pack=1)
