"""Pooling, LayerNorm, SwiGLU and the down projection with their backward, written once over two back ends.

The back end, kernels or plain torch, supplies ``pool`` (with the LayerNorm), ``gated`` and ``dgated``; the products
around them are torch's (cuBLAS). Per token, training keeps one row of C values (the LayerNorm's rows before scale and
shift, or the pooled ones where there is no LayerNorm) and the packed gate and up (2H); ``recompute`` keeps only the row.
S = silu(gate) * up falls out of ``dgated`` once more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import choose, reference, target
from .geometry import PoolPlan

# Rows from which frozen features take the way round the product [T, 2H] x [2H, C]: that costs 2 T flops per weight, the
# way round 6 bytes per weight, and a GPU does 230 flops in the time of a byte (690 TFLOP/s over 3 TB/s): from 690 rows.
SHORTCUT_ROWS = 768


class Kept(NamedTuple):
    """What the backward pass will want; empty tensors for what it will not."""

    rows: Tensor  # [T, C]
    rstd: Tensor  # float32 [T]
    gate_up: Tensor  # [T, 2H]


class Weights(NamedTuple):
    """Everything trainable, in the order of the operator's arguments and gradients."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    gate_up_weight: Tensor
    gate_up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted: the features' and each weight's."""

    features: bool
    norm_weight: bool
    norm_bias: bool
    gate_up_weight: bool
    gate_up_bias: bool
    down_weight: bool
    down_bias: bool


def forward(
    features: Tensor, plan: PoolPlan | None, weights: Weights, has_norm: bool, eps: float, keep: bool, recompute: bool
) -> tuple[Tensor, Kept]:
    """The projection [T, D] of features pooled by ``plan`` (or pooled already), and what backward needs if ``keep``.

    ``Kept.rows`` is empty where they are the features themselves: no plan and no LayerNorm.
    """
    check(features, weights)
    norm = (weights.norm_weight, weights.norm_bias, eps, keep) if has_norm else None
    made = _in_one_launch(features, plan, norm, weights, keep and not recompute)
    tokens, rows, rstd = made[:3] if made else _pooled(features, plan, norm)
    if plan is not None and not has_norm:
        rows = tokens
    if tokens.shape[0] == 0:
        out = tokens.new_empty(0, weights.down_weight.shape[0])
        gate_up = None if recompute else tokens.new_empty(0, weights.gate_up_weight.shape[0])
    else:
        gated = made[3:] if made else _gated(tokens, *weights[2:4], True, keep and not recompute)
        inner, gate_up = gated
        out = F.linear(inner, weights.down_weight, weights.down_bias)
    return out, Kept(*(features.new_empty(0) if x is None else x for x in (rows, rstd, gate_up)))


def backward(
    d_out: Tensor, kept: Kept, plan: PoolPlan | None, weights: Weights, has_norm: bool, needs: Needs, in_place: bool
) -> tuple[Tensor | None, ...]:
    """The gradients that ``needs`` asks for, None for the others. Of ``kept`` the rows must be there.

    ``in_place``: those of gate and up are written over ``kept.gate_up``: 2H values a token less at the peak.
    """
    rows, rstd, gate_up = kept
    if rows.shape[0] == 0:
        d_features = None
        if needs.features:
            d_features = rows.new_zeros(0 if plan is None else plan.num_patches, rows.shape[1])
        return (d_features, *(torch.zeros_like(x) if need else None for x, need in zip(weights, needs[1:])))
    grads: dict[str, Tensor] = {}
    if needs.down_bias:
        grads["down_bias"] = d_out.sum(0)
    if not any(needs._replace(down_bias=False)):
        return tuple(grads.get(name) for name in Needs._fields)

    # With features that need no gradient (a frozen vision tower) the LayerNorm's own gradients follow from the weight's
    # product, without the product [T, 2H] x [2H, C] that would give d_tokens: a fifth of the projector's arithmetic.
    needs_norm = has_norm and (needs.norm_weight or needs.norm_bias)
    is_shortcut = needs_norm and not needs.features and rows.shape[0] >= SHORTCUT_ROWS
    tokens = None
    if gate_up.numel() == 0:
        in_place = True  # nobody else has what is made here
        tokens = _affine(rows, weights, has_norm)
        gate_up = _gated(tokens, weights.gate_up_weight, weights.gate_up_bias, False, True)[1]
    d_gate_up, inner, bias_sum = _dgated(
        d_out, weights.down_weight, gate_up, needs.gate_up_bias or is_shortcut, needs.down_weight, in_place
    )
    del gate_up
    if needs.down_weight:
        grads["down_weight"] = d_out.T @ inner
    del inner
    if needs.gate_up_bias:
        grads["gate_up_bias"] = bias_sum.to(rows.dtype)
    if is_shortcut:
        return _finish(grads | _grads_of_frozen_features(d_gate_up.T @ rows, bias_sum, weights), needs)
    if needs.gate_up_weight:
        tokens = _affine(rows, weights, has_norm) if tokens is None else tokens
        grads["gate_up_weight"] = d_gate_up.T @ tokens
    del tokens
    if needs.features or needs_norm:
        d_rows = d_gate_up @ weights.gate_up_weight
        if has_norm:
            d_rows, sums = _norm_backward(d_rows, rows, rstd, weights.norm_weight, needs.features, needs_norm)
            if needs_norm:
                grads |= _apart(sums, rows.dtype)
        if needs.features:
            grads["features"] = d_rows if plan is None else _pooled(d_rows, plan, None, transposed=True)[0]
    return _finish(grads, needs)


def _finish(grads: dict[str, Tensor], needs: Needs) -> tuple[Tensor | None, ...]:
    return tuple(grads.get(name) if need else None for name, need in zip(Needs._fields, needs))


def _apart(sums: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The LayerNorm's gradients from [2, C]; copies, as an operator's outputs must not share memory."""
    return {name: row.to(dtype, copy=True) for name, row in zip(("norm_weight", "norm_bias"), sums)}


def _grads_of_frozen_features(product: Tensor, bias_sum: Tensor, weights: Weights) -> dict[str, Tensor]:
    """Gradients of the weight and the LayerNorm from the weight's product with the rows before scale and shift.

    tokens = hat * scale + shift and G = hat (scale * W)' + W shift', so with E = dG' hat and e = sum of dG over rows:
    dW = E * scale + e (x) shift; dscale = sum over W's rows of W * E; dshift = e W. ``product`` (E) becomes dW.
    """
    scale, shift, weight = weights.norm_weight, weights.norm_bias, weights.gate_up_weight
    dtype = product.dtype
    if target.runs_kernels(product):
        from . import frozen

        product, sums = frozen.grads(weight, product, bias_sum, scale, shift)
        return {"gate_up_weight": product} | _apart(sums, dtype)
    exact = torch.promote_types(dtype, torch.float32)
    weight, product, sums = weight.to(exact), product.to(exact), bias_sum.to(exact)
    grads = {"norm_weight": (weight * product).sum(0).to(dtype), "norm_bias": (sums @ weight).to(dtype)}
    if scale is not None:
        product = product * scale.to(exact)
    if shift is not None:
        product = torch.addcmul(product, sums[:, None], shift.to(exact)[None, :])
    return grads | {"gate_up_weight": product.to(dtype)}


def _pooled(
    source: Tensor, plan: PoolPlan | None, norm: tuple | None, transposed: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(tokens, their rows before scale and shift, 1 / standard deviations); the last two as far as ``norm`` says."""
    if plan is None and norm is None:
        return source, None, None
    if target.runs_kernels(source):
        from . import pool

        if norm is None or pool.fits_norm(source.shape[1]):
            return pool.pool(source, plan, transposed, None if norm is None else pool.NormOf(*norm))
        rows = source if plan is None else pool.pool(source, plan)[0]
    else:
        rows = source if plan is None else reference.pool(source, plan, transposed)
    if norm is None:
        return rows, None, None
    scale, shift, eps, keep = norm
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    tokens = F.layer_norm(rows, rows.shape[-1:], scale, shift, eps)
    if not keep:
        return tokens, None, None
    hat, rstd = reference.normalise(wide, eps)
    return tokens, hat.to(rows.dtype), rstd


def _in_one_launch(
    features: Tensor, plan: PoolPlan | None, norm: tuple | None, weights: Weights, store_gate_up: bool
) -> tuple[Tensor | None, ...] | None:
    """What ``_pooled`` and ``_gated`` return, where they may be one launch; else None."""
    if plan is None or plan.num_tokens == 0 or not (choose.allows_one_launch() and target.runs_kernels(features)):
        return None
    from . import fused, pool

    if not pool.fits_norm(features.shape[1]):
        return None
    norm = None if norm is None else pool.NormOf(*norm)
    return fused.pooled_gated(features, plan, norm, weights.gate_up_weight, weights.gate_up_bias, store_gate_up)


def _affine(rows: Tensor, weights: Weights, has_norm: bool) -> Tensor:
    """The tokens of the rows that were kept."""
    if not has_norm:
        return rows
    if target.runs_kernels(rows):
        from . import pool

        if pool.fits_norm(rows.shape[1]):
            return pool.affine_of(rows, weights.norm_weight, weights.norm_bias)
    return reference.affine(rows, weights.norm_weight, weights.norm_bias)


def _norm_backward(
    d_tokens: Tensor, hat: Tensor, rstd: Tensor, scale: Tensor | None, need_rows: bool, need_sums: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of the rows before the LayerNorm, [2, C] gradients of its scale and shift) from its rows ``hat``."""
    if target.runs_kernels(hat):
        from . import pool

        if pool.fits_norm(hat.shape[1]):
            return pool.norm_grad(d_tokens, hat, rstd, scale, need_rows, need_sums)
    exact = torch.promote_types(hat.dtype, torch.float32)
    d, x = d_tokens.to(exact), hat.to(exact)
    sums = torch.stack(((d * x).sum(0), d.sum(0))) if need_sums else None
    if not need_rows:
        return None, sums
    if scale is not None:
        d = d * scale.to(exact)
    d = (d - d.mean(1, keepdim=True) - x * (d * x).mean(1, keepdim=True)) * rstd[:, None]
    return d.to(hat.dtype), sums


def _gated(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, store_inner: bool, store_gate_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """silu(gate) * up and the packed gate and up of ``tokens``."""
    if target.runs_kernels(tokens):
        from . import gated

        return gated.gated(tokens, weight, bias, store_inner, store_gate_up)
    gate_up = F.linear(tokens, weight, bias)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up if store_inner else None, gate_up if store_gate_up else None


def _dgated(
    d_out: Tensor, weight: Tensor, gate_up: Tensor, sum_bias: bool, store_inner: bool, in_place: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[dGate | dUp], silu(gate) * up, and the column sums of the first in float32 or wider."""
    if target.runs_kernels(d_out):
        from . import gated

        return gated.dgated(d_out, weight, gate_up, sum_bias, store_inner, in_place)
    exact = torch.promote_types(d_out.dtype, torch.float32)
    d_inner = (d_out @ weight).to(exact)
    gate, up = gate_up.to(exact).chunk(2, -1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    d_gate_up = torch.cat((d_inner * up * (sigmoid + silu * (1 - sigmoid)), d_inner * silu), -1)
    inner = (silu * up).to(d_out.dtype) if store_inner else None
    sums = d_gate_up.sum(0) if sum_bias else None
    return gate_up.copy_(d_gate_up) if in_place else d_gate_up.to(d_out.dtype), inner, sums


def check(features: Tensor, weights: Weights) -> None:
    """Raise ``ValueError`` unless the weights' shapes fit the features and each other."""
    width, (double, gate_up_in) = features.shape[1], weights.gate_up_weight.shape
    out, down_in = weights.down_weight.shape
    if gate_up_in != width:
        raise ValueError(
            f"gate_up.weight is {(double, gate_up_in)}, but the features are {width} wide: it must be [2H, C]"
        )
    if double != 2 * down_in:
        raise ValueError(
            f"gate_up.weight has {double} rows and down.weight {down_in} columns: gate and up, one above the other, "
            f"must have twice as many rows as down has columns"
        )
    wanted = {"norm_weight": width, "norm_bias": width, "gate_up_bias": double, "down_bias": out}
    for name, size in wanted.items():
        tensor = getattr(weights, name)
        if tensor is not None and tuple(tensor.shape) != (size,):
            raise ValueError(f"{name} is {tuple(tensor.shape)}; it must be ({size},)")
