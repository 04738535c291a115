"""Pretrained parts under ZeRO-3 on two ranks: loaded into shards, they train as the same parts loaded whole."""

import json

import blake3
import pytest
import torch
from conftest import ROOT, train_ranks

from tokenflex.export import export_model
from tokenflex.model import build_model
from tokenflex.model.weights import weight_files


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_config, processor):
    """A tiny vision encoder, language model and whole exported model on disk."""
    root = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(5)
    model = build_model(tiny_config.model, tiny_config.budget, processor, torch.float32)
    model.vision_tower.save_pretrained(root / "vision")
    model.language_model.save_pretrained(root / "text")
    export_model(model, {**dict(model.named_parameters()), **dict(model.named_buffers())}, processor, root / "whole")
    return root


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "tiny" / "metrics.jsonl").read_text().splitlines()]


def settings_of(stage, folder):
    """A DeepSpeed configuration of this ZeRO stage that shards whatever it can."""
    config = json.loads((ROOT / "configs" / "zero3.json").read_text())
    config["zero_optimization"] = {"stage": stage}
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def bare_tokenizer(tmp_path_factory, corpus):
    """The corpus's tokenizer, and how many tokens it has: the language models below have exactly as many rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    return corpus / "tokenizer", len(tokenizer)


@pytest.mark.parametrize(("is_tied", "is_trained"), [(True, False), (False, True)])
def test_added_image_tokens_grow_a_pretrained_model_at_every_stage(
    is_tied, is_trained, bare_tokenizer, tmp_path, cache_dir
):
    """One rank with whole weights and two with shards: same losses, new rows the mean of the old or trained alone, exports that reload."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig

    from tokenflex.model import TokenFlexForConditionalGeneration  # noqa: F401  its Auto classes

    folder, num_tokens = bare_tokenizer
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    source = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=num_tokens, tie_word_embeddings=is_tied))
    source.save_pretrained(tmp_path / "text")
    overrides = [
        f"model.text={tmp_path}/text",
        f"model.tokenizer={folder}",
        "model.image_tokens=['<pic>','<PIC>','</pic>']",
        "model.add_image_tokens=true",
        "optimizer.text.train=false",
        f"optimizer.train_image_tokens={str(is_trained).lower()}",
        "train.num_steps=2",
    ]
    train_ranks(1, tmp_path / "a", cache_dir, *overrides, ds_config=settings_of(2, tmp_path))
    train_ranks(2, tmp_path / "b", cache_dir, *overrides, ds_config=settings_of(3, tmp_path))
    for whole, sharded in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
        assert abs(whole - sharded) < 1e-5, (whole, sharded)
    for run in ("a", "b"):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / run / "tiny" / "model", dtype="auto")
        assert model.config.text_config.vocab_size == num_tokens + 3
        pairs = [(model.get_input_embeddings(), source.get_input_embeddings())]
        pairs += [(model.get_output_embeddings(), source.get_output_embeddings())]
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == is_tied
        for ours, theirs in pairs:
            assert torch.equal(ours.weight[:num_tokens], theirs.weight)
            moved = (
                (ours.weight[num_tokens:] - theirs.weight.mean(0)).abs().amax(-1)
            )  # image start, placeholder, image end
            if is_trained:
                assert moved[0] > 1e-4 and moved[2] > 1e-4, moved
            else:
                torch.testing.assert_close(moved, torch.zeros(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", ["parts", "whole"])
def test_sharded_loading_trains_as_whole_loading(start, folders, tmp_path, cache_dir, corpus):
    overrides = {
        "parts": [
            f"model.vision={folders}/vision",
            f"model.text={folders}/text",
            f"model.tokenizer={corpus}/tokenizer",
        ],
        "whole": [f"model.init_from={folders}/whole"],
    }[start]
    config = json.loads((ROOT / "configs" / "zero3.json").read_text())
    config["zero_optimization"] = {"stage": 0}
    (tmp_path / "whole.json").write_text(json.dumps(config))
    config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (tmp_path / "sharded.json").write_text(json.dumps(config))
    steps = ["train.num_steps=2", *overrides]
    train_ranks(1, tmp_path / "a", cache_dir, *steps, ds_config=tmp_path / "whole.json")
    train_ranks(2, tmp_path / "b", cache_dir, *steps, ds_config=tmp_path / "sharded.json")
    for whole, sharded in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
        assert abs(whole - sharded) < 1e-5, (whole, sharded)


def test_an_encoder_is_taken_out_of_a_whole_model(tmp_path, tiny_config, processor):
    """InternVL's own format: the encoder's weights lie under another name among those of the whole."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    vision = {**small, "image_size": [48, 48], "patch_size": [8, 8]}
    text = {"model_type": "qwen2", **small, "num_key_value_heads": 2, "vocab_size": 100}
    torch.manual_seed(1)
    whole = InternVLForConditionalGeneration(InternVLConfig(vision_config=vision, text_config=text))
    whole.save_pretrained(tmp_path)
    parts = tiny_config.model.model_copy(update={"vision": str(tmp_path)})
    model = build_model(parts, tiny_config.budget, processor, torch.float32)
    theirs, ours = whole.model.vision_tower.state_dict(), model.vision_tower.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    record = weight_files(parts)["model.vision"]
    (file,) = record["files"].values()
    assert file["bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert file["blake3"] == blake3.blake3((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert "model.text" not in weight_files(parts), "it is from scratch"
