"""What a step costs because there are many ranks: planning, the plan's digest, the agreement that ends it. CPU only.

OMP_NUM_THREADS=1 python tests/benchmarks/ranks_cost.py [--write]     writes docs/results/ranks.json

Planning is what one rank of 8, 64 and 1,024 does (every rank plans all of them); a step is a sleep of 0.1 s, as a host waits for
its device. Agreements are real processes on gloo, forked on this machine: with more of them than cores the figure is the machine's.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.append(str(Path(__file__).parent / "packing"))
from workload import workload  # noqa: E402

from tokenflex.data.loader import micro_batches  # noqa: E402
from tokenflex.parallel.environment import Launch  # noqa: E402
from tokenflex.parallel.ranks import Ranks  # noqa: E402
from tokenflex.plan import Position  # noqa: E402
from tokenflex.plan.ahead import ahead  # noqa: E402
from tokenflex.plan.simulate import make_planner  # noqa: E402
from tokenflex.plan.table import LengthTable  # noqa: E402
from tokenflex.train.run import PLANS_AHEAD  # noqa: E402

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results" / "ranks.json"
STEP_S, NUM_STEPS = 0.1, 100


def planner_of(table, num_ranks):
    settings = SimpleNamespace(
        capacity=8192, max_tiles=48, ranks=num_ranks, counts=[64, 144, 256], probabilities=[0.2, 0.3, 0.5],
        mixed_counts=False, over_long="drop", window_rows=16, seed=0,
    )  # fmt: skip
    return make_planner(table, settings)


def plans_of(table, num_ranks):
    return micro_batches(planner_of(table, num_ranks).steps_from(Position()), 0, num_ranks, 1)


def waits(plans):
    """Seconds that each step but the first waits for its plan."""
    next(plans)
    found = []
    for _ in range(NUM_STEPS):
        time.sleep(STEP_S)
        begin = time.perf_counter()
        next(plans)
        found.append(time.perf_counter() - begin)
    return {"longest_wait_s": round(max(found), 4), "waited_in_all_s": round(sum(found), 4)}


def digest_us(table, num_ranks):
    steps = planner_of(table, num_ranks).steps_from(Position())
    found = []
    for _ in range(20):
        step = next(steps)
        begin = time.thread_time()
        step.digest()
        found.append(1e6 * (time.thread_time() - begin))
    return round(statistics.median(found), 1)


def agreement_us(num_ranks, rounds=200):
    """Median of an agreement about six numbers, by rank 0, over real processes."""
    port, (reader, writer) = 20000 + os.getpid() % 20000, os.pipe()
    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            try:
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                torch.distributed.init_process_group("gloo", rank=rank, world_size=num_ranks)
                launch = Launch(rank=rank, num_ranks=num_ranks, local_rank=rank, local_num_ranks=num_ranks,
                                master_addr="127.0.0.1", master_port=port, launcher="benchmark")  # fmt: skip
                ranks, found = Ranks(launch, torch.device("cpu")), []
                for _ in range(rounds):
                    begin = time.perf_counter()
                    ranks.all_reduce_max([0.0] * 6)
                    found.append(1e6 * (time.perf_counter() - begin))
                if rank == 0:
                    os.write(writer, str(statistics.median(found)).encode())
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return round(float(os.read(reader, 100)), 1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text, tiles = workload(1_500_000)
    table = LengthTable(text=text, tiles=tiles, name="workload")
    record = {"machine": f"{os.cpu_count()} CPU cores, shared", "step_s": STEP_S, "steps": NUM_STEPS, "plan": {}}
    for num_ranks in (8, 64, 1024):
        record["plan"][num_ranks] = {
            "in the step": waits(plans_of(table, num_ranks)),
            "ahead": waits(ahead(plans_of(table, num_ranks), PLANS_AHEAD)),
            "digest_us": digest_us(table, num_ranks),
        }
        print(num_ranks, json.dumps(record["plan"][num_ranks]), flush=True)
    record["agreement_us"] = {n: agreement_us(n) for n in (2, 8, 64)}
    print(json.dumps(record["agreement_us"]), flush=True)
    if arguments.write:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
