"""NaN, infinity and spikes: all ranks skip together, nothing moves, the samples are named, and a streak is passed over."""

import json
import math

import pytest
from jobs import trace_of

from tokenflex import layout
from tokenflex.checkpoint import checked_manifest
from tokenflex.layout import tag_of
from tokenflex.train.spike_filter import MIN_STEPS, SpikeFilter

ACCUMULATED = ["data.packs_per_micro_batch=1", "train.keep_checkpoints=9"]


def events(folder, kind):
    lines = (folder / "crash" / "events.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == kind]


def checksums(folder, step):
    """Of what a checkpoint holds, by kind and piece, without the generators (which do move)."""
    from tokenflex.checkpoint import ShardReader

    place, found = folder / "crash" / "checkpoints" / tag_of(step), {}
    for name in checked_manifest(place).files:
        with ShardReader(place / name) as reader:
            for (kind, parameter), pieces in reader.slices.items():
                for start, piece in pieces:
                    found[name, kind, parameter, start] = reader._file.get_tensor(piece).numpy().tobytes()
    return found


def slow(*values):
    """A case of the long form only."""
    return pytest.param(*values, marks=pytest.mark.slow)


CASES = [("loss", 0, 0), ("gradient", 1, 1), slow("loss", 1, 1), slow("gradient", 0, 0)]
CASES += [slow("activation", 0, 0), slow("activation", 1, 1)]


@pytest.mark.parametrize("place, rank, micro", CASES)
def test_a_nan_moves_nothing_on_any_rank(place, rank, micro, forge, tmp_path):
    """Injected on one rank in one of two accumulated micro-steps: weights and moments keep every bit, the run goes on."""
    fault = f"nan@{place},rank={rank},step=2,micro={micro}"
    job = forge.done(tmp_path, 2, *ACCUMULATED, faults=fault)
    (skip,) = events(tmp_path, "skip")
    assert skip["step"] == 2 and "nan" in skip["reason"]
    ids = {i for (_, _, step), some in trace_of(tmp_path).samples.items() if step == 2 for i in some}
    assert len(skip["samples"]) == len(ids) and all(".tar:" in name for name in skip["samples"])
    before, after, later = (checksums(tmp_path, step) for step in (2, 3, 4))
    assert before == after, "a skipped step moved something"
    moved = {key for key in after if after[key] != later[key]}
    assert {kind for _, kind, _, _ in moved} == {"weight", "exp_avg", "exp_avg_sq"}
    assert job.output.count("skipped   step 2") == 1
    manifests = [checked_manifest(tmp_path / "crash" / "checkpoints" / tag_of(step)) for step in (2, 3, 4)]
    assert [m.num_updates for m in manifests] == [2, 2, 3]
    assert all(math.isfinite(loss) for step, (loss, _) in trace_of(tmp_path).losses.items() if step != 3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_zero_stage_skips_alike(stage, forge, tmp_path):
    from test_resume import ds_config

    flags = [ds_config(tmp_path, stage)]
    forge.done(tmp_path, 2, *ACCUMULATED, faults="nan@gradient,rank=1,step=2,micro=0", flags=flags)
    assert checksums(tmp_path, 2) == checksums(tmp_path, 3) != checksums(tmp_path, 4)
    assert len(events(tmp_path, "skip")) == 1


def test_a_streak_takes_the_run_back_and_its_data_are_passed_over(forge, tmp_path):
    """Three bad steps in a row: back to the checkpoint before them, and the same run as if those data had not been there."""
    overrides = ["train.max_bad_steps=3", "train.num_steps=6", "train.keep_checkpoints=9"]
    faults = ";".join(f"nan@loss,rank=1,step={step}" for step in (2, 3, 4))
    job = forge.done(tmp_path, 2, *overrides, faults=faults)
    (back,) = events(tmp_path, "roll back")
    assert back["step"] == 5 and back["to"] == 2
    log = [json.loads(line) for line in (tmp_path / "crash" / "samples-1.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert back["passed_over"] == [record["position"] for record in log[2:5]]
    again = [record["position"] for record in log[:2] + log[5:]]
    assert again == sorted(again) and not [p for p in again if p in back["passed_over"]], "each place but those, once"
    assert "their data are passed over" in job.output
    final = trace_of(tmp_path)
    assert sorted(final.losses) == [1, 2, 3, 4, 5, 6] and all(loss is not None for loss, _ in final.losses.values())
    assert final.final["progress"]["passed_over"] == back["passed_over"]
    # The same, killed after the way back: the resumed run passes over the same data.
    killed = tmp_path / "killed"
    forge(killed, 2, *overrides, faults=faults + ";kill@forward,rank=all,step=4,count=2")
    assert events(killed, "roll back") and not (killed / "crash" / "model").exists()
    forge.done(killed, 2, *overrides)
    assert trace_of(killed).final == final.final


@pytest.mark.slow
def test_a_run_that_only_gets_worse_stops(forge, tmp_path):
    faults = ";".join(f"nan@loss,rank=0,step={step},count={count}" for step in (2, 3) for count in (1, 2, 3))
    overrides = ["train.max_bad_steps=2", "train.num_steps=8", "train.max_rollbacks=2"]
    job = forge(tmp_path, 2, *overrides, faults=faults)
    assert job.statuses == [layout.DIVERGED] * 2, job.output[-3000:]
    assert "went back 2 times" in job.output
    job = forge(tmp_path / "early", 2, *overrides, faults="nan@loss,step=0;nan@loss,step=1")
    assert job.statuses == [layout.DIVERGED] * 2 and "no checkpoint from before" in job.output


def test_the_guard_finds_spikes_and_gets_used_to_a_new_level():
    guard = SpikeFilter(6.0, {})
    level = lambda i: 2.0 + 0.1 * math.sin(i)
    assert not any(guard.judge(level(i), 1.0 + 0.01 * math.cos(i)) for i in range(MIN_STEPS + 10))
    assert "loss 5 is far above" in guard.judge(5.0, 1.0)
    assert not guard.judge(level(3), 1.0)
    assert "gradient norm 40" in guard.judge(level(4), 40.0)
    assert "loss is nan" in guard.judge(float("nan"), 1.0) and "inf" in guard.judge(1.0, float("inf"))
    skipped = [bool(guard.judge(6.0 + 0.1 * math.sin(i), 1.0)) for i in range(40)]
    assert 1 <= sum(skipped) <= 7 and not any(skipped[8:]), (
        "a level that stays must be accepted before a run is taken back"
    )
    assert not SpikeFilter(0, {}).judge(1e30, 1e30)


def test_the_guard_goes_on_from_its_history():
    one, history = SpikeFilter(6.0, {}), {}
    values = [2.0 + 0.1 * math.sin(i * i) for i in range(100)] + [9.0, 2.0]
    verdicts = [one.judge(value, value) for value in values]
    split = [SpikeFilter(6.0, history).judge(value, value) for value in values]
    assert verdicts == split and verdicts[-2] and not verdicts[-1]
