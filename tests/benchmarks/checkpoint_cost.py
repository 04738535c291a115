"""What a save costs here and with DeepSpeed's own format: stall of the step loop, time in all, bytes; and what loading costs.

Started on every rank by `test_cost.py`. Rank 0 prints one line of JSON. Both formats save the same engine's state (weights,
moments) to the same disk; ours adds generators and checksums. DeepSpeed's save stops the loop for all of its time.
"""

import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

from tokenflex import parallel
from tokenflex.checkpoint import (
    CheckpointWriter,
    EarlyCheck,
    Retention,
    check_files,
    load_newest,
    named_pieces,
    read_slices,
)
from tokenflex.train.optimizer import VetoableAdamW

ROUNDS = 5
BATCH = 512


class Blocks(torch.nn.Module):
    """Square layers: the number of parameters is what counts here."""

    def __init__(self, width, num_layers):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(width, width) for _ in range(num_layers)])

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x.square().mean()


def main(folder, width, num_layers):
    folder = Path(folder)
    launch = parallel.join()
    parallel.quiet_libraries()
    ranks = parallel.join_ranks(launch)
    device = ranks.device
    ds_config = parallel.resolve_ds_config({"zero_optimization": {"stage": 3}}, "fp32", 1, 1.0)
    torch.manual_seed(0)
    model = Blocks(width, num_layers)
    num_parameters = sum(p.numel() for p in model.parameters())
    parameters = list(model.parameters())
    engine = parallel.Engine(
        model, lambda should_skip, _: VetoableAdamW(parameters, should_skip, lr=1e-4, fused=True), ds_config, ranks
    )

    def step(before_update=lambda: None):
        """One whole step; `before_update` runs where the training loop calls it."""
        begin = time.perf_counter()
        engine.backward(engine(x=torch.ones(BATCH, width, device=device)))
        before_update()
        engine.step([1e-4], lambda norm: "")
        return time.perf_counter() - begin

    for _ in range(2):
        step()

    shapes = {name: [list(p.ds_shape), "float32", True] for name, p in engine.model.named_parameters()}
    constant = {"parameters": shapes, "buffers": [], "config": {}, "model": {}, "versions": {}, "score": None}
    writer = CheckpointWriter(
        folder / "ours", ranks, Retention(last=1), "cost", lambda p: {**constant, "num_updates": 2}
    )
    stalls, totals, theirs, plain_steps, saving_steps = [], [], [], [], []
    for round in range(ROUNDS):
        ranks.barrier()
        begin = time.perf_counter()
        pieces = named_pieces(engine.slices(), launch.rank, launch.num_ranks)
        writer.start(pieces, {}, {"step": round + 1})
        saving_steps.append(ranks.all_reduce_max([step(writer.before_update)])[0])
        saved = writer.finish()
        stalls.append(ranks.all_reduce_max([saved.stall_s])[0])
        totals.append(ranks.all_reduce_max([time.perf_counter() - begin])[0])
        ranks.barrier()
        plain_steps.append(ranks.all_reduce_max([step()])[0])
        ranks.barrier()
        begin = time.perf_counter()
        engine._engine.save_checkpoint(str(folder / "deepspeed"), tag=f"step-{round}", save_latest=True)
        theirs.append(ranks.all_reduce_max([time.perf_counter() - begin])[0])
        if launch.rank == 0 and round:
            shutil.rmtree(folder / "deepspeed" / f"step-{round - 1}")
        ranks.barrier()

    def fill(manifest, place):
        with engine.loading(manifest.num_updates) as slices:
            read_slices(place, manifest, slices, launch.rank)

    loads, checks, waits = [], [], []
    for _ in range(ROUNDS):
        check = EarlyCheck(folder / "ours", launch.rank, launch.num_ranks)
        time.sleep(1.0)  # a start builds its model meanwhile
        ranks.barrier()
        begin = time.perf_counter()
        check(folder / "ours" / f"step-{ROUNDS:08d}", launch.rank, launch.num_ranks)
        waits.append(ranks.all_reduce_max([time.perf_counter() - begin])[0])
        ranks.barrier()
        begin = time.perf_counter()
        loaded = load_newest(folder / "ours", ranks, fill, check=check)
        loads.append(ranks.all_reduce_max([time.perf_counter() - begin])[0])
        ranks.barrier()
        begin = time.perf_counter()
        check_files(folder / "ours" / loaded.tag, loaded.manifest, launch.rank, launch.num_ranks)
        checks.append(ranks.all_reduce_max([time.perf_counter() - begin])[0])
    their_loads = []
    for _ in range(ROUNDS):
        ranks.barrier()
        begin = time.perf_counter()
        engine._engine.load_checkpoint(str(folder / "deepspeed"), tag=f"step-{ROUNDS - 1}")
        their_loads.append(ranks.all_reduce_max([time.perf_counter() - begin])[0])
    size = sum(path.stat().st_size for path in (folder / "deepspeed" / f"step-{ROUNDS - 1}").rglob("*"))
    if launch.rank == 0:
        record = {
            "parameters": num_parameters,
            "ranks": launch.num_ranks,
            "rounds": ROUNDS,
            "stall_s": statistics.median(stalls),
            "step_s": statistics.median(plain_steps),
            "step_while_saving_s": statistics.median(saving_steps),
            "total_s": statistics.median(totals),
            "bytes": saved.num_bytes,
            "deepspeed_stall_s": statistics.median(theirs),
            "deepspeed_bytes": size,
            "stall_share": statistics.median(stalls) / statistics.median(theirs),
            "load_s": statistics.median(loads),
            "verify_s": statistics.median(checks),
            "verify_waited_s": statistics.median(waits),
            "verify_share": statistics.median(waits) / statistics.median(loads),
            "deepspeed_load_s": statistics.median(their_loads),
        }
        print("COST " + json.dumps(record), flush=True)
    engine.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
