"""Laws of validation while training: the same on any number of ranks, none repeated after a kill, and training is left alone."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY

from tokenflex.checkpoint import entries
from tokenflex.config import load_config
from tokenflex.data.held_out import open_held_out
from tokenflex.data.sources import Here
from tokenflex.errors import UserError
from tokenflex.train.answers import rounds
from tokenflex.train.objective import Objective
from tokenflex.train.progress import Progress
from tokenflex.train.validation import Validation, check_validation, figures

PLAIN = ["train.num_steps=6", "model.text.attention_dropout=0", "model.vision.attention_dropout=0"]
VALIDATED = [*PLAIN, "evaluate.every=2", "evaluate.answers=true", "train.save_every=2", "train.keep_checkpoints=1"]


def lines(folder, name="validation.jsonl"):
    return [json.loads(line) for line in (folder / "crash" / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, forge):
    """A run that validates, on two ranks of ZeRO-3."""
    folder = tmp_path_factory.mktemp("two")
    job = forge.done(folder, 2, *VALIDATED, "train.keep_best=1", "train.tensorboard=true", timeout_s=280)
    return folder, job.output


@pytest.fixture(scope="module")
def killed(tmp_path_factory, forge):
    """The same on one rank, killed between its second validation and the save after it, and gone on with."""
    folder = tmp_path_factory.mktemp("killed")
    job = forge(folder, 1, *VALIDATED, faults="kill@snapshot,step=4", timeout_s=280)
    assert job.statuses == [-9] and [line["step"] for line in lines(folder)] == [2, 4], job.output[-2000:]
    forge.done(folder, 1, *VALIDATED)
    return folder


def test_one_rank_killed_and_resumed_finds_what_two_ranks_find_and_repeats_none(two_ranks, killed):
    one, two = lines(killed), lines(two_ranks[0])
    assert [line["step"] for line in one] == [line["step"] for line in two] == [2, 4, 6]
    for a, b in zip(one, two):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6) and a["accuracy"] == b["accuracy"]
        for task, row in a["loss_per_task"].items():
            assert row == pytest.approx(b["loss_per_task"][task], abs=1e-5)
    assert set(one[0]["loss_per_count"]) == {"4", "6", "12", "text"}, "also at a count that is not trained"
    assert one[0]["loss_per_task"]["text"].keys() == {"text"} and set(one[0]["accuracy"]) == set(
        one[0]["loss_per_task"]
    )
    losses = [line["loss"] for line in one]
    assert losses == sorted(losses, reverse=True), "it looks at a model that learns"


def test_training_is_what_it_is_without_validation(two_ranks, tmp_path, forge):
    """Losses, and weights, moments and generators of the last checkpoint, to the bit."""
    forge.done(tmp_path, 2, *PLAIN, "train.save_every=2")
    keys = ("step", "loss", "grad_norm", "num_tokens")
    plain, validated = lines(tmp_path, "metrics.jsonl"), lines(two_ranks[0], "metrics.jsonl")
    assert [[line[key] for key in keys] for line in plain] == [[line[key] for key in keys] for line in validated]
    ends = [entries(folder / "crash" / "checkpoints")[-1].manifest for folder in (tmp_path, two_ranks[0])]
    assert ends[0].files == ends[1].files and ends[0].step == ends[1].step == 6
    assert validated[1]["seconds_per_step"]["validate"] > 0 == plain[1]["seconds_per_step"]["validate"]


def test_the_figures_of_a_run_are_whole(two_ranks, killed):
    """Phases add up to the time of the run, counts to its tokens; ranks are named; the sinks have it all."""
    folder, output = two_ranks
    logged = lines(folder, "metrics.jsonl")
    alone = lines(killed, "metrics.jsonl")
    phases = sum(sum(line["seconds_per_step"].values()) for line in alone)
    assert (
        0.5 < phases / sum(line["seconds"] for line in alone) < 1.1
    )  # logging and saving after the last line is in no line
    for line in logged:
        assert sum(line["tokens_per_count"].values()) == line["num_tokens"]
        assert 0 < line["fill"] <= 1 and line["flops"] > 0 and "mfu" not in line, "the peak of a CPU is not known"
        assert line["balance"]["language"] <= 1 and line["work_s"]["rank"] in (0, 1)
        assert line["work_s"]["mean"] <= line["work_s"]["max"] + 1e-5 and line["memory_gb"]["max"] > 0.1
        per_count = [value for value in line["loss_per_count"].values() if value is not None]
        assert min(per_count) - 1e-6 <= line["loss"] <= max(per_count) + 1e-6
    assert "validate  step 4: loss" in output and list((folder / "crash" / "tensorboard").glob("events*"))


def test_the_best_checkpoint_is_the_one_of_the_lowest_validation_loss(two_ranks):
    folder, _ = two_ranks
    by_step = {line["step"]: line["loss"] for line in lines(folder)}
    kept = {entry.manifest.step: entry for entry in entries(folder / "crash" / "checkpoints")}
    assert min(by_step, key=by_step.get) in kept
    for step, entry in kept.items():
        assert entry.manifest.score == by_step[step] and f"validation loss {by_step[step]:.4f}" in entry.describe()
        assert entry.manifest.progress["validation"] == {"step": step, "loss": by_step[step]}


@pytest.fixture(scope="module")
def held_out(tiny_config, processor):
    config = tiny_config.model_copy(update={"evaluate": tiny_config.evaluate.model_copy(update={"answers": True})})
    return open_held_out(config, processor, Here(), say=lambda text: None)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_every_sample_is_tried_once_per_count_by_one_rank_and_ranks_run_alike(held_out, num_ranks):
    plans = [list(held_out.plans(rank, num_ranks)) for rank in range(num_ranks)]
    assert {len(some) for some in plans} == {held_out.num_plans(num_ranks)}
    tried = [
        (int(sample), int(count))
        for some in plans
        for plan in some
        for sample, count in zip(plan.sample_ids, plan.counts)
    ]
    with_images = {sample for sample, count in tried if count}
    expected = {(sample, count) for sample in with_images for count in held_out.counts}
    expected |= {(sample, 0) for sample in held_out.tasks.keys() - with_images}
    assert len(tried) == len(set(tried)) and set(tried) == expected
    for side_by_side in zip(*plans):
        assert len({int(count) for plan in side_by_side for count in plan.counts}) <= 1, "one count at a time"
    asked = [chunk for some in rounds(held_out, 3, num_ranks) for chunk in some]
    assert sorted((i, name) for name, ids in asked for i in ids) == sorted(
        (sample, str(count or "text")) for sample, count in expected
    )
    for some in rounds(held_out, 3, num_ranks):
        assert len(some) <= num_ranks and len({name == "text" for name, _ in some}) == 1, "one kind at a time"


class Alone:
    """One rank, as far as a validation uses it."""

    rank, num_ranks, device, is_main = 0, 1, torch.device("cpu"), True

    def all_reduce_sum(self, values):
        return values.clone()

    def all_reduce_max(self, numbers):
        return list(numbers)


def test_a_run_that_is_asked_to_stop_leaves_its_validation_and_does_it_when_it_goes_on(
    held_out, tiny_config, model, processor
):
    config = tiny_config.model_copy(update={"evaluate": tiny_config.evaluate.model_copy(update={"every": 4})})
    modes, said, written, must_stop = [], [], [], [True]
    engine = SimpleNamespace(
        device=Alone.device, model=model, eval=lambda: modes.append(0), train=lambda: modes.append(1)
    )
    heartbeat = SimpleNamespace(phase=lambda *arguments: None)
    progress = Progress(step=4)
    state = SimpleNamespace(engine=engine, ranks=Alone(), heartbeat=heartbeat, say=said.append, progress=progress)
    sink = SimpleNamespace(write=lambda record, section: written.append((section, record)))
    objective = Objective(model.eval(), processor.image_processor.normalised)

    def started():
        return Validation(config, held_out, objective, state, [sink], lambda: must_stop[0])

    started().on_step(None)
    assert "left unfinished" in said[0] and not written and progress.validation == {} and modes == [0, 1]
    must_stop[0] = False
    again = started()
    again.on_batch(4, None)
    again.on_batch(4, None)
    again.on_step(None)
    ((section, record),) = written
    assert (
        section == "validation" and record["step"] == 4 and progress.validation == {"step": 4, "loss": record["loss"]}
    )
    assert not started()._is_due(4) and started()._is_due(8) and not started()._is_due(5) and not started()._is_due(0)
    assert started()._is_due(config.train.num_steps), "also after the last step"
    total = weight = 0.0
    for plan in held_out.plans(0, 1):
        if plan.counts[0] == 4:
            batch = held_out.dataset.batch(plan)
            with torch.no_grad():
                total += float((objective.token_losses(batch)[1] * batch.weights).sum())
            weight += float(batch.weights.sum())
    assert record["loss_per_count"]["4"] == pytest.approx(total / weight, rel=1e-5)


def test_what_has_no_sample_is_left_out():
    sums = np.array([[[6.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 4.0]]])
    found = figures(sums, ["a", "b"], ["4", "text"])
    assert found == {
        "loss": 7 / 6,
        "loss_per_count": {"4": 3.0, "text": 0.25},
        "loss_per_task": {"a": {"4": 3.0}, "b": {"text": 0.25}},
    }


@pytest.mark.parametrize("overrides, part", [
    (["data.evaluation=[]"], "data.evaluation is empty; name held-out shards"),
    (["evaluate.num_visual_tokens=[4,640]"], "640 visual tokens and their text fit no pack"),
    (["train.keep_best=1"], "no step is both saved"),
    (["train.keep_best=1", "train.save_every=5"], "no step is both saved"),
])  # fmt: skip
def test_a_recipe_that_cannot_be_validated_by_is_refused(overrides, part):
    with pytest.raises(UserError, match=part):
        check_validation(load_config(TINY, ["evaluate.every=2", *overrides]))
    check_validation(load_config(TINY, ["evaluate.every=0", *overrides]))


def test_a_pack_that_no_held_out_sample_fits_is_named(tiny_config, processor):
    config = tiny_config.model_copy(update={"data": tiny_config.data.model_copy(update={"pack_length": 5})})
    with pytest.raises(UserError, match="none of 16 samples has an answer and fits a pack at 12 visual tokens"):
        open_held_out(config, processor, Here())
