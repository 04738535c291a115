"""Laws of the objective: its parts sum to what goes backward, and a further term is the sum of its shares."""

import numpy as np
import pytest
import torch
from conftest import needs_fused_loss

from tokenflex.data import Limits, PackDataset
from tokenflex.data.loader import MicroBatchPlan
from tokenflex.plan import Position
from tokenflex.train.loss import fused_loss_head
from tokenflex.train.objective import Objective


class Spread:
    """A term that looks at logits: the weighted mean of their squares."""

    name = "spread"
    needs_logits = True

    def __call__(self, outputs, batch):
        return (batch.weights * outputs.logits.squeeze(0).float().square().mean(-1)).sum() / batch.total_weight


class Constant:
    """A term that needs nothing of the model's answer."""

    name = "constant"
    needs_logits = False

    def __call__(self, outputs, batch):
        return 0.1 * batch.weights.sum() / batch.total_weight


@pytest.fixture
def batches(index, processor):
    """One step as one micro-batch, and the same step as two."""
    dataset = PackDataset(index, processor, "sqrt", 4, Limits())
    ids = np.arange(6)
    counts = np.where(index.num_images[ids] > 0, 12, 0)
    whole = dataset.batch(MicroBatchPlan(Position(), True, ids, counts, 5.0))
    halves = [dataset.batch(MicroBatchPlan(Position(), True, ids[at], counts[at], 5.0)) for at in (ids[:2], ids[2:])]
    return whole, halves


def test_parts_sum_to_the_total_and_shares_to_the_step(model, batches, processor):
    whole, halves = batches
    objective = Objective(model, processor.image_processor.normalised, terms=[Spread(), Constant()])
    assert objective.part_names == ("cross_entropy", "spread", "constant")
    loss = objective(whole)
    torch.testing.assert_close(sum(loss.parts.values()), loss.total.detach())
    shares = [objective(half) for half in halves]
    for name, part in loss.parts.items():
        assert part.requires_grad is False and part != 0
        torch.testing.assert_close(sum(share.parts[name] for share in shares), part, rtol=1e-5, atol=1e-6)


def test_a_term_teaches(model, batches, processor):
    """Gradients are those of the cross-entropy plus those of the term."""
    whole, normalise = batches[0], processor.image_processor.normalised
    weight = model.language_model.get_output_embeddings().weight
    plain = torch.autograd.grad(Objective(model, normalise)(whole).total, weight)[0]
    both = torch.autograd.grad(Objective(model, normalise, terms=[Spread()])(whole).total, weight)[0]

    def of_term(objective):
        outputs, _ = objective.token_losses(whole)
        return torch.autograd.grad(Spread()(outputs, whole), weight)[0]

    torch.testing.assert_close(both, plain + of_term(Objective(model, normalise)), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(both, plain)


@needs_fused_loss
def test_a_term_that_needs_logits_gets_them_and_others_leave_the_loss_fused(model, batches, processor):
    normalise = processor.image_processor.normalised
    head = fused_loss_head(model.language_model, "on", torch.device("cpu"))
    assert Objective(model, normalise, head, [Spread()]).fused_head is None
    fused = Objective(model, normalise, head, [Constant()])
    assert fused.fused_head is head
    plain = Objective(model, normalise, None, [Constant()])
    torch.testing.assert_close(fused(batches[0]).total, plain(batches[0]).total, rtol=1e-5, atol=1e-6)
