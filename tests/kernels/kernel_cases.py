"""Every kernel x configuration x pattern against float64: one list, run on a GPU at real sizes and interpreted at small ones.

The sizes reach what a launch can do: more tiles than persistent programs, tiles that end inside M, N and K, one row,
with and without bias, what training stores and what inference stores. Outputs start as NaN, so a missed write shows.

    python tests/kernels/kernel_cases.py                       on a GPU: the names of all (kernel, configuration)
    python tests/kernels/kernel_cases.py KERNEL CONFIGURATION   on a GPU: a JSON line per pattern
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from kernel_checks import RAGGED, ROUNDING, poisoned_allocations, relative_error, same_bits
from tokenflex_kernels import choose, frozen, fused, gated, pool, pool_plan, reference, splice, target

UNFUSED = choose.UNFUSED


class Size(NamedTuple):
    """Widths C, H and D, the row counts, and whether tiles shrink to 16 (the interpreter is slow)."""

    width: int
    inner: int
    out: int
    rows: tuple[int, ...]
    images: int
    is_small: bool


REAL = Size(1096, 3400, 1544, (1, 104, 2500), 3, False)  # 2,500 rows: 540 tiles of 128 x 128 on 132 programs
SMALL = Size(40, 24, 56, (1, 50), 1, True)  # 50 rows: 8 tiles of 16 x 16 on 2 programs


class Case(NamedTuple):
    """``run()`` gives (what, got, float64, roundings allowed) of every output."""

    kernel: str
    config: str
    pattern: str
    run: Callable


def error_of(case):
    """None, or in words what is wrong with a case."""
    with poisoned_allocations():
        outputs = case.run()
    for what, got, exact, roundings in outputs:
        dtype = torch.bfloat16 if got.dtype == torch.bfloat16 else torch.float32
        bound = roundings * (ROUNDING[dtype] if dtype == torch.bfloat16 else 1e-5)
        error = relative_error(got, exact)
        if not error <= bound:
            return f"{what} is off by {error:.3g} (at most {bound:.3g})"
        worst = choose._worst_error(got, exact)
        if not worst <= 2e-2:
            return f"a row or column of {what} is off by {worst:.3g}"
    return None


def all_cases(size, device):
    """Every case that this device's path has; bfloat16, since float32 runs no tiles of its own."""
    yield from pool_cases(size, device)
    capability = target.capability(torch.device(device, 0))
    path = "tma" if capability // 10 in target.TMA_CAPABILITIES else "pointer"
    for way in dict.fromkeys((path, "pointer")):
        yield from gated_cases(size, device, gated.configs_for(gated.GATED_CONFIGS, way, capability))
        yield from dgated_cases(size, device, gated.configs_for(gated.DGATED_CONFIGS, way, capability))
    if path == "tma":
        yield from fused_cases(size, device)
    yield from other_cases(size, device)


def randn(device, *shape, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(device, torch.bfloat16)


def _tile(config, size):
    return config._replace(m=16, n=16 * config.pieces, k=16) if size.is_small else config


def gated_cases(size, device, configs):
    """gate and up: {bias} x {training, inference, recomputation} x rows, the unfused way as well."""
    for config in (*configs, UNFUSED):
        tile = config if config == UNFUSED else _tile(config, size)
        for num_rows in size.rows:
            for has_bias in (True, False):
                for stores in ((True, True), (True, False), (False, True)):

                    def run(tile=tile, num_rows=num_rows, has_bias=has_bias, stores=stores):
                        x = randn(device, num_rows, size.width)
                        weight = randn(device, 2 * size.inner, size.width, scale=size.width**-0.5)
                        bias = randn(device, 2 * size.inner) if has_bias else None
                        inner, gate_up = gated.launch_gated(tile, x, weight, bias, *stores)
                        exact = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
                        gate, up = exact.chunk(2, -1)
                        wanted = (torch.nn.functional.silu(gate) * up, exact)
                        assert [inner is not None, gate_up is not None] == list(stores)
                        outputs = zip(("inner", "gate_up"), (inner, gate_up), wanted)
                        return [(what, got, fine, 2) for what, got, fine in outputs if got is not None]

                    name = config if config == UNFUSED else gated.name_of(config)
                    yield Case("gated", name, f"T={num_rows} bias={has_bias} stores={stores}", run)


def fused_cases(size, device):
    """Pooling, LayerNorm and ``gated`` in one launch: what training and inference store, no bias, no LayerNorm, x rows."""
    batches = [([(1, 1)], [(1, 1)]), RAGGED]  # 1 and 104 rows
    if not size.is_small:
        batches.append(([(27, 27)] * 13, [(16, 16), (12, 12)] * 6 + [(16, 16)]))  # 2656
    for config in fused.CONFIGS:
        for grids, sides in batches:
            plan = pool_plan(grids, sides, device=device)
            for way in ("training", "inference", "no bias", "no norm"):
                run = _fused_run(size, device, _tile(config, size), plan, way)
                yield Case("pooled_gated", gated.name_of(config), f"T={plan.num_tokens} {way}", run)


def _fused_run(size, device, tile, plan, way):
    def run():
        source = randn(device, plan.num_patches, size.width + 8)[:, 8:]
        weight = randn(device, 2 * size.inner, size.width, scale=size.width**-0.5)
        bias = None if way == "no bias" else randn(device, 2 * size.inner)
        scale, shift = randn(device, 2, size.width)
        norm = None if way == "no norm" else reference.NormOf(scale, shift, 1e-5, way != "inference")
        tokens, hat, rstd, inner, gate_up = fused.launch(tile, source, plan, norm, weight, bias, way != "inference")
        wanted = reference.pool(source.double(), plan)
        outputs = []
        if norm is not None:
            exact, exact_rstd = reference.normalise(wanted, 1e-5)
            wanted = reference.affine(exact, scale.double(), shift.double())
            outputs = [("hat", hat, exact, 1), ("rstd", rstd, exact_rstd, 1)]
        product = tokens.double() @ weight.double().T + (0 if bias is None else bias.double())
        gate, up = product.chunk(2, -1)
        outputs += [("tokens", tokens, wanted, 2), ("inner", inner, torch.nn.functional.silu(gate) * up, 2)]
        outputs.append(("gate_up", gate_up, product, 2))
        assert [x is None for x in (hat, gate_up)] == [way in ("inference", "no norm"), way == "inference"]
        return [output for output in outputs if output[1] is not None]

    return run


def dgated_cases(size, device, configs):
    """Their gradient: {bias gradient} x {S for a trained down projection, without} x rows, and once in place."""
    for config in (*configs, UNFUSED):
        tile = config if config == UNFUSED else _tile(config, size)
        for num_rows in size.rows:
            for has_bias in (True, False):
                for stores in (True, False):

                    def run(tile=tile, num_rows=num_rows, has_bias=has_bias, stores=stores, in_place=False):
                        d_out = randn(device, num_rows, size.out)
                        weight = randn(device, size.out, size.inner, scale=size.out**-0.5)
                        gate_up = randn(device, num_rows, 2 * size.inner)
                        options, read = (has_bias, stores, in_place), gate_up.clone()
                        d_gate_up, inner, sums = gated.launch_dgated(tile, d_out, weight, read, *options)
                        assert (d_gate_up is read) is in_place
                        if in_place:
                            apart = gated.launch_dgated(tile, d_out, weight, gate_up, has_bias, stores)
                            assert all(map(same_bits, (d_gate_up, inner, sums), apart)), "in place differs"
                        leaf = gate_up.double().requires_grad_()
                        gate, up = leaf.chunk(2, -1)
                        exact = torch.nn.functional.silu(gate) * up
                        (wanted,) = torch.autograd.grad(exact, leaf, d_out.double() @ weight.double())
                        outputs = [("d_gate_up", d_gate_up, wanted, 2)]
                        assert (inner is not None, sums is not None) == (stores, has_bias)
                        if stores:
                            outputs.append(("inner", inner, exact.detach(), 1))
                        if has_bias:  # the unfused way rounds dS to bfloat16 before
                            outputs.append(("bias sums", sums, wanted.sum(0), 500 if tile == UNFUSED else 5))
                        return outputs

                    name = config if config == UNFUSED else gated.name_of(config)
                    yield Case("dgated", name, f"T={num_rows} bias={has_bias} inner={stores}", run)
                    if has_bias and stores:
                        yield Case("dgated", name, f"T={num_rows} in place", functools.partial(run, in_place=True))


def pool_cases(size, device):
    """Pooling, its backward pass, and the LayerNorm after it, in both modes; ragged, and a single cell."""
    grids, sides = RAGGED
    batches = {"one": ([(1, 1)], [(1, 1)]), "ragged": (grids * size.images, sides * size.images)}
    if not size.is_small:
        batches["many"] = ([(27, 27)] * 10, [(16, 16), (12, 12)] * 5)
    for has_norm in (False, True):
        for name, config in pool.candidates(size.width, has_norm):
            if size.is_small and config in pool.CONFIGS and config != pool.CONFIGS[-1]:
                continue  # each row a program: test_every_configuration_and_width has them
            for batch, (grids, sides) in batches.items():
                for mode in ("adaptive", "resize"):
                    if size.is_small and mode == "resize" and (config != pool.INTERPRETED or has_norm):
                        continue  # many interpreted steps; interpreted_pool.py has that mode in full
                    plan = pool_plan(grids, sides, mode, device)
                    for way in ("training", "inference", "no affine") if has_norm else ("forward", "backward"):
                        run = _pool_run(size, device, config, plan, way)
                        yield Case("pool", name, f"{batch} {mode} {'norm ' * has_norm}{way}", run)
            if has_norm:
                yield Case("pool", name, "norm alone", _pool_run(size, device, config, None, "training"))


def _pool_run(size, device, config, plan, way):
    def run():
        num_rows = 50 if plan is None else plan.num_tokens if way == "backward" else plan.num_patches
        # the view of a wider tensor: rows that lie apart
        source = randn(device, num_rows, size.width + 8)[:, 8:]
        if way in ("forward", "backward"):
            out = pool.launch(config, source, plan, way == "backward", None)[0]
            return [("rows", out, reference.pool(source.double(), plan, way == "backward"), 1)]
        scale, shift = (None, None) if way == "no affine" else randn(device, 2, size.width)
        out, hat, rstd = pool.launch(
            config, source, plan, False, reference.NormOf(scale, shift, 1e-5, way != "inference")
        )
        rows = source.double() if plan is None else reference.pool(source.double(), plan)
        exact, exact_rstd = reference.normalise(rows, 1e-5)
        wide = [None if x is None else x.double() for x in (scale, shift)]
        outputs = [("tokens", out, reference.affine(exact, *wide), 2)]
        if way != "inference":
            outputs += [("hat", hat, exact, 1), ("rstd", rstd, exact_rstd, 1)]
        return outputs

    return run


def other_cases(size, device):
    """The kernels of one configuration each."""
    for num_rows in size.rows:

        def norm_grad(num_rows=num_rows):
            source, grad = (randn(device, num_rows, size.width, scale=scale) for scale in (1.0, 2.0))
            scale = randn(device, size.width)
            _, hat, rstd = pool.launch(UNFUSED, source, None, False, reference.NormOf(scale, None, 1e-5, True))
            g = grad.double() * scale.double()
            x = hat.double()
            wanted = (g - g.mean(1, keepdim=True) - x * (g * x).mean(1, keepdim=True)) * rstd.double()[:, None]
            sums = torch.stack(((grad.double() * x).sum(0), grad.double().sum(0)))
            got, got_sums = pool.norm_grad(grad.clone(), hat, rstd, scale, True, True)
            return [("d_rows", got, wanted, 1), ("sums", got_sums, sums, 5)]

        def weight_grads(num_rows=num_rows):
            weight, product = randn(device, 2, 2 * size.inner, size.width)
            sums, scale, shift = randn(device, 2 * size.inner).float(), *randn(device, 2, size.width)
            w, e, total = weight.double(), product.double(), sums.double()
            wanted = torch.stack(((w * e).sum(0), total @ w))
            fine = e * scale.double() + total[:, None] * shift.double()
            got, got_sums = frozen.weight_grads(weight, product.clone(), sums, scale, shift)
            return [("weight", got, fine, 1), ("scale and shift", got_sums, wanted, 5)]

        def splicing(num_rows=num_rows):
            text, visual = randn(device, num_rows + 3, size.width), randn(device, num_rows, size.width)
            positions = torch.arange(num_rows, device=device) + 2
            wanted = text.clone()
            wanted[2 : num_rows + 2] = visual
            d_text, d_visual = splice.splice_backward(wanted, positions, True, True)
            zeros = wanted.clone()
            zeros[2 : num_rows + 2] = 0
            outputs = (splice.splice(text, visual, positions), wanted), (d_text, zeros), (d_visual, visual)
            return [(f"output {i}", got, exact.double(), 0) for i, (got, exact) in enumerate(outputs)]

        yield Case("norm_grad", "only", f"T={num_rows}", norm_grad)
        yield Case("weight_grads", "only", f"T={num_rows}", weight_grads)
        yield Case("splice", "only", f"T={num_rows}", splicing)


def main(*wanted):
    cases = list(all_cases(REAL, "cuda"))
    if not wanted:
        for kernel, config in dict.fromkeys((case.kernel, case.config) for case in cases):
            print(kernel, config)
    for case in cases:
        if (case.kernel, case.config) == wanted:
            try:
                why = error_of(case)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
            print(json.dumps({"case": case[:3], "error": why}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
