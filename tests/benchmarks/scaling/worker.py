"""One rank of the runs that `tokenflex simulate` is held against: planned packs of made-up samples through a real engine.

`worker.py PLANS STAGE OUT`; runs under a launcher's variables. Each micro-step is timed on its own: CPU seconds of this process (all of
its threads, gloo's too) and wall seconds. Waiting for another rank costs no CPU, so on cores that are shared the CPU seconds are
what the rank would take on a core of its own.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tokenflex import parallel
from tokenflex.config import load_config
from tokenflex.corpus.tokenizer import build_tokenizer
from tokenflex.model import build_model, build_processor
from tokenflex.model.attention import packing
from tokenflex.train.optimizer import make_adamw, parameter_groups

HERE = Path(__file__).parent
ROUNDS = 2
ZERO = {"contiguous_gradients": True, "reduce_bucket_size": 1_000_000, "stage3_param_persistence_threshold": 1_000}


def main(plans, stage, out):
    parallel.quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer().save_pretrained(folder)
        config = load_config(HERE / "model.yaml", [f"model.tokenizer={folder}"])
        processor = build_processor(config.model, config.budget)
    ranks = parallel.join_ranks(parallel.join())
    ds_config = parallel.resolve_ds_config({"zero_optimization": {"stage": int(stage), **ZERO}}, "fp32", 1, 1.0)
    torch.manual_seed(0)
    model = build_model(config.model, config.budget, processor, torch.float32)
    groups = parameter_groups(model, config.optimizer)
    rates = [group["lr"] for group in groups]
    engine = parallel.Engine(model, make_adamw(groups, config.optimizer), ds_config, ranks)
    del model
    workloads = json.loads(Path(plans).read_text())
    timed = {name: [] for name in workloads}
    for number in range(ROUNDS + 1):
        for name, packs in workloads.items():
            mine = packs[ranks.rank :: ranks.num_ranks]
            times = [micro_step(engine, pack, rates) for pack in mine]
            if number:  # the first round warms up
                timed[name].append(times)
    medians = {name: np.median(np.array(values), axis=0).tolist() for name, values in timed.items()}
    every = ranks.all_gather(medians)
    if ranks.is_main:
        Path(out).write_text(json.dumps(every))
    engine.close()


def micro_step(engine, pack, rates):
    """[CPU seconds of forward and backward pass, wall seconds of them, CPU seconds of the update]."""
    inputs = batch_of(pack, engine.model.config)
    cpu, wall = time.process_time(), time.perf_counter()
    engine.backward(engine(**inputs).logits.float().square().mean())
    passes = time.process_time() - cpu, time.perf_counter() - wall
    cpu = time.process_time()
    engine.step(rates, lambda norm: "")
    return [*passes, time.process_time() - cpu]


def batch_of(pack, config):
    """Inputs of a pack {lengths, tiles, counts, learned}: tokens of no meaning, images of noise."""
    bounds = torch.tensor([0, *np.cumsum(pack["lengths"])], dtype=torch.int32)
    total, tiles = int(bounds[-1]), sum(pack["tiles"])
    counts = [count for number, count in zip(pack["tiles"], pack["counts"]) for _ in range(number)]
    return {
        "input_ids": torch.full((1, total), 3),
        "position_ids": torch.cat([torch.arange(length) for length in pack["lengths"]])[None],
        "pixel_values": torch.rand(max(tiles, 1), 3, config.image_height, config.image_width),
        "num_visual_tokens": counts or [4],
        "visual_positions": torch.arange(sum(counts)),
        "is_dummy_image": not tiles,
        "logits_to_keep": torch.arange(max(pack["learned"], 1)),
        **packing(bounds, max(pack["lengths"]), total),
    }


if __name__ == "__main__":
    main(*sys.argv[1:4])
