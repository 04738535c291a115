"""Windows and reference: torch's own pooling and interpolation in float64 are the yardstick."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import RAGGED, SINGLE, num_rows, relative_error
from tokenflex_kernels import adaptive_pool, geometry, reference

CPU = torch.device("cpu")


def torch_pool(features, grid, side, mode):
    image = features.view(1, *grid, -1).permute(0, 3, 1, 2)
    if mode == "adaptive":
        pooled = F.adaptive_avg_pool2d(image, side)
    else:
        size = [-(-patches // tokens) * tokens for patches, tokens in zip(grid, side, strict=True)]
        resized = F.interpolate(image, size=size, mode="bilinear", align_corners=True)
        pooled = F.avg_pool2d(resized, [patches // tokens for patches, tokens in zip(size, side, strict=True)])
    return pooled.permute(0, 2, 3, 1).reshape(-1, features.shape[-1])


@pytest.mark.parametrize("mode", geometry.MODES)
@pytest.mark.parametrize("grid, side", [*SINGLE, ((2, 3), (1, 1)), ((64, 64), (4, 4)), ((1, 9), (7, 2))])
def test_the_reference_is_torchs_pooling(grid, side, mode):
    features = torch.randn(grid[0] * grid[1], 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(side[0] * side[1], 5, dtype=torch.float64)
    wanted, got = torch_pool(features, grid, side, mode), reference.adaptive_pool(features, [grid], [side], mode)
    torch.testing.assert_close(got, wanted)
    (wanted_grad,) = torch.autograd.grad(wanted, features, grad)
    torch.testing.assert_close(torch.autograd.grad(got, features, grad)[0], wanted_grad)
    operator = adaptive_pool(features, [grid], [side], mode)
    torch.testing.assert_close(torch.autograd.grad(operator, features, grad)[0], wanted_grad)


@pytest.mark.parametrize("mode", geometry.MODES)
def test_the_two_modes_agree_exactly_where_the_side_divides(mode):
    features = torch.randn(24 * 24, 4, dtype=torch.float64)
    for side in (1, 2, 8, 12, 24):
        torch.testing.assert_close(
            reference.adaptive_pool(features, [(24, 24)], [(side, side)], mode),
            reference.adaptive_pool(features, [(24, 24)], [(side, side)]),
        )


@pytest.mark.parametrize("mode", geometry.MODES)
@pytest.mark.parametrize("size, side", [(27, 8), (27, 12), (5, 16), (16, 5), (1, 1), (1, 4), (9, 1), (13, 13)])
def test_windows_are_the_matrix(size, side, mode):
    matrix = geometry.axis_matrix(size, side, mode)
    torch.testing.assert_close(matrix.sum(1), torch.ones(side, dtype=torch.float64))
    for transposed, dense in ((False, matrix), (True, matrix.T)):
        windows = geometry.axis_windows(size, side, mode, transposed)
        rebuilt = torch.zeros_like(dense)
        for i, (first, count) in enumerate(zip(windows.first.tolist(), windows.count.tolist(), strict=True)):
            rebuilt[i, first : first + count] = windows.weight[i, :count].double()
        torch.testing.assert_close(rebuilt, dense.contiguous(), atol=1e-7, rtol=1e-6)
    if side <= size:  # a patch then lies in at most two windows per axis: the backward gather reads 2 x 2 tokens
        assert int(geometry.axis_windows(size, side, mode, True).count.max()) <= 2


def test_the_table_of_a_ragged_batch_is_its_images_tables_shifted():
    grids, sides = (tuple(n for pair in pairs for n in pair) for pairs in RAGGED)
    for transposed in (False, True):
        windows = geometry.row_windows(grids, sides, "resize", transposed, CPU)
        assert windows.num_rows == num_rows(RAGGED[0 if transposed else 1])
        last = windows.table[0] + (windows.table[2] - 1) * windows.table[1] + windows.table[3] - 1
        assert int(last.max()) == num_rows(RAGGED[1 if transposed else 0]) - 1
        assert int(windows.table[0].min()) == 0 and windows.table.dtype == torch.int32


def test_too_many_rows_for_the_table():
    with pytest.raises(ValueError, match="more than 2147483647 rows"):
        geometry.row_windows((1, 2**30) * 3, (1, 1) * 3, "adaptive", False, CPU)


def test_half_precision_is_pooled_in_float32_and_rounded_once():
    features = torch.randn(27 * 27, 16).bfloat16()
    exact = reference.adaptive_pool(features.double(), [(27, 27)], [(12, 12)])
    once = relative_error(exact.bfloat16(), exact)
    assert relative_error(reference.adaptive_pool(features, [(27, 27)], [(12, 12)]), exact) <= 1.0001 * once
