"""Clips are trained on: digits that move, of which one question needs one frame and the other their order."""

import json

import pytest
from clip_files import moving_shard, needs_av
from conftest import train_ranks

SMALL = ["data.pack_length=256", "data.max_images_per_pack=16", "evaluate.at_end=true", "data.max_bad_fraction=0"]


def settings(folder, corpus):
    shards = [f"data.train={folder}/train.tar", f"data.evaluation={folder}/held-out.tar"]
    return [*shards, f"model.tokenizer={corpus}/tokenizer", *SMALL]


@needs_av
def test_a_run_on_lists_of_frames_and_files_trains_and_answers(tmp_path, cache_dir, corpus):
    """Every sample is trained on at its planned length, half of them files; the export is asked about held-out clips."""
    moving_shard(tmp_path / "train.tar", 24, "train", 0, as_files=True)
    moving_shard(tmp_path / "held-out.tar", 6, "eval", 1, as_files=True)
    (end,) = train_ranks(1, tmp_path, cache_dir, *settings(tmp_path, corpus), "train.num_steps=3")
    logged = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in logged if "loss" in record] == [1, 2, 3]
    assert not list((tmp_path / "tiny").glob("bad-samples/*.jsonl")), end.output[-2000:]
    accuracy = json.loads((tmp_path / "tiny" / "accuracy.json").read_text())
    assert set(accuracy["accuracy"]) == {"digit", "way"} and accuracy["num_bad_samples"] == 0


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_few_hundred_steps_learn_which_way_a_digit_moves(tmp_path, cache_dir, corpus):
    """Guessing is right in a quarter of the clips; the way is in no single frame."""
    moving_shard(tmp_path / "train.tar", 6000, "train", 0)
    moving_shard(tmp_path / "held-out.tar", 400, "eval", 1)
    overrides = ["train.num_steps=400", "data.packs_per_step=4", "data.pack_length=512", "data.max_images_per_pack=32"]
    train_ranks(1, tmp_path, cache_dir, *settings(tmp_path, corpus), *overrides, "train.log_every=20", timeout_s=2900)
    accuracy = json.loads((tmp_path / "tiny" / "accuracy.json").read_text())["accuracy"]
    print(json.dumps(accuracy))
    assert accuracy["way"]["12"] >= 0.6
