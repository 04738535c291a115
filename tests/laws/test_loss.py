"""Laws of the fused loss: the same loss and gradients as logits, cross-entropy and a weighted sum, whatever the shape."""

import numpy as np
import pytest
import torch
from conftest import needs_fused_loss

from tokenflex.data import Limits, PackDataset
from tokenflex.data.loader import MicroBatchPlan
from tokenflex.errors import UserError
from tokenflex.model import build_model
from tokenflex.plan import Position
from tokenflex.train.loss import (
    FUSED_MODEL_TYPES,
    answering_losses,
    cross_entropies,
    fused_loss_head,
    weighted_sum,
)
from tokenflex.train.objective import Objective

CPU = torch.device("cpu")


def assert_close_relative(got, wanted, bound=1e-6):
    """Relative Frobenius error; what is exactly zero must stay so."""
    error = (got.double() - wanted.double()).norm()
    assert error <= bound * wanted.double().norm(), f"{error / wanted.double().norm():.2e} > {bound:g}"


@needs_fused_loss
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_tokens, width, vocabulary", [(0, 16, 101), (1, 16, 101), (7, 5, 11), (65, 16, 333)])
def test_fused_equals_plain_over_ragged_sizes(num_tokens, width, vocabulary, has_bias):
    generator = torch.Generator().manual_seed(num_tokens)
    head = torch.nn.Linear(width, vocabulary, bias=has_bias)
    hidden = (3 * torch.randn(1, num_tokens, width, generator=generator)).requires_grad_()
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
    weights = torch.rand(num_tokens, generator=generator)
    plain = weighted_sum(cross_entropies(head(hidden).squeeze(0), targets), weights, 3.3)
    with answering_losses(head, targets):
        losses = head(hidden)
    assert losses.shape == (1, num_tokens)
    fused = weighted_sum(losses.squeeze(0), weights, 3.3)
    assert_close_relative(fused, plain)
    leaves = [hidden, *head.parameters()]
    gradients = torch.autograd.grad(plain, leaves)
    for got, wanted in zip(torch.autograd.grad(fused, leaves), gradients, strict=True):
        assert_close_relative(got, wanted)
    head.requires_grad_(False)  # the language model is frozen
    with answering_losses(head, targets):
        (frozen,) = torch.autograd.grad(weighted_sum(head(hidden).squeeze(0), weights, 3.3), hidden)
    assert_close_relative(frozen, gradients[0])
    assert head(hidden).shape == (1, num_tokens, vocabulary), "the layer answers with logits again"


def test_the_layer_answers_with_logits_again_after_an_error():
    head = torch.nn.Linear(4, 9)
    with pytest.raises(RuntimeError), answering_losses(head, torch.zeros(3, dtype=torch.long)):
        raise RuntimeError
    assert head(torch.zeros(1, 3, 4)).shape == (1, 3, 9)


def gradients(model, batch, normalise, head):
    model.zero_grad()
    loss = Objective(model, normalise, head)(batch).total
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@needs_fused_loss
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("model_type", FUSED_MODEL_TYPES)
def test_every_listed_model_has_the_plain_losss_gradients(model_type, is_tied, tiny_config, processor, index):
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"model_type": model_type, "intermediate_size": 48, "tie_word_embeddings": is_tied, "pad_token_id": 0}
    text |= {"sliding_window": None} if model_type in ("mistral", "phi3") else {}
    torch.manual_seed(1)
    section = tiny_config.model.model_copy(update={"text": text})
    model = build_model(section, tiny_config.budget, processor, torch.float32)
    head = fused_loss_head(model.language_model, "on", CPU)
    dataset = PackDataset(index, processor, "sqrt", blank_count=4, limits=Limits())
    ids = np.concatenate([np.flatnonzero(index.num_images == number)[:2] for number in (0, 1, 2)])
    for chosen in (ids, ids[:0]):  # a mixed micro-batch, and an empty one
        counts = np.where(index.num_images[chosen] > 0, 12, 0)
        batch = dataset.batch(MicroBatchPlan(Position(), True, chosen, counts, 7.0))
        loss, plain = gradients(model, batch, processor.image_processor.normalised, None)
        fused_loss, fused = gradients(model, batch, processor.image_processor.normalised, head)
        assert_close_relative(fused_loss, loss)
        assert plain.keys() == fused.keys() and (len(chosen) > 0) == bool(loss > 0)
        scale = torch.cat([grad.flatten() for grad in plain.values()]).norm()
        for name, wanted in plain.items():  # relative to the whole: some gradients vanish but for rounding
            assert (fused[name] - wanted).norm() <= 1e-6 * scale, name


def test_what_cannot_be_fused_is_plain_or_refused(model, monkeypatch):
    assert fused_loss_head(model.language_model, "off", CPU) is None
    assert fused_loss_head(model.language_model, "auto", CPU) is None, "on CPU the plain loss is the faster one"
    monkeypatch.setattr(model.language_model.config, "model_type", "gemma2")
    assert fused_loss_head(model.language_model, "auto", torch.device("cuda")) is None
    monkeypatch.setattr(torch.nn, "LinearCrossEntropyOptions", None, raising=False)
    with pytest.raises(
        UserError, match="^train.fused_loss=on: language models of type gemma2 .* qwen3.*fused_loss=auto"
    ):
        fused_loss_head(model.language_model, "on", CPU)
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions")
    with pytest.raises(UserError, match="^train.fused_loss=on: torch .* has no chunked linear_cross_entropy, 2.13 has"):
        fused_loss_head(model.language_model, "on", CPU)


@needs_fused_loss
def test_auto_fuses_on_a_gpu(model):
    head = fused_loss_head(model.language_model, "auto", torch.device("cuda"))
    assert head is model.language_model.get_output_embeddings()
