"""A total of visual tokens shared by the images or frames of a prompt; one rule for training, the processor and the model.

Evenly, every tile gets the largest trained count with which all of them fit. By size the same tokens are dealt out anew, a
row of that count's grid at a time, so that the sum is the even one to the token and no length depends on a size. Travels
with every exported model, so it imports nothing but its siblings.
"""

import heapq
from collections.abc import Sequence

from .pooling import sides_of

SHARES = ("even", "size")
"""How a total is shared where no router does it."""
LEAST = 4
"""By size no image gets less than this part of the even count."""


def even_count(count: int, trained: Sequence[int], num_tiles: int, total: int) -> int:
    """The visual tokens of each of `num_tiles` tiles: `count`, or the largest trained count below it with which all fit `total`.

    Raises:
        ValueError: they do not fit at the smallest.
    """
    candidates = [count, *(other for other in trained if other < count)]
    fits = [other for other in candidates if other * num_tiles <= total]
    if not fits:
        raise ValueError(
            f"total_visual_tokens={total}: {num_tiles} images (or tiles, or frames) have {min(candidates) * num_tiles} visual tokens at "
            f"the least, {min(candidates)} each; give a larger total, or fewer images"
        )
    return max(fits)


def counts_by_size(count: int, areas: Sequence[int], grid: Sequence[int]) -> list[int]:
    """A count per image that shares `count` times their number by their `areas` in pixels; the sum is exact.

    The unit is a row of the count's own grid, so every count has a rectangle. Each image has a quarter of `count` at the
    least and as many rows as the patch `grid` at the most; the next row goes to the image with the most pixels per row.
    """
    rows, columns = sides_of(count, grid)
    least, most = max(1, rows // LEAST), max(rows, grid[0])
    dealt = [least] * len(areas)
    waiting = [(-area / least, image) for image, area in enumerate(areas)]
    heapq.heapify(waiting)
    for _ in range((rows - least) * len(areas)):
        _, image = heapq.heappop(waiting)
        dealt[image] += 1
        if dealt[image] < most:
            heapq.heappush(waiting, (-areas[image] / dealt[image], image))
    return [own * columns for own in dealt]
