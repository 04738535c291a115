"""What saving costs where most of a model is frozen: bytes written and seconds per save, in a row of saves of one run.

torchrun --nproc-per-node 2 tests/benchmarks/frozen_cost.py DIR [NAME]   (DIR: an empty folder on the disk to measure)

Rank 0 prints one line of JSON; with NAME it is entered under that name into docs/results/frozen.json.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from checkpoint_cost import Blocks

from tokenflex import parallel
from tokenflex.checkpoint import CheckpointWriter, Retention, load_newest, named_pieces, read_slices
from tokenflex.train.optimizer import VetoableAdamW

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results" / "frozen.json"
WIDTH, NUM_LAYERS, NUM_FROZEN, NUM_SAVES = 1536, 24, 23, 8


def main(folder, name=""):
    parallel.quiet_libraries()
    ranks = parallel.join_ranks(parallel.join())
    torch.manual_seed(0)
    model = Blocks(WIDTH, NUM_LAYERS)
    model.layers[:NUM_FROZEN].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    ds_config = parallel.resolve_ds_config({"zero_optimization": {"stage": 3}}, "fp32", 1, 1.0)
    engine = parallel.Engine(model, lambda *asked: VetoableAdamW(trained, asked[0], lr=1e-4), ds_config, ranks)
    shapes = {n: [list(p.ds_shape), "float32", p.requires_grad] for n, p in engine.model.named_parameters()}
    constant = {"parameters": shapes, "buffers": [], "config": {}, "model": {}, "versions": {}, "score": None}
    describe = lambda progress: {**constant, "num_updates": engine.num_updates}
    writer = CheckpointWriter(Path(folder), ranks, Retention(last=2), "cost", describe)
    num_bytes, seconds = [], []
    for number in range(1, NUM_SAVES + 1):
        engine.backward(engine(x=torch.ones(1, WIDTH, device=ranks.device)))
        engine.step([1e-4], lambda norm: "")
        ranks.barrier()
        begin = time.perf_counter()
        writer.start(named_pieces(engine.slices(), ranks.rank, ranks.num_ranks), {}, {"step": number})
        writer.before_update()
        saved = writer.finish()
        seconds.append(ranks.all_reduce_max([time.perf_counter() - begin])[0])
        num_bytes.append(saved.num_bytes)

    def fill(manifest, place):
        with engine.loading(manifest.num_updates) as slices:
            read_slices(place, manifest, slices, ranks.rank)

    ranks.barrier()
    begin = time.perf_counter()
    load_newest(Path(folder), ranks, fill, say=lambda text: None)
    load_s = ranks.all_reduce_max([time.perf_counter() - begin])[0]
    if ranks.is_main:
        on_disk = {p.stat().st_ino: p.stat().st_size for p in Path(folder).rglob("*.safetensors")}
        record = {
            "parameters": sum(torch.Size(shape).numel() for shape, _, _ in shapes.values()),
            "trained": sum(torch.Size(shape).numel() for shape, _, is_trained in shapes.values() if is_trained),
            "ranks": ranks.num_ranks,
            "megabytes_written": [round(n / 1e6, 1) for n in num_bytes],
            "seconds": [round(s, 3) for s in seconds],
            "median_s_from_the_third_on": round(statistics.median(seconds[2:]), 3),
            "megabytes_on_disk": round(sum(on_disk.values()) / 1e6, 1),
            "load_s": round(load_s, 3),
        }
        print("COST " + json.dumps(record), flush=True)
        if name:
            known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            RESULTS.write_text(json.dumps({**known, name: record}, indent=1) + "\n")
    engine.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
