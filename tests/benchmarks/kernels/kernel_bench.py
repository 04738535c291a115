"""Microbenchmarks of tokenflex_kernels: shapes, peers, floors, interleaved timing, rows as JSON and a plot.

A row is one case: our time, every peer's, the median over rounds of peer / ours with its spread, and the share of the
floor, which is the time of the case's own bare products (cuBLAS, measured beside it) plus that of the unavoidable bytes at
the measured copy bandwidth. Beside the chosen configuration there is a row for each by name. The variants of a case take
turns in a shuffled order, so that clocks and temperature hit all alike. A backward time is the difference between a whole
step and a forward pass: no peer is run twice over one graph (Liger overwrites what it saved). Nothing is timed before it
was compared with float32; a peer that is off is left out, by name.

    python kernel_bench.py                  the names of the cases, the most telling first
    python kernel_bench.py CASE [--left-out KERNEL CONFIGURATION ...]   one case on the GPU; its rows as JSON on the last line
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kernel_checks import leave_out, pinned
from tokenflex_kernels import Linear, Norm, adaptive_pool, choose, pool_plan, pooled_swiglu, set_one_launch

NUM_ROUNDS = 5
WRONG = 0.03  # relative Frobenius error to float32 past which nothing is timed


class Case(NamedTuple):
    """``num_images`` grids of width ``width`` pooled to ``sides`` (dealt out in turn) and projected to ``out``."""

    width: int
    out: int
    num_images: int
    sides: tuple[int, ...]
    frozen: bool = False

    @property
    def grid(self):
        return (27, 27) if self.width == 1152 else (32, 32)

    @property
    def grids(self):
        return [self.grid] * self.num_images

    @property
    def tokens(self):
        return [(side, side) for side in (self.sides[i % len(self.sides)] for i in range(self.num_images))]

    @property
    def num_tokens(self):
        return sum(h * w for h, w in self.tokens)

    @property
    def num_patches(self):
        return self.num_images * self.grid[0] * self.grid[1]

    @property
    def name(self):
        count = "ragged" if len(self.sides) > 1 else f"n{self.sides[0]}"
        return f"{self.width}-{self.out}-b{self.num_images}-{count}{'-frozen' if self.frozen else ''}"


WIDTHS = ((1024, 896), (1152, 1536), (1152, 3584), (1024, 3584), (3200, 8192))
SIDES = ((8,), (12,), (16,), (8, 12, 16))
ALL_CASES = [Case(*widths, b, sides) for widths in WIDTHS for b in (1, 8, 64) for sides in SIDES]
# What fits into a few minutes, the headline first: the SigLIP shapes, small batches, then the rest.
CORE_CASES = [
    Case(1152, 1536, 64, (16,)),
    Case(1152, 3584, 64, (16,)),
    Case(1152, 1536, 1, (16,)),
    Case(1152, 1536, 8, (16,)),
    Case(1152, 1536, 64, (8,)),
    Case(1152, 1536, 64, (8, 12, 16)),
    Case(1152, 1536, 64, (16,), frozen=True),
    Case(1152, 1536, 8, (16,), frozen=True),
    Case(1152, 3584, 8, (12,)),
    Case(1024, 3584, 64, (16,)),
    Case(3200, 8192, 8, (16,)),
]
TUNED_CASES = CORE_CASES[:1]  # torch.compile with its own search over products; the others take its defaults


class Tensors(NamedTuple):
    """The inputs of a projector, and the gradient of its output."""

    features: torch.Tensor
    norm: Norm
    gate_up: Linear
    down: Linear
    grad: torch.Tensor

    @property
    def leaves(self):
        tensors = (self.features, self.norm.weight, self.norm.bias, *self.gate_up, *self.down)
        return [x for x in tensors if x.requires_grad]


def make_tensors(case, device, dtype):
    """Random, never zeros: power draw, and with it the clock, depends on the values."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape, scale=1.0, needs_grad=True):
        values = torch.randn(*shape, generator=generator, device=device) * scale
        return values.to(dtype).requires_grad_(needs_grad)

    inner = 3 * case.width
    return Tensors(
        randn(case.num_patches, case.width, needs_grad=not case.frozen),
        Norm(randn(case.width), randn(case.width)),
        Linear(randn(2 * inner, case.width, scale=case.width**-0.5), randn(2 * inner)),
        Linear(randn(case.out, inner, scale=inner**-0.5), randn(case.out)),
        randn(case.num_tokens, case.out, needs_grad=False),
    )


# --------------------------------------------------------------------------------------------------------------- peers


def eager_pool(features, case):
    """torch's pooling as well as it can be written: a permuted view, one call per token budget, no copy in, one gather."""
    channels, image = features.shape[1], features.view(case.num_images, *case.grid, -1).permute(0, 3, 1, 2)
    if len(case.sides) == 1:
        return F.adaptive_avg_pool2d(image, case.sides[0]).permute(0, 2, 3, 1).reshape(-1, channels)
    groups = [
        F.adaptive_avg_pool2d(image[index :: len(case.sides)], side).permute(0, 2, 3, 1).reshape(-1, channels)
        for index, side in enumerate(case.sides)
    ]
    return torch.cat(groups).index_select(0, _images_order(case, features.device))


@functools.cache
def _images_order(case, device):
    """Where each row of the images' order lies when the images are pooled budget by budget."""
    starts, at = {}, 0
    for index, side in enumerate(case.sides):
        for image in range(index, case.num_images, len(case.sides)):
            starts[image], at = at, at + side * side
    rows = [torch.arange(h * w) + starts[image] for image, (h, w) in enumerate(case.tokens)]
    return torch.cat(rows).to(device)


def loop_pool(features, case):
    """torch's pooling image by image."""
    image = features.view(case.num_images, *case.grid, -1).permute(0, 3, 1, 2)
    parts = [
        F.adaptive_avg_pool2d(image[i : i + 1], side).permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        for i, side in enumerate(case.tokens)
    ]
    return torch.cat(parts)


def dense_pool(features, case):
    """Pooling as one product with the dense [n * n, H * W] matrix; one token budget only."""
    matrix = _dense_matrix(case.grid, case.sides[0], features.device, features.dtype)
    return torch.matmul(matrix, features.view(case.num_images, -1, features.shape[1])).flatten(0, 1)


@functools.lru_cache
def _dense_matrix(grid, side, device, dtype):
    eye = torch.eye(grid[0] * grid[1]).view(-1, 1, *grid)
    return F.adaptive_avg_pool2d(eye, side).flatten(1).T.contiguous().to(device, dtype)


def _normed(tokens, tensors):
    return F.layer_norm(tokens, tokens.shape[-1:], tensors.norm.weight, tensors.norm.bias, tensors.norm.eps)


def plain_swiglu(tokens, tensors):
    gate, up = F.linear(_normed(tokens, tensors), *tensors.gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, *tensors.down)


def liger_swiglu(tokens, tensors):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up = F.linear(_normed(tokens, tensors), *tensors.gate_up).chunk(2, -1)
    return F.linear(LigerSiLUMulFunction.apply(gate, up), *tensors.down)


def quack_swiglu(tokens, tensors):
    from quack.linear import gated_linear_func, linear_gated_func

    weight, bias = tensors.gate_up
    before, after = linear_gated_func(_normed(tokens, tensors), weight, "swiglu", bias=bias, concat_layout=True)
    return gated_linear_func(before, tensors.down.weight, after, "swiglu", bias=tensors.down.bias)


@functools.cache
def plan_of(case, device):
    """The case's pooling plan, as its batch would bring it along."""
    return pool_plan(case.grids, case.tokens, device=device)


def our_pool(features, case):
    return adaptive_pool(features, plan_of(case, features.device))


def ours(case, tensors):
    plan = plan_of(case, tensors.features.device)
    return pooled_swiglu(tensors.features, plan, tensors.norm, tensors.gate_up, tensors.down)


def one_launch(case, tensors):
    """Ours where pooling and the gated product may be one launch; which it was is among the choices."""
    set_one_launch(True)
    try:
        return ours(case, tensors)
    finally:
        set_one_launch(False)


def eager(case, tensors):
    return plain_swiglu(eager_pool(tensors.features, case), tensors)


def peers(case):
    """Name -> function(case, tensors) of every peer that this machine and case allow."""
    found = {"eager": eager, "compile": _compiled(case), "ours, one launch": one_launch}
    found["our pool, eager"] = lambda case, tensors: plain_swiglu(our_pool(tensors.features, case), tensors)
    if len(case.sides) > 1:
        found["loop"] = lambda case, tensors: plain_swiglu(loop_pool(tensors.features, case), tensors)
    else:
        found["dense"] = lambda case, tensors: plain_swiglu(dense_pool(tensors.features, case), tensors)
    if importlib.util.find_spec("liger_kernel"):
        found["liger"] = lambda case, tensors: liger_swiglu(eager_pool(tensors.features, case), tensors)
    if importlib.util.find_spec("quack"):
        found["quack"] = lambda case, tensors: quack_swiglu(eager_pool(tensors.features, case), tensors)
        found["our pool, quack"] = lambda case, tensors: quack_swiglu(our_pool(tensors.features, case), tensors)
    return found


def _compiled(case):
    torch._dynamo.reset()
    mode = "max-autotune-no-cudagraphs" if case in TUNED_CASES else None
    return torch.compile(eager, mode=mode, dynamic=False)


# -------------------------------------------------------------------------------------------------------------- timing


def time_ms(function):
    """Median time of a call: on a GPU by events with the L2 cache cleared, else by the wall clock."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(function, warmup=10, rep=40, return_mode="median")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def interleaved(functions: dict[str, Callable], num_rounds=NUM_ROUNDS, timer=time_ms):
    """Name -> one time per round; each round runs all in an order of its own."""
    times = {name: [] for name in functions}
    for round_index in range(num_rounds):
        order = list(functions)
        random.Random(round_index).shuffle(order)
        for name in order:
            times[name].append(timer(functions[name]))
    return times


def ratios(ours_ms, peer_ms):
    """Median, least and greatest of peer / ours over the rounds."""
    by_round = [theirs / mine for mine, theirs in zip(ours_ms, peer_ms, strict=True)]
    return {"median": statistics.median(by_round), "min": min(by_round), "max": max(by_round)}


def relative_error(got, wanted):
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


def peak_bytes(function, device):
    """Bytes that a call adds at its peak; 0 where nobody counts."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Ceilings(NamedTuple):
    """What this device does, measured in the same run."""

    copy_bytes_per_s: float
    flops_per_s: float


def measure_ceilings(device, dtype, num_bytes=2**30, side=8192, timer=time_ms):
    """Bandwidth of a copy (read and written bytes), and rate of a square matrix product."""
    source = torch.randn(num_bytes // dtype.itemsize, device=device, dtype=dtype)
    copy = torch.empty_like(source)
    copy_ms = timer(lambda: copy.copy_(source))
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product_ms = timer(lambda: a @ b)
    return Ceilings(2e3 * source.numel() * dtype.itemsize / copy_ms, 2e3 * side**3 / product_ms)


def bare_products_ms(case, device, dtype, timer=time_ms):
    """{"forward", "backward"}: the case's own products one by one, by cuBLAS with nothing around them."""
    inner, tokens = 3 * case.width, case.num_tokens
    matrix = lambda rows, columns: torch.randn(rows, columns, device=device).to(dtype)  # noqa: E731
    x, gate_up, down = matrix(tokens, case.width), matrix(2 * inner, case.width), matrix(case.out, inner)
    s, d_out, d_gate_up = matrix(tokens, inner), matrix(tokens, case.out), matrix(tokens, 2 * inner)
    products = {
        "forward": [lambda: x @ gate_up.T, lambda: s @ down.T],
        "backward": [lambda: d_out @ down, lambda: d_out.T @ s, lambda: d_gate_up.T @ x],
    }
    if not case.frozen:
        products["backward"].append(lambda: d_gate_up @ gate_up)
    return {part: sum(timer(product) for product in some) for part, some in products.items()}


def floor_ms(case, part, ceilings, products, itemsize=2):
    """The case's bare products plus the pooling's own bytes at the measured copy bandwidth."""
    pool_ms = 1e3 * itemsize * case.width * (case.num_patches + case.num_tokens) / ceilings.copy_bytes_per_s
    forward = products["forward"] + pool_ms
    backward = products["backward"] + (0 if case.frozen else pool_ms)
    return {"forward": forward, "backward": backward, "both": forward + backward}[part]


def step(function, case, tensors):
    """One forward and backward pass from scratch."""
    return torch.autograd.grad(function(case, tensors), tensors.leaves, tensors.grad)


def captured(function, case, tensors):
    """The step as a CUDA graph: for small batches, where launching takes longer than computing."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(function, case, tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step(function, case, tensors)
    return graph.replay


def bench_projector(case, device, dtype, ceilings, functions=None, num_rounds=NUM_ROUNDS, timer=time_ms):
    """Rows (forward, backward, both) of one case, after every variant was compared with float32."""
    tensors = make_tensors(case, device, dtype)
    exact = [x.float() for x in step(eager, case, _in_float32(tensors))]
    variants, excluded = {}, {}
    for name, function in {"ours": ours, **(peers(case) if functions is None else functions)}.items():
        grads = step(function, case, tensors)
        error = max(relative_error(got, wanted) for got, wanted in zip(grads, exact, strict=True))
        if error <= WRONG:
            variants[name] = function
        else:
            excluded[name] = f"off by {error:.3g}"
    if "ours" in excluded:
        raise AssertionError(f"{case.name}: our gradients are {excluded['ours']}; nothing was timed")
    forward = {name: (lambda f=function: f(case, tensors)) for name, function in variants.items()}
    both = {name: (lambda f=function: step(f, case, tensors)) for name, function in variants.items()}
    if device.type == "cuda" and case.num_images <= 8:  # all or none: a graph saves every launch its host time
        both |= {f"{name}, graph": captured(function, case, tensors) for name, function in variants.items()}
    products = bare_products_ms(case, device, dtype, timer)
    times = {"forward": interleaved(forward, num_rounds, timer), "both": interleaved(both, num_rounds, timer)}
    times["backward"] = {
        name: [b - f for b, f in zip(times["both"][name], times["forward"][name], strict=True)] for name in forward
    }
    memory = {name: peak_bytes(function, device) for name, function in both.items() if "graph" not in name}
    return [
        row(case.name, part, times[part], floor_ms(case, part, ceilings, products, dtype.itemsize), memory, excluded)
        for part in times
    ]


def _in_float32(tensors):
    widen = lambda x: x.detach().float().requires_grad_(x.requires_grad)  # noqa: E731
    norm = Norm(widen(tensors.norm.weight), widen(tensors.norm.bias), tensors.norm.eps)
    gate_up, down = (Linear(*map(widen, linear)) for linear in (tensors.gate_up, tensors.down))
    return Tensors(widen(tensors.features), norm, gate_up, down, widen(tensors.grad))


def row(case, part, times, floor, memory=None, excluded=None):
    """One JSON row; ``times`` has "ours" and the peers."""
    mine = times["ours"]
    return {
        "case": case,
        "part": part,
        "ours_ms": statistics.median(mine),
        "floor_ms": floor,
        "floor_share": floor / statistics.median(mine),
        "peers": {
            name: {"ms": statistics.median(theirs), "ratio": ratios(mine, theirs)}
            for name, theirs in times.items()
            if name != "ours"
        },
        "peak_bytes": memory or {},
        "excluded": excluded or {},
    }


def bench_pool(case, device, dtype, ceilings, num_rounds=NUM_ROUNDS, timer=time_ms):
    """Rows of the pooling alone; the floor is its bytes at the copy bandwidth."""
    features = torch.randn(case.num_patches, case.width, device=device).to(dtype).requires_grad_()
    grad = torch.randn(case.num_tokens, case.width, device=device).to(dtype)
    bytes_moved = dtype.itemsize * case.width * (case.num_patches + case.num_tokens)
    floor = 1e3 * bytes_moved / ceilings.copy_bytes_per_s
    pools = {
        "ours": lambda x: our_pool(x, case),
        "eager": lambda x: eager_pool(x, case),
        "compile": torch.compile(functools.partial(eager_pool, case=case), dynamic=False),
    }
    if device.type != "cuda":
        del pools["compile"]
    wanted = eager_pool(features.detach().float(), case)
    for name, function in pools.items():
        error = relative_error(function(features), wanted)
        assert error <= WRONG, f"{case.name}: pooling by {name} is off by {error:.3g}"
    forward = {name: (lambda f=function: f(features)) for name, function in pools.items()}
    # The map is linear: its backward pass is timed on its own over one graph, and saves nothing that could be spoilt.
    outs = {name: function(features) for name, function in pools.items()}
    backward = {
        name: (lambda out=out: torch.autograd.grad(out, features, grad, retain_graph=True))
        for name, out in outs.items()
    }
    return [
        row(f"pool-{case.name}", part, interleaved(functions, num_rounds, timer), floor)
        for part, functions in (("forward", forward), ("backward", backward))
    ]


def bench_products(case, device, dtype, num_rounds=NUM_ROUNDS, timer=time_ms):
    """Rows of ``gated`` and ``dgated`` against the bare products under them (cuBLAS, no epilogue)."""
    from tokenflex_kernels import gated

    tensors = make_tensors(case, device, dtype)
    tokens = torch.randn(case.num_tokens, case.width, device=device).to(dtype)
    weight, bias = (x.detach() for x in tensors.gate_up)
    down, d_out = tensors.down.weight.detach(), tensors.grad
    gate_up = torch.randn(case.num_tokens, weight.shape[0], device=device).to(dtype)
    runs = {
        "gated": {
            "ours": lambda: gated.gated(tokens, weight, bias, True, True),
            "bare product": lambda: tokens @ weight.T,
        },
        "dgated": {
            "ours": lambda: gated.dgated(d_out, down, gate_up, True, True),
            "bare product": lambda: d_out @ down,
        },
    }
    rows = []
    for name, functions in runs.items():
        if device.type == "cuda":
            functions |= _pinned_each(name, functions["ours"])
        times = interleaved(functions, num_rounds, timer)
        rows.append(row(f"{name}-{case.name}", "both", times, statistics.median(times["bare product"])))
    return rows


def _pinned_each(kernel, call):
    """Name -> ``call`` by that configuration, for each of ``kernel`` that was found right; the unfused one as well."""
    call()
    (text,) = [text for text in choose.export_choices()["timings_ms"] if text.startswith(f"{kernel}|")][-1:]

    def run_pinned(name):
        with pinned(kernel, name):
            return call()

    return {name: functools.partial(run_pinned, name) for name in choose.export_choices()["timings_ms"][text]}


def bench_splice(num_rows, num_visual, width, device, dtype, ceilings, num_rounds=NUM_ROUNDS, timer=time_ms):
    """Rows of building packed embeddings, against a boolean scatter."""
    from tokenflex_kernels import splice_rows

    generator = torch.Generator(device).manual_seed(0)
    positions = torch.randperm(num_rows, device=device, generator=generator)[:num_visual].sort().values
    is_visual = torch.zeros(num_rows, 1, dtype=torch.bool, device=device).index_fill_(0, positions, True)
    text, visual = (
        torch.randn(rows, width, device=device).to(dtype).requires_grad_() for rows in (num_rows, num_visual)
    )
    grad = torch.randn(num_rows, width, device=device).to(dtype)
    ways = {
        "ours": lambda: splice_rows(text, visual, positions),
        "masked_scatter": lambda: text.masked_scatter(is_visual, visual),
    }
    assert torch.equal(ways["ours"](), ways["masked_scatter"]()), "the splice is wrong; nothing was timed"
    steps = {name: (lambda f=f: torch.autograd.grad(f(), [text, visual], grad)) for name, f in ways.items()}
    times = interleaved(steps, num_rounds, timer)
    floor = 1e3 * dtype.itemsize * width * (4 * num_rows + num_visual) / ceilings.copy_bytes_per_s
    return [row(f"splice-{num_rows}-{num_visual}-{width}", "both", times, floor)]


# ------------------------------------------------------------------------------------------------------------- reports


def environment(device):
    """Device and versions beside the figures."""
    versions = {}
    for package in ("torch", "triton", "liger-kernel", "quack-kernels"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "gpu_state": gpu_state(device),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def gpu_state(device):
    """Clocks (MHz), power (W) and temperature (degrees C) at this moment, as nvidia-smi has them; None without one."""
    if device.type != "cuda":
        return None
    query = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        return dict(zip(query.split(","), map(str.strip, lines[0].split(","))))
    return None


def write_report(folder, name, device, ceilings, rows, left_out=()):
    """``folder/name.json`` with everything and ``folder/name.svg`` with the ratios; returns both paths.

    ``left_out`` names what there was no time for.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    measured = {
        "ceilings": ceilings._asdict(),
        "choices": choose.export_choices(),
        "rows": rows,
        "left_out": list(left_out),
    }
    report = environment(device) | measured
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1))
    (folder / f"{name}.svg").write_text(plot(report))
    return folder / f"{name}.json", folder / f"{name}.svg"


COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")


def plot(report):
    """An SVG of bars: how many times longer each peer takes, forward and backward together, with the spread."""
    rows = [entry for entry in report["rows"] if entry["part"] == "both"]
    names = list(dict.fromkeys(name for entry in rows for name in entry["peers"]))
    bars = [(entry["case"], name, entry["peers"][name]["ratio"]) for entry in rows for name in entry["peers"]]
    longest = max([ratio["max"] for _, _, ratio in bars], default=1.0)
    scale = 560 / max(longest, 1.0)
    parts, y = [], 70
    for index, name in enumerate(names):
        parts.append(
            f'<rect x="{20 + 115 * index}" y="34" width="10" height="10" fill="{COLOURS[index % len(COLOURS)]}"/>'
        )
        parts.append(f'<text x="{34 + 115 * index}" y="43">{name}</text>')
    for entry in rows:
        parts.append(f'<text x="20" y="{y + 10}">{entry["case"]}</text>')
        for name, peer in entry["peers"].items():
            ratio, colour = peer["ratio"], COLOURS[names.index(name) % len(COLOURS)]
            width = scale * ratio["median"]
            parts.append(f'<rect x="230" y="{y}" width="{width:.1f}" height="11" fill="{colour}"/>')
            low, high = 230 + scale * ratio["min"], 230 + scale * ratio["max"]
            parts.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 5.5}" y2="{y + 5.5}" stroke="black"/>')
            parts.append(f'<text x="{high + 5:.1f}" y="{y + 10}">{ratio["median"]:.2f}</text>')
            y += 13
        y += 8
    one = 230 + scale
    title = (
        f"Peer's time / ours, one forward and backward pass, {report['device']}, torch {report['versions']['torch']}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="860" height="{y + 20}" font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/><text x="20" y="20" font-size="13">{title}</text>{"".join(parts)}'
        f'<line x1="{one:.1f}" x2="{one:.1f}" y1="55" y2="{y}" stroke="black" stroke-dasharray="3 3"/></svg>\n'
    )


def table(rows):
    """The rows as text, one line each."""
    lines = [f"{'case':34} {'part':9} {'ours ms':>9} {'of floor':>8}  peer / ours: median (min - max)"]
    for entry in rows:
        peers_text = "  ".join(
            f"{name} {peer['ratio']['median']:.2f} ({peer['ratio']['min']:.2f} - {peer['ratio']['max']:.2f})"
            for name, peer in entry["peers"].items()
        )
        left_out = "".join(f"  [{name}: {why}]" for name, why in entry["excluded"].items())
        lines.append(
            f"{entry['case']:34} {entry['part']:9} {entry['ours_ms']:9.3f} {entry['floor_share']:8.2f}  {peers_text}{left_out}"
        )
    return "\n".join(lines)


def case_names():
    """What the last stage of `make gpu` runs, one process each, in this order."""
    names = [f"projector {case.name}" for case in CORE_CASES[:4]]
    names += [f"parts {case.name}" for case in CORE_CASES[:6]]
    names += [f"splice {num_rows} {num_visual} {width}" for num_rows, num_visual, width in SPLICES]
    return names + [f"projector {case.name}" for case in CORE_CASES[4:]]


SPLICES = [(16384, 4096, 1536), (16384, 12288, 3584)]


def run_case(name):
    """{"rows", "ceilings", "choices", "gpu_state"} of one of ``case_names`` on this machine's GPU."""
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    before, ceilings = gpu_state(device), measure_ceilings(device, dtype)
    kind, *rest = name.split()
    if kind == "splice":
        rows = bench_splice(*map(int, rest), device, dtype, ceilings)
    else:
        (case,) = [case for case in CORE_CASES if case.name == rest[0]]
        if kind == "parts":
            rows = bench_pool(case, device, dtype, ceilings) + bench_products(case, device, dtype)
        else:
            rows = bench_projector(case, device, dtype, ceilings)
    again = measure_ceilings(device, dtype)
    return {
        "rows": rows, "ceilings": [ceilings._asdict(), again._asdict()], "choices": choose.export_choices(),
        "gpu_state": [before, gpu_state(device)], "environment": environment(device),
    }  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print("\n".join(case_names()))
    else:
        for kernel, config in zip(sys.argv[3::2], sys.argv[4::2]):
            leave_out(kernel, config)
        print(json.dumps(run_case(sys.argv[1])))
