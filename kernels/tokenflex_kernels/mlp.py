"""LayerNorm, SwiGLU and the down projection with their backward, written once over two back ends.

The back end, kernels or plain torch, supplies ``gated`` and ``dgated``; the products around them are torch's (cuBLAS).
Per token, training keeps the pooled row (C values) and the packed gate and up (2H); ``recompute`` keeps only the row.
The normalised row, S = silu(gate) * up and the LayerNorm's statistics are made again in the backward pass: all three
are cheap, and S falls out of ``dgated``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import target


class Weights(NamedTuple):
    """Everything trainable, in the order of the operator's arguments and gradients."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    gate_up_weight: Tensor
    gate_up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted: the pooled rows' and each weight's."""

    pooled: bool
    norm_weight: bool
    norm_bias: bool
    gate_up_weight: bool
    gate_up_bias: bool
    down_weight: bool
    down_bias: bool


def forward(pooled: Tensor, weights: Weights, has_norm: bool, eps: float, save: bool) -> tuple[Tensor, Tensor]:
    """The projection [T, D] of pooled rows [T, C], and the packed gate and up [T, 2H], empty unless ``save``."""
    check(pooled, weights)
    if pooled.shape[0] == 0:
        gate_up = pooled.new_empty(0, weights.gate_up_weight.shape[0]) if save else pooled.new_empty(0)
        return pooled.new_empty(0, weights.down_weight.shape[0]), gate_up
    tokens = pooled
    if has_norm:
        tokens = _normalise(pooled, weights.norm_weight, weights.norm_bias, eps)[0]
    inner, gate_up = _gated(tokens, weights.gate_up_weight, weights.gate_up_bias, True, save)
    out = F.linear(inner, weights.down_weight, weights.down_bias)
    return out, gate_up if save else pooled.new_empty(0)


def backward(
    d_out: Tensor, pooled: Tensor, gate_up: Tensor, weights: Weights, has_norm: bool, eps: float, needs: Needs
) -> tuple[Tensor | None, ...]:
    """The gradients that ``needs`` asks for, None for the others. ``gate_up`` is empty if it is to be made again."""
    if pooled.shape[0] == 0:
        inputs = (pooled, *weights)
        return tuple(torch.zeros_like(x) if need else None for x, need in zip(inputs, needs, strict=True))
    grads: dict[str, Tensor] = {}
    if needs.down_bias:
        grads["down_bias"] = d_out.sum(0)
    if not any(needs._replace(down_bias=False)):
        return tuple(grads.get(name) for name in Needs._fields)

    # With features that need no gradient (a frozen vision tower) the LayerNorm's own gradients follow from the weight's
    # product, without the product [T, 2H] x [2H, C] that would give d_tokens: a fifth of the projector's arithmetic.
    norm_of_frozen = has_norm and not needs.pooled and (needs.norm_weight or needs.norm_bias)
    tokens, stats = pooled, None
    if has_norm and not (norm_of_frozen and gate_up.numel()):
        tokens, *stats = _normalise(pooled, weights.norm_weight, weights.norm_bias, eps)
    if gate_up.numel() == 0:
        gate_up = _gated(tokens, weights.gate_up_weight, weights.gate_up_bias, False, True)[1]
    d_gate_up, inner, bias_sum = _dgated(
        d_out, weights.down_weight, gate_up, needs.gate_up_bias or norm_of_frozen, needs.down_weight
    )
    del gate_up
    if needs.down_weight:
        grads["down_weight"] = d_out.T @ inner
    del inner
    if needs.gate_up_bias:
        grads["gate_up_bias"] = bias_sum.to(pooled.dtype)
    if norm_of_frozen:
        hat = _normalise(pooled, None, None, eps)[0]
        grads |= _grads_of_frozen_features(d_gate_up.T @ hat, bias_sum, weights)
    elif needs.gate_up_weight:
        grads["gate_up_weight"] = d_gate_up.T @ tokens
    if needs.pooled:
        d_tokens = d_gate_up @ weights.gate_up_weight
        grads |= _norm_backward(d_tokens, pooled, stats, weights, needs) if has_norm else {"pooled": d_tokens}
    return tuple(grads.get(name) if need else None for name, need in zip(Needs._fields, needs, strict=True))


def _grads_of_frozen_features(d_hat_weight: Tensor, bias_sum: Tensor, weights: Weights) -> dict[str, Tensor]:
    """Gradients of the weight and the LayerNorm from the weight's product with the rows before scale and shift.

    tokens = hat * scale + shift and G = hat (scale * W)' + W shift', so with E = dG' hat and e = sum of dG over rows:
    dW = E * scale + e (x) shift; dscale = sum over W's rows of W * E; dshift = e W.
    """
    dtype = d_hat_weight.dtype
    exact = torch.promote_types(dtype, torch.float32)
    weight, product, sums = weights.gate_up_weight.to(exact), d_hat_weight.to(exact), bias_sum.to(exact)
    grads = {"norm_weight": (weight * product).sum(0).to(dtype), "norm_bias": (sums @ weight).to(dtype)}
    if weights.norm_weight is not None:
        product = product * weights.norm_weight.to(exact)
    if weights.norm_bias is not None:
        product = torch.addcmul(product, sums[:, None], weights.norm_bias.to(exact)[None, :])
    return grads | {"gate_up_weight": product.to(dtype)}


def _norm_backward(
    d_tokens: Tensor, pooled: Tensor, stats: list[Tensor], weights: Weights, needs: Needs
) -> dict[str, Tensor]:
    """Gradients through the LayerNorm, by name."""
    names = ("pooled", "norm_weight", "norm_bias")
    wide = _wide(pooled)
    tensors = [None if x is None else x.to(wide) for x in (weights.norm_weight, weights.norm_bias)]
    grads = torch.ops.aten.native_layer_norm_backward(
        d_tokens.to(wide),
        pooled.to(wide),
        pooled.shape[-1:],
        *stats,
        *tensors,
        [getattr(needs, name) for name in names],
    )
    return {name: grad.to(pooled.dtype) for name, grad in zip(names, grads, strict=True) if grad is not None}


def _normalise(pooled: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of rows, with mean and 1 / standard deviation."""
    wide = _wide(pooled)
    weight, bias = (None if x is None else x.to(wide) for x in (weight, bias))
    tokens, mean, rstd = torch.native_layer_norm(pooled.to(wide), pooled.shape[-1:], weight, bias, eps)
    return tokens.to(pooled.dtype), mean, rstd


def _wide(pooled: Tensor) -> torch.dtype:
    """The dtype to call torch's LayerNorm in: its CUDA statistics are float32, its CPU ones the input's dtype."""
    return pooled.dtype if pooled.is_cuda else torch.promote_types(pooled.dtype, torch.float32)


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
    d_out: Tensor, weight: Tensor, gate_up: Tensor, sum_bias: bool, store_inner: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[dGate | dUp], silu(gate) * up, and the column sums of the first in float32 or wider."""
    if target.runs_kernels(d_out):
        from . import gated

        return gated.dgated(d_out, weight, gate_up, sum_bias, store_inner)
    exact = torch.promote_types(d_out.dtype, torch.float32)
    d_inner = (d_out @ weight).to(exact)
    gate, up = gate_up.to(exact).chunk(2, -1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    d_gate_up = torch.cat((d_inner * up * (sigmoid + silu * (1 - sigmoid)), d_inner * silu), -1)
    inner = (silu * up).to(d_out.dtype) if store_inner else None
    return d_gate_up.to(d_out.dtype), inner, d_gate_up.sum(0) if sum_bias else None


def check(pooled: Tensor, weights: Weights) -> None:
    """Raise ``ValueError`` unless the weights' shapes fit the pooled rows and each other."""
    if pooled.dim() != 2:
        raise ValueError(f"features must be [rows, C], not {tuple(pooled.shape)}")
    width, (double, gate_up_in) = pooled.shape[1], weights.gate_up_weight.shape
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
