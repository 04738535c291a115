"""A run in stages: what can be added from outside, and the ways to begin."""

import json
import shutil

import pytest
from conftest import ROOT, TINY, run_ranks, train_ranks

BRANCHING = ["train.save_every=2", "train.keep_checkpoints=9", "optimizer.schedule=constant"]


def records(folder, name="tiny"):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def losses(folder, name="tiny"):
    return {record["step"]: record["loss"] for record in records(folder, name)}


def test_the_example_adds_a_loss_term_a_metric_and_an_observer(tmp_path, cache_dir, corpus):
    arguments = ["--config", TINY, f"output_dir={tmp_path}", f"data.cache_dir={cache_dir}", "train.num_steps=4"]
    ends = run_ranks(2, [ROOT / "examples" / "add_a_loss_term.py", *arguments])
    assert [end.status for end in ends] == [0, 0], ends[0].output[-3000:]
    logged = records(tmp_path)
    assert len(logged) == 4
    for record in logged:
        parts = record["loss_parts"]
        assert parts["z_loss"] > 0 and abs(parts["cross_entropy"] + parts["z_loss"] - record["loss"]) < 1e-4
    assert logged[0]["loss_gained"] == 0 and logged[-1]["loss_gained"] > 0


def test_a_run_branches_off_another_ones_checkpoint(tmp_path, cache_dir, corpus):
    """With the same settings the branch does what the other run did; with others it has its moments and its data."""
    train_ranks(1, tmp_path, cache_dir, *BRANCHING)
    taken = f"train.resume_from={tmp_path}/tiny/checkpoints/step-00000004"
    (end,) = train_ranks(1, tmp_path, cache_dir, *BRANCHING, "name=branch", taken)
    assert "branched  from" in end.output and "at step 4" in end.output
    before, after = losses(tmp_path), losses(tmp_path, "branch")
    assert sorted(after) == [5, 6] and after == {step: before[step] for step in (5, 6)}
    (end,) = train_ranks(1, tmp_path, cache_dir, *BRANCHING, "name=branch", taken, "train.num_steps=8")
    assert "resumed   from" in end.output, "a run with checkpoints of its own goes on from those"
    cooled = [*BRANCHING, "optimizer.schedule=linear", "name=cooled", f"train.resume_from={tmp_path}/tiny"]
    (end,) = train_ranks(1, tmp_path, cache_dir, *cooled, "train.num_steps=8")
    assert "at step 6" in end.output and sorted(losses(tmp_path, "cooled")) == [7, 8]


def test_what_cannot_be_branched_off_is_refused_in_one_line(tmp_path, cache_dir, corpus):
    train_ranks(1, tmp_path, cache_dir, *BRANCHING, "train.num_steps=2")
    common = [
        "launch/train.py",
        "--config",
        TINY,
        f"output_dir={tmp_path}",
        f"data.cache_dir={cache_dir}",
        "name=other",
    ]
    for overrides, part in (
        ([f"train.resume_from={tmp_path}/nothing"], "train.resume_from"),
        ([f"train.resume_from={tmp_path}/tiny", "train.seed=7"], "made with another train.seed"),
        (
            [f"train.resume_from={tmp_path}/tiny", "model.projector_multiplier=2"],
            "made with model.projector_multiplier=3, the recipe says 2",
        ),
    ):
        (end,) = run_ranks(1, [*common, *overrides])
        assert end.status == 2, end.output[-2000:]
        (line,) = [line for line in end.output.splitlines() if line.startswith("error: ")]
        assert part in line


def test_shards_that_have_changed_are_refused_until_they_are_accepted(tmp_path, cache_dir, corpus):
    """A place in the data means nothing in other data: with --accept-new-data the run goes on at its next epoch."""
    shards = tmp_path / "shards"
    shards.mkdir()
    (first,) = (corpus / "train").glob("*.tar")
    shutil.copy(first, shards / "0.tar")
    common = ["launch/train.py", "--config", TINY, f"output_dir={tmp_path}", f"data.cache_dir={cache_dir}"]
    common += [
        f"data.train={shards}",
        f"model.tokenizer={corpus}/tokenizer",
        "train.save_every=1",
        "train.log_samples=true",
    ]
    (end,) = run_ranks(1, [*common, "train.num_steps=1"])
    assert end.status == 0, end.output[-2000:]
    shutil.copy(corpus / "eval" / "shard-00000.tar", shards / "1.tar")
    (end,) = run_ranks(1, [*common, "train.num_steps=2"])
    (line,) = [line for line in end.output.splitlines() if line.startswith("error: ")]
    assert end.status == 2 and "1 shards added (1.tar)" in line and "--accept-new-data" in line
    (end,) = run_ranks(1, [*common, "train.num_steps=2", "--accept-new-data"])
    assert end.status == 0 and "going on at epoch 1" in end.output, end.output[-2000:]
    trace = [json.loads(line) for line in (tmp_path / "tiny" / "samples-0.jsonl").read_text().splitlines()]
    assert [step["position"] for step in trace] == [[0, 0], [1, 0]]
    (end,) = run_ranks(1, [*common, "train.num_steps=3"])
    assert end.status == 0, "what was accepted once is the run's own from then on"


def test_a_run_that_is_done_is_not_passed_off_as_another(tmp_path, cache_dir, corpus):
    """Another model, other rates or fewer steps under the name of a complete run: refused, not evaluated as if trained so."""
    train_ranks(1, tmp_path, cache_dir, "train.num_steps=2")
    common = ["launch/train.py", "--config", TINY, f"output_dir={tmp_path}", f"data.cache_dir={cache_dir}"]
    for overrides, part in (
        (["train.num_steps=2", "optimizer.schedule=linear"], "its 2 steps are done, with optimizer.schedule=cosine"),
        (["train.num_steps=2", "model.pooling_mode=resize"], "model.pooling_mode=adaptive, the recipe says resize"),
        (["train.num_steps=1"], "train.num_steps=1, but 2 steps are done"),
    ):
        (end,) = run_ranks(1, [*common, *overrides])
        (line,) = [line for line in end.output.splitlines() if line.startswith("error: ")]
        assert end.status == 2 and part in line, end.output[-2000:]
    (end,) = train_ranks(1, tmp_path, cache_dir, "train.num_steps=3", "optimizer.schedule=linear")
    assert "changed   optimizer.schedule was cosine, is linear from here on" in end.output


def test_one_run_has_one_record_in_wandb(tmp_path, cache_dir, corpus):
    pytest.importorskip("wandb")
    environment = {"WANDB_API_KEY": "", "WANDB_MODE": "offline"}
    for num_steps in (2, 3):
        overrides = ["train.wandb=auto", f"train.num_steps={num_steps}"]
        train_ranks(1, tmp_path, cache_dir, *overrides, environment=environment)
    records = [path.name.rpartition("-")[2] for path in (tmp_path / "tiny" / "wandb").glob("offline-run-*")]
    assert len(records) == 2 and set(records) == {(tmp_path / "tiny" / "wandb-id").read_text()}
    written = b"".join(path.read_bytes() for path in (tmp_path / "tiny" / "wandb").glob("offline-run-*/*.wandb"))
    assert b"count_histogram" in written and b"loss_per_count/4" in written


def test_an_offloaded_optimizer_trains_and_can_be_vetoed(tmp_path, cache_dir, corpus):
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "offload.json").write_text(json.dumps(config))
    train_ranks(2, tmp_path, cache_dir, ds_config=tmp_path / "offload.json")
    train_ranks(2, tmp_path / "plain", cache_dir)
    offloaded, plain = losses(tmp_path), losses(tmp_path / "plain")
    assert sorted(offloaded) == sorted(plain)
    assert all(abs(offloaded[step] - plain[step]) < 1e-4 for step in plain)
