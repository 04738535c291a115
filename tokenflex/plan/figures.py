"""Figures of a plan: how full packs are, and how long ranks wait for each other in each micro-step.

Under ZeRO-3 ranks meet at every layer, so the vision phase and the language phase each wait for their slowest rank:
z3_waste = 1 - mean(V + L) / (max V + max L) over the ranks of a micro-step. It is a cost model, not a timing.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ..config.schema import CostConfig


@dataclass(frozen=True)
class PackTotals:
    """Per pack, in emitted order, all [packs]: tokens, tiles, language cost and number of samples; what figures come from."""

    tokens: np.ndarray
    tiles: np.ndarray
    cost: np.ndarray
    samples: np.ndarray


def totals(pack: np.ndarray, tokens: np.ndarray, tiles: np.ndarray, num_packs: int, cost: CostConfig) -> PackTotals:
    """`PackTotals` of samples in packs: pack, tokens, tiles [S]; `cost` is the configuration's cost section."""
    tokens, tiles = np.asarray(tokens, np.float64), np.asarray(tiles, np.float64)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(pack, weights=values, minlength=num_packs)

    language = total(cost.per_token * tokens + cost.per_token_pair * tokens**2)
    return PackTotals(total(tokens), total(tiles), language, np.bincount(pack, minlength=num_packs))


@dataclass
class Figures:
    """Sums over a plan, fed a window at a time; `result()` has the figures. cost: the configuration's cost section."""

    capacity: int
    num_ranks: int
    cost: CostConfig
    sums: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("language", "vision", "max_language", "max_vision"), 0.0)
    )
    num_packs: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_steps: int = 0
    without_image: int = 0
    max_tiles: int = 0
    max_tokens: int = 0
    fill: np.ndarray = field(default_factory=lambda: np.zeros(1001, np.int64))
    steps: list[tuple[float, float, float]] = field(default_factory=list)
    MAX_STEPS: ClassVar[int] = 4096

    def add(self, packs: PackTotals) -> None:
        """Packs (`PackTotals`) in emitted order; every `num_ranks` make a micro-step, an incomplete last one is not one."""
        used = packs.samples > 0
        self.num_packs += int(used.sum())
        self.num_samples += int(packs.samples.sum())
        self.num_tokens += int(packs.tokens.sum())
        self.without_image += int((used & (packs.tiles == 0)).sum())
        self.max_tiles = max(self.max_tiles, int(packs.tiles.max(initial=0)))
        self.max_tokens = max(self.max_tokens, int(packs.tokens.max(initial=0)))
        self.fill += np.bincount((packs.tokens[used] * 1000 // self.capacity).astype(np.int64), minlength=1001)[:1001]
        num_steps = len(used) // self.num_ranks
        by_step = lambda values: values[: num_steps * self.num_ranks].reshape(num_steps, self.num_ranks)  # noqa: E731
        whole = by_step(used).all(axis=1)
        language, vision = by_step(packs.cost)[whole], by_step(packs.tiles)[whole] * float(self.cost.per_tile)
        self.num_steps += len(language)
        for name, values in (("language", language), ("vision", vision)):
            self.sums[name] += float(values.mean(axis=1).sum())
            self.sums["max_" + name] += float(values.max(axis=1, initial=0).sum())
        if len(self.steps) < self.MAX_STEPS:
            both = language + vision
            waited = language.max(axis=1, initial=0) + vision.max(axis=1, initial=0)
            self.steps += list(zip(both.min(axis=1, initial=np.inf), both.mean(axis=1), waited))

    def result(self) -> dict[str, Any]:
        """Shares between 0 and 1, and numbers; wastes are 0 where there is no whole micro-step."""
        waste = lambda mean, slowest: 1 - mean / slowest if slowest else 0.0  # noqa: E731
        sums = self.sums
        z3_waste = waste(sums["language"] + sums["vision"], sums["max_language"] + sums["max_vision"])
        utilisation = self.num_tokens / max(self.num_packs * self.capacity, 1)
        return {
            "samples": self.num_samples,
            "packs": self.num_packs,
            "micro_steps": self.num_steps,
            "utilisation": utilisation,
            "llm_waste": waste(sums["language"], sums["max_language"]),
            "vision_waste": waste(sums["vision"], sums["max_vision"]),
            "z3_waste": z3_waste,
            "effective": utilisation * (1 - z3_waste),
            "max_tokens": self.max_tokens,
            "max_tiles": self.max_tiles,
            "packs_without_image": self.without_image,
        }
