"""The public functions, as torch.library operators: eager, autograd, autocast, fake tensors and torch.compile.

Each operator has one body per device: the Triton kernels on CUDA, the reference on the CPU (or the kernels, under
Triton's interpreter). Backward passes are operators too, so that torch.compile never traces into a launch. Autograd
keeps the caller's own weight tensors, never a view or copy: a weight that ZeRO-3 or FSDP frees after the forward pass
and gathers before the backward pass is found again through its Parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import mlp, reference, target
from .geometry import check_geometry, check_rows, row_windows
from .reference import Linear, Norm

NAMESPACE = "tokenflex_kernels"


def adaptive_pool(
    features: Tensor, grids: Sequence[tuple[int, int]], sides: Sequence[tuple[int, int]], mode: str = "adaptive"
) -> Tensor:
    """Pool every image's patches to its own number of visual tokens, all images in one launch.

    Args:
        features: [sum(H*W), C], the images' patches one image after another, each row-major. Any strides.
        grids: (H, W) of each image.
        sides: (n_h, n_w) of each image; non-square, and above the grid's side, are fine.
        mode: ``adaptive`` (average over floor/ceil windows; arXiv 2504.03154) or ``resize`` (the released projector:
            bilinear resize with aligned corners to the next multiple of the side, then average).

    Returns:
        [sum(n_h*n_w), C] in the features' dtype, summed in float32.

    Raises:
        ValueError: ``features`` not a matrix, a grid or side below 1, lists of unequal length, an unknown mode, or a row
            count that differs from the grids'.
    """
    _check_matrix("features", features)
    return torch.ops.tokenflex_kernels.pool(features, _flat(grids), _flat(sides), mode)


def swiglu(tokens: Tensor, norm: Norm | None, gate_up: Linear, down: Linear, *, recompute: bool = False) -> Tensor:
    """LayerNorm (optional), gate and up, SiLU(gate) * up, down: [T, C] -> [T, D]. See ``pooled_swiglu``."""
    scale, shift, eps = norm if norm is not None else (None, None, 0.0)
    tensors = {
        "features": tokens, "norm_weight": scale, "norm_bias": shift, "gate_up_weight": gate_up[0], "gate_up_bias": gate_up[1],
        "down_weight": down[0], "down_bias": down[1],
    }  # fmt: skip
    _check_alike(tensors, autocast=_is_autocast(tokens))
    save = (
        torch.is_grad_enabled() and not recompute and any(t is not None and t.requires_grad for t in tensors.values())
    )
    return torch.ops.tokenflex_kernels.swiglu(*tensors.values(), norm is not None, eps, save)[0]


def pooled_swiglu(
    features: Tensor,
    grids: Sequence[tuple[int, int]],
    sides: Sequence[tuple[int, int]],
    norm: Norm | None,
    gate_up: Linear,
    down: Linear,
    *,
    mode: str = "adaptive",
    recompute: bool = False,
) -> Tensor:
    """The projector of TokenFLEX: pool, LayerNorm, SwiGLU, down: [sum(H*W), C] -> [sum(n_h*n_w), D].

    Args:
        features, grids, sides, mode: as for ``adaptive_pool``. Features that need no gradient (a frozen vision tower)
            skip the product and the pooling that would give it.
        norm: ``Norm(weight [C] or None, bias [C] or None, eps)``, or None for no LayerNorm.
        gate_up: ``Linear(weight [2H, C], bias [2H] or None)``, the gate's rows first.
        down: ``Linear(weight [D, H], bias [D] or None)``.
        recompute: make gate and up again in the backward pass instead of keeping [T, 2H]: about a seventh more time.

    Returns:
        [sum(n_h*n_w), D] in the features' dtype, or in autocast's.

    Raises:
        ValueError: as ``adaptive_pool``; weights of shapes that do not fit; tensors of several devices or dtypes.
    """
    pooled = adaptive_pool(features, grids, sides, mode)
    return swiglu(pooled, norm, gate_up, down, recompute=recompute)


def splice_rows(text: Tensor, visual: Tensor, positions: Tensor) -> Tensor:
    """Packed embeddings in one pass: ``text`` with row ``positions[v]`` replaced by ``visual[v]``.

    Args:
        text: [T, D], the embedding output of the packed sequence, image placeholders included.
        visual: [V, D], the projector's output, same dtype (autocast widens the narrower one).
        positions: int64 [V], distinct rows in [0, T).

    Returns:
        [T, D], a new tensor. Backward gathers rows; the placeholders' embeddings get zeros.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on the CPU also repeated positions.
        IndexError: on the CPU, a position outside [0, T). On CUDA that fails on the device.
    """
    for name, tensor in (("text", text), ("visual", visual)):
        _check_matrix(name, tensor)
    if positions.dtype != torch.int64 or positions.dim() != 1:
        raise ValueError(f"positions must be int64 [V], not {positions.dtype} {tuple(positions.shape)}")
    if positions.device != text.device:
        raise ValueError(f"positions are on {positions.device}, text on {text.device}: move them")
    _check_alike({"text": text, "visual": visual}, autocast=_is_autocast(text))
    return torch.ops.tokenflex_kernels.splice(text, visual, positions)


def _flat(pairs: Sequence[tuple[int, int]]) -> list[int]:
    return [number for height, width in pairs for number in (height, width)]


def _is_autocast(tensor: Tensor) -> bool:
    # Not torch.amp.is_autocast_available: torch.compile of 2.10 cannot trace it.
    return tensor.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(tensor.device.type)


def _check_matrix(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be a matrix [rows, width], not {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, not {tensor.dtype}")


def _check_alike(tensors: dict[str, Tensor | None], autocast: bool) -> None:
    """Raise unless all share the first one's device and, outside autocast, its dtype."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor is None:
            continue
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, {first_name} on {first.device}: move one of them")
        if tensor.dtype != first.dtype and not autocast:
            raise ValueError(
                f"{name} is {tensor.dtype}, {first_name} {first.dtype}: cast one of them, or use torch.autocast"
            )


_WEIGHTS = (
    "Tensor? norm_weight, Tensor? norm_bias, Tensor gate_up_weight, Tensor? gate_up_bias, Tensor down_weight, "
    "Tensor? down_bias"
)


def _operator(name: str, schema: str) -> Callable[[Callable], Any]:
    """Register a function as an operator that changes none of its inputs.

    The schema is written out: what torch infers from annotations depends on its release and on Python's.
    """
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=(), schema=schema)


# ---------------------------------------------------------------------------------------------------------------- pool


@_operator("pool", "(Tensor features, SymInt[] grids, SymInt[] sides, str mode) -> Tensor")
def _pool(features: Tensor, grids: Sequence[int], sides: Sequence[int], mode: str) -> Tensor:
    if not target.runs_kernels(features):
        return reference.pool(features, grids, sides, mode)
    check_geometry(grids, sides, mode)
    check_rows(features.shape[0], grids, "features")
    from . import pool

    windows = row_windows(tuple(grids), tuple(sides), mode, False, features.device)
    return pool.pool(features, windows, uniform=mode == "adaptive")


@_operator("pool_backward", "(Tensor grad, SymInt[] grids, SymInt[] sides, str mode) -> Tensor")
def _pool_backward(grad: Tensor, grids: Sequence[int], sides: Sequence[int], mode: str) -> Tensor:
    if not target.runs_kernels(grad):
        return reference.pool_backward(grad, grids, sides, mode)
    from . import pool

    return pool.pool(grad, row_windows(tuple(grids), tuple(sides), mode, True, grad.device), uniform=False)


def _num_rows(flat: Sequence[int]) -> int:
    return sum(flat[i] * flat[i + 1] for i in range(0, len(flat), 2))


@_pool.register_fake
def _(features: Tensor, grids: Sequence[int], sides: Sequence[int], mode: str) -> Tensor:
    return features.new_empty(_num_rows(sides), features.shape[1])


@_pool_backward.register_fake
def _(grad: Tensor, grids: Sequence[int], sides: Sequence[int], mode: str) -> Tensor:
    return grad.new_empty(_num_rows(grids), grad.shape[1])


def _pool_setup(ctx, inputs, output) -> None:
    ctx.geometry = inputs[1:]


# The map is linear, so each of the two is the other's gradient; that also gives second derivatives.
_pool.register_autograd(
    lambda ctx, grad: (torch.ops.tokenflex_kernels.pool_backward(grad, *ctx.geometry), None, None, None),
    setup_context=_pool_setup,
)
_pool_backward.register_autograd(
    lambda ctx, grad: (torch.ops.tokenflex_kernels.pool(grad, *ctx.geometry), None, None, None),
    setup_context=_pool_setup,
)

# -------------------------------------------------------------------------------------------------------------- swiglu


@_operator("swiglu", f"(Tensor pooled, {_WEIGHTS}, bool has_norm, float eps, bool save) -> (Tensor, Tensor)")
def _swiglu(
    pooled: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gate_up_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    has_norm: bool,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    weights = mlp.Weights(norm_weight, norm_bias, gate_up_weight, gate_up_bias, down_weight, down_bias)
    return mlp.forward(pooled, weights, has_norm, eps, save)


@_swiglu.register_fake
def _(pooled, norm_weight, norm_bias, gate_up_weight, gate_up_bias, down_weight, down_bias, has_norm, eps, save):
    out = pooled.new_empty(pooled.shape[0], down_weight.shape[0])
    return out, pooled.new_empty(pooled.shape[0], gate_up_weight.shape[0]) if save else pooled.new_empty(0)


@_operator(
    "swiglu_backward",
    f"(Tensor grad, Tensor pooled, Tensor gate_up, {_WEIGHTS}, bool has_norm, float eps, bool[] needs) -> Tensor[]",
)
def _swiglu_backward(
    grad: Tensor,
    pooled: Tensor,
    gate_up: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gate_up_weight: Tensor,
    gate_up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    has_norm: bool,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    weights = mlp.Weights(norm_weight, norm_bias, gate_up_weight, gate_up_bias, down_weight, down_bias)
    grads = mlp.backward(grad, pooled, gate_up, weights, has_norm, eps, mlp.Needs(*needs))
    return [grad for grad in grads if grad is not None]


@_swiglu_backward.register_fake
def _(
    grad,
    pooled,
    gate_up,
    norm_weight,
    norm_bias,
    gate_up_weight,
    gate_up_bias,
    down_weight,
    down_bias,
    has_norm,
    eps,
    needs,
):
    inputs = (pooled, norm_weight, norm_bias, gate_up_weight, gate_up_bias, down_weight, down_bias)
    return [x.new_empty(x.shape) for x, need in zip(inputs, needs, strict=True) if need]


def _swiglu_setup(ctx, inputs, output) -> None:
    *tensors, ctx.has_norm, ctx.eps, _ = inputs
    gate_up = output[1]
    ctx.mark_non_differentiable(gate_up)
    ctx.set_materialize_grads(False)  # or autograd would fill a [T, 2H] of zeros for gate_up
    # The inputs themselves: for a Parameter that means the Parameter, whatever storage it has by then.
    ctx.save_for_backward(gate_up, *tensors)


def _swiglu_grad(ctx, grad: Tensor | None, _unused: None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:7])
    if grad is None or not any(needs):
        return (None,) * 10
    gate_up, pooled, *weights = ctx.saved_tensors
    grads = iter(
        torch.ops.tokenflex_kernels.swiglu_backward(grad, pooled, gate_up, *weights, ctx.has_norm, ctx.eps, needs)
    )
    return (*(next(grads) if need else None for need in needs), None, None, None)


_swiglu.register_autograd(_swiglu_grad, setup_context=_swiglu_setup)

# -------------------------------------------------------------------------------------------------------------- splice


@_operator("splice", "(Tensor text, Tensor visual, Tensor positions) -> Tensor")
def _splice(text: Tensor, visual: Tensor, positions: Tensor) -> Tensor:
    if visual.shape[1] != text.shape[1]:
        raise ValueError(f"visual rows are {visual.shape[1]} wide, text rows {text.shape[1]}")
    if visual.shape[0] != positions.shape[0]:
        raise ValueError(f"{visual.shape[0]} visual rows but {positions.shape[0]} positions: give one position per row")
    if visual.shape[0] > text.shape[0]:
        raise ValueError(f"{visual.shape[0]} visual rows do not fit into {text.shape[0]} packed rows")
    if positions.device.type == "cpu" and positions.unique().numel() != positions.numel():
        raise ValueError("positions repeat: every visual row needs a row of its own")
    if not target.runs_kernels(text):
        return reference.splice_rows(text, visual, positions)
    from . import splice

    return splice.splice(text, visual, positions)


@_operator("splice_backward", "(Tensor grad, Tensor positions, bool need_text, bool need_visual) -> (Tensor, Tensor)")
def _splice_backward(grad: Tensor, positions: Tensor, need_text: bool, need_visual: bool) -> tuple[Tensor, Tensor]:
    if target.runs_kernels(grad):
        from . import splice

        return splice.splice_backward(grad, positions, need_text, need_visual)
    return (
        grad.index_fill(0, positions, 0.0) if need_text else grad.new_empty(0),
        grad.index_select(0, positions) if need_visual else grad.new_empty(0),
    )


@_splice.register_fake
def _(text: Tensor, visual: Tensor, positions: Tensor) -> Tensor:
    return text.new_empty(text.shape)


@_splice_backward.register_fake
def _(grad: Tensor, positions: Tensor, need_text: bool, need_visual: bool) -> tuple[Tensor, Tensor]:
    d_text = grad.new_empty(grad.shape) if need_text else grad.new_empty(0)
    return d_text, grad.new_empty(positions.shape[0], grad.shape[1]) if need_visual else grad.new_empty(0)


def _splice_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[2])


def _splice_grad(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    need_text, need_visual, _ = ctx.needs_input_grad
    (positions,) = ctx.saved_tensors
    d_text, d_visual = torch.ops.tokenflex_kernels.splice_backward(grad, positions, need_text, need_visual)
    return d_text if need_text else None, d_visual if need_visual else None, None


_splice.register_autograd(_splice_grad, setup_context=_splice_setup)

# ------------------------------------------------------------------------------------------------------------ autocast


def _to_autocast_dtype(tensors: Sequence[Tensor], device_type: str) -> torch.dtype:
    return torch.get_autocast_dtype(device_type)


def _to_widest_dtype(tensors: Sequence[Tensor], device_type: str) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _autocast(name: str, device_type: str, dtype_of: Callable[[Sequence[Tensor], str], torch.dtype] | None) -> Callable:
    """The operator under autocast: floating inputs cast to one dtype, or none cast; float64 stays, as in torch.

    Inside, autocast is off: the bodies' own products must not be cast again (the reference's pooling is float32).
    """

    def call(*args):
        floating = [x for x in args if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64]
        with torch.autocast(device_type, enabled=False):
            if dtype_of is not None and floating:
                dtype = dtype_of(floating, device_type)
                args = [x.to(dtype) if any(x is other for other in floating) else x for x in args]
            return getattr(torch.ops.tokenflex_kernels, name)(*args)

    return call


_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    # matmul's rule for the projection; torch.cat's for the splice. Pooling keeps its dtype, as torch's pooling does.
    _LIBRARY.impl("swiglu", _autocast("swiglu", _device_type, _to_autocast_dtype), _key)
    _LIBRARY.impl("splice", _autocast("splice", _device_type, _to_widest_dtype), _key)
    for _name in ("pool", "pool_backward", "swiglu_backward", "splice_backward"):
        _LIBRARY.impl(_name, _autocast(_name, _device_type, None), _key)
