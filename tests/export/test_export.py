"""Laws of what leaves the project: whole or refused, readable by whom the umask says, ending where turns end, no trace of a machine."""

import json
import logging
import os
import stat
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    GenerationConfig,
)
from transformers.utils.logging import warning_once

from tokenflex.errors import UserError
from tokenflex.export import export_model
from tokenflex.model import build_model
from tokenflex.model.generation import generation_settings


def state_of(model):
    return {name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_config, processor):
    """A vision encoder and a language model in folders of this machine, the latter with settings of its own."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(1)
    model = build_model(tiny_config.model, tiny_config.budget, processor, torch.float32)
    model.vision_tower.save_pretrained(root / "vision")
    model.language_model.save_pretrained(root / "text")
    GenerationConfig(do_sample=True, temperature=0.6, top_k=20, eos_token_id=[5, 7]).save_pretrained(root / "text")
    return tiny_config.model.model_copy(update={"vision": str(root / "vision"), "text": str(root / "text")})


@pytest.fixture(scope="module")
def composed(parts, tiny_config, processor):
    return build_model(parts, tiny_config.budget, processor, torch.float32)


@pytest.fixture(scope="module")
def exported(composed, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "model"
    old = os.umask(0o027)
    try:
        export_model(composed, state_of(composed), processor, folder, {"license": "apache-2.0", "data": "ours"})
    finally:
        os.umask(old)
    return folder


@pytest.mark.parametrize(
    "name", ["language_model.model.layers.0.self_attn.q_proj.lora_A.weight", "ema.projector.norm.weight"]
)
def test_a_tensor_that_is_none_of_the_models_is_refused_by_name(name, composed, processor, tmp_path):
    state = {**state_of(composed), name: torch.ones(2)}
    with pytest.raises(UserError, match=f"1 tensors are none of the model's and would be lost, first {name}"):
        export_model(composed, state, processor, tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_a_weight_that_did_not_come_is_refused_by_name(composed, processor, tmp_path):
    state = state_of(composed)
    del state["projector.down.bias"]
    with pytest.raises(UserError, match="1 weights of the model did not come, first projector.down.bias"):
        export_model(composed, state, processor, tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_the_umask_decides_who_reads_an_export(exported):
    for path in exported.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o750 if path.is_dir() else 0o640), (path.name, oct(mode))


def test_nothing_tells_where_it_was_made(exported, parts):
    for path in exported.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(exported.parent).encode() not in content and parts.text.encode() not in content, path.name
            assert os.path.dirname(parts.vision).encode() not in content, path.name


def test_the_card_says_how_to_load_it_and_what_it_was_trained_at(exported):
    card = (exported / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    import yaml

    front = yaml.safe_load(front)
    assert front["library_name"] == "transformers" and front["license"] == "apache-2.0"
    assert "seen in training: 4, 12" in body and "AutoModelForImageTextToText.from_pretrained" in body
    assert "Training data: ours." in body and "base_model" not in front


def test_generation_ends_where_turns_end_and_where_the_language_model_ends(exported, processor):
    settings = json.loads((exported / "generation_config.json").read_text())
    assert set(settings["eos_token_id"]) >= {5, 7, processor.tokenizer.eos_token_id, processor.turn_end_id()}
    assert settings["do_sample"] is True and settings["temperature"] == 0.6 and settings["top_k"] == 20
    again = AutoModelForImageTextToText.from_pretrained(exported)
    assert again.generation_config.eos_token_id == settings["eos_token_id"]


@pytest.mark.parametrize("own, sampling", [(None, {}), (5, {}), ([5, 7], {}), (5, {"temperature": 0.3, "top_p": 0.5})])
def test_a_models_own_ends_are_kept_whatever_their_form(own, sampling, tmp_path, parts, processor):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": own, **sampling}))
    settings = generation_settings(parts.model_copy(update={"text": str(tmp_path)}), processor)
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    wanted = {*(own if isinstance(own, list) else [own] * (own is not None)), processor.turn_end_id()}
    assert wanted <= set(ends) and len(ends) == len(set(ends))
    settings.save_pretrained(tmp_path / "again")  # transformers refuses to write what has no effect
    assert GenerationConfig.from_pretrained(tmp_path / "again").temperature in (None, 1.0)


def test_a_model_without_generation_settings_has_those_of_its_configuration(tmp_path, parts, processor):
    config = json.loads(Path(parts.text, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": [3, 9]}))
    settings = generation_settings(parts.model_copy(update={"text": str(tmp_path)}), processor)
    assert {3, 9} <= set(settings.eos_token_id)


def test_every_auto_class_loads_an_export_with_its_weights(exported, composed):
    ids = torch.arange(3, 12)[None]
    composed.language_model.set_attn_implementation("sdpa")
    composed.eval()
    with torch.no_grad():
        wanted = composed(input_ids=ids, output_hidden_states=True)
        full = AutoModelForMultimodalLM.from_pretrained(exported)
        torch.testing.assert_close(full(input_ids=ids).logits, wanted.logits)
        base, info = AutoModel.from_pretrained(exported, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        torch.testing.assert_close(base(input_ids=ids).last_hidden_state, wanted.hidden_states[-1])
    assert json.loads((exported / "config.json").read_text())["auto_map"].keys() >= {
        "AutoModel",
        "AutoModelForImageTextToText",
    }


def test_nothing_that_is_deprecated_is_used(tiny_export, caplog, monkeypatch):
    """What this release of transformers means to drop is said as a warning or, once in a process, in its log."""
    warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    items = [{"type": "image", "image": Image.new("RGB", (64, 48))}, {"type": "text", "text": "What?"}]
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("error", category)
        processor, model = (one.from_pretrained(tiny_export) for one in (AutoProcessor, AutoModelForImageTextToText))
        inputs = processor.apply_chat_template([{"role": "user", "content": items}], tokenize=True)
        text = processor.apply_chat_template([{"role": "user", "content": items}])
        processor(items[0]["image"], text, return_text_replacement_offsets=True, return_mm_token_type_ids=True)
        for options in ({}, {"num_beams": 2, "num_visual_tokens": 4}, {"prompt_lookup_num_tokens": 2}):
            model.generate(**inputs, **options, do_sample=False, max_new_tokens=3)
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert not [record.getMessage() for record in caplog.records if "deprecated" in record.getMessage()]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_attention_goes_to_the_parts_that_have_it(implementation, tiny_config, processor, tmp_path):
    bit = {"model_type": "bit", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 4}
    model = build_model(
        tiny_config.model.model_copy(update={"vision": bit}), tiny_config.budget, processor, torch.float32
    )
    export_model(model, state_of(model), processor, tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", attn_implementation=implementation)
    assert again.language_model.config._attn_implementation == implementation
    again(input_ids=torch.arange(3, 12)[None])


def test_image_features_come_one_tensor_per_image(composed):
    pixels = torch.rand(3, 3, 48, 64)
    features = composed.get_image_features(pixels)
    assert [tuple(some.shape) for some in features.pooler_output] == [(12, 32)] * 3
    mixed = composed.get_image_features(pixels, num_visual_tokens=[4, (2, 3)], num_tiles=[1, 2]).pooler_output
    assert [len(some) for some in mixed] == [4, 12]
    as_tuple = composed.get_image_features(pixels, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1][0], features.pooler_output[0])
