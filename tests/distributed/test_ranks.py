"""Laws of a job: one rank = two ranks, resumed = uninterrupted, and no rank waits for another's image."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, needs_fused_loss, run_ranks, train_ranks

from tokenflex.layout import REQUEUE


def metrics(output_dir, name="tiny"):
    return [json.loads(line) for line in (output_dir / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, cache_dir, corpus):
    """The tiny recipe on one rank: the reference of the laws below."""
    folder = tmp_path_factory.mktemp("one_rank")
    train_ranks(1, folder, cache_dir)
    return folder


def test_one_rank_equals_two_ranks(one_rank, tmp_path, cache_dir):
    train_ranks(2, tmp_path, cache_dir)
    one, two = metrics(one_rank), metrics(tmp_path)
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        assert abs(a["loss"] - b["loss"]) < 1e-6, (a, b)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        for key in ("num_tokens", "num_visual_tokens", "num_samples", "images_per_count"):
            assert a[key] == b[key], key


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_zero_stage_trains_alike(stage, one_rank, tmp_path, cache_dir):
    config = json.loads((ROOT / "configs" / "zero3.json").read_text())
    config["zero_optimization"] = {"stage": stage}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    train_ranks(1, tmp_path, cache_dir, ds_config=tmp_path / "ds.json")
    for a, b in zip(metrics(one_rank), metrics(tmp_path), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5, (a, b)


@pytest.fixture
def zero3_without_persistence(tmp_path):
    """A DeepSpeed file under which every weight, also the smallest, is gathered for each use and freed after it."""
    config = json.loads((ROOT / "configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "ds.json").write_text(json.dumps(config))
    return tmp_path / "ds.json"


def assert_same_training(one, other, loss_bound):
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert abs(a["loss"] - b["loss"]) < loss_bound, (a, b)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), (a, b)


def test_trains_through_the_interpreted_kernels_as_through_plain_torch(
    one_rank, tmp_path, cache_dir, zero3_without_persistence
):
    """Pooling, projector and splice in the Triton kernels themselves, run by Triton's interpreter, on two ranks of ZeRO-3."""
    train_ranks(
        2,
        tmp_path,
        cache_dir,
        "model.projector_backend=kernels",
        environment={"TRITON_INTERPRET": "1"},
        timeout_s=280,
        ds_config=zero3_without_persistence,
    )
    assert_same_training(one_rank, tmp_path, loss_bound=1e-5)


@needs_fused_loss
def test_the_fused_loss_trains_as_the_plain_one_with_a_sharded_tied_weight(
    one_rank, tmp_path, cache_dir, zero3_without_persistence
):
    train_ranks(2, tmp_path, cache_dir, "train.fused_loss=on", ds_config=zero3_without_persistence)
    assert_same_training(one_rank, tmp_path, loss_bound=1e-6)


@needs_fused_loss
def test_the_fused_loss_trains_as_the_plain_one_with_a_sharded_output_layer(
    tmp_path, cache_dir, corpus, tiny_config, zero3_without_persistence
):
    text = json.dumps({**tiny_config.model.text, "tie_word_embeddings": False})
    untied = [f"model.text={text}", "train.num_steps=3"]
    train_ranks(1, tmp_path / "plain", cache_dir, *untied, "train.fused_loss=off")
    train_ranks(2, tmp_path / "fused", cache_dir, *untied, "train.fused_loss=on", ds_config=zero3_without_persistence)
    assert_same_training(tmp_path / "plain", tmp_path / "fused", loss_bound=1e-6)


def test_workers_change_nothing(one_rank, tmp_path, cache_dir):
    train_ranks(1, tmp_path, cache_dir, "data.num_workers=2")
    assert [line["loss"] for line in metrics(one_rank)] == [line["loss"] for line in metrics(tmp_path)]


def test_interrupt_saves_and_the_same_command_continues_the_curve(one_rank, tmp_path, cache_dir):
    """Ctrl-C in the middle of a run of real processes, then the same command again."""
    command = [sys.executable, "launch/train.py", "--config", str(TINY), "--ds_config", "configs/zero3.json"]
    command += [f"output_dir={tmp_path}", f"data.cache_dir={cache_dir}"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": "29671"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    log = tmp_path / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == REQUEUE, output
    assert "the same command goes on from there" in output
    num_before = len(metrics(tmp_path))
    assert 2 <= num_before < 6
    again = subprocess.run(command, cwd=ROOT, env=variables, text=True, capture_output=True, timeout=240)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"at step {num_before}" in again.stdout
    for a, b in zip(metrics(one_rank), metrics(tmp_path), strict=True):
        assert a["step"] == b["step"]
        assert abs(a["loss"] - b["loss"]) < 1e-6, (a, b)


def test_a_changed_plan_is_refused_on_resume(one_rank, cache_dir):
    ends = run_ranks(
        1,
        [
            "launch/train.py",
            "--config",
            TINY,
            f"output_dir={one_rank}",
            f"data.cache_dir={cache_dir}",
            "data.pack_length=512",
        ],
    )
    assert ends[0].status == 2
    assert "made with another data.pack_length" in ends[0].output and "--fresh" in ends[0].output


def test_a_run_of_another_planner_is_refused_on_resume(one_rank, tmp_path, cache_dir):
    shutil.copytree(one_rank, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tiny" / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "planner.version": 0}))
    arguments = ["launch/train.py", "--config", TINY, f"output_dir={tmp_path}", f"data.cache_dir={cache_dir}"]
    ends = run_ranks(1, arguments)
    assert ends[0].status == 2
    assert "made with another planner.version; take the release" in ends[0].output


TEXT_ONLY_ON_ONE_RANK = """
import sys
import numpy as np
import torch
from tokenflex import parallel
from tokenflex.config import load_config
from tokenflex.data import Limits, PackDataset, find_shards, load_or_build_index
from tokenflex.plan import Position
from tokenflex.data.loader import MicroBatchPlan
from tokenflex.model import build_model, build_processor
from tokenflex.train.loss import fused_loss_head
from tokenflex.train.optimizer import make_optimizer, parameter_groups
from tokenflex.train.objective import Objective

recipe, corpus, fused_loss = sys.argv[1:]
config = load_config(recipe, [f"model.tokenizer={corpus}/tokenizer"])
launch = parallel.join()
parallel.quiet_libraries()
ranks = parallel.join_ranks(launch)
ds_config = parallel.resolve_ds_config(parallel.load_ds_config("configs/zero3.json"), "fp32", 2, 1.0)
ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # every weight is gathered, none is kept
processor = build_processor(config.model, config.budget)
index = load_or_build_index(find_shards([corpus + "/train"]), processor, corpus + "/train/index", Limits())
torch.manual_seed(0)
model = build_model(config.model, config.budget, processor, torch.float32)
groups = parameter_groups(model, config.optimizer)
rates = [group["lr"] for group in groups]
engine = parallel.Engine(model, make_optimizer(groups, config.optimizer), ds_config, ranks)
engine.train()
fused_head = fused_loss_head(engine.model.language_model, fused_loss, ranks.device)
dataset = PackDataset(index, processor, "sqrt", blank_count=4, limits=Limits())
text, images = np.flatnonzero(index.num_images == 0), np.flatnonzero(index.num_images > 0)
for micro in range(8):  # one rank without images, then without anything; with the plain loss, then with the fused one
    ids = text[: 2 * (micro % 4 < 2)] if launch.rank == micro % 2 else images[micro : micro + 2]
    counts = np.where(index.num_images[ids] > 0, 12, 0)
    batch = dataset.batch(MicroBatchPlan(Position(), micro % 2 == 1, ids, counts, 4.0))
    objective = Objective(engine, processor.image_processor.normalised, fused_head if micro >= 4 else None)
    loss = objective(batch).total
    engine.backward(loss)
    engine.step(rates)
    assert torch.isfinite(loss)
print("DONE", launch.rank)
torch.distributed.destroy_process_group()
"""


def test_a_text_only_or_empty_micro_batch_on_one_rank_does_not_hang_zero3(tmp_path, corpus):
    script = tmp_path / "text_only.py"
    script.write_text(TEXT_ONLY_ON_ONE_RANK)
    fused_loss = "on" if hasattr(torch.nn, "LinearCrossEntropyOptions") else "off"
    for rank, end in enumerate(run_ranks(2, [script, TINY, corpus, fused_loss], timeout_s=120)):
        assert end.status == 0 and f"DONE {rank}" in end.output, end.output[-3000:]


OTHER_PLAN_LATER_ON = """
import os, runpy, sys
from dataclasses import replace
from tokenflex.plan import Planner

if os.environ["RANK"] == "1":
    planned = Planner.steps_from

    def steps_from(planner, position):
        for number, step in enumerate(planned(planner, position)):
            yield replace(step, packs=step.packs[::-1]) if number >= 3 else step

    Planner.steps_from = steps_from
sys.path.insert(0, "launch")
sys.argv[0] = "launch/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_plan_that_comes_apart_later_on_ends_all_ranks_before_it_is_saved(tmp_path, cache_dir, corpus):
    """The first steps are the same on both ranks; from the fourth on, rank 1 has the packs in another order."""
    script = tmp_path / "other_plan.py"
    script.write_text(OTHER_PLAN_LATER_ON)
    arguments = ["--config", TINY, "--ds_config", "configs/zero3.json", f"data.cache_dir={cache_dir}"]
    ends = run_ranks(2, [script, *arguments, f"output_dir={tmp_path}", "train.save_every=1"])
    assert [end.status for end in ends] == [2, 2], ends[0].output[-3000:] + ends[1].output[-3000:]
    found = re.search("data, step 4: rank 1 plans ([0-9a-f]{16}), rank 0 plans ([0-9a-f]{16});", ends[0].output)
    assert found and found[1] != found[2], ends[0].output[-3000:]
    saved = sorted(path.name for path in (tmp_path / "tiny" / "checkpoints").glob("step-*"))
    assert saved and int(saved[-1].removeprefix("step-")) <= 3
