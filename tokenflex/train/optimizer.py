"""Which parameters are trained, at which rate, and how the rate moves over the run."""

import math

import torch

from ..errors import UserError

PARTS = {"vision": "vision_tower.", "projector": "projector.", "text": "language_model."}
"""Part of the configuration -> prefix of its parameters' names."""


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that asks before it runs: where `should_skip()` says so, weights, moments and count stay as they are.

    The question comes at the one moment when the step's gradient norm is known and nothing has moved yet, whatever wraps
    the optimizer.
    """

    should_skip = staticmethod(lambda: False)

    def step(self, closure=None):
        return None if self.should_skip() else super().step(closure)


def build_optimizer(model, config):
    """AdamW over the trained parts, one group per part for matrices and one for vectors (which do not decay).

    Frozen parts get `requires_grad=False`. Returns the optimizer and the peak rate of each of its groups.

    Raises:
        UserError: every part is frozen.
    """
    groups, peaks = [], []
    for part, prefix in PARTS.items():
        settings = getattr(config, part)
        parameters = [p for name, p in model.named_parameters() if name.startswith(prefix)]
        for parameter in parameters:
            parameter.requires_grad_(settings.train)
        if not settings.train:
            continue
        # A ZeRO-3 shard is flat; its real rank is in `ds_shape`.
        is_matrix = lambda p: len(getattr(p, "ds_shape", p.shape)) >= 2  # noqa: E731
        for decay, members in (
            (config.weight_decay, [p for p in parameters if is_matrix(p)]),
            (0.0, [p for p in parameters if not is_matrix(p)]),
        ):
            if members:
                groups.append({"params": members, "lr": settings.learning_rate, "weight_decay": decay})
                peaks.append(settings.learning_rate)
    if not groups:
        raise UserError(
            "optimizer: vision, projector and text are all frozen; set optimizer.projector.train=true or another part's"
        )
    return GuardedAdamW(groups, betas=config.betas, eps=config.eps, fused=True), peaks


def rate_factor(step, num_steps, config):
    """Share of the peak learning rate at `step` (0-based) of `num_steps`: linear warm-up, then the chosen shape."""
    warmup = math.ceil(config.warmup_fraction * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    shapes = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }
    return config.final_fraction + (1.0 - config.final_fraction) * shapes[config.schedule]
