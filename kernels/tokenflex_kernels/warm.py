"""Choosing every configuration before a run instead of in its first steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .choose import export_choices
from .geometry import PoolPlan
from .module import PooledSwiGLU


def warm_up(
    plans: Sequence[PoolPlan],
    width: int,
    inner: int,
    out: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    frozen: Sequence[str] = (),
    **options: bool,
) -> dict[str, dict]:
    """Compile, compare and (in mode ``measure``) time the projector on batches like ``plans``; returns the choices.

    Runs inference and a training step on random data of its own, so it needs no weights and no batch, and frees all it
    took. Row counts share a choice up to the next power of two: plans of 1, 2, 4, ... images of each token count say all.

    Args:
        plans: on any device.
        width, inner, out: C, H and D.
        frozen: of "features", "norm", "gate_up" and "down", what will not be trained.
        options: those of ``PooledSwiGLU`` (bias, recompute, in_place), as the projector will be called.

    Raises:
        ValueError: another name in ``frozen``.
    """
    parts = ("features", "norm", "gate_up", "down")
    if set(frozen) - set(parts):
        raise ValueError(f"frozen is {list(frozen)}; it may name {parts}")
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:  # the run's own numbers stay its own
        projector = PooledSwiGLU(width, inner, out, **options).to(dtype)
        for part in parts[1:]:
            getattr(projector, part).requires_grad_(part not in frozen)
        weights = [weight for weight in projector.parameters() if weight.requires_grad]
        for plan in plans:
            plan = plan.to(device)
            features = torch.randn(plan.num_patches, width, dtype=dtype)
            leaves = weights if "features" in frozen else [features.requires_grad_(), *weights]
            with torch.no_grad():
                projector(features, plan)
            result = projector(features, plan)
            if leaves:
                torch.autograd.grad(result, leaves, torch.randn_like(result))
            del features, leaves, result
    return export_choices()
