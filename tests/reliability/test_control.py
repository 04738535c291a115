"""What people set at every ZeRO stage: Muon, rates and betas per part, an average of the weights, a frozen part; each of the
shipped DeepSpeed files trains to the same weights, and a killed run goes on to the bit."""

import json
import signal

import pytest
import torch
from jobs import ROOT, trace_of
from safetensors.torch import load_file

from tokenflex import cli
from tokenflex.checkpoint import checked_manifest, read_whole, tags
from tokenflex.layout import tag_of

CONTROL = [
    "optimizer.matrices=muon",
    "optimizer.text.layer_decay=0.5",
    "optimizer.text.betas=[0.8,0.9]",
    "optimizer.vision.train=false",
    "train.ema_decay=0.7",
    "train.export_average=true",
]
NO_DROPOUT = ["model.text.attention_dropout=0", "model.vision.attention_dropout=0", "train.num_steps=3"]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("zero*.json"))


def newest(folder):
    place = folder / "crash" / "checkpoints"
    return place / tags(place)[-1]


@pytest.fixture(scope="module")
def whole(forge, tmp_path_factory):
    """On one rank without ZeRO, where every weight and moment lies whole in one place."""
    folder = tmp_path_factory.mktemp("whole")
    forge.done(folder, 1, *CONTROL, *NO_DROPOUT, flags=[f"--ds_config={ROOT}/configs/zero0.json"])
    return folder


@pytest.mark.parametrize("config", CONFIGS)
def test_every_shipped_file_trains_to_the_same_weights_and_average(config, whole, forge, tmp_path):
    settings = json.loads((ROOT / "configs" / f"{config}.json").read_text())
    if "zero_hpz_partition_size" in settings["zero_optimization"]:
        settings["zero_optimization"]["zero_hpz_partition_size"] = 2  # a node has two ranks here
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    forge.done(tmp_path, 2, *CONTROL, *NO_DROPOUT, flags=[f"--ds_config={path}"])
    one, two = trace_of(whole).losses, trace_of(tmp_path).losses
    assert all(abs(one[step][0] - two[step][0]) < 1e-5 for step in one), (one, two)
    for kind in ("weight", "exp_avg", "average"):
        a, b = (read_whole(newest(f), checked_manifest(newest(f)), kind) for f in (whole, tmp_path))
        assert a.keys() == b.keys() and len(a) > 5
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=f"{kind} of {name}")


def test_the_average_is_exported_and_is_one(whole):
    """Of the weights before the first step and after each of three, with 0.7: what is exported, to the bit."""
    average = read_whole(newest(whole), checked_manifest(newest(whole)), "average")
    weights = read_whole(newest(whole), checked_manifest(newest(whole)))
    exported = load_file(whole / "crash" / "model" / "model.safetensors")
    assert average.keys() == {name for name in exported if not name.startswith("vision_tower")}
    assert all(torch.equal(exported[name], average.get(name, weights[name])) for name in exported)
    steps = [whole / "crash" / "checkpoints" / tag for tag in tags(whole / "crash" / "checkpoints")]
    one, two, three = ({k: read_whole(f, checked_manifest(f), k) for k in ("weight", "average")} for f in steps)
    for name in average:
        follows = 0.7 * two["average"][name] + 0.3 * three["weight"][name]
        torch.testing.assert_close(three["average"][name], follows, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(one["average"][name], one["weight"][name]) for name in average)


def test_the_command_exports_the_average_of_a_checkpoint(whole, tmp_path):
    assert cli.main(["checkpoint", "export", str(newest(whole)), "--to", str(tmp_path / "m"), "--average"]) == 0
    ours, runs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "m", whole / "crash" / "model"))
    assert ours.keys() == runs.keys() and all(torch.equal(ours[name], runs[name]) for name in ours)


@pytest.mark.parametrize("config", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_killed_it_goes_on_to_the_bit(config, forge, tmp_path):
    flags = [f"--ds_config={ROOT}/configs/{config}.json"]
    forge.done(tmp_path / "whole", 2, *CONTROL, flags=flags)
    killed = forge(tmp_path / "killed", 2, *CONTROL, flags=flags, faults="kill@forward,rank=all,step=3")
    assert killed.statuses == [-signal.SIGKILL] * 2, killed.output[-3000:]
    forge.done(tmp_path / "killed", 2, *CONTROL, flags=flags)
    assert trace_of(tmp_path / "killed") == trace_of(tmp_path / "whole")


def test_an_average_may_begin_under_a_run_and_a_step_that_is_refused_does_not_move_it(forge, tmp_path, capsys):
    """The first leg keeps none; the second begins one at the weights that it has loaded, and its only step is not finite."""
    forge.done(tmp_path, 1, "train.num_steps=1")
    job = forge.done(tmp_path, 1, "train.num_steps=2", "train.ema_decay=0.5", faults="nan@loss,step=1")
    assert "skipped   step 1" in job.output
    weights, average = (
        read_whole(newest(tmp_path), checked_manifest(newest(tmp_path)), k) for k in ("weight", "average")
    )
    assert average and all(torch.equal(average[name], weights[name]) for name in average)
    before = newest(tmp_path).parent / tag_of(1)
    assert cli.main(["checkpoint", "export", str(before), "--to", str(tmp_path / "m"), "--average"]) == 2
    assert "has no average of the weights; train with train.ema_decay" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_blocks_train_as_plain_ones_under_zero2(forge, tmp_path):
    flags = [f"--ds_config={ROOT}/configs/zero2.json"]
    forge.done(tmp_path / "plain", 2, *NO_DROPOUT, flags=flags)
    forge.done(tmp_path / "compiled", 2, *NO_DROPOUT, "train.compile=blocks", flags=flags, timeout_s=800)
    plain, compiled = trace_of(tmp_path / "plain").losses, trace_of(tmp_path / "compiled").losses
    assert all(abs(plain[step][0] - compiled[step][0]) < 1e-5 for step in plain), (plain, compiled)
