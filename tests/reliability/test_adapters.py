"""Laws of LoRA: at first it changes nothing; merged = stock peft on the base; what it stands on keeps every bit; resumed to the
bit."""

import json
import signal

import numpy as np
import pytest
import torch
from jobs import ROOT, trace_of
from PIL import Image
from safetensors.torch import load_file

from tokenflex import cli
from tokenflex.checkpoint import checked_manifest, read_whole, tags
from tokenflex.config import load_config
from tokenflex.errors import UserError
from tokenflex.model.adapters import add_adapters, merged

peft = pytest.importorskip("peft")

ADAPTERS = [
    "model.text_adapter.rank=4",
    "model.text_adapter.alpha=8",
    "model.vision_adapter.rank=2",
    "model.vision_adapter.layers=[q_proj,v_proj]",
    "train.export_adapter=true",
]


@pytest.fixture(scope="module")
def base(forge, tmp_path_factory):
    """An exported model to put adapters on."""
    folder = tmp_path_factory.mktemp("base")
    forge.done(folder, 1, "train.num_steps=1", flags=[f"--ds_config={ROOT}/configs/zero0.json"])
    return folder / "crash" / "model"


@pytest.fixture(scope="module")
def tuned(base, forge, tmp_path_factory):
    """The run's folder of a fine-tuning with adapters on both towers, at ZeRO-3 on two ranks."""
    folder = tmp_path_factory.mktemp("tuned")
    forge.done(folder, 2, f"model.init_from={base}", *ADAPTERS, flags=[f"--ds_config={ROOT}/configs/zero3.json"])
    return folder / "crash"


def newest(run):
    return run / "checkpoints" / tags(run / "checkpoints")[-1]


def answer(model, processor):
    image = Image.fromarray((np.arange(40 * 30 * 3) % 251).astype(np.uint8).reshape(30, 40, 3))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True, num_visual_tokens=4
    )
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_the_merged_export_is_what_stock_peft_makes_of_base_and_adapter(base, tuned):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import tokenflex.model  # noqa: F401  makes the Auto classes know this release's code

    processor = AutoProcessor.from_pretrained(tuned / "model")
    whole = AutoModelForImageTextToText.from_pretrained(tuned / "model")
    bare = AutoModelForImageTextToText.from_pretrained(base)
    before = answer(bare, processor)
    loaded = peft.PeftModel.from_pretrained(bare, tuned / "adapter")
    torch.testing.assert_close(answer(loaded, processor), answer(whole, processor), rtol=1e-4, atol=1e-5)
    assert (answer(whole, processor) - before).abs().max() > 1e-3, "the adapters have learned something"


def test_what_an_adapter_stands_on_keeps_every_bit(base, tuned):
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model" / "model.safetensors")
    assert before.keys() == after.keys(), "an export has the base's names"
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.startswith("projector.") or name.endswith("_proj.weight") for name in moved), sorted(moved)
    assert any(name.startswith("vision_tower.") for name in moved) and any("mlp" in name for name in moved)
    assert not any(name.startswith("vision_tower.") and "mlp" in name for name in moved), "it was not asked for there"
    state = read_whole(newest(tuned), checked_manifest(newest(tuned)))
    based = [name for name in state if ".base_layer." in name]
    assert based and all(torch.equal(state[name], before[name.replace(".base_layer.", ".")]) for name in based)


def test_a_checkpoint_exports_the_same_merged_model(tuned, tmp_path):
    assert cli.main(["checkpoint", "export", str(newest(tuned)), "--to", str(tmp_path / "model")]) == 0
    ours, runs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", tuned / "model"))
    assert ours.keys() == runs.keys() and all(torch.equal(ours[name], runs[name]) for name in ours)


def test_only_adapters_and_what_has_none_are_trained(tuned):
    parameters = checked_manifest(newest(tuned)).parameters
    trained = {name for name, (_, _, is_trained) in parameters.items() if is_trained}
    assert trained and all(".lora_" in name or name.startswith("projector.") for name in trained)
    settings = json.loads((tuned / "adapter" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["projector"] and settings["r"] in (2, 4)


@pytest.mark.slow
def test_killed_it_goes_on_to_the_bit(base, forge, tmp_path):
    common = [f"model.init_from={base}", *ADAPTERS, "model.text_adapter.dropout=0.1"]
    flags = [f"--ds_config={ROOT}/configs/zero2.json"]
    forge.done(tmp_path / "whole", 2, *common, flags=flags)
    killed = forge(tmp_path / "killed", 2, *common, flags=flags, faults="kill@forward,rank=all,step=3")
    assert killed.statuses == [-signal.SIGKILL] * 2, killed.output[-3000:]
    forge.done(tmp_path / "killed", 2, *common, flags=flags)
    assert trace_of(tmp_path / "killed") == trace_of(tmp_path / "whole")


def with_adapter(*overrides):
    return load_config(None, [f"model.text_adapter.{text}" for text in ("rank=4", *overrides)]).model


def test_at_first_an_adapter_changes_nothing_and_merging_it_neither(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = with_adapter()
    add_adapters(model, config)
    state = dict(model.named_parameters())
    names = {name for name in state if ".lora_B." in name}
    assert len(names) == 7 * len(model.language_model.model.layers) and not any(state[name].any() for name in names)
    after = merged(state, config)
    assert after.keys() == {name for name in before if name != "language_model.lm_head.weight"}
    assert all(torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("layers, part", [("nothing_proj", "Target modules"), ("embed_tokens", "embed_tokens is a")])
def test_layers_that_cannot_have_one_are_refused(model, layers, part):
    with pytest.raises(UserError, match=f"model.text_adapter: .*{part}") as error:
        add_adapters(model, with_adapter(f"layers=[{layers}]"))
    assert "\n" not in str(error.value)
