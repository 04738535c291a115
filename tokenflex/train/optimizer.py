"""Which parameters are trained, in which groups, and an optimizer that can be kept from running."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..config import OptimizerConfig
from ..errors import UserError

PARTS = {"vision": "vision_tower.", "projector": "projector.", "text": "language_model."}
"""Part of the configuration -> prefix of its parameters' names."""


class VetoableAdamW(torch.optim.AdamW):
    """AdamW that asks before it runs: where `should_skip()` says so, weights, moments and count stay as they are.

    The question comes at the one moment when the step's gradient norm is known and nothing has moved yet, whatever wraps
    the optimizer.
    """

    def __init__(self, params: Iterable, should_skip: Callable[[], bool], **settings: Any):
        self._should_skip = should_skip
        super().__init__(params, **settings)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move the weights, unless told not to."""
        return None if self._should_skip() else super().step(closure)


def parameter_groups(model: torch.nn.Module, config: OptimizerConfig) -> list[dict]:
    """The trained parts, one group per part for matrices and one for vectors (which do not decay), each with its peak `lr`.

    Frozen parts get `requires_grad=False`.

    Raises:
        UserError: every part is frozen.
    """
    groups = []
    for part, prefix in PARTS.items():
        settings = getattr(config, part)
        parameters = [p for name, p in model.named_parameters() if name.startswith(prefix)]
        for parameter in parameters:
            parameter.requires_grad_(settings.train)
        if not settings.train:
            continue
        for decay, members in (
            (config.weight_decay, [p for p in parameters if _is_matrix(p)]),
            (0.0, [p for p in parameters if not _is_matrix(p)]),
        ):
            if members:
                groups.append({"params": members, "lr": settings.learning_rate, "weight_decay": decay})
    if not groups:
        raise UserError(
            "optimizer: vision, projector and text are all frozen; set optimizer.projector.train=true or another part's"
        )
    return groups


def make_adamw(groups: list[dict], config: OptimizerConfig) -> Callable[[Callable[[], bool]], VetoableAdamW]:
    """What makes the optimizer of these groups once there is somebody to ask: (should_skip) -> optimizer."""
    return functools.partial(VetoableAdamW, groups, betas=config.betas, eps=config.eps, fused=True)


def _is_matrix(parameter):
    return (
        len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
    )  # a ZeRO-3 shard is flat; its real rank is `ds_shape`
