"""The operators as torch sees them: schema, gradients, compilation, checkpointing, autocast, errors. On the CPU."""

import contextlib
import functools
import subprocess
import sys

import kernel_process
import pytest
import tokenflex_kernels
import torch
from kernel_checks import RAGGED, num_rows, relative_error, same_bits
from tokenflex_kernels import Linear, Norm, adaptive_pool, mlp, pool_plan, pooled_swiglu, reference, splice_rows, swiglu
from torch.utils.checkpoint import checkpoint

GRIDS, SIDES = [(5, 4), (3, 3)], [(2, 3), (4, 1)]
PLAN = pool_plan(GRIDS, SIDES)
OPS = torch.ops.tokenflex_kernels


def leaves(dtype=torch.float64, width=6, inner=5, out=7, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    sizes = [(num_rows(GRIDS), width), (width,), (width,), (2 * inner, width), (2 * inner,), (out, inner), (out,)]
    return [
        torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)
        for size in sizes
    ]


def project(
    features, scale, shift, gate_up, gate_up_bias, down, down_bias, plan=PLAN, function=pooled_swiglu, **options
):
    norm, gates, last = Norm(scale, shift, 1e-5), Linear(gate_up, gate_up_bias), Linear(down, down_bias)
    return function(features, plan, norm, gates, last, **options)


# ------------------------------------------------------------------------------------------------------------ autograd


@pytest.mark.parametrize(
    "options",
    [{}, {"plan": pool_plan(GRIDS, SIDES, "resize")}, {"recompute": True}],
    ids=["plain", "resize", "recompute"],
)
@pytest.mark.parametrize("frozen", [(), (0,), (0, 1), (0, 2), (0, 1, 2), (3,), (4,), (5, 6), (0, 3, 4)], ids=str)
def test_gradcheck_whatever_is_frozen(frozen, options, monkeypatch):
    inputs = [x.detach() if i in frozen else x for i, x in enumerate(leaves())]
    for shortcut_rows in (0, 10**9)[: 1 + (0 in frozen)]:
        monkeypatch.setattr(mlp, "SHORTCUT_ROWS", shortcut_rows)
        assert torch.autograd.gradcheck(lambda *xs: project(*xs, **options), inputs)


@pytest.mark.parametrize("absent", [(1, 2), (1,), (2,), (4, 6), (1, 2, 4, 6)], ids=str)
def test_gradcheck_without_norm_or_biases(absent):
    present = [i for i in range(7) if i not in absent]

    def function(*xs):
        given = dict(zip(present, xs, strict=True))
        features, scale, shift, *rest = (given.get(i) for i in range(7))
        norm = None if absent[:2] == (1, 2) else Norm(scale, shift)
        return pooled_swiglu(features, PLAN, norm, Linear(*rest[:2]), Linear(*rest[2:]))

    inputs = leaves()
    assert torch.autograd.gradcheck(function, [inputs[i] for i in present])
    inputs[0] = inputs[0].detach()
    assert torch.autograd.gradcheck(function, [inputs[i] for i in present])


def test_pooling_and_splicing_have_their_gradients():
    features, *_ = leaves()
    for mode in ("adaptive", "resize"):
        pool = functools.partial(adaptive_pool, plan=pool_plan(GRIDS, SIDES, mode))
        assert torch.autograd.gradcheck(pool, [features])
        assert torch.autograd.gradgradcheck(pool, [features])
    text, visual = (torch.randn(rows, 4, dtype=torch.float64, requires_grad=True) for rows in (5, 2))
    assert torch.autograd.gradcheck(lambda a, b: splice_rows(a, b, torch.tensor([3, 0])), [text, visual])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_on_cpu_is_the_reference(dtype):
    inputs = leaves(dtype, width=24, inner=40, out=16)
    ours, plain = project(*inputs), project(*inputs, function=reference.pooled_swiglu)
    assert same_bits(ours, plain)
    if dtype == torch.float32:
        grad = torch.randn_like(plain)
        torch.testing.assert_close(
            torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(plain, inputs, grad), rtol=1e-4, atol=1e-4
        )


def test_autograd_keeps_the_parameters_themselves():
    """A view or copy would survive ZeRO-3's release of the weight, or miss its gathering."""
    inputs = leaves()
    out = project(*inputs)  # held, as torch 2.10 frees what a dropped result has saved
    saved = out.grad_fn.saved_tensors
    for parameter in inputs[1:]:
        assert any(tensor is parameter for tensor in saved)


def test_what_is_kept_for_backward():
    """Per token one row, its LayerNorm's scale and the packed gate and up; with ``recompute`` without the latter."""
    kept = {}
    for name, recompute in (("plain", False), ("recompute", True)):
        inputs = leaves(torch.float32)
        sizes = []
        count = lambda x, sizes=sizes: sizes.append(x.numel() if x.is_floating_point() else 0) or x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            project(*inputs, recompute=recompute)
        kept[name] = sum(sizes) - sum(x.numel() for x in inputs[1:])
    tokens = num_rows(SIDES)
    assert kept == {"plain": tokens * (6 + 1 + 10), "recompute": tokens * (6 + 1)}
    with torch.no_grad():
        assert project(*inputs).grad_fn is None


@pytest.mark.parametrize("is_hooked", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_written_over_what_was_kept_by_its_last_reader_alone(recompute, is_hooked):
    """Equal to the bit; a graph that is kept goes back as often as asked, one that is not is refused by autograd."""
    inputs = leaves(torch.float32)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with hooks if is_hooked else contextlib.nullcontext():  # autograd looks at no version behind a hook
        out = project(*inputs, recompute=recompute)
    gate_up = kept[2] if is_hooked else out.grad_fn.saved_tensors[2]
    before = gate_up.clone()
    wanted = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    for _ in range(2):
        again = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
        assert all(same_bits(a, b) for a, b in zip(again, wanted, strict=True)) and same_bits(gate_up, before)
    last = torch.autograd.grad(out.sum(), inputs)
    assert all(same_bits(a, b) for a, b in zip(last, wanted, strict=True))
    assert same_bits(gate_up, before) is (gate_up.numel() == 0) is recompute
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), inputs)


def test_whoever_else_uses_what_was_kept_is_told():
    inputs = leaves(torch.float32)
    out = project(*inputs)
    factor = torch.ones((), requires_grad=True)
    other = (out.grad_fn.saved_tensors[2] * factor).sum()
    out.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_a_second_derivative_is_refused_in_words():
    inputs = leaves()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(project(*inputs).sum(), inputs[3], create_graph=True)


# -------------------------------------------------------------------------------------------------------- registration


def test_opcheck():
    """Schema, fake tensors and dispatch of every operator; their gradients are functions around them."""
    features, *weights = leaves(requires_grad=False)

    def check(op, arguments):  # two outputs that are both empty "alias" each other, by torch's reckoning
        outputs = op(*arguments)
        num_empty = sum(x.numel() == 0 for x in outputs) if isinstance(outputs, tuple) else 0
        tests = ("test_schema", "test_faketensor")[num_empty > 1 :]
        torch.library.opcheck(op, arguments, test_utils=tests)

    for mode in ("adaptive", "resize"):
        plan = pool_plan(GRIDS, SIDES, mode)
        pooled = adaptive_pool(features, plan)
        check(OPS.pool.default, (features, *plan, False))
        check(OPS.pool.default, (pooled, *plan, True))
    grad = torch.randn(pooled.shape[0], 7, dtype=torch.float64)
    no_plan = (None, 0, 0, 0, 0, False)
    for rows, plan in ((features, PLAN), (pooled, no_plan)):
        for some, has_norm in ((weights, True), ([None, None, weights[2], None, weights[4], None], False)):
            check(OPS.project.default, (rows, *some, *plan, has_norm, 1e-5))
            for recompute in (False, True):
                check(OPS.project_training.default, (rows, *some, *plan, has_norm, 1e-5, recompute))
            out, kept, rstd, gate_up = OPS.project_training(rows, *some, *plan, has_norm, 1e-5, False)
            kept = kept if kept.numel() else rows
            for needs in (127, 126, 64) if has_norm else (0b0101001, 0b0001000):
                for op in (OPS.project_backward, OPS.project_backward_):
                    check(op.default, (grad, kept, rstd, gate_up.clone(), *some, *plan, has_norm, needs))
    text, visual = torch.randn(5, 4), torch.randn(2, 4)
    check(OPS.splice.default, (text, visual, torch.tensor([3, 1])))
    check(OPS.splice_backward.default, (torch.randn(5, 4), torch.tensor([3, 1]), 1))


def ragged_batch(num_images, generator):
    """(features, plan, text, positions) of images of any grid and side up to 6."""
    grids, sides = (
        [tuple(pair) for pair in torch.randint(1, 7, (num_images, 2), generator=generator).tolist()] for _ in range(2)
    )
    plan = pool_plan(grids, sides)
    features = torch.randn(plan.num_patches, 6, generator=generator)
    return features, plan, torch.randn(plan.num_tokens + 3, 7, generator=generator), torch.arange(plan.num_tokens)


def test_no_batch_recompiles():
    """50 ragged batches of 1 to 64 images, forward and backward: compiled once, whole."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    _, *weights = leaves(torch.float32)

    def step(features, plan, text, positions, *xs):
        return splice_rows(text, project(features, *xs, plan=plan), positions)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_images in [40, 1, 64, *torch.randint(1, 65, (47,), generator=generator).tolist()]:
            features, plan, text, positions = ragged_batch(num_images, generator)
            leaf = features.requires_grad_()
            got = compiled(leaf, plan, text, positions, *weights)
            grads = torch.autograd.grad(got.sum(), [leaf, *weights])
    wanted = step(leaf, plan, text, positions, *weights)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(grads, torch.autograd.grad(wanted.sum(), [leaf, *weights]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_with_dynamic_shapes(backend):
    torch._dynamo.reset()
    inputs = leaves(torch.float32)

    def step(plan, text, positions, *xs):
        return splice_rows(text, project(*xs, plan=plan), positions)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for sides in ([(2, 3), (4, 1)], [(2, 2), (5, 5)], [(3, 3), (1, 1)]):
        plan = pool_plan(GRIDS, sides)
        visual = plan.num_tokens
        text, positions = torch.randn(visual + 3, 7, requires_grad=True), torch.arange(visual)
        got, wanted = compiled(plan, text, positions, *inputs), step(plan, text, positions, *inputs)
        torch.testing.assert_close(got, wanted)
        grad = torch.randn_like(wanted)
        torch.testing.assert_close(
            torch.autograd.grad(got, [text, *inputs], grad), torch.autograd.grad(wanted, [text, *inputs], grad)
        )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(use_reentrant):
    inputs = leaves(torch.float32)
    plain, again = project(*inputs), checkpoint(project, *inputs, use_reentrant=use_reentrant)
    assert same_bits(plain, again)
    for a, b in zip(torch.autograd.grad(plain.sum(), inputs), _grads(again.sum(), inputs), strict=True):
        assert same_bits(a, b)


def _grads(loss, inputs):
    """By ``backward``: reentrant checkpointing refuses ``autograd.grad``."""
    loss.backward()
    return [x.grad for x in inputs]


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_weights():
    inputs = leaves(torch.float32, width=24, inner=40, out=16)
    text = torch.randn(12, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = project(*inputs)
        packed = splice_rows(text, out, torch.arange(10))
    assert out.dtype == torch.bfloat16 and packed.dtype == torch.float32
    for grad, x in zip(torch.autograd.grad(packed.sum(), inputs), inputs, strict=True):
        assert grad.dtype == x.dtype == torch.float32 and grad.abs().sum() > 0
    assert relative_error(out, project(*inputs)) < 0.02
    with torch.autocast("cpu", dtype=torch.bfloat16):  # pooling keeps its dtype and precision
        for function in (adaptive_pool, reference.adaptive_pool):
            exact = reference.adaptive_pool(inputs[0].double(), PLAN)
            assert relative_error(function(inputs[0], PLAN), exact) < 1e-6
        (grad,) = torch.autograd.grad(adaptive_pool(inputs[0], PLAN).sum(), inputs[0])
        torch.testing.assert_close(grad.sum(), torch.tensor(10.0 * 24))
    compiled = torch.compile(project, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(compiled(*inputs), out)


def test_inference_mode_leaves_nothing_behind_that_training_trips_over():
    inputs = leaves(torch.float32)
    with torch.inference_mode():
        adaptive_pool(inputs[0], pool_plan(GRIDS, [(1, 2), (2, 1)]))
    for function in (adaptive_pool, reference.adaptive_pool):
        function(inputs[0], pool_plan(GRIDS, [(1, 2), (2, 1)])).sum().backward()


def test_shapes_without_data():
    with torch.device("meta"):
        features, text = torch.empty(num_rows(RAGGED[0]), 8), torch.empty(9, 8)
        weights = Linear(torch.empty(12, 8)), Linear(torch.empty(4, 6))
        plan = pool_plan(*RAGGED, device="meta")
        assert pooled_swiglu(features, plan, None, *weights).shape == (num_rows(RAGGED[1]), 4)
        assert splice_rows(text, torch.empty(2, 8), torch.empty(2, dtype=torch.int64)).shape == (9, 8)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "grids, sides, mode, message",
    [
        (GRIDS, [(2, 3), (0, 1)], "adaptive", r"sides\[1\] is \(0, 1\): both numbers must be at least 1"),
        ([(5, 4), (600, 3)], SIDES, "adaptive", r"grids\[1\] is \(600, 3\): both numbers must be at most 512"),
        (GRIDS, [(2, 3)], "adaptive", "2 grids but 1 sides"),
        (GRIDS, SIDES, "nearest", "mode is 'nearest'; it must be one of"),
        ([(512, 512)] * 8192, [(1, 1)] * 8192, "adaptive", "more than 2147483647 rows"),
    ],
)
def test_wrong_plans_are_named(grids, sides, mode, message):
    with pytest.raises(ValueError, match=message):
        pool_plan(grids, sides, mode)


@pytest.mark.parametrize(
    "features, message",
    [
        (torch.zeros(28, 6), "features has 28 rows, but the plan's grids hold 29"),
        (torch.zeros(29, 2, 3), "features must be a matrix"),
        (torch.zeros(29, 6, dtype=torch.int32), "features must be floating point"),
        (torch.zeros(29, 6, device="meta"), "the plan is on cpu, features on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_features_are_named(features, message):
    with pytest.raises(ValueError, match=message):
        adaptive_pool(features, PLAN)
    with pytest.raises(ValueError, match=message):
        pooled_swiglu(features, PLAN, None, Linear(torch.zeros(4, 6)), Linear(torch.zeros(3, 2)))


@pytest.mark.parametrize(
    "index, tensor, message",
    [
        (3, torch.zeros(10, 5), r"gate_up.weight is \(10, 5\), but the features are 6 wide"),
        (3, torch.zeros(8, 6), r"gate_up.weight has 8 rows and down.weight 5 columns"),
        (1, torch.zeros(5), r"norm_weight is \(5,\); it must be \(6,\)"),
        (4, torch.zeros(5), r"gate_up_bias is \(5,\); it must be \(10,\)"),
        (6, torch.zeros(1), r"down_bias is \(1,\); it must be \(7,\)"),
        (5, torch.zeros(7, 5).bfloat16(), r"down_weight is torch.bfloat16, features torch.float32"),
        (5, torch.zeros(7, 5, device="meta"), r"down_weight is on meta, features on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_weights_that_do_not_fit_are_named(index, tensor, message):
    inputs = leaves(torch.float32)
    inputs[index] = tensor
    with pytest.raises(ValueError, match=message):
        project(*inputs)


@pytest.mark.parametrize(
    "visual, positions, error, message",
    [
        (torch.zeros(2, 4), torch.tensor([1, 1]), ValueError, "positions repeat"),
        (torch.zeros(2, 4), torch.tensor([1, 5]), IndexError, "index 5 is out of bounds"),
        (torch.zeros(2, 4), torch.tensor([1]), ValueError, "2 visual rows but 1 positions"),
        (torch.zeros(2, 3), torch.tensor([1, 2]), ValueError, "visual rows are 3 wide, text rows 4"),
        (torch.zeros(6, 4), torch.arange(6), ValueError, "6 visual rows do not fit into 5"),
        (torch.zeros(2, 4), torch.tensor([1, 2]).int(), ValueError, "positions must be int64"),
        (torch.zeros(2, 4).half(), torch.tensor([1, 2]), ValueError, "visual is torch.float16, text torch.float32"),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "positions are on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_splices_are_named(visual, positions, error, message):
    with pytest.raises(error, match=message):
        splice_rows(torch.zeros(5, 4), visual, positions)


# ---------------------------------------------------------------------------------------------------------- the package


def test_the_module_is_the_function():
    features, *weights = leaves(torch.float32)
    for recompute in (False, True):
        module = tokenflex_kernels.PooledSwiGLU(6, 5, 7, recompute=recompute)
        module.load_state_dict(dict(zip(module.state_dict(), (w.detach() for w in weights), strict=True)))
        out, wanted = module(features, PLAN), project(features, *weights, recompute=recompute)
        assert same_bits(out, wanted)
        grads = torch.autograd.grad(out.sum(), list(module.parameters()))
        assert all(same_bits(a, b) for a, b in zip(grads, torch.autograd.grad(wanted.sum(), weights), strict=True))


def test_it_stands_alone_and_without_triton():
    """No import of the trainer; and on a machine without Triton the reference serves."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, tokenflex_kernels as k\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'tokenflex'], 'imports the trainer'\n"
        "x = torch.arange(4.0).view(4, 1)\n"
        "assert k.adaptive_pool(x, k.pool_plan([(2, 2)], [(1, 1)])).item() == 1.5 and not k.is_available()\n"
    )
    path = str(kernel_process.PACKAGE_ROOT)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=path, env={"PYTHONPATH": path, "PATH": ""})


def test_importing_starts_nothing_on_a_gpu_and_the_public_names_stand():
    assert set(tokenflex_kernels.__all__) >= {
        "adaptive_pool",
        "pooled_swiglu",
        "splice_rows",
        "is_available",
        "Norm",
        "Linear",
    }
    assert tokenflex_kernels.is_available() is (torch.cuda.is_available() and torch.version.cuda is not None)
    assert not torch.cuda.is_initialized() or tokenflex_kernels.is_available()
    assert swiglu is tokenflex_kernels.swiglu
