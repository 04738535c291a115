"""The probe tells parts that work from parts that would train wrong: over transformers' own kinds, and over broken ones."""

import re

import pytest
import torch
import zoo

from tokenflex.errors import UserError
from tokenflex.model.attention import PACKED
from tokenflex.model.probe import critical_lengths, probe

CPU = torch.device("cpu")

TEXT = {
    "qwen3": "equal",
    "gemma2": "equal",  # windows and a cap on the scores
    "gpt_oss": "equal",  # sinks
    "llama4_text": "equal",  # chunks
    "mixtral": "equal",
    "phimoe": "equal within its window, beyond it refused: a sample of .* tokens in a pack is .* off the same sample alone",
    "jamba": "refused: samples of a pack reach each other",
    "lfm2": "refused: it cannot be run on packed samples .*can't keep packed sequences apart without `causal_conv1d`",
    "bloom": "refused: its attention cannot be replaced",
    "bart": "refused: a sample of .* tokens in a pack is .* off the same sample alone",
    "inkling_text": "refused: .*packed attention got position_bias",
}

VISION = {
    "siglip2_vision_model": "equal",
    "vit": "equal",  # positions are interpolated
    "qwen2_5_vl_vision": "equal",
    "qwen3_vl_vision": "equal",
    "convnext": "equal",
    "aimv2_vision_model": "equal at its own size, at another refused: it cannot be run",
    "sam_vision_model": "refused: ",
}


@pytest.mark.parametrize("model_type", TEXT)
def test_language_models_of_every_kind(model_type):
    result = zoo.try_text(model_type)
    assert re.match(TEXT[model_type] + ("$" if TEXT[model_type] == "equal" else ""), result), result


@pytest.mark.parametrize("model_type", VISION)
def test_vision_encoders_of_every_kind(model_type):
    result = zoo.try_vision(model_type)
    assert re.match(VISION[model_type] + ("$" if VISION[model_type] == "equal" else ""), result), result


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "vision"])
def test_no_type_of_transformers_is_wrong(kind):
    """Each is equal or refused by name; a type that cannot be built tiny here is told, and a run probes it anyway."""
    types, tried = {"text": (zoo.text_types, zoo.try_text), "vision": (zoo.vision_types, zoo.try_vision)}[kind]
    results = {model_type: tried(model_type) for model_type in types()}
    kinds = ("equal", "refused: ", "not tried: ", "its text part is: ")
    assert all(result.startswith(kinds) for result in results.values()), results
    assert sum(result.startswith("equal") for result in results.values()) >= (90 if kind == "text" else 30)


def tiny(text=zoo.PLAIN_TEXT, vision=zoo.PLAIN_VISION, size=(48, 64)):
    return zoo.build(vision, text, size, "text")


BROKEN = {
    "column by column": lambda f: f.view(-1, 6, 8, 32).transpose(1, 2).reshape(-1, 32),
    "upside down": lambda f: f.view(-1, 6, 8, 32).flip(1).reshape(-1, 32),
    "mirrored": lambda f: f.view(-1, 6, 8, 32).flip(2).reshape(-1, 32),
    "shifted by 1": lambda f: f.view(-1, 48, 32).roll(1, 1).reshape(-1, 32),
    "no order known here": lambda f: f.view(-1, 48, 32)[:, torch.arange(48) * 7 % 48].reshape(-1, 32),
}


@pytest.mark.parametrize("order", BROKEN)
def test_features_in_another_order_are_refused_by_its_name(order):
    model = tiny()
    model.projector.register_forward_pre_hook(lambda module, inputs: (BROKEN[order](inputs[0]), *inputs[1:]))
    with pytest.raises(
        UserError, match=f"model.vision siglip_vision_model at 48 x 64 pixels: .*{order}.*docs/models.md"
    ):
        probe(model, model, CPU, 640)


def test_images_that_see_each_other_are_refused():
    model = tiny()
    leak = lambda module, inputs: (inputs[0] + inputs[0].abs().mean() * len(inputs[1]), *inputs[1:])
    model.projector.register_forward_pre_hook(leak)
    with pytest.raises(UserError, match="an image's features differ by .* when others are encoded beside it"):
        probe(model, model, CPU, 640)


def test_a_feature_too_many_is_refused():
    model = tiny()
    longer = lambda module, inputs: (torch.cat([inputs[0], inputs[0][:1]]), *inputs[1:])
    model.projector.register_forward_pre_hook(longer)
    with pytest.raises(UserError, match="model.vision .* 49 feature rows but the grids hold 48 patches"):
        probe(model, model, CPU, 640)


@pytest.mark.parametrize("text", [zoo.PLAIN_TEXT, {**zoo.PLAIN_TEXT, "model_type": "jamba", "num_experts": 2}])
def test_nothing_is_left_changed(text):
    """Whether the probe passes or refuses: modes, weights, buffers, gradients, attention, random states."""
    model = tiny(text)
    model.vision_tower.eval()  # as a frozen part may be
    state = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    try:
        probe(model, model, CPU, 640)
    except UserError:
        assert text is not zoo.PLAIN_TEXT
    assert modes == [module.training for module in model.modules()] and torch.equal(random, torch.get_rng_state())
    assert model.language_model.config._attn_implementation == PACKED
    assert all(p.grad is None for p in model.parameters())
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(value, state[name]), name


def test_stretched_positions_are_tried_where_a_sample_can_be_that_long():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    text = {**zoo.PLAIN_TEXT, "rope_parameters": rope, "max_position_embeddings": 64}
    model = tiny(text)
    assert critical_lengths(model.config.text_config) == [64]
    probe(model, model, CPU, pack_length=64)
    with pytest.raises(UserError, match="in a pack is .* off the same sample alone.*data.pack_length=64"):
        probe(model, model, CPU, pack_length=640)


def test_a_lack_of_memory_is_not_blamed_on_a_part():
    model = tiny()

    def full(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        probe(model, full, CPU, 640)
