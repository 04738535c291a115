"""Plans and reference: torch's own pooling and interpolation in float64 are the yardstick."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_checks import RAGGED, SINGLE, num_rows, relative_error
from tokenflex_kernels import adaptive_pool, geometry, pool_plan, reference


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
    plan = pool_plan([grid], [side], mode)
    wanted, got = torch_pool(features, grid, side, mode), reference.adaptive_pool(features, plan)
    torch.testing.assert_close(got, wanted)
    (wanted_grad,) = torch.autograd.grad(wanted, features, grad)
    torch.testing.assert_close(torch.autograd.grad(got, features, grad)[0], wanted_grad)
    operator = adaptive_pool(features, plan)
    torch.testing.assert_close(torch.autograd.grad(operator, features, grad)[0], wanted_grad)


@pytest.mark.parametrize("mode", geometry.MODES)
def test_the_two_modes_agree_exactly_where_the_side_divides(mode):
    features = torch.randn(24 * 24, 4, dtype=torch.float64)
    for side in (1, 2, 8, 12, 24):
        torch.testing.assert_close(
            reference.adaptive_pool(features, pool_plan([(24, 24)], [(side, side)], mode)),
            reference.adaptive_pool(features, pool_plan([(24, 24)], [(side, side)])),
        )


@pytest.mark.parametrize("mode", geometry.MODES)
@pytest.mark.parametrize("size, side", [(27, 8), (27, 12), (5, 16), (16, 5), (1, 1), (1, 4), (9, 1), (13, 13)])
def test_every_row_of_an_axis_is_an_average_of_neighbours(size, side, mode):
    matrix = geometry.axis_matrix(size, side, mode)
    torch.testing.assert_close(matrix.sum(1), torch.ones(side, dtype=torch.float64))
    for rows in (matrix, matrix.T):  # nonzeros side by side: a window, forward and backward
        for row in rows:
            (used,) = row.nonzero(as_tuple=True)
            assert used.numel() == used[-1] - used[0] + 1
    if side <= size:  # a patch then lies in at most two windows per axis: the backward gather reads 2 x 2 tokens
        assert int((matrix != 0).sum(0).max()) <= 2


def test_a_plan_is_offsets_and_sizes():
    grids, sides = RAGGED
    plan = pool_plan(grids, sides, "resize")
    assert plan.table.dtype == torch.int32 and plan.table.shape == (len(grids) + 1, 6)
    assert plan.table[-1, :2].tolist() == [num_rows(grids), num_rows(sides)] == [plan.num_patches, plan.num_tokens]
    assert geometry.images_of(plan.table) == list(zip(grids, sides))
    assert plan.table[2, 0] == num_rows(grids[:2]) and plan.table[2, 1] == num_rows(sides[:2])
    assert plan.is_resize and plan.cells >= 2 <= plan.patch_cells
    empty = pool_plan([], [])
    assert (empty.num_patches, empty.num_tokens, empty.table.shape) == (0, 0, (1, 6))


def test_a_plan_moves_with_its_batch():
    plan = pool_plan(*RAGGED)
    assert plan.to("meta").table.device.type == "meta" and plan.to("meta").num_tokens == plan.num_tokens


def test_a_plan_is_not_made_under_capture(monkeypatch):
    """A graph would copy from page-locked memory that is free by its first replay."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="make the plan before"):
        pool_plan(*RAGGED, device="cuda")


def test_the_kernels_division_is_exact():
    """floor(a / b) by a float32 product, for every b up to the largest side and the worst a of each quotient."""
    for b in range(1, 2 * geometry.MAX_SIDE):  # resized rows: up to a grid's side plus a token grid's
        quotient = np.arange(0, 2**20 // b + 1, dtype=np.int64)
        # 1 / b on a GPU may be two units off in the last place
        exact = np.float32(1) / np.float32(b)
        for inverse in (
            exact,
            np.nextafter(np.nextafter(exact, np.float32(0)), np.float32(0)),
            np.nextafter(np.nextafter(exact, np.float32(2)), np.float32(2)),
        ):
            for a in (quotient * b, quotient * b + b - 1):
                got = ((a.astype(np.float32) + np.float32(0.5)) * inverse).astype(np.int64)
                assert (got == quotient)[a < 2**20].all(), b


def test_half_precision_is_rounded_once():
    features = torch.randn(27 * 27, 16).bfloat16()
    plan = pool_plan([(27, 27)], [(12, 12)])
    exact = reference.adaptive_pool(features.double(), plan)
    once = relative_error(exact.bfloat16(), exact)
    assert relative_error(reference.adaptive_pool(features, plan), exact) <= 1.0001 * once
