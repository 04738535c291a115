"""Law: every count pools exactly as adaptive average pooling is defined; `resize` pools as the authors' release does."""

import math

import pytest
import torch
import torch.nn.functional as F

from tokenflex.model.pooling import adaptive_pool, pool_grid, sides_of


def by_definition(features_HWC, side):
    """Window averages written out from the definition, in fp64."""
    height, width, _ = features_HWC.shape
    rows = []
    for i in range(side[0]):
        for j in range(side[1]):
            h = slice(i * height // side[0], -(-(i + 1) * height // side[0]))
            w = slice(j * width // side[1], -(-(j + 1) * width // side[1]))
            rows.append(features_HWC[h, w].double().mean((0, 1)))
    return torch.stack(rows)


@pytest.mark.parametrize("grid", [(27, 27), (16, 16), (7, 13), (1, 1), (5, 2)])
def test_every_count_up_to_the_grid_and_beyond(grid):
    features = torch.randn(1, *grid, 5)
    for count in range(1, grid[0] * grid[1] + 40):
        side = sides_of(count, grid)
        assert side[0] * side[1] == count
        pooled = pool_grid(features, side)
        theirs = F.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), side).flatten(2).transpose(1, 2)
        torch.testing.assert_close(pooled, theirs, rtol=0, atol=0)
        torch.testing.assert_close(pooled[0].double(), by_definition(features[0], side), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count, grid, side", [(64, (27, 27), (8, 8)), (144, (27, 27), (12, 12)), (12, (6, 8), (3, 4))])
def test_a_count_is_shaped_like_the_grid(count, grid, side):
    assert sides_of(count, grid) == side


def test_no_other_factorisation_is_nearer_to_the_grids_shape():
    skew = lambda rows, columns: abs(math.log(rows / columns * 36 / 24))
    for count in range(1, 300):
        chosen = skew(*sides_of(count, (24, 36)))
        assert all(chosen <= skew(n, count // n) + 1e-9 for n in range(1, count + 1) if count % n == 0)


@pytest.mark.parametrize("count", [0, -4, 2.5, "64", True, None, (0, 3), (1, 2, 3)])
def test_a_count_that_is_none_is_refused(count):
    with pytest.raises(ValueError, match="num_visual_tokens is"):
        sides_of(count, (8, 8))


def released_pool(features_BLC, grid, n):
    """The authors' released pooling, stated plainly: bilinear to the next multiple of n, then average."""
    batch, _, width = features_BLC.shape
    maps = features_BLC.transpose(1, 2).reshape(batch, width, *grid)
    target = math.ceil(grid[0] / n) * n
    if target != grid[0]:
        maps = F.interpolate(maps, size=(target, target), mode="bilinear", align_corners=True)
    maps = F.avg_pool2d(maps, target // n)
    return maps.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("n", [1, 3, 5, 8, 9, 12, 16, 27, 30])
def test_resize_mode_is_the_released_pooling(n):
    features = torch.randn(2, 27 * 27, 6, dtype=torch.float64)
    pooled = pool_grid(features.view(2, 27, 27, 6), (n, n), "resize")
    torch.testing.assert_close(pooled, released_pool(features, (27, 27), n), rtol=1e-12, atol=1e-12)


def test_resize_and_adaptive_differ_where_the_count_does_not_divide():
    features = torch.randn(1, 27, 27, 4)
    assert (pool_grid(features, (8, 8), "resize") - pool_grid(features, (8, 8))).abs().max() > 1e-2
    torch.testing.assert_close(pool_grid(features, (9, 9), "resize"), pool_grid(features, (9, 9)))


def test_a_ragged_batch_is_its_images_one_by_one():
    grids, sides = [(4, 6), (7, 3), (4, 6), (1, 1), (4, 6)], [(2, 3), (5, 4), (2, 3), (2, 2), (3, 3)]
    images = [torch.randn(h * w, 5) for h, w in grids]
    together = adaptive_pool(torch.cat(images), grids, sides)
    apart = [pool_grid(x.view(1, *grid, 5), side)[0] for x, grid, side in zip(images, grids, sides)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=0)


def test_wrong_numbers_are_named():
    with pytest.raises(ValueError, match="11 feature rows but the grids hold 12"):
        adaptive_pool(torch.zeros(11, 3), [(3, 4)], [(1, 1)])
    with pytest.raises(ValueError, match="2 grids but 1 sides"):
        adaptive_pool(torch.zeros(2, 3), [(1, 1), (1, 1)], [(1, 1)])
    with pytest.raises(ValueError, match="'adaptive', 'resize' or 'max'"):
        pool_grid(torch.zeros(1, 2, 2, 3), (1, 1), "mean")
