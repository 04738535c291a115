"""Ways to choose counts, compared on the same questions: what each gets right and what it costs.

Shape suffixes: Q questions, K counts, E efforts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLDS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.01)
"""Of the cascade: an answer less probable than this is asked again at the next count."""
DRAWS = 2000
"""Of the bootstrap."""


@dataclass(frozen=True)
class Asked:
    """Questions with images, each answered at every count and as the router chose at every effort.

    right: [Q, K] whether exactly. confidence: [Q, K] the model's probability of its own answer, which a cascade goes by; None where
    it gave none (teacher forcing). tiles: [Q] of all images of a question. routed: [Q, E] right at the router's counts. spent: [Q, E] visual tokens of these. shares: [E, K] of the images that got each count.
    """

    keys: list[str]
    tasks: list[str]
    counts: tuple[int, ...]
    efforts: tuple[float, ...]
    tiles: np.ndarray
    right: np.ndarray
    confidence: np.ndarray | None
    routed: np.ndarray
    spent: np.ndarray
    shares: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What a policy comes to: accuracy [Q] in shares (an expectation where it draws) and visual tokens [Q] by question."""

    policy: str
    setting: float | None
    right: np.ndarray
    tokens: np.ndarray


def outcomes(asked: Asked) -> list[Outcome]:
    """Every policy at every setting: each count always, the router, random in the router's shares, the cascade, the oracle."""
    tokens_QK = asked.tiles[:, None] * np.array(asked.counts, dtype=float)
    found = [
        Outcome("always", count, asked.right[:, k].astype(float), tokens_QK[:, k])
        for k, count in enumerate(asked.counts)
    ]
    for e, effort in enumerate(asked.efforts):
        found.append(Outcome("router", effort, asked.routed[:, e].astype(float), asked.spent[:, e].astype(float)))
        found.append(Outcome("random", effort, asked.right @ asked.shares[e], tokens_QK @ asked.shares[e]))
    if asked.confidence is not None:
        found += [cascade(asked, threshold) for threshold in THRESHOLDS]
    best = np.where(asked.right.any(1), asked.right.argmax(1), 0)
    rows = np.arange(len(best))
    return [*found, Outcome("oracle", None, asked.right[rows, best].astype(float), tokens_QK[rows, best])]


def cascade(asked: Asked, threshold: float) -> Outcome:
    """Start at the smallest count and go up while the answer is less probable than `threshold`; every try costs its tokens."""
    assert asked.confidence is not None
    is_sure = asked.confidence >= threshold
    is_sure[:, -1] = True
    last = is_sure.argmax(1)
    rows = np.arange(len(last))
    tokens = asked.tiles * np.cumsum(asked.counts)[last]
    return Outcome("cascade", threshold, asked.right[rows, last].astype(float), tokens.astype(float))


def rows_of(asked: Asked, seed: int = 0) -> list[dict[str, float | str | None]]:
    """A row per outcome: accuracy, mean visual tokens of a question, and both as shares of the largest count's.

    `kept_low` and `kept_high` are the 95 % interval of the share of accuracy by a bootstrap over questions.
    """
    all_outcomes = outcomes(asked)
    largest = all_outcomes[len(asked.counts) - 1]
    num = len(largest.right)
    weights = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), DRAWS) / num
    base, rows = weights @ largest.right, []
    for outcome in all_outcomes:
        low, high = (
            np.percentile((weights @ outcome.right)[base > 0] / base[base > 0], [2.5, 97.5]) if base.any() else (0, 0)
        )
        rows.append(
            {
                "policy": outcome.policy,
                "setting": outcome.setting,
                "accuracy": float(outcome.right.mean()),
                "tokens": float(outcome.tokens.mean()),
                "kept": float(outcome.right.mean() / max(largest.right.mean(), 1e-12)),
                "kept_low": float(low),
                "kept_high": float(high),
                "token_share": float(outcome.tokens.mean() / largest.tokens.mean()),
            }
        )
    return rows


def accuracy_at(rows: Sequence[dict], policy: str, token_share: float) -> float:
    """Accuracy of a policy at a share of tokens, between its two settings beside it (a mix of them has it on average).

    A policy that never costs so little or so much answers with its cheapest or dearest setting.
    """
    points = sorted((row["token_share"], row["accuracy"]) for row in rows if row["policy"] == policy)
    shares, accuracy = zip(*points)
    return float(np.interp(token_share, shares, np.maximum.accumulate(accuracy)))
