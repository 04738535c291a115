"""The pooling kernel, forward and backward, under Triton's interpreter. Run by test_kernel_interpreted.py."""

import pytest
import torch
from kernel_checks import (
    DTYPES,
    RAGGED,
    ROUNDING,
    SINGLE,
    num_rows,
    pinned,
    poison_allocations,
    relative_error,
    same_bits,
)
from tokenflex_kernels import adaptive_pool, choose, pool, pool_plan, reference, target
from tokenflex_kernels.geometry import MODES


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    assert target.is_interpreted()
    poison_allocations(monkeypatch)


def forward_backward(features, grids, sides, mode, grad, function=adaptive_pool):
    features = features.detach().requires_grad_()
    out = function(features, pool_plan(grids, sides, mode))
    (d_features,) = torch.autograd.grad(out, features, grad)
    return out.detach(), d_features


def random_case(grids, sides, channels, dtype):
    generator = torch.Generator().manual_seed(channels)
    features = torch.randn(num_rows(grids), channels, generator=generator).to(dtype)
    return features, torch.randn(num_rows(sides), channels, generator=generator).to(dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid, side", SINGLE)
def test_every_shape_rounds_once(grid, side, mode):
    for dtype, channels in list(zip(DTYPES, (24, 12, 8), strict=True))[
        0 if mode == "adaptive" or grid == (7, 13) else 2 :
    ]:
        features, grad = random_case([grid], [side], channels, dtype)
        got = forward_backward(features, [grid], [side], mode, grad)
        wide = forward_backward(features.double(), [grid], [side], mode, grad.double(), reference.adaptive_pool)
        eager = forward_backward(features, [grid], [side], mode, grad, reference.adaptive_pool)
        for ours, exact, peer in zip(got, wide, eager, strict=True):
            error = relative_error(ours, exact)
            assert error <= ROUNDING[dtype]
            if dtype != torch.float32:  # in float32 the order of the sum decides, in half the one rounding
                assert error <= 1.05 * relative_error(peer, exact)


@pytest.mark.parametrize("config", pool.CONFIGS, ids=pool.name_of)
def test_every_configuration_and_width(config):
    grids, sides = [(3, 5), (1, 1), (2, 2)], [(2, 3), (1, 1), (3, 2)]
    for dtype, channels in ((torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 141)):
        features, grad = random_case(grids, sides, channels, dtype)
        with pinned("pool", pool.name_of(config)):
            out, d_features = forward_backward(features, grids, sides, "adaptive", grad)
        wide = forward_backward(features.double(), grids, sides, "adaptive", grad.double(), reference.adaptive_pool)
        assert relative_error(out, wide[0]) <= ROUNDING[dtype]
        assert relative_error(d_features, wide[1]) <= ROUNDING[dtype]


@pytest.mark.parametrize("mode", MODES)
def test_ragged_is_per_image_and_permuting_images_permutes_rows(mode):
    grids, sides = RAGGED
    features, grad = random_case(grids, sides, 16, torch.bfloat16)
    out, d_features = forward_backward(features, grids, sides, mode, grad)
    if mode == "adaptive":
        again = forward_backward(features, grids, sides, mode, grad)
        assert same_bits(out, again[0]) and same_bits(d_features, again[1])

    patches, tokens = features.split([h * w for h, w in grids]), grad.split([h * w for h, w in sides])
    single = [forward_backward(x, [g], [s], mode, z) for x, g, s, z in zip(patches, grids, sides, tokens, strict=True)]
    assert same_bits(out, torch.cat([one[0] for one in single]))
    assert same_bits(d_features, torch.cat([one[1] for one in single]))

    order = [3, 0, 4, 2, 1]
    pick = lambda parts: [parts[i] for i in order]  # noqa: E731
    permuted = forward_backward(torch.cat(pick(patches)), pick(grids), pick(sides), mode, torch.cat(pick(tokens)))
    assert same_bits(permuted[0], torch.cat([single[i][0] for i in order]))
    assert same_bits(permuted[1], torch.cat([single[i][1] for i in order]))


@pytest.mark.parametrize("mode", MODES)
def test_laws_of_a_pooling(mode):
    grids, sides = RAGGED
    features, grad = random_case(grids, sides, 8, torch.float32)
    constant = torch.full_like(features, 3.0)
    torch.testing.assert_close(adaptive_pool(constant, pool_plan(grids, sides, mode)), torch.full_like(grad, 3.0))
    assert torch.equal(adaptive_pool(features, pool_plan(grids, grids, mode)), features)
    out, d_features = forward_backward(features, grids, sides, mode, grad)
    torch.testing.assert_close((out * grad).sum(), (features * d_features).sum())
    torch.testing.assert_close(d_features.sum(), grad.sum())  # every window's weights sum to 1


def test_strided_inputs_and_zero_stride_gradients():
    grids, sides = RAGGED
    features, grad = random_case(grids, sides, 8, torch.float32)
    strided = features.t().contiguous().t()
    assert not strided.is_contiguous()
    ones = torch.ones(()).expand(grad.shape)
    out, d_features = forward_backward(strided, grids, sides, "adaptive", ones)
    wanted = forward_backward(features, grids, sides, "adaptive", ones.contiguous())
    assert same_bits(out, wanted[0]) and same_bits(d_features, wanted[1])


def test_an_empty_batch():
    out, d_features = forward_backward(torch.zeros(0, 8), [], [], "adaptive", torch.zeros(0, 8))
    assert out.shape == d_features.shape == (0, 8)


def test_rows_past_two_to_the_31_elements():
    """The last image of 2^31 + 2^12 one-byte elements: an int32 offset would go negative."""
    channels = 4096
    last = 2**31 // channels
    source = torch.zeros(last + 1, channels, dtype=torch.int8)
    source[last] = 5
    plan = pool_plan([(1, 1)], [(1, 1)])
    plan.table[:, 0] += last
    out = pool.launch(pool.CONFIGS[-1], source, plan, False, None)[0]
    assert torch.equal(out, torch.full((1, channels), 5, dtype=torch.int8))


@pytest.mark.parametrize("apart", [40, 33])
def test_rows_that_lie_apart_are_not_copied(apart, monkeypatch):
    """A vision tower's output without its class token is a view; 33 values apart it is read 2 bytes at a time."""
    plan = pool_plan(*RAGGED)
    wide = torch.randn(plan.num_patches, apart).half()
    features = wide[:, 8:32]
    wanted = adaptive_pool(features.contiguous(), plan)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", lambda tensor: pytest.fail("copied"))
        got = adaptive_pool(features, plan)
    assert same_bits(got, wanted)


@pytest.mark.parametrize("width", [1, 24, 47, 1096])
@pytest.mark.parametrize("has_plan", [True, False])
def test_pooling_and_layer_norm_in_one_pass(width, has_plan):
    """Against float64 and against the two steps; rows far from zero, where a one-pass variance would cancel."""
    plan = pool_plan([(5, 5), (3, 4)], [(2, 3), (4, 4)]) if has_plan else None
    generator = torch.Generator().manual_seed(width)
    source = torch.randn(37, width, generator=generator) + 30
    scale, shift = torch.randn(2, width, generator=generator)
    for dtype in DTYPES if width < 1000 else DTYPES[2:]:
        rows = source.to(dtype)
        for affine in ((scale.to(dtype), shift.to(dtype)), (None, shift.to(dtype)), (None, None)):
            exact = rows.double() if plan is None else reference.pool(rows.double(), plan)
            hat, rstd = reference.normalise(exact, 1e-5)
            tokens = reference.affine(hat, *(None if x is None else x.double() for x in affine))
            got = pool.pooled(rows, plan, norm=pool.NormOf(*affine, 1e-5, True))
            for ours, wanted in zip(got, (tokens, hat, rstd), strict=True):
                bound = 2e-6 * 30 if dtype == torch.float32 else 2 * ROUNDING[dtype]
                assert relative_error(ours, wanted) <= bound if width > 1 else not ours.isnan().any()
            assert same_bits(pool.affine(got[1], *affine), got[0])
            only = pool.pooled(rows, plan, norm=pool.NormOf(*affine, 1e-5, False))
            assert same_bits(only[0], got[0]) and only[1] is only[2] is None
            unfused = pool.launch(choose.UNFUSED, rows, plan, False, pool.NormOf(*affine, 1e-5, True))
            assert width == 1 or choose.difference(got, unfused) is None


@pytest.mark.parametrize("num_rows, width", [(1, 24), (37, 47), (19, 130)])
def test_the_layer_norms_gradient_is_torchs(num_rows, width):
    generator = torch.Generator().manual_seed(width)
    source, grad = torch.randn(2, num_rows, width, generator=generator)
    leaves = [x.double().requires_grad_() for x in (source, *torch.randn(2, width, generator=generator))]
    wanted = torch.autograd.grad(
        torch.nn.functional.layer_norm(leaves[0], (width,), *leaves[1:]), leaves, grad.double()
    )
    scale, shift = (x.detach().float() for x in leaves[1:])
    _, hat, rstd = pool.pooled(source, None, norm=pool.NormOf(scale, shift, 1e-5, True))
    d_source, sums = pool.norm_grad(grad.clone(), hat, rstd, scale, True, True)
    for ours, exact in zip((d_source, *sums), wanted, strict=True):
        assert relative_error(ours, exact) < 5e-6
    only = pool.norm_grad(grad.clone(), hat, rstd, scale, False, True)
    assert only[0] is None and same_bits(only[1], sums)


def test_every_width_fits_into_three_pieces():
    for width in range(1, 4200):
        pieces = pool.pieces_of(width)
        assert sum(pieces) >= width and all(piece & (piece - 1) == 0 for piece in pieces)
        assert sum(pieces) <= 1.15 * width + 1, (width, pieces)
    assert pool.pieces_of(1152) == (1024, 128, 0) and pool.pieces_of(3200) == (2048, 1024, 128)
