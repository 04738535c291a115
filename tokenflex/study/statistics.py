"""Differences between two arms with their uncertainty: seeds and questions both drawn anew, paired throughout."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["better", "non-inferior", "inconclusive", "worse"]
MARGIN = 0.01
"""Non-inferior: not more than this below, in shares of all questions."""


@dataclass(frozen=True)
class Difference:
    """Mean accuracy of one arm minus another's, in shares.

    low, high: 95 % interval. p_better, p_worse, p_inferior: one-sided p-values of "not better", "not worse" and "below by
    more than `MARGIN`". num_seeds: pairs of runs.
    """

    mean: float
    low: float
    high: float
    p_better: float
    p_worse: float
    p_inferior: float
    num_seeds: int


def paired_difference(
    ours: np.ndarray, theirs: np.ndarray, tasks: np.ndarray, images: np.ndarray, draws: int = 4000, seed: int = 0
) -> Difference:
    """The difference of two arms by a bootstrap over seeds and, within every task, over images.

    Args:
        ours, theirs: [S, Q] whether each question was answered, by seed; row s of both saw the same data in the same order.
        tasks, images: [Q] the task of each question, and what its images are: questions about one image are drawn together.
        draws: of the bootstrap.

    Seeds and images are crossed (every seed answers the same questions), so both are drawn independently. S - 1 of S seeds
    are drawn: with few seeds a bootstrap of S would understate their variance by (S - 1) / S.

    Raises:
        ValueError: fewer than two seeds, or shapes that do not fit.
    """
    if ours.shape != theirs.shape or ours.shape[1:] != tasks.shape or tasks.shape != images.shape:
        raise ValueError(
            f"answers {ours.shape} and {theirs.shape} for {tasks.shape} tasks and {images.shape} images: wanted [S, Q] "
            "twice and [Q]"
        )
    num_seeds = len(ours)
    if num_seeds < 2:
        raise ValueError(f"{num_seeds} seed: an interval over seeds needs two or more")
    difference = ours.astype(np.float64) - theirs
    generator = np.random.default_rng(seed)
    seed_weights = generator.multinomial(num_seeds - 1, np.full(num_seeds, 1 / num_seeds), draws) / (num_seeds - 1)
    drawn, names = np.zeros(draws), np.unique(tasks)
    for task in names:
        of_task = np.flatnonzero(tasks == task)
        _, image = np.unique(images[of_task], return_inverse=True)
        num_images = int(image.max()) + 1
        sums = np.stack([np.bincount(image, row[of_task], num_images) for row in difference])  # [S, images]
        sizes = np.bincount(image, minlength=num_images)
        weights = generator.multinomial(num_images, np.full(num_images, 1 / num_images), draws)  # [draws, images]
        drawn += np.einsum("ds,ds->d", seed_weights, weights @ sums.T) / (weights @ sizes) / len(names)
    low, high = np.quantile(drawn, [0.025, 0.975])
    mean = float(np.mean([difference[:, tasks == task].mean() for task in names]))
    return Difference(mean, float(low), float(high), _p(drawn <= 0), _p(drawn >= 0), _p(drawn <= -MARGIN), num_seeds)


def _p(is_against: np.ndarray) -> float:
    """Share of draws against a claim; never an exact zero, which so many draws cannot show."""
    return float((is_against.sum() + 1) / (len(is_against) + 1))


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for as many claims (Holm, 1979), in their order."""
    order = np.argsort(p_values)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def verdicts(differences: list[Difference], level: float = 0.025) -> list[Verdict]:
    """What may be said of each of a family of differences, every claim corrected over the family at a one-sided `level`."""
    better, worse, not_inferior = (
        holm([getattr(difference, name) for difference in differences])
        for name in ("p_better", "p_worse", "p_inferior")
    )
    results: list[Verdict] = []
    for p_better, p_worse, p_inferior in zip(better, worse, not_inferior):
        if p_better <= level:
            results.append("better")
        elif p_worse <= level:
            results.append("worse")
        else:
            results.append("non-inferior" if p_inferior <= level else "inconclusive")
    return results
