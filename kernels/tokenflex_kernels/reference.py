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
    check_rows("features", features.shape[0], plan.num_patches, "grids")
    return pool(features, plan)


def check_rows(name: str, num_rows: int, wanted: int, what: str) -> None:
    """Raise ``ValueError`` unless ``num_rows`` is what the plan's grids (or sides) hold."""
    if num_rows != wanted:
        raise ValueError(
            f"{name} has {num_rows} rows, but the plan's {what} hold {wanted}: "
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
            outputs.append(x.to(rows.dtype).reshape(-1, rows.shape[1]))
            start, left = stop, left - num_images
    return torch.cat(outputs) if outputs else rows.clone()


def normalise(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(LayerNorm without scale and shift, 1 / standard deviation [T]) of rows in float32 or wider."""
    hat, _, rstd = torch.native_layer_norm(rows, rows.shape[-1:], None, None, eps)
    return hat, rstd.flatten()


def affine(hat: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """hat * scale + shift, computed in float32 or wider; ``hat`` itself without either."""
    if scale is None and shift is None:
        return hat
    wide = torch.promote_types(hat.dtype, torch.float32)
    y = hat.to(wide)
    if scale is not None:
        y = y * scale.to(wide)
    if shift is not None:
        y = y + shift.to(wide)
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
