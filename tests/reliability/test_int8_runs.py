"""Laws of a run over weights in 8 bit: close to the same run in bf16, killed and resumed to the bit, and exported in full."""

import json
import signal

import pytest
import torch
from jobs import ROOT, trace_of
from safetensors.torch import load_file

from tokenflex import cli
from tokenflex.checkpoint import checked_manifest, read_whole, tags

pytest.importorskip("peft")

FLAGS = [f"--ds_config={ROOT}/configs/zero2.json"]
ADAPTER = ["model.text_adapter.rank=4", "optimizer.vision.train=false", "train.precision=bf16", "train.num_steps=8"]
INT8 = ["model.text_frozen_dtype=int8", "model.vision_frozen_dtype=int8"]


@pytest.fixture(scope="module")
def tuned(forge, tmp_path_factory):
    """The folder of a run over both towers in 8 bit that was killed in its sixth step and went on, on two ranks at ZeRO-2."""
    folder = tmp_path_factory.mktemp("tuned")
    killed = forge(folder, 2, *ADAPTER, *INT8, flags=FLAGS, faults="kill@forward,rank=all,step=5")
    assert killed.statuses == [-signal.SIGKILL] * 2, killed.output[-3000:]
    assert "resumed   from" in forge.done(folder, 2, *ADAPTER, *INT8, flags=FLAGS).output
    return folder


def newest(run):
    return run / "checkpoints" / tags(run / "checkpoints")[-1]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "crash" / "metrics.jsonl").read_text().splitlines()]


def test_killed_it_goes_on_to_the_bit(tuned, forge, tmp_path):
    forge.done(tmp_path, 2, *ADAPTER, *INT8, flags=FLAGS)
    assert trace_of(tmp_path) == trace_of(tuned)


def test_losses_are_those_over_bf16_but_for_a_hundredth_of_what_is_learned(tuned, forge, tmp_path):
    forge.done(tmp_path, 2, *ADAPTER, flags=FLAGS)
    ours, theirs = losses(tuned), losses(tmp_path)
    learned = theirs[0] - theirs[-1]
    assert ours != theirs and learned > 0.05, "rounding shows, and something is learned"
    assert ours == pytest.approx(theirs, abs=learned / 100)


def test_checkpoints_hold_frozen_weights_once_and_in_bytes(tuned):
    """In files of their own, of which every later checkpoint has a link, as of any frozen weights."""
    run = tuned / "crash"
    frozen = {}
    for path in newest(run).glob("frozen-*"):
        assert path.stat().st_nlink > 1, path
        frozen |= load_file(path)
    rows = {name: tensor for name, tensor in frozen.items() if ".weight_int8@" in name}
    assert rows and {tensor.dtype for tensor in rows.values()} == {torch.int8}
    manifest = checked_manifest(newest(run))
    assert all(not trained for name, (_, _, trained) in manifest.parameters.items() if ".weight_" in name)


def test_the_export_is_in_full_and_of_the_weights_that_were_trained_over(tuned, tmp_path):
    run = tuned / "crash"
    assert cli.main(["checkpoint", "export", str(newest(run)), "--to", str(tmp_path / "model")]) == 0
    ours, runs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", run / "model"))
    assert ours.keys() == runs.keys() and {tensor.dtype for tensor in runs.values()} == {torch.bfloat16}
    state = read_whole(newest(run), checked_manifest(newest(run)))
    names = [
        name.removesuffix("_int8") for name in state if name.endswith(".weight_int8") and ".base_layer." not in name
    ]
    assert names, "the encoder's, which have no adapter"
    for name in names:
        torch.testing.assert_close(runs[name], state[f"{name}_int8"] * state[f"{name}_scale"][:, None], rtol=0, atol=0)
