"""Train a router on what a model made of answers at each count, and find the price of a visual token at every effort.

Shape suffixes: R rows (an image of an answer each), K counts.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..model.router import NUM_PRICES, CountRouter, best_places
from .measure import Measured

HELD_OUT = 0.2
"""Share of the conversations that the router is not trained on: they stop training and set the prices."""
KEPT = 0.99
"""Of what the largest count promises: the default effort is the smallest that keeps it on the held-out conversations."""


@dataclass(frozen=True)
class FitSettings:
    """How a router is trained: `num_members` networks of `hidden_size`, whose mean in logits is one of them laid side by side."""

    hidden_size: int = 128
    num_members: int = 4
    max_epochs: int = 60
    patience: int = 8
    batch_size: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    dropout: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """A trained router; the smallest effort that keeps `KEPT` of what the largest count promises; how training went.

    held_out_loss: cross-entropy of the promises. constant_loss: that of the means of each count, which a router that has learned nothing promises.
    """

    router: CountRouter
    effort: float
    held_out_loss: float
    constant_loss: float
    num_rows: int
    num_held_out: int


def likelihoods(losses_RK: torch.Tensor) -> torch.Tensor:
    """What a router learns to promise: the answers' likelihood per token, in [0, 1], so that one bad answer cannot outweigh many."""
    return (-losses_RK).exp()


def fit_router(measured: Measured, counts: Sequence[int], settings: FitSettings) -> Fitted:
    """A router for `counts` (ascending) from measured answers, the same for the same seed.

    Raises:
        ValueError: too few conversations to train on some and hold others out.
    """
    is_held_out = _held_out(measured.samples, settings.seed)
    if is_held_out.all() or not is_held_out.any():
        raise ValueError(f"{len(measured.tasks)} conversations are too few to train a router on")
    targets = likelihoods(measured.losses)
    fit, held = (targets[~is_held_out], targets[is_held_out])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        seen, unseen = measured.features[~is_held_out], measured.features[is_held_out]
        members = [_trained(counts, (seen, fit), (unseen, held), settings) for _ in range(settings.num_members)]
    router = _side_by_side(members)
    with torch.no_grad():
        loss = float(F.binary_cross_entropy_with_logits(router(unseen), held))
    constant = F.binary_cross_entropy(fit.mean(0).expand_as(held), held)
    effort = calibrate(router, unseen, held)
    return Fitted(router, effort, loss, float(constant), len(fit), len(held))


def _held_out(samples: torch.Tensor, seed: int) -> torch.Tensor:
    """Per row whether it is held out: all rows of a conversation or none."""
    numbers = samples.unique()
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    return torch.isin(samples, numbers[order[: round(HELD_OUT * len(numbers))]])


def _side_by_side(members):
    """One router whose logits are the mean of the members': one of them alone hangs on its random start."""
    router = CountRouter(
        members[0].center.numel(), members[0].counts, sum(member.hidden.out_features for member in members)
    )
    with torch.no_grad():
        router.center.copy_(members[0].center)
        router.scale.copy_(members[0].scale)
        router.hidden.weight.copy_(torch.cat([member.hidden.weight for member in members]))
        router.hidden.bias.copy_(torch.cat([member.hidden.bias for member in members]))
        router.out.weight.copy_(torch.cat([member.out.weight for member in members], dim=1) / len(members))
        router.out.bias.copy_(torch.stack([member.out.bias for member in members]).mean(0))
    return router


def _trained(counts, fit, held_out, settings):
    """A router by AdamW until its held-out loss has not fallen for `patience` epochs, with the best weights."""
    router = CountRouter(fit[0].shape[1], counts, settings.hidden_size)
    router.center.copy_(fit[0].mean(0))
    router.scale.copy_(fit[0].std(0, unbiased=False).clamp(min=1e-4))
    optimizer = torch.optim.AdamW(router.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best, best_state, waited = float("inf"), copy.deepcopy(router.state_dict()), 0
    for _ in range(settings.max_epochs):
        for rows in torch.randperm(len(fit[0])).split(settings.batch_size):
            features = F.dropout((fit[0][rows] - router.center) / router.scale, settings.dropout)
            logits = router.out(F.dropout(F.gelu(router.hidden(features)), settings.dropout))
            loss = F.binary_cross_entropy_with_logits(logits, fit[1][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            now = float(F.binary_cross_entropy_with_logits(router(held_out[0]), held_out[1]))
        waited = waited + 1 if now >= best else 0
        if now < best:
            best, best_state = now, copy.deepcopy(router.state_dict())
        if waited == settings.patience:
            break
    router.load_state_dict(best_state)
    return router


@torch.no_grad()
def calibrate(router: CountRouter, features: torch.Tensor, targets_RK: torch.Tensor) -> float:
    """Set the router's prices by rows that it was not trained on; returns the default effort.

    At the effort e the rows cost on average the share e of the way from the smallest count to the largest, as nearly as their
    promises can be told apart. The default is the smallest effort that keeps `KEPT` of the likelihood at the largest count.
    """
    promised, counts = router(features).sigmoid(), torch.tensor(router.counts, dtype=torch.float)
    steepest = float(counts[-1] / counts.diff().min()) if len(counts) > 1 else 1.0
    wanted = KEPT * float(targets_RK[:, -1].mean())
    default = 1.0
    for number in reversed(range(NUM_PRICES)):
        effort = number / (NUM_PRICES - 1)
        goal = float(counts[0] + effort * (counts[-1] - counts[0]))
        router.prices[number] = _price(promised, router.counts, goal, steepest)
        places = best_places(promised, router.counts, float(router.prices[number]))
        if float(targets_RK.gather(1, places.unsqueeze(1)).mean()) >= wanted:
            default = effort
    return default


def _price(promised, counts, goal, steepest):
    """The price at which rows cost `goal` visual tokens on average; at +-`steepest` all get the smallest or the largest."""
    tokens = torch.tensor(counts, dtype=torch.float)
    low, high = -steepest, steepest
    for _ in range(40):
        middle = (low + high) / 2
        is_dear = float(tokens[best_places(promised, counts, middle)].mean()) > goal
        low, high = (middle, high) if is_dear else (low, middle)
    return (low + high) / 2
