"""The pooling kernel, forward and backward, under Triton's interpreter. Run by test_kernel_interpreted.py."""

import pytest
import torch
from kernel_checks import DTYPES, RAGGED, ROUNDING, SINGLE, num_rows, poison_allocations, relative_error, same_bits
from tokenflex_kernels import adaptive_pool, choose, geometry, pool, reference, target
from tokenflex_kernels.geometry import MODES, RowWindows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    assert target.is_interpreted()
    poison_allocations(monkeypatch)


def forward_backward(features, grids, sides, mode, grad, function=adaptive_pool):
    features = features.detach().requires_grad_()
    out = function(features, grids, sides, mode)
    (d_features,) = torch.autograd.grad(out, features, grad)
    return out.detach(), d_features


def random_case(grids, sides, channels, dtype):
    generator = torch.Generator().manual_seed(channels)
    features = torch.randn(num_rows(grids), channels, generator=generator).to(dtype)
    return features, torch.randn(num_rows(sides), channels, generator=generator).to(dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid, side", SINGLE)
def test_every_shape_rounds_once(grid, side, mode):
    for dtype, channels in list(zip(DTYPES, (24, 12, 8), strict=True))[:: 1 if mode == "adaptive" else 2]:
        features, grad = random_case([grid], [side], channels, dtype)
        with choose.pinned("pool", str(pool.CONFIGS[1])):  # the most rows a program: the fewest programs to interpret
            got = forward_backward(features, [grid], [side], mode, grad)
        wide = forward_backward(features.double(), [grid], [side], mode, grad.double(), reference.adaptive_pool)
        eager = forward_backward(features, [grid], [side], mode, grad, reference.adaptive_pool)
        for ours, exact, peer in zip(got, wide, eager, strict=True):
            error = relative_error(ours, exact)
            assert error <= ROUNDING[dtype]
            if dtype != torch.float32:  # in float32 the order of the sum decides, in half the one rounding
                assert error <= 1.05 * relative_error(peer, exact)


@pytest.mark.parametrize("config", pool.CONFIGS, ids=str)
def test_every_configuration_and_width(config):
    grids, sides = RAGGED
    for dtype, channels in ((torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 130)):
        features, grad = random_case(grids, sides, channels, dtype)
        with choose.pinned("pool", str(config)):
            out, d_features = forward_backward(features, grids, sides, "adaptive", grad)
        wide = forward_backward(features.double(), grids, sides, "adaptive", grad.double(), reference.adaptive_pool)
        assert relative_error(out, wide[0]) <= ROUNDING[dtype]
        assert relative_error(d_features, wide[1]) <= ROUNDING[dtype]


@pytest.mark.parametrize("mode", MODES)
def test_ragged_is_per_image_and_permuting_images_permutes_rows(mode):
    grids, sides = RAGGED
    features, grad = random_case(grids, sides, 16, torch.bfloat16)
    out, d_features = forward_backward(features, grids, sides, mode, grad)
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
    torch.testing.assert_close(adaptive_pool(constant, grids, sides, mode), torch.full_like(grad, 3.0))
    assert torch.equal(adaptive_pool(features, grids, grids, mode), features)
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
    """The last row of 2^31 + 2^12 one-byte elements: an int32 offset would go negative."""
    channels = 4096
    last = 2**31 // channels
    source = torch.zeros(last + 1, channels, dtype=torch.int8)
    source[last] = 5
    table = torch.tensor([[last], [1], [1], [1], [0], [0]], dtype=torch.int32)
    out = pool.launch(source, RowWindows(table, torch.ones(1), 1, 1), True, pool.CONFIGS[0])
    assert torch.equal(out, torch.full((1, channels), 5, dtype=torch.int8))


def test_the_window_table_is_built_once_per_batch_shape():
    geometry._host_windows.cache_clear()
    for _ in range(3):
        adaptive_pool(torch.zeros(9, 4), [(3, 3)], [(2, 2)])
    assert geometry._host_windows.cache_info().misses == 1
