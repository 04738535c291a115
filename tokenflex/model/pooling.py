"""Adaptive pooling of patch features to any number of visual tokens, in plain torch.

Travels with every exported model, so it imports nothing but torch. Shape suffixes: B images, P patches, N visual tokens,
C vision width.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def sides_of(num_visual_tokens: int | Sequence[int], grid: Sequence[int]) -> tuple[int, int]:
    """Rows and columns (n_h, n_w) of a pooled grid of exactly `num_visual_tokens`, shaped like `grid`.

    Of all factorisations n_h * n_w the one whose aspect ratio is nearest to the grid's; a square number on a square grid
    gives (n, n). `num_visual_tokens` may also be a pair (n_h, n_w), which is taken as it is.

    Raises:
        ValueError: a count that is not a positive integer.
    """
    if isinstance(num_visual_tokens, (tuple, list)):
        if len(num_visual_tokens) != 2 or any(not _is_count(n) for n in num_visual_tokens):
            raise ValueError(
                f"num_visual_tokens is {num_visual_tokens!r}; a pair must hold two positive integers (rows, columns)"
            )
        return tuple(num_visual_tokens)
    if not _is_count(num_visual_tokens):
        raise ValueError(f"num_visual_tokens is {num_visual_tokens!r}; it must be a positive integer, for example 64")
    return _nearest_sides(num_visual_tokens, tuple(grid), None)


def aspect_sides(num_visual_tokens: int | Sequence[int], size: Sequence[int], grid: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a pooled grid of exactly `num_visual_tokens`, shaped like an image of `size` = (height, width) pixels.

    As `sides_of`, among the factorisations with no more rows and columns than the patch `grid` has, since more of them would
    repeat patches; where there is none, what `sides_of` gives. The number of tokens does not depend on the image.

    Raises:
        ValueError: see `sides_of`.
    """
    sides = sides_of(num_visual_tokens, grid)
    if isinstance(num_visual_tokens, (tuple, list)) or sides[0] > grid[0] or sides[1] > grid[1]:
        return sides
    return _nearest_sides(num_visual_tokens, tuple(size), tuple(grid))


def tile_sides(
    num_visual_tokens: int | Sequence[int], sizes: Sequence[Sequence[int]], grid: Sequence[int], sides: str
) -> list[tuple[int, int]]:
    """Rows and columns of each tile of an image at `num_visual_tokens` per tile.

    Args:
        sizes: [tiles, 2] height and width of what each tile shows; see `TokenFlexImageProcessor.tile_sizes`.
        sides: `aspect` looks at them, `square` at the patch `grid` alone.

    Raises:
        ValueError: see `sides_of`.
    """
    if sides == "square":
        return [sides_of(num_visual_tokens, grid) for _ in sizes]
    return [aspect_sides(num_visual_tokens, size, grid) for size in sizes]


@functools.lru_cache(maxsize=4096)
def _nearest_sides(num_visual_tokens, shape, most):
    height, width = shape

    def skew(rows):  # |log| treats "twice too tall" and "twice too wide" alike
        return round(abs(math.log(rows * rows * width / (num_visual_tokens * height))), 9), rows

    factors = [n for n in range(1, num_visual_tokens + 1) if num_visual_tokens % n == 0]
    if most is not None:
        factors = [rows for rows in factors if rows <= most[0] and num_visual_tokens // rows <= most[1]]
    rows = min(factors, key=skew)
    return rows, num_visual_tokens // rows


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def pool_grid(features_BHWC: torch.Tensor, side: tuple[int, int], mode: str = "adaptive") -> torch.Tensor:
    """Pool a batch of equal grids: [B, H, W, C] -> [B, n_h * n_w, C].

    `adaptive` averages over the windows [floor(i H / n), ceil((i + 1) H / n)) per axis (paper section 3.1); sides above
    the grid's repeat patches. `resize` is the authors' release: bilinear (align_corners) to the next multiple of the
    side, then equal average windows. `max` takes the largest of each adaptive window, channel by channel.
    """
    features_BCHW = features_BHWC.permute(0, 3, 1, 2)
    if mode == "resize":
        size = tuple(-(-length // n) * n for length, n in zip(features_BCHW.shape[-2:], side))
        if size != tuple(features_BCHW.shape[-2:]):
            features_BCHW = F.interpolate(features_BCHW, size=size, mode="bilinear", align_corners=True)
    elif mode == "max":
        return F.adaptive_max_pool2d(features_BCHW, side).flatten(2).transpose(1, 2)
    elif mode != "adaptive":
        raise ValueError(f"pooling mode is {mode!r}; it must be 'adaptive', 'resize' or 'max'")
    return F.adaptive_avg_pool2d(features_BCHW, side).flatten(2).transpose(1, 2)


def adaptive_pool(
    features_PC: torch.Tensor, grids: list[tuple[int, int]], sides: list[tuple[int, int]], mode: str = "adaptive"
) -> torch.Tensor:
    """Pool images laid one after another, each to its own side: [sum(H_i W_i), C] -> [sum(n_h n_w), C].

    Images of equal grid and side are pooled in one call; the rows come back in the images' order.

    Raises:
        ValueError: as many sides as grids, or rows as patches, were not given; the message has both numbers.
    """
    if len(grids) != len(sides):
        raise ValueError(f"adaptive_pool got {len(grids)} grids but {len(sides)} sides; one side per image is needed")
    num_patches = sum(height * width for height, width in grids)
    if features_PC.shape[0] != num_patches:
        raise ValueError(
            f"adaptive_pool got {features_PC.shape[0]} feature rows but the grids hold {num_patches} patches"
        )
    if not grids:
        return features_PC
    if len(set(zip(grids, sides))) == 1:
        (height, width), side = grids[0], sides[0]
        return pool_grid(features_PC.view(len(grids), height, width, -1), side, mode).flatten(0, 1)
    rows = list(features_PC.split([height * width for height, width in grids]))
    groups = {}
    for image, key in enumerate(zip(grids, sides)):
        groups.setdefault(key, []).append(image)
    for ((height, width), side), images in groups.items():
        pooled = pool_grid(torch.stack([rows[i] for i in images]).unflatten(1, (height, width)), side, mode)
        for image, tokens in zip(images, pooled):
            rows[image] = tokens
    return torch.cat(rows)
