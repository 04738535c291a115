"""What a step minimises: a packed batch through the model to its share of the step's loss, term by term.

The first term is always the cross-entropy of the learned tokens. Others are added here and nowhere else: a consistency
between counts, a part's own auxiliary loss. See `docs/architecture.md` for how.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..data.collate import PackedBatch
from ..model.attention import packing
from .loss import answering_losses, cross_entropies, weighted_sum


@dataclass(frozen=True)
class Loss:
    """One micro-batch's share of a step's loss; summed over ranks and micro-steps it is the step's.

    total: scalar with its graph. parts: its terms by name, without. token_losses: [L] cross-entropy of each learned token,
    neither weighted nor divided, without graph.
    """

    total: torch.Tensor
    parts: dict[str, torch.Tensor]
    token_losses: torch.Tensor


class LossTerm(Protocol):
    """A further term of the loss.

    name: under which it is logged, as `loss/<name>`. needs_logits: `outputs.logits` must be logits; else they may be
    cross-entropies already, from the fused loss.
    """

    name: str
    needs_logits: bool

    def __call__(self, outputs: Any, batch: PackedBatch) -> torch.Tensor:
        """This micro-batch's share of the term, a scalar: what it sums to over ranks and micro-steps is the step's."""


class Objective:
    """`objective(batch)` -> `Loss`; built once per run.

    Args:
        model: anything called like `TokenFlexForConditionalGeneration`, bare or under an engine.
        normalise: image bytes [B, H, W, 3] -> pixel values [B, 3, H, W].
        fused_head: the model's output layer where its loss is fused (`fused_loss_head`), or None: logits are then computed
            at the learned places only; with it not even there.
        terms: added to the cross-entropy.
    """

    def __init__(
        self,
        model: Callable,
        normalise: Callable[[torch.Tensor], torch.Tensor],
        fused_head: torch.nn.Module | None = None,
        terms: Sequence[LossTerm] = (),
    ):
        self.model, self.normalise, self.terms = model, normalise, tuple(terms)
        self.fused_head = None if any(term.needs_logits for term in self.terms) else fused_head

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the loss' terms."""
        return ("cross_entropy", *(term.name for term in self.terms))

    def __call__(self, batch: PackedBatch) -> Loss:
        outputs, losses_L = self.token_losses(batch)
        cross_entropy = weighted_sum(losses_L, batch.weights, batch.total_weight)
        losses = [cross_entropy, *(term(outputs, batch) for term in self.terms)]
        total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        parts = {name: loss.detach() for name, loss in zip(self.part_names, losses)}
        return Loss(total, parts, losses_L.detach())

    def token_losses(self, batch: PackedBatch) -> tuple[Any, torch.Tensor]:
        """(the model's outputs, the cross-entropy of each learned token: [L])."""
        inputs = {**model_inputs(batch, self.normalise), "logits_to_keep": batch.logits_positions}
        if self.fused_head is not None:
            with answering_losses(self.fused_head, batch.targets):
                outputs = self.model(**inputs)
            return outputs, outputs.logits.squeeze(0)
        outputs = self.model(**inputs)
        return outputs, cross_entropies(outputs.logits.squeeze(0), batch.targets)


def model_inputs(batch: PackedBatch, normalise: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """A `PackedBatch` as the arguments of `TokenFlexForConditionalGeneration.forward` under packed attention."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "pixel_values": normalise(batch.images),
        "num_visual_tokens": batch.tile_sides,
        "pool_plan": batch.pool_plan,
        "tile_index": batch.tile_index,
        "visual_positions": batch.visual_positions,
        "is_dummy_image": batch.is_dummy_image,
        **packing(batch.cu_seq_lens, batch.max_length, batch.input_ids.shape[1]),
    }
