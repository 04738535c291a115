"""The loss: a weighted sum of cross-entropies over the learned tokens of a step, divided by one global weight."""

import torch.nn.functional as F


def weighted_cross_entropy(logits_LV, targets_L, weights_L, total_weight):
    """Sum over learned tokens of weight * cross-entropy, divided by the weight of the whole step: a scalar in fp32.

    `total_weight` spans all ranks and micro-steps, so the sum of this over them is the step's loss however the step is cut
    up; an empty micro-batch gives an exact zero that still reaches every weight.
    """
    losses_L = F.cross_entropy(logits_LV.float(), targets_L, reduction="none")
    return (losses_L * weights_L).sum() / max(total_weight, 1e-30)
