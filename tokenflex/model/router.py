"""The router: which of the trained counts an image needs for a question, by what is there before the language model runs.

Travels with every exported model, so it imports nothing but torch. Shape suffixes: N images, P patches, C vision width,
D text width, F = 2 C + D features, K counts, B batch rows, T tokens.
"""

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import nn

AUTO = "auto"
"""In place of a count: the router chooses it."""
NUM_PRICES = 101
"""Efforts from 0 to 1, equally spaced, at which the price of visual tokens is known."""


class CountRouter(nn.Module):
    """How likely the answer is at each count, for images and their questions; an effort chooses among them.

    Two linear layers on features [N, F], which are standardised first; the answer [N, K] is in logits. A count is chosen by what it
    promises less its share of the largest count times a price. The effort sets the price: `prices[i]` at the effort i / (NUM_PRICES - 1), so found
    that on held-out training data effort e costs, of the way from the smallest count to the largest, the share e.

    Args:
        num_features: F.
        counts: visual tokens, ascending.
        hidden_size: between the two layers.
    """

    def __init__(self, num_features: int, counts: Sequence[int], hidden_size: int):
        super().__init__()
        self.counts = list(counts)
        self.register_buffer("center", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))
        self.register_buffer("prices", torch.full((NUM_PRICES,), float("nan")))  # until it is calibrated
        self.hidden = nn.Linear(num_features, hidden_size)
        self.out = nn.Linear(hidden_size, len(self.counts))

    def forward(self, features_NF: torch.Tensor) -> torch.Tensor:
        standard_NF = (features_NF.to(self.center.dtype) - self.center) / self.scale
        return self.out(F.gelu(self.hidden(standard_NF)))

    def choose(self, features_NF: torch.Tensor, effort: float) -> list[int]:
        """A count per image. Effort 0 is always the smallest, 1 the largest, and no image gets less at a higher effort.

        Raises:
            ValueError: an effort that is not in [0, 1], or a router that has not been calibrated.
        """
        check_effort(effort)
        if effort in (0, 1):
            return [self.counts[-int(effort)]] * len(features_NF)
        if self.prices.isnan().any():
            raise ValueError(
                "the router has no prices: it was not calibrated, or its weights did not come; train it again"
            )
        place = effort * (NUM_PRICES - 1)
        price = torch.lerp(self.prices[int(place)], self.prices[int(place) + 1], place - int(place))
        places = best_places(self(features_NF).float().sigmoid(), self.counts, float(price))
        return [self.counts[place] for place in places.tolist()]


def best_places(promised_NK: torch.Tensor, counts: Sequence[int], price: float) -> torch.Tensor:
    """Which count is best for each image at a price: its place [N]. Of equals the smaller; dearer tokens are never more tokens."""
    shares_K = torch.tensor(counts, dtype=promised_NK.dtype, device=promised_NK.device) / max(counts)
    return (promised_NK - price * shares_K).argmax(-1)


def check_effort(effort: float) -> None:
    """See that an effort is one.

    Raises:
        ValueError: it is no number in [0, 1].
    """
    if isinstance(effort, bool) or not isinstance(effort, (int, float)) or not 0 <= effort <= 1:
        raise ValueError(f"effort is {effort!r}; it must be a number from 0 (fewest visual tokens) to 1 (most)")


def asks_auto(num_visual_tokens: object) -> bool:
    """Whether the count of some image is left to the router."""
    entries = num_visual_tokens if isinstance(num_visual_tokens, (list, tuple)) else [num_visual_tokens]
    return any(isinstance(entry, str) and entry == AUTO for entry in entries)


def image_summary(features: torch.Tensor, tiles: Sequence[int]) -> torch.Tensor:
    """Mean and spread of the patch features [tiles, P, C] of each image: [N, 2 C] in fp32."""
    flat = [image.flatten(0, 1).float() for image in features.split(list(tiles))]
    return torch.stack([torch.cat([image.mean(0), image.std(0, unbiased=False)]) for image in flat])


def question_mask(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, not_text: Collection[int], turn_ends: Collection[int]
) -> torch.Tensor:
    """Which tokens [B, T] of prompts are the question: the text behind the last turn but one that has ended.

    A prompt ends with the user's turn and the beginning of an answer. Where fewer turns end, all text is the question.

    Args:
        not_text: ids that stand for images.
        turn_ends: ids that end a turn.
    """
    is_end = torch.isin(input_ids, input_ids.new_tensor(list(turn_ends))) & attention_mask.bool()
    ends_behind = is_end.flip(1).cumsum(1).flip(1)  # those from here on, so two or more up to the last turn but one
    is_text = ~torch.isin(input_ids, input_ids.new_tensor(list(not_text))) & attention_mask.bool()
    return is_text & (ends_behind < 2)


def question_summary(embeddings_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean embedding [B, D] in fp32 of the tokens of each row's question; zero where there are none."""
    weights = mask_BT.unsqueeze(-1).float()
    return (embeddings_BTD.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
