"""Consistency between counts: what a sample's answers are at its largest count, they are to be at its others (ViCO)."""

from typing import Any

import torch
import torch.nn.functional as F

from ..data.collate import PackedBatch
from .loss import weighted_sum


class Consistency:
    """A `LossTerm`: `weight` times the Kullback-Leibler divergence of the answers at smaller counts from those at the largest.

    Of each learned token the distribution in the sample's first view is the teacher, without a gradient. Tokens weigh as in
    the cross-entropy, and the step's weight, which spans all views, divides.
    """

    name = "consistency"
    needs_logits = True

    def __init__(self, weight: float):
        self.weight = weight

    def __call__(self, outputs: Any, batch: PackedBatch) -> torch.Tensor:
        logits_LV = outputs.logits.squeeze(0)
        if batch.teacher is None:  # text alone, or an empty pack
            return 0.0 * logits_LV.float().sum()
        students = (batch.teacher >= 0).nonzero().squeeze(1)
        log_students = F.log_softmax(logits_LV[students].float(), dim=-1)
        log_teachers = F.log_softmax(logits_LV[batch.teacher[students]].detach().float(), dim=-1)
        divergences = F.kl_div(log_students, log_teachers, reduction="none", log_target=True).sum(-1)
        return self.weight * weighted_sum(divergences, batch.weights[students], batch.total_weight)
