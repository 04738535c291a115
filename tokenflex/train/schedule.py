"""How the learning rate moves over a run: a warm-up, then a shape; a pure function of the step."""

import math
from collections.abc import Callable, Sequence

from ..config import OptimizerConfig

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "wsd": lambda progress: 1.0 - progress,
}
"""Share of the peak, from 1 to 0 (or not), at a share of the steps after the warm-up (`wsd`: of those at the end)."""


def lr_multiplier(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Share of the peak learning rate at `step` (0-based) of `num_steps`: linear warm-up, then the chosen shape."""
    warmup = config.warmup_steps or math.ceil(config.warmup_fraction * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    begin = warmup  # of the fall
    if config.schedule == "wsd":
        begin = max(warmup, num_steps - math.ceil(config.decay_fraction * num_steps))
    progress = max(0, step - begin) / max(1, num_steps - begin)
    return config.final_fraction + (1.0 - config.final_fraction) * SHAPES[config.schedule](progress)


class Schedule:
    """Learning rates of a run: `schedule(step)` -> one per optimizer group.

    Args:
        peaks: the groups' rates at their highest.
    """

    def __init__(self, peaks: Sequence[float], num_steps: int, config: OptimizerConfig):
        self.peaks, self.num_steps, self.config = list(peaks), num_steps, config

    def __call__(self, step: int) -> list[float]:
        multiplier = lr_multiplier(step, self.num_steps, self.config)
        return [peak * multiplier for peak in self.peaks]
