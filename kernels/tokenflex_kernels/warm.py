"""Choosing every configuration before a run instead of in its first steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .choose import export_choices
from .geometry import PoolPlan
from .ops import pooled_swiglu
from .reference import Linear, Norm


def warm_up(
    plans: Sequence[PoolPlan],
    width: int,
    inner: int,
    out: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    has_norm: bool = True,
    has_bias: bool = True,
    frozen: Sequence[str] = (),
    recompute: bool = False,
) -> dict[str, dict]:
    """Compile, compare and (in mode ``measure``) time the projector on batches like ``plans``; returns the choices.

    Runs inference and a training step on random data of its own, so it needs no weights and no batch, and frees all it
    took. Row counts share a choice up to the next power of two: plans of 1, 2, 4, ... images of each token count say all.

    Args:
        plans: on any device.
        width, inner, out: C, H and D.
        has_norm, has_bias, recompute: as the projector will be called.
        frozen: of "features", "norm", "gate_up" and "down", what will not be trained.

    Raises:
        ValueError: another name in ``frozen``.
    """
    parts = ("features", "norm", "gate_up", "down")
    if set(frozen) - set(parts):
        raise ValueError(f"frozen is {list(frozen)}; it may name {parts}")
    generator = torch.Generator(device).manual_seed(0)

    def random(part: str, *shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, device=device) * scale
        return values.to(dtype).requires_grad_(part not in frozen)

    norm = Norm(random("norm", width), random("norm", width)) if has_norm else None
    biases = (random("gate_up", 2 * inner), random("down", out)) if has_bias else (None, None)
    gate_up = Linear(random("gate_up", 2 * inner, width, scale=width**-0.5), biases[0])
    down = Linear(random("down", out, inner, scale=inner**-0.5), biases[1])
    for plan in plans:
        plan = plan.to(device)
        features = random("features", plan.num_patches, width)
        with torch.no_grad():
            pooled_swiglu(features, plan, norm, gate_up, down)
        result = pooled_swiglu(features, plan, norm, gate_up, down, recompute=recompute)
        leaves = [x for x in (features, *(norm or ()), *gate_up, *down) if torch.is_tensor(x) and x.requires_grad]
        if leaves:
            torch.autograd.grad(result, leaves, torch.randn_like(result))
        del features, result
    return export_choices()
