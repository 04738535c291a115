"""Resuming: to the bit under every ZeRO stage and in bf16, over other numbers of ranks and workers, and only when it is safe."""

import json
import os
import signal

import pytest
import torch
from jobs import ROOT, trace_of, write_result

from tokenflex import cli, layout
from tokenflex.checkpoint import checked_manifest, read_whole, tags
from tokenflex.layout import tag_of

NO_DROPOUT = ["model.text.attention_dropout=0", "model.vision.attention_dropout=0"]
KILL = "kill@forward,rank=all,step=3"


def ds_config(folder, stage):
    config = json.loads((ROOT / "configs" / "zero3.json").read_text())
    config["zero_optimization"] = (
        {"stage": stage, "stage3_param_persistence_threshold": 300} if stage == 3 else {"stage": stage}
    )
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return f"--ds_config={path}"


def slow(*values):
    """A case of the long form only."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "stage, precision", [(0, "fp32"), (3, "bf16"), slow(0, "bf16"), slow(1, "bf16"), slow(2, "fp32"), slow(3, "fp32")]
)
def test_resumed_is_uninterrupted_to_the_bit(stage, precision, forge, tmp_path):
    flags = [ds_config(tmp_path, stage)]
    overrides = [f"train.precision={precision}", "optimizer.vision.train=false", "data.packs_per_micro_batch=1"]
    forge.done(tmp_path / "whole", 2, *overrides, flags=flags)
    killed = forge(tmp_path / "killed", 2, *overrides, flags=flags, faults=KILL)
    assert killed.statuses == [-signal.SIGKILL] * 2, killed.output[-3000:]
    job = forge.done(tmp_path / "killed", 2, *overrides, flags=flags)
    assert "resumed   from" in job.output
    assert trace_of(tmp_path / "killed") == trace_of(tmp_path / "whole")


def frozen_weights(folder):
    """Of the newest checkpoint, whole."""
    place = folder / "crash" / "checkpoints"
    newest = place / tags(place)[-1]
    state = read_whole(newest, checked_manifest(newest))
    return {name: tensor for name, tensor in state.items() if name.startswith("vision_tower")}


def test_ranks_and_workers_come_and_go(forge, tmp_path):
    """2 -> 4 -> 1 -> 2 ranks with 0, 1, 3 and 0 workers: one stream of samples, one curve, frozen weights to the bit."""
    overrides = [*NO_DROPOUT, "optimizer.vision.train=false", "train.num_steps=8"]
    forge.done(tmp_path / "one", 1, *overrides)
    legs = [(2, 0, "kill@forward,step=3"), (4, 1, "kill@fetch,step=5"), (1, 3, "kill@before-step,step=6"), (2, 0, "")]
    for num_ranks, num_workers, fault in legs:
        job = forge(tmp_path / "many", num_ranks, *overrides, f"data.num_workers={num_workers}", faults=fault)
        assert not job.hung
        assert set(job.statuses) == ({-signal.SIGKILL} if fault else {0}), job.output[-3000:]
    one, many = trace_of(tmp_path / "one"), trace_of(tmp_path / "many")
    worst = max(abs(one.losses[step][0] - many.losses[step][0]) for step in one.losses)
    assert len(many.losses) == 8 and worst < 1e-6, worst
    whole, last = frozen_weights(tmp_path / "one"), frozen_weights(tmp_path / "many")
    assert whole and all(torch.equal(whole[name], last[name]) for name in whole)
    together = {}  # a step that was begun by one set of ranks and finished by another is in the log of both
    for (_, num_ranks, step), ids in many.samples.items():
        together.setdefault((step, num_ranks), []).extend(ids)
    assert {step for step, _ in together} == set(range(8)) and {ranks for _, ranks in together} == {1, 2, 4}
    for (step, num_ranks), ids in together.items():
        assert sorted(ids) == sorted(one.samples["samples-0", 1, step]), (step, num_ranks)
    write_result("ranks 2 -> 4 -> 1 -> 2", steps=8, largest_loss_difference=worst, frozen_equal=True)


@pytest.mark.slow
@pytest.mark.parametrize("written, read", [(0, 3), (3, 1), (2, 0)])
def test_stages_read_each_other(written, read, forge, tmp_path):
    """The format knows no stage: what one wrote another goes on from."""
    folder = tmp_path / "run"
    job = forge(folder, 2, *NO_DROPOUT, flags=[ds_config(tmp_path, written)], faults=KILL)
    assert set(job.statuses) == {-signal.SIGKILL}
    forge.done(folder, 2, *NO_DROPOUT, flags=[ds_config(tmp_path, read)])
    forge.done(tmp_path / "whole", 2, *NO_DROPOUT, flags=[ds_config(tmp_path, read)])
    resumed, whole = trace_of(folder), trace_of(tmp_path / "whole")
    for step, (loss, _) in whole.losses.items():
        assert abs(resumed.losses[step][0] - loss) < 1e-5, step


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_said(forge, tmp_path):
    forge(tmp_path, 2, faults="kill@forward,step=4")
    place = tmp_path / "crash" / "checkpoints"
    newest, before = tags(place)[-1], tags(place)[-2]
    path = next((place / newest).glob("rank-00001*"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    forge.done(tmp_path / "whole", 2)
    job = forge.done(tmp_path, 2)
    assert f"{newest}: {path.name} does not match its checksum; passed over" in job.output
    assert f"{before} at step {int(before[5:])}" in job.output
    assert trace_of(tmp_path) == trace_of(tmp_path / "whole")


def test_nothing_good_is_an_error_and_fresh_begins_anew(forge, tmp_path):
    forge.done(tmp_path, 1, "train.num_steps=2")
    place = tmp_path / "crash" / "checkpoints"
    for tag in tags(place):
        (place / tag / "manifest.json").unlink()
    job = forge(tmp_path, 1, "train.num_steps=2")
    assert job.statuses == [layout.USER_ERROR] and "none of 2 can be loaded" in job.output and "--fresh" in job.output
    job = forge.done(tmp_path, 1, "train.num_steps=2", flags=["--fresh"])
    assert "resumed" not in job.output and len(trace_of(tmp_path).losses) == 2


@pytest.mark.parametrize("number", [slow(signal.SIGTERM), signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_with_everything_saved(number, forge, tmp_path):
    """One rank is told, twice over in the middle of a save; all agree, save and say so by their status."""
    action = {signal.SIGTERM: "term", signal.SIGUSR1: "usr1"}[number]
    fault = f"{action}@forward,rank=1,step=2;{action}@shard-50,rank=1,step=3;{action}@shard-50,rank=0,step=3"
    job = forge(tmp_path, 2, faults=fault)
    assert job.statuses == [layout.REQUEUE] * 2 and not job.hung, job.output[-3000:]
    assert tags(tmp_path / "crash" / "checkpoints")[-1] == tag_of(3), "agreed within the step, and saved at its end"
    job = forge.done(tmp_path, 2)
    assert "at step 3" in job.output
    forge.done(tmp_path / "whole", 2)
    assert trace_of(tmp_path) == trace_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_failing_disk_does_not_end_the_run_until_it_has_failed_often(forge, tmp_path):
    job = forge.done(tmp_path / "once", 2, faults="io@write,rank=1,count=30,error=ENOSPC")
    assert "No space left on device" in job.output and "bytes free" in job.output
    forge.done(tmp_path / "never", 2)
    assert trace_of(tmp_path / "once") == trace_of(tmp_path / "never")
    faults = ";".join(f"io@fsync,rank=1,count={count},error=EIO" for count in range(2, 5))
    job = forge(tmp_path / "often", 2, "train.max_failed_saves=3", "train.num_steps=12", faults=faults)
    assert job.statuses == [layout.SAVE_FAILED] * 2, job.output[-3000:]
    assert "3 saves in a row failed" in job.output
    job = forge.done(tmp_path / "often", 2, "train.num_steps=12")
    assert "at step 1" in job.output


def test_the_second_start_into_a_run_folder_is_refused(forge, tmp_path):
    """While one job writes there, `launch/train.py` ends with one line that names the holder."""
    from tokenflex.checkpoint import RunLock

    (tmp_path / "crash").mkdir()
    lock = RunLock(tmp_path / "crash")
    job = forge(tmp_path, 2)
    lock.release()
    assert job.statuses == [layout.USER_ERROR] * 2
    assert "another job writes there" in job.output and f'"process": {os.getpid()}' in job.output
    assert not (tmp_path / "crash" / "plan.json").exists()


def test_the_command_lists_verifies_and_exports(forge, tmp_path, capsys):
    forge.done(tmp_path, 2, "train.num_steps=3", "train.keep_checkpoints=2")
    place = tmp_path / "crash" / "checkpoints"
    assert cli.main(["checkpoint", "ls", str(tmp_path / "crash")]) == 0
    out = capsys.readouterr().out
    assert out.count("step-0000000") >= 2 and "latest" in out and "2 ranks" in out
    assert cli.main(["checkpoint", "verify", str(tmp_path / "crash")]) == 0
    assert capsys.readouterr().out.count("good") == 2
    target = tmp_path / "exported"
    assert cli.main(["checkpoint", "export", str(place / tag_of(3)), "--to", str(target)]) == 0
    capsys.readouterr()
    from safetensors.torch import load_file

    exported, trained = (
        load_file(target / "model.safetensors"),
        load_file(tmp_path / "crash" / "model" / "model.safetensors"),
    )
    assert exported.keys() == trained.keys() and all(torch.equal(exported[name], trained[name]) for name in exported)
    shard = next((place / tag_of(3)).glob("rank-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert cli.main(["checkpoint", "verify", str(tmp_path / "crash")]) == 1
    assert "the manifest says" in capsys.readouterr().out
    assert cli.main(["checkpoint", "export", str(place / tag_of(3)), "--to", str(target)]) == 2
    assert "the manifest says" in capsys.readouterr().err
