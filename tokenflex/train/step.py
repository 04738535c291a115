"""One micro-step: a packed batch through the model to its share of the step's loss."""

from ..model.attention import packing
from .loss import answering_losses, weighted_cross_entropy, weighted_sum


def batch_loss(model, batch, normalise, fused_head=None):
    """The share of the step's loss that a `PackedBatch` holds.

    `model` is anything that is called like `TokenFlexForConditionalGeneration` (bare or under an engine); `normalise` turns
    image bytes into pixel values. Logits are computed at the learned places only, and with `fused_head` (the model's output
    layer, see `fused_loss_head`) not even there.
    """
    inputs = {**model_inputs(batch, normalise), "logits_to_keep": batch.logits_positions}
    if fused_head is not None:
        with answering_losses(fused_head, batch.targets):
            losses = model(**inputs).logits.squeeze(0)
        return weighted_sum(losses, batch.weights, batch.total_weight)
    outputs = model(**inputs)
    return weighted_cross_entropy(outputs.logits.squeeze(0), batch.targets, batch.weights, batch.total_weight)


def model_inputs(batch, normalise):
    """A `PackedBatch` as the arguments of `TokenFlexForConditionalGeneration.forward` under packed attention."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "pixel_values": normalise(batch.images),
        "num_visual_tokens": batch.counts,
        "visual_positions": batch.visual_positions,
        "is_dummy_image": batch.is_dummy_image,
        **packing(batch.cu_seq_lens, batch.max_length, batch.input_ids.shape[1]),
    }
