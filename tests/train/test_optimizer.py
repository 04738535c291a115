"""Laws of the groups and of the optimizers: who is trained how fast, and what an update by Muon is."""

import pytest
import torch

from tokenflex.config import OptimizerConfig, load_config
from tokenflex.model.adapters import add_adapters
from tokenflex.train.optimizer import (
    MUON_SIZE,
    VetoableAdamW,
    VetoableOrthogonal,
    layer_scales,
    make_optimizer,
    orthogonal,
    parameter_groups,
)


def groups_of(model, *overrides):
    return parameter_groups(model, load_config(None, [f"optimizer.{text}" for text in overrides]).optimizer)


def test_every_trained_weight_is_in_one_group_with_its_parts_settings(model):
    groups = groups_of(
        model, "text.betas=[0.7,0.8]", "text.weight_decay=0.3", "projector.learning_rate=1e-3", "matrices=muon"
    )
    members = [p for group in groups for p in group["params"]]
    assert len(members) == len(set(members)) == len(list(model.parameters()))
    of = {p: group for group in groups for p in group["params"]}
    norm, query = model.language_model.model.norm.weight, model.language_model.model.layers[0].self_attn.q_proj.weight
    assert of[norm]["betas"] == of[query]["betas"] == (0.7, 0.8)
    assert (of[norm]["weight_decay"], of[query]["weight_decay"]) == (0.0, 0.3)
    down = of[model.projector.down.weight]
    assert (down["lr"], down["betas"], down["weight_decay"]) == (1e-3, (0.9, 0.95), 0.05)


def test_muon_moves_the_matrices_of_linear_layers_and_nothing_that_embeds(model):
    groups = groups_of(model, "matrices=muon", "vision.train=false")
    by_muon = {p for group in groups if "muon_momentum" in group for p in group["params"]}
    names = {name for name, p in model.named_parameters() if p in by_muon}
    assert "projector.gate_up.weight" in names and all(name.endswith("weight") for name in names)
    assert not any("embed" in name or "lm_head" in name or "norm" in name or "vision" in name for name in names)
    assert not any("muon_momentum" in group for group in groups_of(model))


def test_an_adapter_and_the_image_tokens_rows_are_trained_together(model):
    """What the adapter stands on is frozen; the embedding gets a gradient in three rows."""
    add_adapters(model, load_config(None, ["model.text_adapter.rank=2"]).model)
    groups = groups_of(model, "train_image_tokens=true")
    members = {p for group in groups for p in group["params"]}
    text = {name for name, p in model.language_model.named_parameters() if p in members}
    assert "model.embed_tokens.weight" in text and all(
        ".lora_" in name for name in text - {"model.embed_tokens.weight"}
    )
    assert members == {p for p in model.parameters() if p.requires_grad}


def test_a_layers_rate_is_a_share_of_the_one_aboves():
    names = ["t.embed.weight", "t.layers.0.a", "t.layers.1.a", "t.layers.1.inner.7.b", "t.norm.weight"]
    assert layer_scales(names, 0.5) == dict(zip(names, [0.125, 0.25, 0.5, 0.5, 1.0]))
    assert set(layer_scales(names, 1.0).values()) == {1.0}
    assert layer_scales(["p.norm", "p.down"], 0.5) == {"p.norm": 1.0, "p.down": 1.0}, "a part without layers"


def test_layer_decay_reaches_the_groups(model):
    groups = groups_of(model, "text.layer_decay=0.5", "text.learning_rate=8e-3")
    of = {p: group["lr"] for group in groups for p in group["params"]}
    text = model.language_model.model
    assert of[text.norm.weight] == 8e-3 and of[text.layers[-1].mlp.up_proj.weight] == pytest.approx(4e-3)
    assert of[text.embed_tokens.weight] == pytest.approx(8e-3 * 0.5 ** (1 + len(text.layers)))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 24), (64, 64), (1, 9), (300, 5)])
def test_an_orthogonal_update_has_adamws_size_and_the_matrix_singular_vectors(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    update = orthogonal(matrix)
    values = torch.linalg.svdvals(update) / (MUON_SIZE * max(shape) ** 0.5)
    assert values.max() < 1.3 and values.median() > 0.6
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    mixed = left.T @ update @ right.T
    torch.testing.assert_close(mixed, torch.diag(mixed.diagonal()), rtol=0, atol=1e-4)
    torch.testing.assert_close(orthogonal(1000 * matrix), update, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(orthogonal(matrix.T), update.T, rtol=1e-4, atol=1e-5)


def optimizer_of(weight, is_vetoed, **settings):
    config = OptimizerConfig(matrices="muon", **settings)
    group = {"params": [weight], "lr": 0.1, "weight_decay": 0.5, "betas": (0.9, 0.95), "muon_momentum": 0.9}
    make = make_optimizer([group], config)
    return make(lambda: is_vetoed[0], lambda members, flat, values, function: values.copy_(function(values)))


def test_muon_by_its_formula_and_a_veto_that_keeps_every_bit():
    weight, gradient = torch.nn.Parameter(torch.randn(4, 6)), torch.randn(4, 6)
    is_vetoed, before = [False], weight.detach().clone()
    optimizer = optimizer_of(weight, is_vetoed)
    assert isinstance(optimizer, VetoableOrthogonal)
    weight.grad = gradient.clone()
    optimizer.step()
    momentum = 0.1 * gradient
    wanted = before * (1 - 0.1 * 0.5) - 0.1 * orthogonal(0.1 * gradient + 0.9 * momentum)
    torch.testing.assert_close(weight.detach(), wanted)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], momentum)
    assert set(optimizer.state[weight]) == {"step", "exp_avg"} and torch.equal(weight.grad, gradient)
    is_vetoed[0], moved = True, weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, moved) and torch.equal(optimizer.state[weight]["exp_avg"], momentum)
    assert int(optimizer.state[weight]["step"]) == 1 and len(optimizer.param_groups) == 1


def test_deepspeed_does_not_take_our_muon_for_its_own():
    """It goes by the class' name and by `use_muon` of parameters: its own would move the momentum before a veto."""
    for kind in (VetoableAdamW, VetoableOrthogonal):
        assert "muon" not in kind.__name__.lower()
