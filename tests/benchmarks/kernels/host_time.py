"""Host time of a projector step, ours beside eager, and recompilations of torch.compile; on a CPU, no GPU needed.

    PYTHONPATH=kernels:tests/kernels python3 tests/benchmarks/kernels/host_time.py      writes docs/results/kernels-host.json

Both sides run forward and backward on tiny CPU tensors, so that what is timed is the host's work: torch's dispatch and
autograd, our Python, and Triton's whole launch path (binding, specialisation, cache) for compute capability 9.0. Only what
a driver would do is left out. ``launches_us`` is the part of Triton's launch path in our time. Eager is the best-written
statement of the same projector (kernel_bench.eager: one pooling call per token budget). CPU kernels do real, small work in
both. Times are of the thread's CPU clock. Runs take turns in a shuffled order; the figure is the median of the rounds' medians.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import kernel_bench
import torch
import triton
from kernel_launch import AbsentGPU
from tokenflex_kernels import Linear, Norm, pool_plan, pooled_swiglu, splice_rows, target
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

RESULT = Path(__file__).parents[3] / "docs" / "results" / "kernels-host.json"
NUM_BATCHES = 50


class Small(kernel_bench.Case):
    """Images of 3 x 3 patches: the arithmetic is nothing, the calls are all there."""

    grid = (3, 3)


def step_of(function, case, tensors):
    return lambda: kernel_bench.step(function, case, tensors)


def compiled_for_nobody(kernel):
    """Stands in for loading a compiled kernel: launching it does nothing."""
    kernel.module, kernel.function, kernel._run = "nowhere", 0, lambda *arguments: None


def measure(case, rounds, calls):
    """Microseconds per step of ours, ours without Triton's launch path, and eager, at one case."""
    tensors = kernel_bench.make_tensors(case, torch.device("cpu"), torch.bfloat16)
    plan = pool_plan(case.grids, case.tokens)

    def ours(case, tensors):
        return pooled_swiglu(tensors.features, plan, tensors.norm, tensors.gate_up, tensors.down)

    launch = JITFunction.run
    step, eager = step_of(ours, case, tensors), step_of(kernel_bench.eager, case, tensors)
    variants = {
        "ours": (step, launch),
        "ours_no_launch": (step, lambda self, *args, **kwargs: None),
        "eager": (eager, launch),
    }
    times = {name: [] for name in variants}
    for index in range(rounds + 1):
        for name in random.Random(index).sample(sorted(variants), len(variants)):
            function, JITFunction.run = variants[name]
            taken = []
            for _ in range(calls):
                start = time.thread_time_ns()
                function()
                taken.append((time.thread_time_ns() - start) / 1e3)
            if index:  # the first round compiles
                times[name].append(statistics.median(taken))
    JITFunction.run = launch
    ours_us, bare_us, eager_us = (statistics.median(times[name]) for name in ("ours", "ours_no_launch", "eager"))
    by_round = [mine / theirs for mine, theirs in zip(times["ours"], times["eager"])]
    return {
        "images": case.num_images, "ours_us": ours_us, "launches_us": ours_us - bare_us, "eager_us": eager_us,
        "ours_over_eager": {"median": statistics.median(by_round), "min": min(by_round), "max": max(by_round)},
    }  # fmt: skip


def recompilations():
    """Graphs that torch.compile made beyond the first, over ragged batches of 1 to 64 images, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(*shape).requires_grad_() for shape in ((6,), (6,), (10, 6), (10,), (7, 5), (7,))]

    def step(features, plan, text, positions):
        norm, gate_up, down = Norm(*weights[:2]), Linear(*weights[2:4]), Linear(*weights[4:])
        return splice_rows(text, pooled_swiglu(features, plan, norm, gate_up, down), positions)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_images in [40, 1, 64, *torch.randint(1, 65, (NUM_BATCHES - 3,), generator=generator).tolist()]:
        grids, sides = (
            [tuple(p) for p in torch.randint(1, 7, (num_images, 2), generator=generator).tolist()] for _ in range(2)
        )
        plan = pool_plan(grids, sides)
        features = torch.randn(plan.num_patches, 6, requires_grad=True)
        out = compiled(features, plan, torch.randn(plan.num_tokens + 3, 7), torch.arange(plan.num_tokens))
        out.sum().backward()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] - 1


def plan_time():
    """Microseconds of ``pool_plan`` for 64 images of mixed counts, as a loader's worker spends them."""
    case = kernel_bench.Case(1152, 1536, 64, (8, 12, 16))
    taken = []
    for _ in range(200):
        start = time.thread_time_ns()
        pool_plan(case.grids, case.tokens)
        taken.append((time.thread_time_ns() - start) / 1e3)
    return statistics.median(taken)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = {
        "command": " ".join(["PYTHONPATH=kernels:tests/kernels python3 tests/benchmarks/kernels/host_time.py", *sys.argv[1:]]),
        "cpu": platform.processor() or platform.machine(), "torch": torch.__version__, "triton": triton.__version__,
        "recompilations": recompilations(), "batches": NUM_BATCHES, "plan_us_64_images": plan_time(), "steps": [],
    }  # fmt: skip
    driver.set_active(AbsentGPU(90))
    target.runs_kernels, target.num_processors = lambda tensor: True, lambda device: 132
    CompiledKernel._init_handles = compiled_for_nobody
    for num_images, sides in ((1, (2,)), (8, (1, 2, 3)), (64, (1, 2, 3))):
        report["steps"].append(measure(Small(16, 16, num_images, sides), options.rounds, options.calls))
        print(json.dumps(report["steps"][-1]), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
