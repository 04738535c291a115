"""Dynamic tiling by aspect ratio (InternVL 1.5, arXiv 2404.16821, section 3.2): an image as a grid of tiles and a thumbnail.

Pure and vectorised, so that an index of millions of images can be tiled from their sizes alone. Travels with every exported
model, so it imports nothing but numpy.
"""

import numpy as np


def tiles_for(
    widths: np.ndarray, heights: np.ndarray, max_tiles: int, thumbnail: bool, tile_size: tuple[int, int] = (448, 448)
) -> np.ndarray:
    """Tiles of images: widths [S], heights [S] in pixels (upright) -> [S] int64, the thumbnail counted.

    See `grids_for`; an image of a single tile has no thumbnail.
    """
    rows, columns = grids_for(widths, heights, max_tiles, tile_size)
    grid = rows * columns
    return grid + (grid > 1) * bool(thumbnail)


def grids_for(
    widths: np.ndarray | int, heights: np.ndarray | int, max_tiles: int, tile_size: tuple[int, int] = (448, 448)
) -> tuple[np.ndarray, np.ndarray]:
    """The grid of each image: widths [S], heights [S] -> (rows [S], columns [S]) int64, rows * columns <= max_tiles.

    The grid whose shape (of tiles of `tile_size` = (height, width) pixels) is nearest to the image's. Of equally near ones
    the larger is taken if the image has more than half of its pixels. Sizes below 1 (an image that cannot be read) count
    as 1 x 1.

    Raises:
        ValueError: max_tiles below 1.
    """
    if max_tiles < 1:
        raise ValueError(f"max_tiles is {max_tiles}; wanted at least 1 (one tile is the whole image)")
    widths, heights = (np.maximum(np.asarray(sides, dtype=np.int64), 1) for sides in (widths, heights))
    tile_height, tile_width = tile_size
    best_rows, best_columns = np.ones_like(widths), np.ones_like(widths)
    best_gap = np.full(widths.shape, np.inf)
    for rows, columns in grids(max_tiles):
        shape = (columns * tile_width) / (rows * tile_height)
        gap = np.abs(widths / heights - shape)
        is_nearer = gap < best_gap
        is_larger = (gap == best_gap) & (2 * widths * heights > rows * columns * tile_height * tile_width)
        chosen = is_nearer | is_larger
        best_rows, best_columns = np.where(chosen, rows, best_rows), np.where(chosen, columns, best_columns)
        best_gap = np.where(chosen, gap, best_gap)
    return best_rows, best_columns


def grids(max_tiles: int) -> list[tuple[int, int]]:
    """Every (rows, columns) of at most `max_tiles` tiles, by their number, then by columns."""
    every = [(rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1)]
    return sorted(every, key=lambda grid: (grid[0] * grid[1], grid[1]))
