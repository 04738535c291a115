"""Every entry point that takes a recipe understands it in the same way: `embedded` is resolved, whatever states it."""

import argparse
import json
import os
import re

import pytest
import yaml
from conftest import ROOT, TINY, run_ranks

from tokenflex import cli
from tokenflex.cli.main import parser
from tokenflex.layout import RunLayout

BY_SOURCES = {"data": {"train": [], "sources": [{"paths": "embedded"}], "evaluation": ["embedded"]}}
"""The same corpus, named where a mixture names its sources."""


def commands(of, prefix=()):
    """(words, parser) of every command below a parser."""
    subparsers = [action for action in of._actions if isinstance(action, argparse._SubParsersAction)]
    if not subparsers:
        yield prefix, of
    for action in subparsers:
        for name, inner in action.choices.items():
            yield from commands(inner, (*prefix, name))


def test_these_are_all_that_take_a_recipe():
    """A new command with --config belongs into the tests below."""
    taking = {" ".join(words) for words, command in commands(parser()) if "--config" in command._option_string_actions}
    assert taking == {"data inspect", "doctor", "estimate", "simulate", "train-router"}
    scripts = {path.name for path in (ROOT / "launch").glob("*.py") if "launch_parser" in path.read_text()}
    assert scripts == {"train.py", "evaluate.py", "index.py"}
    assert {path.name for path in (ROOT / "launch").glob("*.py")} == scripts | {"paper.py"}
    readers = [*(f"launch/{name}" for name in scripts), "tokenflex/study/study.py", "tokenflex/cli/train_router.py"]
    for reader in readers:
        text = (ROOT / reader).read_text()
        assert re.search(r"resolve_embedded\(", text), f"{reader} reads a recipe and does not resolve it"


@pytest.fixture(scope="module", params=["data.train", "data.sources"])
def recipe(request, tmp_path_factory, cache_dir):
    values = yaml.safe_load(TINY.read_text())
    values["data"]["cache_dir"] = str(cache_dir)
    if request.param == "data.sources":
        values["data"].update(BY_SOURCES["data"])
    folder = tmp_path_factory.mktemp("recipe")
    values["output_dir"] = str(folder)
    values["train"]["num_steps"] = 1
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_index_train_evaluate_export_and_inspect_resolve_a_recipe(recipe, corpus, tmp_path, monkeypatch, capsys):
    offline = {"HF_HUB_OFFLINE": "1"}
    monkeypatch.setattr(os, "environ", {**os.environ, **offline})
    (end,) = run_ranks(1, ["launch/index.py", "--config", recipe], environment=offline)
    assert end.status == 0 and "60 samples" in end.output, end.output[-2000:]
    (end,) = run_ranks(1, ["launch/train.py", "--config", recipe], environment=offline)
    assert end.status == 0, end.output[-2000:]
    (end,) = run_ranks(1, ["launch/evaluate.py", "--config", recipe], environment=offline)
    assert end.status == 0 and "| **4** | 6 | **12** |" in end.output, end.output[-2000:]
    run = recipe.parent / "tiny"
    layout = RunLayout(run)
    assert {"torch", "cpu"} <= {finding["name"] for finding in json.loads(layout.doctor.read_text())["findings"]}
    card = (layout.model / "README.md").read_text()
    assert "# tiny\n" in card and "| **4** | 6 | **12** |" in card and "Not evaluated" not in card
    assert str(recipe.parent) not in card, "a path of this machine travels"
    assert json.loads(layout.plan.read_text())["data.train"] in (["embedded"], []), (
        "the recipe stands as it was written"
    )
    assert cli.main(["checkpoint", "export", str(run), "--to", str(tmp_path / "model")]) == 0, capsys.readouterr().err
    weights = [(folder / "model.safetensors").read_bytes() for folder in (layout.model, tmp_path / "model")]
    assert weights[0] == weights[1]
    page = tmp_path / "page.html"
    shards = str(corpus / "train")
    assert cli.main(["data", "inspect", shards, "--config", str(recipe), "--out", str(page), "--samples", "2"]) == 0
    assert "learned" in page.read_text()


def test_inspecting_with_the_quick_starts_recipe_asks_no_hub(corpus, tmp_path, cache_dir, monkeypatch):
    """Its encoder is `embedded`; a stand-in lies where the pretrained one would, so that the test takes seconds."""
    from transformers import BitConfig, BitModel

    from tokenflex.corpus import encoder

    folder = cache_dir / f"embedded-encoder-v{encoder.ENCODER_VERSION}-0"
    if not folder.exists():
        BitModel(BitConfig(**encoder.ARCHITECTURE)).save_pretrained(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    overrides = [f"data.cache_dir={cache_dir}", "data.embedded.num_train=60", "data.embedded.num_eval_per_task=2"]
    arguments = [argument for override in overrides for argument in ("--set", override)]
    page = tmp_path / "page.html"
    quickstart = str(ROOT / "configs" / "quickstart.yaml")
    command = ["data", "inspect", str(corpus / "train"), "--config", quickstart, "--out", str(page), "--samples", "2"]
    assert cli.main([*command, *arguments]) == 0


@pytest.mark.parametrize("script", ["train", "index"])
def test_a_recipe_without_data_is_refused_in_one_line(script, tmp_path):
    values = yaml.safe_load(TINY.read_text())
    values["data"].update(train=[], evaluation=[])
    values["output_dir"] = str(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    (end,) = run_ranks(1, [f"launch/{script}.py", "--config", tmp_path / "recipe.yaml"])
    assert end.status == 2 and "error: data.train: empty; name shards to train on" in end.output, end.output[-2000:]


def test_evaluation_is_off_where_no_shards_are_named(tmp_path):
    values = yaml.safe_load(TINY.read_text())
    values["data"]["evaluation"] = []
    values["output_dir"] = str(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    (end,) = run_ranks(1, ["launch/evaluate.py", "--config", tmp_path / "recipe.yaml"])
    assert end.status == 2 and "error: data.evaluation: empty; name shards" in end.output, end.output[-2000:]
