"""The projector's kernels under Triton's interpreter, against float64. Run by test_kernel_interpreted.py."""

import pytest
import torch
from kernel_checks import DTYPES, ROUNDING, num_rows, pinned, poison_allocations, relative_error, same_bits
from tokenflex_kernels import (
    Linear,
    Norm,
    choose,
    fused,
    gated,
    mlp,
    pool_plan,
    pooled_swiglu,
    reference,
    set_one_launch,
    target,
)

NAMES = ("features", "norm_weight", "norm_bias", "gate_up_weight", "gate_up_bias", "down_weight", "down_bias")
GRIDS, SIDES = [(7, 13), (5, 5), (9, 4)], [(3, 5), (8, 8), (2, 2)]
TILES = gated.GATED_CONFIGS["tma"]
PATHS = (
    *(
        (gated.name_of(TILES[i % len(TILES)]), gated.name_of(config))
        for i, config in enumerate(gated.DGATED_CONFIGS["tma"])
    ),
    (gated.UNFUSED, gated.UNFUSED),
)


@pytest.fixture(params=[0, 10**9], ids=["shortcut", "whole"])
def way(request, monkeypatch):
    """With and without the way round a product that frozen features allow."""
    monkeypatch.setattr(mlp, "SHORTCUT_ROWS", request.param)
    return request.param


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    assert target.is_interpreted()
    poison_allocations(monkeypatch)


NUM_PATCHES = num_rows(GRIDS)


def inputs(dtype, width=48, inner=96, out=40, rows=NUM_PATCHES):
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    return [
        randn(rows, width), 1 + randn(width) / 4, randn(width) / 4, randn(2 * inner, width) / width**0.5, randn(2 * inner) / 4,
        randn(out, inner) / inner**0.5, randn(out) / 4,
    ]  # fmt: skip


def run(tensors, grad, function=pooled_swiglu, frozen=False, grids=GRIDS, sides=SIDES, **options):
    """Output and gradients by name; None entries of ``tensors`` are left out."""
    leaves = [None if x is None else x.detach().requires_grad_(not (frozen and i == 0)) for i, x in enumerate(tensors)]
    features, scale, shift, gate_up, gate_up_bias, down, down_bias = leaves
    norm = None if scale is None and shift is None else Norm(scale, shift, 1e-5)
    result = function(
        features, pool_plan(grids, sides), norm, Linear(gate_up, gate_up_bias), Linear(down, down_bias), **options
    )
    wanted = {name: leaf for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None and leaf.requires_grad}
    grads = torch.autograd.grad(result, list(wanted.values()), grad)
    return {"out": result.detach()} | dict(zip(wanted, grads, strict=True))


def against_exact(tensors, grad, **options):
    """(ours, float64, plain torch in the dtype with exact pooling)."""
    frozen = options.get("frozen", False)
    wide = run([None if x is None else x.double() for x in tensors], grad.double(), reference.pooled_swiglu, frozen)
    return run(tensors, grad, **options), wide, run(tensors, grad, reference.pooled_swiglu, frozen)


def check(ours, wide, eager, dtype):
    for name, exact in wide.items():
        error, allowed = relative_error(ours[name], exact), 1.05 * relative_error(eager[name], exact)
        if dtype == torch.float32:
            allowed = max(allowed, 10 * ROUNDING[dtype])
        assert ours[name].dtype == dtype and error <= allowed, (name, error, allowed)


def random_grad(dtype, out=40, sides=SIDES):
    return torch.randn(num_rows(sides), out, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.mark.parametrize("paths", PATHS, ids=lambda paths: paths[1])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_no_worse_than_eager_with_exact_pooling(dtype, paths, monkeypatch):
    tensors, grad = inputs(dtype), random_grad(dtype)
    with pinned("gated", paths[0]), pinned("dgated", paths[1]):
        for frozen, shortcut_rows in ((False, 0), (True, 0), (True, 10**9)):
            monkeypatch.setattr(mlp, "SHORTCUT_ROWS", shortcut_rows)
            results = against_exact(tensors, grad, frozen=frozen)
            assert ("features" in results[0]) is not frozen
            check(*results, dtype)


def test_float32_is_exact_to_rounding(way):
    tensors, grad = inputs(torch.float32), random_grad(torch.float32)
    for frozen in (False, True):
        check(*against_exact(tensors, grad, frozen=frozen), torch.float32)


@pytest.mark.parametrize("absent", [(1, 2), (2,), (1, 2, 4, 6), (4,), (6,)])
def test_biases_and_norm_are_optional(absent, way):
    tensors = [None if i in absent else x for i, x in enumerate(inputs(torch.float16))]
    for frozen in (False, True) if way else (True,):
        check(*against_exact(tensors, random_grad(torch.float16), frozen=frozen), torch.float16)


@pytest.mark.parametrize(
    "trained", [("gate_up_bias",), ("norm_bias",), ("down_bias",), ("down_weight",), ("features",)]
)
def test_each_gradient_alone_is_the_same(trained):
    tensors, grad = inputs(torch.float32), random_grad(torch.float32)
    wanted = run(tensors, grad)
    leaves = {name: x.detach().requires_grad_(name in trained) for name, x in zip(NAMES, tensors, strict=True)}
    out = pooled_swiglu(
        leaves["features"], pool_plan(GRIDS, SIDES), Norm(leaves["norm_weight"], leaves["norm_bias"]),
        Linear(leaves["gate_up_weight"], leaves["gate_up_bias"]), Linear(leaves["down_weight"], leaves["down_bias"]),
    )  # fmt: skip
    for name, got in zip(trained, torch.autograd.grad(out, [leaves[name] for name in trained], grad), strict=True):
        torch.testing.assert_close(got, wanted[name])


def test_twice_the_same_bits_and_recompute_agrees():
    tensors, grad = inputs(torch.bfloat16), random_grad(torch.bfloat16)
    first, second, again = run(tensors, grad), run(tensors, grad), run(tensors, grad, recompute=True)
    for name in first:
        assert same_bits(first[name], second[name]), name
        assert same_bits(first[name], again[name]), name


@pytest.fixture
def one_launch():
    set_one_launch(True)
    yield
    set_one_launch(False)


@pytest.mark.parametrize("config", fused.CONFIGS, ids=gated.name_of)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_one_launch_is_no_worse_than_eager_either(dtype, config, one_launch):
    """By the rule that two launches are held to; twice the same bits, also where it is recomputed, and by inference."""
    tensors, grad = inputs(dtype), random_grad(dtype)
    with pinned("pooled_gated", gated.name_of(config)), pinned("gated", gated.name_of(config)):
        ours, wide, eager = against_exact(tensors, grad)
        check(ours, wide, eager, dtype)
        again, recomputed = run(tensors, grad), run(tensors, grad, recompute=True)
        features, scale, shift, *weights = tensors
        plan, linears = pool_plan(GRIDS, SIDES), (Linear(*weights[:2]), Linear(*weights[2:]))
        out = pooled_swiglu(features, plan, Norm(scale, shift, 1e-5), *linears)
    assert all(same_bits(got[name], ours[name]) for got in (again, recomputed) for name in ours)
    assert same_bits(out, ours["out"])


def test_one_launch_is_off_until_asked_for_and_then_wants_a_timing(monkeypatch):
    launched, launch = [], fused.launch
    monkeypatch.setattr(fused, "launch", lambda config, *rest: (launched.append(config), launch(config, *rest))[1])
    tensors, grad = inputs(torch.bfloat16), random_grad(torch.bfloat16)
    chosen = lambda: {name for key, name in choose.export_choices()["chosen"].items() if key.startswith("pooled_gated")}  # noqa: E731
    wanted = run(tensors, grad)
    assert not chosen()
    set_one_launch(True)
    try:
        got = run(tensors, grad)  # on the CPU nothing is timed
    finally:
        set_one_launch(False)
    assert chosen() == set(launched) == {gated.UNFUSED} and all(same_bits(got[name], wanted[name]) for name in wanted)


def test_rows_do_not_see_each_other():
    tensors = inputs(torch.float32)
    out = run(tensors, random_grad(torch.float32))["out"]
    start = 0
    for grid, side, rows in zip(GRIDS, SIDES, tensors[0].split([h * w for h, w in GRIDS]), strict=True):
        stop = start + side[0] * side[1]
        alone = run([rows, *tensors[1:]], torch.ones(stop - start, 40), grids=[grid], sides=[side])["out"]
        torch.testing.assert_close(out[start:stop], alone)
        start = stop


@pytest.mark.parametrize("rows", [0, 1])
def test_an_empty_batch_and_one_row(rows):
    grids = [(1, 1)] * rows
    tensors = inputs(torch.float32, rows=rows)
    ours = run(tensors, torch.ones(rows, 40), grids=grids, sides=grids)
    eager = run(tensors, torch.ones(rows, 40), reference.pooled_swiglu, grids=grids, sides=grids)
    for name, value in eager.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-5)


def test_zero_stride_gradient():
    tensors = inputs(torch.float32)
    ours = run(tensors, torch.ones(()).expand(num_rows(SIDES), 40))
    eager = run(tensors, torch.ones(num_rows(SIDES), 40), reference.pooled_swiglu)
    for name, value in eager.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-5)


def test_widths_off_the_16_byte_grid_leave_the_descriptors():
    dtype = torch.bfloat16
    tensors = inputs(dtype, width=47, inner=93, out=39)
    grad = random_grad(dtype, out=39)
    check(*against_exact(tensors, grad), dtype)
    chosen = [name for key, name in choose.export_choices()["chosen"].items() if "|47|93|" in key or "|39|93|" in key]
    assert chosen and set(chosen) == {gated.UNFUSED}
    with pinned("gated", gated.name_of(gated.GATED_CONFIGS["pointer"][0])):
        check(*against_exact(tensors, grad), dtype)


@pytest.mark.parametrize("path", ["tma", "pointer"])
@pytest.mark.parametrize("shape", [(37, 40, 24, 48), (1, 8, 8, 8), (16, 16, 64, 32), (50, 72, 136, 24)])
def test_tiles_of_every_raggedness(path, shape):
    """Small tiles, so that all three dims end inside one, several row groups and persistent turns occur; float32."""
    num_tokens, width, inner, out = shape
    randn = lambda *size: torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))  # noqa: E731
    x, weight, bias = randn(num_tokens, width), randn(2 * inner, width), randn(2 * inner)
    exact = (x.double() @ weight.double().T + bias).chunk(2, -1)
    for config in gated.GATED_CONFIGS[path]:
        got, gate_up = gated.launch_gated(config._replace(m=16, n=16, k=16), x, weight, bias, True, True)
        assert relative_error(gate_up, torch.cat(exact, -1)) < 1e-6
        assert relative_error(got, torch.nn.functional.silu(exact[0]) * exact[1]) < 1e-6
        got, gate_up = gated.launch_gated(config._replace(m=16, n=16, k=16), x, weight, None, True, False)
        assert gate_up is None and not got.isnan().any()

    gate_up, d_out, down = randn(num_tokens, 2 * inner), randn(num_tokens, out), randn(out, inner)
    leaf = gate_up.double().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    swiglu = torch.nn.functional.silu(gate) * up
    (exact,) = torch.autograd.grad(swiglu, leaf, d_out.double() @ down.double())
    for config in gated.DGATED_CONFIGS[path]:
        for store_inner in (True, False):
            tile = config._replace(m=16, n=16 * config.pieces, k=16)
            d_gate_up, got, sums = gated.launch_dgated(tile, d_out, down, gate_up, True, store_inner)
            assert relative_error(d_gate_up, exact) < 1e-6
            assert relative_error(sums, exact.sum(0)) < 1e-5
            assert (got is None) is not store_inner
            if store_inner:
                assert relative_error(got, swiglu.detach()) < 1e-6


def test_training_through_the_kernels_follows_the_reference():
    """Ten steps of gradient descent, kernels and reference side by side: the same losses."""
    losses = {}
    for function in (pooled_swiglu, reference.pooled_swiglu):
        tensors = [x.requires_grad_() for x in inputs(torch.float32)]
        features, *weights = tensors
        target_rows = torch.randn(num_rows(SIDES), 40, generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD(weights, lr=0.5)
        losses[function] = []
        for _ in range(10):
            scale, shift, gate_up, gate_up_bias, down, down_bias = weights
            out = function(
                features.detach(),
                pool_plan(GRIDS, SIDES),
                Norm(scale, shift),
                Linear(gate_up, gate_up_bias),
                Linear(down, down_bias),
            )
            loss = (out - target_rows).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[function].append(loss.item())
    ours, plain = losses.values()
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert ours[-1] < 0.7 * ours[0]
