"""What the kernels compute, said in plain torch: the specification, the CPU path, and the tests' yardstick.

Differentiable by torch's autograd, on any device, in any floating dtype. Pooling rounds once, as the kernels do; torch's
own CUDA pooling rounds 1 / area to bfloat16 first (0.2 % off at area 9).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import PoolPlan, axis_matrix, images_of


class Linear(NamedTuple):
    """An affine map: ``weight`` [out, in] and ``bias`` [out] or None."""

    weight: Tensor
    bias: Tensor | None = None


class Norm(NamedTuple):
    """A LayerNorm over the last dim: ``weight`` [C] or None, ``bias`` [C] or None, ``eps``."""

    weight: Tensor | None
    bias: Tensor | None = None
    eps: float = 1e-5


_IMAGES_AT_ONCE = 8  # float64 copies of more would not fit beside a training step


def adaptive_pool(features: Tensor, plan: PoolPlan) -> Tensor:
    """Pool every image's patches to its own number of tokens: [sum(H*W), C] -> [sum(n_h*n_w), C].

    Raises ``ValueError`` for a row count that differs from the plan's.
    """
    check_rows(features, plan)
    return pool(features, plan)


def check_rows(features: Tensor, plan: PoolPlan) -> None:
    """Raise ``ValueError`` unless there are as many rows as the plan's grids hold."""
    if features.shape[0] != plan.num_patches:
        raise ValueError(
            f"features has {features.shape[0]} rows, but the plan's grids hold {plan.num_patches}: "
            "lay the images' rows one after another, row-major, with nothing between them"
        )


def pool(rows: Tensor, plan: PoolPlan, transposed: bool = False) -> Tensor:
    """A_h X A_w' image by image, or with ``transposed`` A_h' X A_w; equal neighbours go together.

    In float64 and rounded once: exact under TF32, autocast and every other setting of torch.
    """
    mode = "resize" if plan.is_resize else "adaptive"
    outputs, start = [], 0
    for (grid, side), group in itertools.groupby(images_of(plan.table)):
        axes = [axis_matrix(size, n, mode).to(rows.device) for size, n in zip(grid, side)]
        by_line, by_cell = (axis.T for axis in axes) if transposed else axes
        per_image = by_line.shape[1] * by_cell.shape[1]
        left = len(list(group))
        while left:
            num_images = min(left, _IMAGES_AT_ONCE)
            stop = start + num_images * per_image
            x = rows[start:stop].double().reshape(num_images, by_line.shape[1], by_cell.shape[1], rows.shape[1])
            x = torch.matmul(by_cell, torch.matmul(by_line, x.flatten(2)).unflatten(2, x.shape[2:]))
            outputs.append(x.to(rows.dtype).flatten(0, 2))
            start, left = stop, left - num_images
    return torch.cat(outputs) if outputs else rows.clone()


def normalise(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(LayerNorm without scale and shift, 1 / standard deviation [T]) of rows in float32 or wider."""
    hat, _, rstd = torch.native_layer_norm(rows, rows.shape[-1:], None, None, eps)
    return hat, rstd.flatten()


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """In float32 or wider."""
    return [None if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def affine(hat: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """hat * scale + shift, computed in float32 or wider; ``hat`` itself without either."""
    y, wide_scale, wide_shift = _wide(hat, scale, shift)
    if scale is not None:
        y = y * wide_scale
    if shift is not None:
        y = y + wide_shift
    return y.to(hat.dtype)


def swiglu(tokens: Tensor, norm: Norm | None, gate_up: Linear, down: Linear) -> Tensor:
    """LayerNorm (optional) -> gate and up -> SiLU(gate) * up -> down: [T, C] -> [T, D]."""
    if norm is not None:
        tokens = F.layer_norm(tokens, tokens.shape[-1:], norm.weight, norm.bias, norm.eps)
    gate, up = F.linear(tokens, gate_up.weight, gate_up.bias).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down.weight, down.bias)


def pooled_swiglu(features: Tensor, plan: PoolPlan, norm: Norm | None, gate_up: Linear, down: Linear) -> Tensor:
    """The projector: ``adaptive_pool`` then ``swiglu``: [sum(H*W), C] -> [sum(n_h*n_w), D].

    ``gate_up.weight`` is [2H, C] with the gate's rows first, ``down.weight`` [D, H]. Errors as ``adaptive_pool``.
    """
    return swiglu(adaptive_pool(features, plan), norm, gate_up, down)


def splice_rows(text: Tensor, visual: Tensor, positions: Tensor) -> Tensor:
    """``text`` [T, D] with row ``positions[v]`` replaced by ``visual[v]``, for ``visual`` [V, D] and distinct positions.

    Raises ``IndexError`` (CPU) if a position is outside [0, T).
    """
    return text.index_copy(0, positions, visual)


# --------------------------------------------------------- what else mlp and ops ask a back end for; see launches.py


class NormOf(NamedTuple):
    """A LayerNorm to follow the pooling, and whether the backward pass will want its normalised rows."""

    scale: Tensor | None
    shift: Tensor | None
    eps: float
    keep: bool


def pooled(
    source: Tensor, plan: PoolPlan | None, transposed: bool = False, norm: NormOf | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(rows, normalised rows, 1 / standard deviations) of ``source`` [any, C] pooled by ``plan``, or as it is.

    Rows are [tokens, C], or with ``transposed`` the gradient [patches, C] of [tokens, C]. With ``norm`` they are the
    LayerNorm of the pooled rows; the other two are None unless it says keep.
    """
    rows = source if plan is None else pool(source, plan, transposed)
    if norm is None:
        return rows, None, None
    tokens = F.layer_norm(rows, rows.shape[-1:], norm.scale, norm.shift, norm.eps)
    if not norm.keep:
        return tokens, None, None
    hat, rstd = normalise(*_wide(rows), norm.eps)
    return tokens, hat.to(rows.dtype), rstd


def norm_grad(
    d_tokens: Tensor, hat: Tensor, rstd: Tensor, scale: Tensor | None, need_grad: bool, need_sums: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of the rows; float32 or wider [2, C] gradients of scale and shift), as asked for."""
    d, x, wide_scale = _wide(d_tokens, hat, scale)
    sums = torch.stack(((d * x).sum(0), d.sum(0))) if need_sums else None
    if not need_grad:
        return None, sums
    if scale is not None:
        d = d * wide_scale
    d = (d - d.mean(1, keepdim=True) - x * (d * x).mean(1, keepdim=True)) * rstd[:, None]
    return d.to(hat.dtype), sums


def gated(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, store_inner: bool, store_gate_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """silu(gate) * up [M, H] and the packed [gate | up] [M, 2H] of tokens [M, C] and weight [2H, C], as asked for."""
    gate_up = F.linear(tokens, weight, bias)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up if store_inner else None, gate_up if store_gate_up else None


def pooled_gated(
    source: Tensor, plan: PoolPlan | None, norm: NormOf | None, weight: Tensor, bias: Tensor | None, store_gate_up: bool
) -> tuple[Tensor | None, ...]:
    """What ``pooled`` gives, then what ``gated`` makes of its rows."""
    made = pooled(source, plan, norm=norm)
    return (*made, *gated(made[0], weight, bias, True, store_gate_up))


def dgated(
    d_out: Tensor, weight: Tensor, gate_up: Tensor, sum_bias: bool, store_inner: bool, in_place: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[dGate | dUp] [M, 2H], S = silu(gate) * up [M, H] and the sum of [dGate | dUp] over M, float32 or wider [2H].

    d_out [M, D], weight [D, H], gate_up [M, 2H]; the last two as asked for; ``in_place`` writes the first over gate_up.
    """
    d_inner, wide = _wide(d_out @ weight, gate_up)
    gate, up = wide.chunk(2, -1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    grad = torch.cat((d_inner * up * (sigmoid + silu * (1 - sigmoid)), d_inner * silu), -1)
    inner = (silu * up).to(d_out.dtype) if store_inner else None
    return gate_up.copy_(grad) if in_place else grad.to(d_out.dtype), inner, grad.sum(0) if sum_bias else None


def weight_grads(
    weight: Tensor, product: Tensor, row_sums: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dW [2H, C]; [2, C] gradients of scale and shift); see ``mlp.backward``."""
    dtype = product.dtype
    weight, product, row_sums, scale, shift = _wide(weight, product, row_sums, scale, shift)
    sums = torch.stack(((weight * product).sum(0), row_sums @ weight))
    if scale is not None:
        product = product * scale
    if shift is not None:
        product = torch.addcmul(product, row_sums[:, None], shift[None, :])
    return product.to(dtype), sums


def splice_backward(grad: Tensor, positions: Tensor, need_text: bool, need_visual: bool) -> tuple[Tensor, Tensor]:
    """Gradients of ``text`` and ``visual`` of ``splice_rows``; an empty tensor for the one not asked for."""
    return (
        grad.index_fill(0, positions, 0.0) if need_text else grad.new_empty(0),
        grad.index_select(0, positions) if need_visual else grad.new_empty(0),
    )
