"""Pooling, LayerNorm, SwiGLU and the down projection with their backward, written once over two back ends.

The back end is launches.py or reference.py, function for function; the products around it are torch's (cuBLAS). Per
token, training keeps one row of C values (the LayerNorm's before scale and shift, or the pooled one where there is no
LayerNorm) and the packed gate and up (2H); ``recompute`` keeps only the row. S = silu(gate) * up falls out of ``dgated``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, target
from .geometry import PoolPlan
from .reference import NormOf

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


INPUTS = ("features", *Weights._fields)  # what a projector has gradients for


def forward(
    features: Tensor, plan: PoolPlan | None, weights: Weights, has_norm: bool, eps: float, keep: bool, recompute: bool
) -> tuple[Tensor, Kept]:
    """The projection [T, D] of features pooled by ``plan`` (or pooled already), and what backward needs if ``keep``.

    ``Kept.rows`` is empty where they are the features themselves: no plan and no LayerNorm.
    """
    check(features, weights)
    norm = NormOf(weights.norm_weight, weights.norm_bias, eps, keep) if has_norm else None
    tokens, rows, rstd, inner, gate_up = backend_of(features).pooled_gated(
        features, plan, norm, weights.gate_up_weight, weights.gate_up_bias, keep and not recompute
    )
    out = F.linear(inner, weights.down_weight, weights.down_bias)
    if keep and plan is not None and not has_norm:
        rows = tokens
    return out, Kept(*(features.new_empty(0) if x is None else x for x in (rows, rstd, gate_up)))


def backward(
    d_out: Tensor, kept: Kept, plan: PoolPlan | None, weights: Weights, has_norm: bool, needs: set[str], in_place: bool
) -> dict[str, Tensor]:
    """Gradients by name, among them those that ``needs`` asks for. Of ``kept`` the rows must be there.

    ``in_place``: those of gate and up are written over ``kept.gate_up``: 2H values a token less at the peak.
    """
    rows, rstd, gate_up = kept
    grads: dict[str, Tensor] = {}
    if "down_bias" in needs:
        grads["down_bias"] = d_out.sum(0)
    if needs <= {"down_bias"}:
        return grads

    # With features that need no gradient (a frozen vision tower) the LayerNorm's own gradients follow from the weight's
    # product, without the product [T, 2H] x [2H, C] that would give d_tokens: a fifth of the projector's arithmetic.
    needs_features, needs_norm = "features" in needs, has_norm and not needs.isdisjoint(("norm_weight", "norm_bias"))
    is_shortcut = needs_norm and not needs_features and rows.shape[0] >= SHORTCUT_ROWS
    tokens, backend = None, backend_of(rows)

    def affine() -> Tensor:
        return backend.affine(rows, weights.norm_weight, weights.norm_bias) if has_norm else rows

    if gate_up.numel() == 0:
        tokens, in_place = affine(), True  # nobody else has what is made here
        gate_up = backend.gated(tokens, weights.gate_up_weight, weights.gate_up_bias, False, True)[1]
    d_gate_up, inner, bias_sum = backend.dgated(
        d_out, weights.down_weight, gate_up, "gate_up_bias" in needs or is_shortcut, "down_weight" in needs, in_place
    )
    del gate_up
    if "down_weight" in needs:
        grads["down_weight"] = d_out.T @ inner
    del inner
    if "gate_up_bias" in needs:
        grads["gate_up_bias"] = bias_sum.to(rows.dtype)
    if is_shortcut:
        return grads | _grads_of_frozen_features(d_gate_up.T @ rows, bias_sum, weights)
    if "gate_up_weight" in needs:
        tokens = affine() if tokens is None else tokens
        grads["gate_up_weight"] = d_gate_up.T @ tokens
    del tokens
    if needs_features or needs_norm:
        d_rows = d_gate_up @ weights.gate_up_weight
        if has_norm:
            d_rows, sums = backend.norm_grad(d_rows, rows, rstd, weights.norm_weight, needs_features, needs_norm)
            if needs_norm:
                grads |= _apart(sums, rows.dtype)
        if needs_features:
            grads["features"] = backend.pooled(d_rows, plan, transposed=True)[0]
    return grads


def _apart(sums: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The LayerNorm's gradients from [2, C]; copies, as an operator's outputs must not share memory."""
    return {name: row.to(dtype, copy=True) for name, row in zip(("norm_weight", "norm_bias"), sums)}


def _grads_of_frozen_features(product: Tensor, bias_sum: Tensor, weights: Weights) -> dict[str, Tensor]:
    """Gradients of the weight and the LayerNorm from the weight's product with the rows before scale and shift.

    tokens = hat * scale + shift and G = hat (scale * W)' + W shift', so with E = dG' hat and e = sum of dG over rows:
    dW = E * scale + e (x) shift; dscale = sum over W's rows of W * E; dshift = e W. ``product`` (E) becomes dW.
    """
    weight, dtype = weights.gate_up_weight, product.dtype
    product, sums = backend_of(product).weight_grads(weight, product, bias_sum, weights.norm_weight, weights.norm_bias)
    return {"gate_up_weight": product} | _apart(sums, dtype)


def backend_of(tensor: Tensor) -> Any:
    """What computes on tensors like ``tensor``: launches.py or reference.py."""
    if not target.runs_kernels(tensor):
        return reference
    from . import launches

    return launches


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
