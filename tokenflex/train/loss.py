"""The loss: a weighted sum of cross-entropies over the learned tokens of a step, divided by one global weight.

Two ways to each token's cross-entropy. Plain: the model answers with logits [L, V]. Fused: the output layer itself answers
with losses [L], by torch's own chunked `linear_cross_entropy`, and no [L, V] tensor is ever whole. Shape suffixes: L learned
tokens, V vocabulary, D width.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FUSED_MODEL_TYPES = ("llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
"""Language models whose logits are `lm_head(hidden)` and nothing more; others cap or scale them afterwards."""


def cross_entropies(logits_LV: torch.Tensor, targets_L: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each learned token: [L] in fp32."""
    return F.cross_entropy(logits_LV.float(), targets_L, reduction="none")


def weighted_sum(losses_L: torch.Tensor, weights_L: torch.Tensor, total_weight: float) -> torch.Tensor:
    """Sum of weight * loss, divided by the weight of the whole step: a scalar in fp32.

    `total_weight` spans all ranks and micro-steps, so the sum of this over them is the step's loss however the step is cut
    up; an empty micro-batch gives an exact zero that still reaches every weight.
    """
    return (losses_L.float() * weights_L).sum() / max(total_weight, 1e-30)


def fused_loss_head(language_model: "PreTrainedModel", mode: str, device: torch.device) -> torch.nn.Module | None:
    """The output layer whose loss is fused, or None for the plain loss; `mode` is `auto`, `on` or `off`.

    Raises:
        UserError: `on`, and torch or this type of model does not allow it.
    """
    obstacle = "" if mode == "off" else _obstacle(language_model.config.model_type)
    if mode == "on" and obstacle:
        raise UserError(f"train.fused_loss=on: {obstacle}; set train.fused_loss=auto, which takes the plain loss then")
    # On CPU the memory saved is not worth the time: 4x less, but 3.4x slower (fp32, 2,048 x 32,000, width 256).
    if mode == "off" or obstacle or (mode == "auto" and device.type != "cuda"):
        return None
    return language_model.get_output_embeddings()


def _obstacle(model_type: str) -> str:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunked linear_cross_entropy, 2.13 has"
    if model_type not in FUSED_MODEL_TYPES:
        return f"language models of type {model_type} are not known to have plain logits ({', '.join(FUSED_MODEL_TYPES)} are)"
    return ""


@contextlib.contextmanager
def answering_losses(head: torch.nn.Module, targets_L: torch.Tensor) -> Iterator[None]:
    """Within this context the output layer `head` answers hidden states [1, L, D] with cross-entropies [1, L], not logits.

    The computation stays inside the layer's own call, because that is where ZeRO-3 gathers its weight, before the forward
    and again before the backward pass, also where the weight is the embedding's.
    """

    def forward(hidden_1LD: torch.Tensor) -> torch.Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        losses_L = F.linear_cross_entropy(
            hidden_1LD.squeeze(0), head.weight, targets_L, linear_bias=head.bias, reduction="none", options=options
        )
        return losses_L.unsqueeze(0)

    head.forward = forward
    try:
        yield
    finally:
        del head.forward
