"""The public functions, over torch.library operators: eager, autograd, autocast, fake tensors and torch.compile.

Each operator has one body per device: the Triton kernels on CUDA, plain torch on the CPU (or the kernels, under Triton's
interpreter). Backward passes are operators too, so that torch.compile never traces into a launch. They are defined
without wrappers, and their gradients are ``torch.autograd.Function``s around them, since a call must cost the host
little. Autograd keeps the caller's own weight tensors, never a view or copy: a weight that ZeRO-3 or FSDP frees after
the forward pass and gathers before the backward pass is found again through its Parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import mlp, reference
from .geometry import PoolPlan, rows_of
from .reference import Linear, Norm

NAMESPACE = "tokenflex_kernels"


def adaptive_pool(features: Tensor, plan: PoolPlan) -> Tensor:
    """Pool every image's patches to its own number of visual tokens, all images in one launch.

    Args:
        features: [sum(H*W), C], the images' patches one image after another, each row-major. Rows may lie apart.
        plan: what ``pool_plan`` made of the images' grids and sides, on the features' device.

    Returns:
        [sum(n_h*n_w), C] in the features' dtype, summed in float32.

    Raises:
        ValueError: ``features`` not a matrix, a row count that differs from the plan's, a plan on another device.
    """
    _check_features(features, plan)
    if torch.is_grad_enabled() and features.requires_grad:
        return _Pool.apply(features, *plan, False)
    return _OPS.pool(features, *plan, False)


def pooled_swiglu(
    features: Tensor, plan: PoolPlan, norm: Norm | None, gate_up: Linear, down: Linear, *, recompute: bool = False
) -> Tensor:
    """The projector of TokenFLEX: pool, LayerNorm, SwiGLU, down: [sum(H*W), C] -> [sum(n_h*n_w), D].

    Args:
        features, plan: as for ``adaptive_pool``. Features that need no gradient (a frozen vision tower) skip the product
            and the pooling that would give it.
        norm: ``Norm(weight [C] or None, bias [C] or None, eps)``, or None for no LayerNorm.
        gate_up: ``Linear(weight [2H, C], bias [2H] or None)``, the gate's rows first.
        down: ``Linear(weight [D, H], bias [D] or None)``.
        recompute: make gate and up again in the backward pass instead of keeping [T, 2H]: about a seventh more time.

    Returns:
        [sum(n_h*n_w), D] in the features' dtype, or in autocast's.

    Raises:
        ValueError: as ``adaptive_pool``; weights of shapes that do not fit; tensors of several devices or dtypes.
    """
    _check_features(features, plan)
    return _project(features, plan, norm, gate_up, down, recompute)


def swiglu(tokens: Tensor, norm: Norm | None, gate_up: Linear, down: Linear, *, recompute: bool = False) -> Tensor:
    """LayerNorm (optional), gate and up, SiLU(gate) * up, down: [T, C] -> [T, D]. See ``pooled_swiglu``."""
    _check_matrix("features", tokens)
    return _project(tokens, None, norm, gate_up, down, recompute)


def _project(
    features: Tensor, plan: PoolPlan | None, norm: Norm | None, gate_up: Linear, down: Linear, recompute: bool
) -> Tensor:
    scale, shift, eps = norm if norm is not None else (None, None, 0.0)
    tensors = (features, scale, shift, *gate_up, *down)
    is_autocast = _is_autocast(features)
    _check_alike(mlp.INPUTS, tensors, is_autocast)
    if is_autocast and features.dtype != torch.float64:  # matmul's rule; float64 stays, as in torch
        dtype = torch.get_autocast_dtype(features.device.type)
        # Features keep their precision up to the end of the pooling, as torch's pooling does.
        if plan is not None:
            features, plan = adaptive_pool(features, plan), None
        tensors = [None if x is None else x.to(dtype) for x in (features, *tensors[1:])]
        with torch.autocast(features.device.type, enabled=False):
            return _apply(tensors, plan, norm is not None, eps, recompute)
    return _apply(tensors, plan, norm is not None, eps, recompute)


def _apply(tensors: Any, plan: PoolPlan | None, has_norm: bool, eps: float, recompute: bool) -> Tensor:
    table, *numbers = _NO_PLAN if plan is None else plan
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return _Project.apply(*tensors, table, *numbers, has_norm, eps, recompute)
    return _OPS.project(*tensors, table, *numbers, has_norm, eps)


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
    _check_matrix("text", text)
    _check_matrix("visual", visual)
    if positions.dtype != torch.int64 or positions.dim() != 1:
        raise ValueError(f"positions must be int64 [V], not {positions.dtype} {tuple(positions.shape)}")
    if positions.device != text.device:
        raise ValueError(f"positions are on {positions.device}, text on {text.device}: move them")
    is_autocast = _is_autocast(text)
    _check_alike(("text", "visual"), (text, visual), is_autocast)
    if text.dtype != visual.dtype:  # under autocast: torch.cat's rule
        dtype = torch.promote_types(text.dtype, visual.dtype)
        text, visual = text.to(dtype), visual.to(dtype)
    if torch.is_grad_enabled() and (text.requires_grad or visual.requires_grad):
        return _Splice.apply(text, visual, positions)
    return _OPS.splice(text, visual, positions)


_NO_PLAN = (None, 0, 0, 0, 0, False)


def _is_autocast(tensor: Tensor) -> bool:
    # Not torch.amp.is_autocast_available: torch.compile of 2.10 cannot trace it.
    return tensor.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(tensor.device.type)


def _check_matrix(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be a matrix [rows, width], not {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, not {tensor.dtype}")


def _check_features(features: Tensor, plan: PoolPlan) -> None:
    _check_matrix("features", features)
    reference.check_rows(features, plan)
    if plan.table.device != features.device:
        raise ValueError(f"the plan is on {plan.table.device}, features on {features.device}: plan.to(features.device)")


def _check_alike(names: tuple[str, ...], tensors: Any, is_autocast: bool) -> None:
    """Raise unless all share the first one's device and, outside autocast, its dtype."""
    first = tensors[0]
    device, dtype = first.device, first.dtype
    for name, tensor in zip(names, tensors):
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, {names[0]} on {device}: move one of them")
        if tensor.dtype != dtype and not is_autocast:
            raise ValueError(f"{name} is {tensor.dtype}, {names[0]} {dtype}: cast one of them, or use torch.autocast")


# ----------------------------------------------------------------------------------------------------------- operators

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_PLAN = "SymInt num_patches, SymInt num_tokens, SymInt cells, SymInt patch_cells, bool is_resize"
_PROJECTOR = (
    "Tensor? norm_weight, Tensor? norm_bias, Tensor gate_up_weight, Tensor? gate_up_bias, Tensor down_weight, "
    f"Tensor? down_bias, Tensor? table, {_PLAN}, bool has_norm"
)


def _operator(name: str, schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Register a function as an operator for CPU and CUDA tensors alike.

    ``fake`` makes empty outputs of the same arguments. Under autocast the function runs with autocast off: its own
    products must not be cast again.
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)

    def register(function: Callable) -> Callable:
        def without_autocast(device_type: str) -> Callable:
            def call(*args):
                with torch.autocast(device_type, enabled=False):
                    return getattr(_OPS, name)(*args)

            return call

        for device_type in ("cpu", "cuda"):
            _LIBRARY.impl(name, function, device_type.upper())
            _LIBRARY.impl(name, without_autocast(device_type), "Autocast" + device_type.upper())
        return function

    return register


def _pool_like(source, *arguments):
    *plan, transposed = arguments
    return source.new_empty(rows_of(source, PoolPlan(*plan), transposed), source.shape[1])


@_operator("pool", f"(Tensor source, Tensor table, {_PLAN}, bool transposed) -> Tensor", _pool_like)
def _pool(source, *arguments):
    *plan, transposed = arguments
    return mlp.backend_of(source).pooled(source, PoolPlan(*plan), transposed)[0]


def _parts(arguments: tuple) -> tuple[mlp.Weights, PoolPlan | None, tuple]:
    """(weights, plan, what follows) of the projector's operators' arguments from ``norm_weight`` on."""
    plan = None if arguments[6] is None else PoolPlan(*arguments[6:12])
    return mlp.Weights(*arguments[:6]), plan, arguments[12:]


def _project_like(features, *arguments):
    weights, plan, _ = _parts(arguments)
    return features.new_empty(rows_of(features, plan), weights.down_weight.shape[0])


@_operator("project", f"(Tensor features, {_PROJECTOR}, float eps) -> Tensor", _project_like)
def _project_only(features, *arguments):
    weights, plan, (has_norm, eps) = _parts(arguments)
    return mlp.forward(features, plan, weights, has_norm, eps, False, False)[0]


def _project_training_like(features, *arguments):
    weights, plan, (has_norm, _, recompute) = _parts(arguments)
    num_rows = rows_of(features, plan)
    rstd = torch.float64 if features.dtype == torch.float64 else torch.float32
    return (
        features.new_empty(num_rows, weights.down_weight.shape[0]),
        features.new_empty(num_rows, features.shape[1]) if has_norm or plan is not None else features.new_empty(0),
        features.new_empty(num_rows, dtype=rstd) if has_norm else features.new_empty(0),
        features.new_empty(0) if recompute else features.new_empty(num_rows, weights.gate_up_weight.shape[0]),
    )


@_operator(
    "project_training",
    f"(Tensor features, {_PROJECTOR}, float eps, bool recompute) -> (Tensor out, Tensor rows, Tensor rstd, Tensor gate_up)",
    _project_training_like,
)
def _project_training(features, *arguments):
    weights, plan, (has_norm, eps, recompute) = _parts(arguments)
    out, kept = mlp.forward(features, plan, weights, has_norm, eps, True, recompute)
    return (out, *kept)


def _project_backward_like(grad, rows, rstd, gate_up, *arguments):
    weights, plan, (_, needs) = _parts(arguments)
    sizes = [(rows_of(rows, plan, transposed=True), rows.shape[1]), *((0,) if x is None else x.shape for x in weights)]
    return tuple(rows.new_empty(size if needs >> i & 1 else (0,)) for i, size in enumerate(sizes))


def _project_backward(grad, rows, rstd, gate_up, *arguments, in_place=False):
    """``needs`` has bit i for the i-th of the seven inputs; the gradients of the others are empty."""
    weights, plan, (has_norm, needs) = _parts(arguments)
    wanted = {name for i, name in enumerate(mlp.INPUTS) if needs >> i & 1}
    grads = mlp.backward(grad, mlp.Kept(rows, rstd, gate_up), plan, weights, has_norm, wanted, in_place)
    return tuple(grads[name] if name in wanted else rows.new_empty(0) for name in mlp.INPUTS)


# The second writes over ``gate_up``, and says so.
for _name, _kept in (("project_backward", "Tensor gate_up"), ("project_backward_", "Tensor(a!) gate_up")):
    _operator(
        _name,
        f"(Tensor grad, Tensor rows, Tensor rstd, {_kept}, {_PROJECTOR}, int needs) -> ({', '.join(['Tensor'] * 7)})",
        _project_backward_like,
    )(functools.partial(_project_backward, in_place=_name.endswith("_")))


@_operator(
    "splice", "(Tensor text, Tensor visual, Tensor positions) -> Tensor", lambda text, *_: text.new_empty(text.shape)
)
def _splice(text, visual, positions):
    if visual.shape[1] != text.shape[1]:
        raise ValueError(f"visual rows are {visual.shape[1]} wide, text rows {text.shape[1]}")
    if visual.shape[0] != positions.shape[0]:
        raise ValueError(f"{visual.shape[0]} visual rows but {positions.shape[0]} positions: give one position per row")
    if visual.shape[0] > text.shape[0]:
        raise ValueError(f"{visual.shape[0]} visual rows do not fit into {text.shape[0]} packed rows")
    if positions.device.type == "cpu" and positions.unique().numel() != positions.numel():
        raise ValueError("positions repeat: every visual row needs a row of its own")
    return mlp.backend_of(text).splice_rows(text, visual, positions)


@_operator(
    "splice_backward",
    "(Tensor grad, Tensor positions, int needs) -> (Tensor, Tensor)",
    lambda grad, positions, needs: (
        grad.new_empty(grad.shape if needs & 1 else (0,)),
        grad.new_empty((positions.shape[0], grad.shape[1]) if needs & 2 else (0,)),
    ),
)
def _splice_backward(grad, positions, needs):
    return mlp.backend_of(grad).splice_backward(grad, positions, bool(needs & 1), bool(needs & 2))


_OPS = torch.ops.tokenflex_kernels

# ------------------------------------------------------------------------------------------------------------ autograd


def _refuse_second_derivative() -> None:
    # torch's once_differentiable lets one through where the gradient that comes in is a constant.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("the projector and the splice have no second derivative: do without create_graph=True")


def _is_last_reader(kept: Tensor) -> bool:
    """Whether nothing reads ``kept`` after this backward pass.

    Not where autograd keeps the graph (torch asks itself the same for what it donates); not in a CUDA graph, whose
    backward pass may be replayed twice; not under torch.compile, which lays out memory itself.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    return not (kept.is_cuda and torch.cuda.is_current_stream_capturing())


def _bits(flags: tuple[bool, ...]) -> int:
    bits = 0
    for i, flag in enumerate(flags):
        bits |= flag << i
    return bits


def _wanted(grads: tuple[Tensor, ...], needs: int) -> list[Tensor | None]:
    """Those whose bit is set; an operator has no None to return for the others."""
    return [x if needs >> i & 1 else None for i, x in enumerate(grads)]


class _Pool(torch.autograd.Function):
    """Pooling is linear, so its gradient is the transposed pooling, whose gradient is the pooling again."""

    @staticmethod
    def forward(ctx, source, table, *numbers):
        ctx.save_for_backward(table)
        ctx.numbers = (*numbers[:-1], not numbers[-1])
        return _OPS.pool(source, table, *numbers)

    @staticmethod
    def backward(ctx, grad):
        (table,) = ctx.saved_tensors
        return (_Pool.apply(grad, table, *ctx.numbers), *(None,) * 7)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, *arguments):
        *arguments, eps, recompute = arguments
        out, rows, rstd, gate_up = _OPS.project_training(features, *arguments, eps, recompute)
        weights, table, ctx.numbers = arguments[:6], arguments[6], arguments[7:]
        if table is None and not ctx.numbers[-1]:  # neither pooled nor normalised: the rows are the features
            rows = features
        # The inputs themselves: for a Parameter that means the Parameter, whatever storage it has by then.
        ctx.save_for_backward(rows, rstd, gate_up, *weights, table)
        return out

    @staticmethod
    def backward(ctx, grad):
        _refuse_second_derivative()
        needs = _bits(ctx.needs_input_grad[:7])
        saved, operator = ctx.saved_tensors, _OPS.project_backward
        if _is_last_reader(saved[2]):
            operator = _OPS.project_backward_
            torch.autograd.graph.increment_version(saved[2])  # whoever else got hold of it is told by autograd
        grads = operator(grad, *saved, *ctx.numbers, needs)
        return (*_wanted(grads, needs), *(None,) * 9)


class _Splice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, text, visual, positions):
        ctx.save_for_backward(positions)
        return _OPS.splice(text, visual, positions)

    @staticmethod
    def backward(ctx, grad):
        _refuse_second_derivative()
        needs = _bits(ctx.needs_input_grad[:2])
        return (*_wanted(_OPS.splice_backward(grad, *ctx.saved_tensors, needs), needs), None)
