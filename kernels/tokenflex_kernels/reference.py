"""What the kernels compute, said in plain torch: the specification, the CPU path, and the tests' yardstick.

Differentiable by torch's autograd, on any device, in any floating dtype. Half-precision inputs are pooled in float32
and rounded once, like the kernels; torch's own CUDA pooling rounds 1 / area to bfloat16 first (0.2 % off at area 9).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import axis_matrix, check_geometry, check_rows, num_patches


class Linear(NamedTuple):
    """An affine map: ``weight`` [out, in] and ``bias`` [out] or None."""

    weight: Tensor
    bias: Tensor | None = None


class Norm(NamedTuple):
    """A LayerNorm over the last dim: ``weight`` [C] or None, ``bias`` [C] or None, ``eps``."""

    weight: Tensor | None
    bias: Tensor | None = None
    eps: float = 1e-5


def adaptive_pool(
    features: Tensor, grids: Sequence[tuple[int, int]], sides: Sequence[tuple[int, int]], mode: str = "adaptive"
) -> Tensor:
    """Pool every image's patches to its own number of tokens: [sum(H*W), C] -> [sum(n_h*n_w), C].

    Args:
        features: the images' patches one image after another, each row-major.
        grids: (H, W) of each image.
        sides: (n_h, n_w) of each image; non-square, and above the grid's side, are fine.
        mode: ``adaptive`` (arXiv 2504.03154, section 3) or ``resize`` (the released projector: bilinear resize with
            aligned corners to the next multiple of the side, then average).

    Raises:
        ValueError: a side or grid below 1, lists of unequal length, an unknown mode, or a row count that differs
            from the grids'.
    """
    return pool(features, _flat(grids), _flat(sides), mode)


def pool(features: Tensor, grids: Sequence[int], sides: Sequence[int], mode: str) -> Tensor:
    """``adaptive_pool`` with flat lists (H, W, H, W, ...)."""
    check_geometry(grids, sides, mode)
    check_rows(features.shape[0], grids, "features")
    return _separable(features, grids, sides, mode, transposed=False)


def pool_backward(grad: Tensor, grids: Sequence[int], sides: Sequence[int], mode: str) -> Tensor:
    """The gradient with respect to ``pool``'s features: [sum(n_h*n_w), C] -> [sum(H*W), C]."""
    check_geometry(grids, sides, mode)
    check_rows(grad.shape[0], sides, "grad")
    return _separable(grad, grids, sides, mode, transposed=True)


def _separable(rows: Tensor, grids: Sequence[int], sides: Sequence[int], mode: str, transposed: bool) -> Tensor:
    """A_h X A_w' image by image, or A_h' X A_w; equal neighbours go as one batch."""
    exact = torch.promote_types(rows.dtype, torch.float32)
    outputs, start = [], 0
    images = zip(zip(grids[::2], grids[1::2]), zip(sides[::2], sides[1::2]))
    for (grid, side), group in itertools.groupby(images):
        num_images = len(list(group))
        by_line, by_cell = (
            axis_matrix(size, n, mode).to(rows.device, exact) for size, n in zip(grid, side, strict=True)
        )
        if transposed:
            by_line, by_cell = by_line.T, by_cell.T
        stop = start + num_images * by_line.shape[1] * by_cell.shape[1]
        x = rows[start:stop].to(exact).reshape(num_images, by_line.shape[1], by_cell.shape[1], rows.shape[1])
        with _no_autocast(rows):  # or it would make half-precision products of these
            x = torch.matmul(by_line, x.flatten(2)).unflatten(2, x.shape[2:])
            x = torch.matmul(by_cell, x)
        outputs.append(x.to(rows.dtype).reshape(-1, rows.shape[1]))
        start = stop
    return torch.cat(outputs) if outputs else rows.clone()


def swiglu(tokens: Tensor, norm: Norm | None, gate_up: Linear, down: Linear) -> Tensor:
    """LayerNorm (optional) -> gate and up -> SiLU(gate) * up -> down: [T, C] -> [T, D]."""
    if norm is not None:
        tokens = F.layer_norm(tokens, tokens.shape[-1:], norm.weight, norm.bias, norm.eps)
    gate, up = F.linear(tokens, gate_up.weight, gate_up.bias).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down.weight, down.bias)


def pooled_swiglu(
    features: Tensor,
    grids: Sequence[tuple[int, int]],
    sides: Sequence[tuple[int, int]],
    norm: Norm | None,
    gate_up: Linear,
    down: Linear,
    mode: str = "adaptive",
) -> Tensor:
    """The projector: ``adaptive_pool`` then ``swiglu``: [sum(H*W), C] -> [sum(n_h*n_w), D].

    ``gate_up.weight`` is [2H, C] with the gate's rows first, ``down.weight`` [D, H]. Errors as ``adaptive_pool``.
    """
    return swiglu(adaptive_pool(features, grids, sides, mode), norm, gate_up, down)


def splice_rows(text: Tensor, visual: Tensor, positions: Tensor) -> Tensor:
    """``text`` [T, D] with row ``positions[v]`` replaced by ``visual[v]``, for ``visual`` [V, D] and distinct positions.

    Raises ``IndexError`` (CPU) if a position is outside [0, T).
    """
    return text.index_copy(0, positions, visual)


def _no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    device_type = tensor.device.type
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _flat(pairs: Sequence[tuple[int, int]]) -> list[int]:
    return [number for pair in pairs for number in pair]


__all__ = ["Linear", "Norm", "adaptive_pool", "pooled_swiglu", "splice_rows", "swiglu", "num_patches"]
