"""Which steps must not move the weights: those that are not finite, and those far outside what the last steps were."""

import math
import statistics

HISTORY = 128
"""Steps that the present one is compared with."""
MIN_STEPS = 64
"""Steps that must have been seen before anything counts as a spike."""


class SpikeFilter:
    """Judges the loss and the gradient norm of each step; a pure function of the values it has seen.

    Spikes enter the history too: a loss that jumps and stays up (another curriculum, other data) is skipped for about
    four steps of 128 and then accepted, as it has widened the spread by then.

    Args:
        sigma: standard deviations above the mean that make a spike; 0 for never.
        history: {"loss": [...], "gradient norm": [...]} to go on from; it is kept up to date, and is what a checkpoint saves.
    """

    def __init__(self, sigma: float, history: dict[str, list[float]]):
        self.sigma = sigma
        self.history = history
        for name in ("loss", "gradient norm"):
            history.setdefault(name, [])

    def judge(self, loss: float, grad_norm: float) -> str:
        """Why the step must be skipped, in words, or an empty string; every rank gives the same values and gets the same."""
        reasons = []
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            seen = self.history[name]
            if not math.isfinite(value):
                reasons.append(f"{name} is {value}")
                continue
            if self.sigma and len(seen) >= MIN_STEPS:
                mean, spread = statistics.fmean(seen), statistics.pstdev(seen)
                if value > mean + self.sigma * spread:
                    reasons.append(f"{name} {value:.4g} is far above {mean:.4g} +- {spread:.2g}")
            seen.append(value)
            del seen[:-HISTORY]
        return "; ".join(reasons)

    def mean_loss(self) -> float | None:
        """Mean loss of the last steps, or None before the first."""
        return statistics.fmean(self.history["loss"]) if self.history["loss"] else None
