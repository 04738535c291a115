"""A step waits for its device once, where the loss and the gradient norm are read together; no micro-step does."""

import json

from conftest import TINY, run_ranks

COUNTING = """
import collections, json, os, runpy, sys, traceback
import torch
from tokenflex.data.collate import PackedBatch
from tokenflex.train.run import Run
from tokenflex.train.trainer import Trainer

OURS = os.getcwd() + "/tokenflex/"
counts, is_counting = collections.Counter(), [False]


def counted(name):
    original = getattr(torch.Tensor, name)

    def read(tensor, *arguments, **options):
        if is_counting[0]:
            caller = traceback.extract_stack(limit=2)[0]
            if caller.filename.startswith(OURS):
                counts[f"{caller.filename[len(OURS):]}:{caller.name} {name}"] += 1
        return original(tensor, *arguments, **options)

    setattr(torch.Tensor, name, read)


for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
    counted(name)

to, open_batches, run_step = PackedBatch.to, Run.open_batches, Trainer.run_step


def moved(batch, device):
    is_counting[0] = True  # from here on its tensors are on the device
    return to(batch, device)


def opened(run, progress):
    for item in open_batches(run, progress):
        yield item
        is_counting[0] = False  # what is read and decoded comes on the host


def step(trainer, batches):
    try:
        return run_step(trainer, batches)
    finally:
        is_counting[0] = False


PackedBatch.to, Run.open_batches, Trainer.run_step = moved, opened, step
sys.path.insert(0, "launch")
sys.argv[0] = "launch/train.py"
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("READ " + json.dumps(counts))
"""
ON_CPU_ALONE = {"model/attention.py:_sdpa_per_sample tolist"}
"""Reads of what a GPU's attention takes as it is: it needs no lengths on the host."""


def test_the_device_is_read_once_per_step_and_never_per_micro_step(tmp_path, cache_dir, corpus):
    """Four micro-steps to a step, three steps: three reads, all at one place."""
    script = tmp_path / "counting.py"
    script.write_text(COUNTING)
    arguments = [script, "--config", TINY, f"output_dir={tmp_path}", f"data.cache_dir={cache_dir}", "train.num_steps=3"]
    (end,) = run_ranks(1, [*arguments, "data.packs_per_micro_batch=1", "train.ema_decay=0.9"])
    (line,) = [line for line in end.output.splitlines() if line.startswith("READ ")]
    found = json.loads(line[5:])
    assert end.status == 0, end.output[-3000:]
    assert {place: n for place, n in found.items() if place not in ON_CPU_ALONE} == {
        "parallel/engine.py:_ask tolist": 3
    }
