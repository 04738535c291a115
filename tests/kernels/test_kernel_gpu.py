"""The same laws on a GPU: compiled kernels, every configuration, graphs, streams of allocations, big addresses."""

import contextlib

import pytest
import torch
from kernel_checks import RAGGED, SINGLE, num_rows, pinned, poison_allocations, relative_error, same_bits
from tokenflex_kernels import (
    Linear,
    Norm,
    adaptive_pool,
    choose,
    is_available,
    mlp,
    pool_plan,
    pooled_swiglu,
    reference,
    set_tuning,
    splice_rows,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_available(), reason="needs an NVIDIA GPU of compute capability 8.0 or newer, and Triton"),
]
NAMES = ("features", "norm_weight", "norm_bias", "gate_up_weight", "gate_up_bias", "down_weight", "down_bias")
HALVES = (torch.bfloat16, torch.float16)


def inputs(dtype, width=1152, inner=3456, out=1536):
    rows = num_rows(RAGGED[0])
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator).to("cuda", dtype)  # noqa: E731
    return [
        randn(rows, width), 1 + randn(width) / 4, randn(width) / 4, randn(2 * inner, width) / width**0.5, randn(2 * inner) / 4,
        randn(out, inner) / inner**0.5, randn(out) / 4,
    ]  # fmt: skip


def run(tensors, grad, function=pooled_swiglu, frozen=False, grids=RAGGED[0], sides=RAGGED[1], **options):
    leaves = [x.detach().requires_grad_(not (frozen and i == 0)) for i, x in enumerate(tensors)]
    features, scale, shift, gate_up, gate_up_bias, down, down_bias = leaves
    plan = pool_plan(grids, sides, device="cuda")
    out = function(
        features, plan, Norm(scale, shift), Linear(gate_up, gate_up_bias), Linear(down, down_bias), **options
    )
    wanted = {name: leaf for name, leaf in zip(NAMES, leaves, strict=True) if leaf.requires_grad}
    return {"out": out.detach()} | dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), grad), strict=True))


def random_grad(dtype, out=1536, sides=RAGGED[1]):
    return torch.randn(num_rows(sides), out, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)


def has_tma():
    from tokenflex_kernels import target

    return target.capability(torch.device("cuda", 0)) // 10 in target.TMA_CAPABILITIES


def configurations():
    """Every pair of gated and dgated configurations by name, for the device at hand."""
    from tokenflex_kernels import gated, target

    capability = target.capability(torch.device("cuda", 0))
    path = "tma" if has_tma() else "pointer"
    tiles = gated.GATED_CONFIGS[path]
    pairs = [
        (tiles[i % len(tiles)], config)
        for i, config in enumerate(gated.configs_for(gated.DGATED_CONFIGS, path, capability))
    ]
    return [*((gated.name_of(g), gated.name_of(d)) for g, d in pairs), (gated.UNFUSED, gated.UNFUSED)]


@pytest.fixture(autouse=True)
def rule():
    """No timing: hundreds of kernels would be compiled for it. Each is still compared at its first call."""
    set_tuning("rule")
    yield
    set_tuning("measure")


@pytest.mark.parametrize("kernel", ["pool", "gated", "dgated", "pooled_gated", "norm_grad", "weight_grads", "splice"])
def test_every_case_is_right(kernel):
    """kernel_cases.py: persistent turns, partial tiles, one row, bias or none, what training and inference store."""
    import kernel_cases

    cases = [case for case in kernel_cases.all_cases(kernel_cases.REAL, "cuda") if case.kernel == kernel]
    assert bool(cases) is (kernel != "pooled_gated" or has_tma())  # one launch reads by descriptors
    assert not {case[1:3]: error for case in cases if (error := kernel_cases.error_of(case))}


@pytest.mark.parametrize("mode", ["adaptive", "resize"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("grid, side", SINGLE)
def test_pooling_rounds_once(grid, side, dtype, mode, monkeypatch):
    poison_allocations(monkeypatch)
    for channels in (1152, 130):
        features = torch.randn(2 * grid[0] * grid[1], channels, device="cuda").to(dtype).requires_grad_()
        plan = pool_plan([grid] * 2, [side] * 2, mode, "cuda")
        grad = torch.randn(2 * side[0] * side[1], channels, device="cuda").to(dtype)
        out = adaptive_pool(features, plan)
        wide = features.detach().double().requires_grad_()
        exact = reference.adaptive_pool(wide, plan)
        (d_exact,) = torch.autograd.grad(exact, wide, grad.double())
        (d_features,) = torch.autograd.grad(out, features, grad)
        for ours, wanted in ((out, exact), (d_features, d_exact)):
            bound = 4e-7 if dtype == torch.float32 else 1.05 * relative_error(wanted.to(dtype), wanted)
            assert relative_error(ours, wanted) <= bound


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_no_configuration_is_worse_than_exact_eager(dtype, frozen, monkeypatch):
    poison_allocations(monkeypatch)
    tensors, grad = inputs(dtype), random_grad(dtype)
    wide = run([x.double() for x in tensors], grad.double(), reference.pooled_swiglu, frozen)
    eager = run(tensors, grad, reference.pooled_swiglu, frozen)
    monkeypatch.setattr(mlp, "SHORTCUT_ROWS", 0)  # 104 rows: the way round the product is taken where it can be
    for names in configurations():
        with pinned("gated", names[0]), pinned("dgated", names[1]):
            ours = run(tensors, grad, frozen=frozen)
        for name, exact in wide.items():
            error, peer = relative_error(ours[name], exact), relative_error(eager[name], exact)
            assert error <= 1.05 * peer, (names, name, error, peer)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_follows_torchs_setting(precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
    tensors, grad = inputs(torch.float32), random_grad(torch.float32)
    wide = run([x.double() for x in tensors], grad.double(), reference.pooled_swiglu)
    ours, eager = run(tensors, grad), run(tensors, grad, reference.pooled_swiglu)
    for name, exact in wide.items():
        assert relative_error(ours[name], exact) <= max(1.05 * relative_error(eager[name], exact), 1e-5), name


@pytest.mark.parametrize("names", [None, *(configurations() if is_available() else [])], ids=str)
def test_twice_the_same_bits_and_recompute_agrees(names):
    tensors, grad = inputs(torch.bfloat16), random_grad(torch.bfloat16)
    with contextlib.ExitStack() as pins:
        for kernel, name in zip(("gated", "dgated"), names or ()):
            pins.enter_context(pinned(kernel, name))
        first, second, again = run(tensors, grad), run(tensors, grad), run(tensors, grad, recompute=True)
    assert all(same_bits(first[name], second[name]) for name in first)
    assert all(same_bits(first[name], again[name]) for name in first)


def test_stored_choices_repeat_the_bits():
    tensors, grad = inputs(torch.bfloat16), random_grad(torch.bfloat16)
    set_tuning("measure")
    first, stored = run(tensors, grad), choose.export_choices()
    choose._state = choose._State()
    set_tuning("rule")
    choose.import_choices(stored)
    again = run(tensors, grad)
    assert all(same_bits(first[name], again[name]) for name in first)


def test_splicing():
    generator = torch.Generator("cuda").manual_seed(0)
    text = torch.randn(4096, 3584, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    visual = torch.randn(1024, 3584, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    positions = torch.randperm(4096, device="cuda", generator=generator)[:1024]
    ours, plain = splice_rows(text, visual, positions), reference.splice_rows(text, visual, positions)
    grad = torch.randn_like(plain)
    assert same_bits(ours, plain)
    for a, b in zip(*(torch.autograd.grad(out, [text, visual], grad) for out in (ours, plain)), strict=True):
        assert same_bits(a, b)


def test_a_cuda_graph_replays_it():
    tensors, grad = inputs(torch.bfloat16), random_grad(torch.bfloat16)
    leaves = [x.detach().requires_grad_() for x in tensors]
    plan = pool_plan(*RAGGED, device="cuda")

    def step():
        features, scale, shift, gate_up, gate_up_bias, down, down_bias = leaves
        out = pooled_swiglu(features, plan, Norm(scale, shift), Linear(gate_up, gate_up_bias), Linear(down, down_bias))
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # the first calls compare configurations and choose
        step(), step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
        with pytest.raises(RuntimeError, match="make the plan before"):
            pool_plan(*RAGGED, device="cuda")
    for _ in range(300):  # whatever a process caches by batch shape has had its turn
        adaptive_pool(leaves[0].detach()[:4], pool_plan([(2, 2)], [(1, 1)], device="cuda"))
    with torch.no_grad():
        leaves[0].mul_(0.5)
    graph.replay()
    assert all(same_bits(a, b) for a, b in zip(captured, step()))


def test_compiles_and_autocasts():
    features, scale, shift, gate_up, gate_up_bias, down, down_bias = inputs(torch.float32)
    plan = pool_plan(*RAGGED, device="cuda")
    call = lambda x: pooled_swiglu(x, plan, Norm(scale, shift), Linear(gate_up, gate_up_bias), Linear(down, down_bias))  # noqa: E731
    with torch.autocast("cuda", dtype=torch.bfloat16):
        eager = call(features)
        compiled = torch.compile(call, fullgraph=True, dynamic=True)(features)
    assert eager.dtype == torch.bfloat16
    assert same_bits(eager, compiled)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_in_place_have_the_same_bits_and_save_their_memory(recompute):
    tensors, sides = inputs(torch.bfloat16), [(16, 16)] * 16
    leaves = [x.detach().requires_grad_() for x in tensors]
    leaves[0] = torch.randn(16 * 729, 1152, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    features, scale, shift, *rest = leaves
    plan, linears = pool_plan([(27, 27)] * 16, sides, device="cuda"), (Linear(*rest[:2]), Linear(*rest[2:]))
    peaks, grads = {}, {}
    for keeps in (True, True, False):  # the first call compares
        out = pooled_swiglu(features, plan, Norm(scale, shift), *linears, recompute=recompute)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads[keeps] = torch.autograd.grad(out.sum(), leaves, retain_graph=keeps)
        peaks[keeps] = torch.cuda.max_memory_allocated() - before
        del out
    assert all(same_bits(a, b) for a, b in zip(grads[True], grads[False], strict=True))
    assert recompute or peaks[False] <= peaks[True] - 4096 * 4 * 3456  # T x 2H x 2 bytes


def test_a_captured_backward_pass_may_be_replayed_twice():
    tensors = [x.requires_grad_() for x in inputs(torch.bfloat16)]
    plan = pool_plan(*RAGGED, device="cuda")

    def call(features, scale, shift, *rest):
        return pooled_swiglu(features, plan, Norm(scale, shift), Linear(*rest[:2]), Linear(*rest[2:]))

    torch.autograd.grad(call(*tensors).sum(), tensors)  # chooses
    graphed = torch.cuda.make_graphed_callables(call, tuple(tensors))
    out = graphed(*tensors)
    first = [x.clone() for x in torch.autograd.grad(out.sum(), tensors, retain_graph=True)]
    assert all(same_bits(a, b) for a, b in zip(first, torch.autograd.grad(out.sum(), tensors), strict=True))


@pytest.mark.parametrize("is_captured", [False, True])
def test_one_launch_gives_what_two_give_every_time(is_captured):
    """Persistent programs that wait for each other's rows, many times over, and replayed from a CUDA graph."""
    from tokenflex_kernels import fused, gated

    if not has_tma():
        pytest.skip("one launch reads by descriptors, which this device has not")
    source, scale, shift, weight, bias, *_ = inputs(torch.bfloat16)
    plan, source = pool_plan(RAGGED[0] * 20, RAGGED[1] * 20, device="cuda"), source.repeat(20, 1)
    norm = reference.NormOf(scale, shift, 1e-5, True)
    for config in fused.CONFIGS:
        call = lambda config=config: fused.launch(config, source, plan, norm, weight, bias, True)  # noqa: E731
        first = [x.clone() for x in call()]
        assert choose.difference(first, fused.launch(gated.UNFUSED, source, plan, norm, weight, bias, True)) is None
        if is_captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = call()
        for _ in range(50):
            if is_captured:
                for tensor in got:
                    tensor.fill_(float("nan"))
                graph.replay()
            else:
                got = call()
            assert all(same_bits(a, b) for a, b in zip(got, first, strict=True))


def test_one_launch_is_chosen_only_by_a_timing():
    tensors, grad = inputs(torch.bfloat16), random_grad(torch.bfloat16)
    choose.set_one_launch(True)
    try:
        run(tensors, grad)  # mode rule
        chosen = choose.export_choices()["chosen"]
        assert {name for key, name in chosen.items() if key.startswith("pooled_gated")} == {choose.UNFUSED}
    finally:
        choose.set_one_launch(False)


def test_mixed_devices_are_named():
    tensors = inputs(torch.bfloat16)
    tensors[3] = tensors[3].cpu()
    with pytest.raises(ValueError, match="gate_up_weight is on cpu, features on cuda:0"):
        run(tensors, random_grad(torch.bfloat16))


def test_more_than_two_to_the_31_elements():
    """2,400 images of 27 x 27 x 1280: 2.2e9 elements in, and as many out of the backward pass."""
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    num_images, channels = 2400, 1280
    features = torch.ones(num_images * 729, channels, device="cuda", dtype=torch.bfloat16)
    features[-729:] = 3.0
    assert features.numel() > 2**31
    features.requires_grad_()
    out = adaptive_pool(features, pool_plan([(27, 27)] * num_images, [(8, 8)] * num_images, device="cuda"))
    assert (out[:-64] == 1).all() and (out[-64:] == 3).all()
    (grad,) = torch.autograd.grad(out, features, torch.ones_like(out))
    torch.testing.assert_close(
        grad[-729:].float().sum(0), torch.full((channels,), 64.0, device="cuda"), rtol=2e-3, atol=0
    )
    assert same_bits(grad[-729:], grad[:729])
