"""Pretrained parts under ZeRO-3 on two ranks: loaded into shards, they train as the same parts loaded whole."""

import json

import pytest
import torch
from conftest import ROOT, train_ranks

from tokenflex.export import export_model
from tokenflex.model import build_model


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
