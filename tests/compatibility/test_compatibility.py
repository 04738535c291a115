"""What an earlier release wrote goes on being read: its checkpoints, its exports, its plans, to the same numbers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_ranks
from PIL import Image

RELEASES = sorted(path for path in Path(__file__).parent.iterdir() if path.is_dir() and path.name[0].isdigit())


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_a_checkpoint_goes_on_with_the_losses_that_followed(release, tmp_path, cache_dir):
    """The run was saved at step 4 of 6; here it does the two steps that are left."""
    expected = json.loads((release / "expected.json").read_text())
    shutil.copytree(release / "run", tmp_path / "small")
    data = ["data.train=embedded", "data.evaluation=embedded", f"data.cache_dir={cache_dir}"]
    arguments = ["launch/train.py", "--config", release / "recipe.yaml", *data, f"output_dir={tmp_path}"]
    (end,) = run_ranks(1, arguments)
    assert end.status == 0 and "at step 4" in end.output, end.output[-3000:]
    records = [json.loads(line) for line in (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [5, 6]
    for record, wanted in zip(records, expected["steps"], strict=True):
        assert record["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert record["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
        assert (record["num_tokens"], record["images_per_count"]) == (wanted["num_tokens"], wanted["images_per_count"])
    trace = [json.loads(line) for line in (tmp_path / "small" / "samples-0.jsonl").read_text().splitlines()]
    assert trace == expected["samples"]


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_a_checkpoint_is_listed_verified_and_exported(release, tmp_path, cache_dir):
    shutil.copytree(release / "run", tmp_path / "run")
    command = [sys.executable, "-m", "tokenflex.cli", "checkpoint"]
    listed = subprocess.run([*command, "ls", tmp_path / "run"], capture_output=True, text=True, cwd=ROOT)
    assert listed.returncode == 0 and listed.stdout.startswith("step-00000004  "), listed.stderr
    verified = subprocess.run([*command, "verify", tmp_path / "run"], capture_output=True, text=True, cwd=ROOT)
    assert (verified.returncode, verified.stdout) == (0, "step-00000004  good\n"), verified.stderr


@pytest.mark.parametrize("with_own_code", [True, False], ids=["the export's code", "this release's code"])
@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_an_export_answers_as_it_did(release, with_own_code):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import tokenflex.model  # noqa: F401  makes the Auto classes know this release's code

    expected = json.loads((release / "expected.json").read_text())["logits"]
    options = {"trust_remote_code": with_own_code}
    model = AutoModelForImageTextToText.from_pretrained(release / "model", **options).eval()
    processor = AutoProcessor.from_pretrained(release / "model", **options)
    image = Image.fromarray((np.arange(40 * 30 * 3) % 251).astype(np.uint8).reshape(30, 40, 3))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
    for count, wanted in expected.items():
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            num_visual_tokens=int(count),
        )
        assert inputs["input_ids"].shape[1] == wanted["num_tokens"]
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1, : len(wanted["logits"])]
        torch.testing.assert_close(logits, torch.tensor(wanted["logits"]), rtol=1e-3, atol=1e-4)
