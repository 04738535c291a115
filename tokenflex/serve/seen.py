"""What each visual token of a request's images saw: the windows of patches that were pooled, for a page that draws them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..data import Limits
from ..data.images import read_header
from ..infer import Generator
from ..model.modeling_tokenflex import image_runs
from ..model.tiling import grids_for

Window = tuple[float, float]


@dataclass(frozen=True)
class SeenImage:
    """How one image became visual tokens.

    num_visual_tokens: of all its tiles together. rows, columns: of the pooled grid of each tile. tiles: (rows, columns) of tiles
    that the image was cut into. has_thumbnail: whether the whole image came once more behind them. row_windows, column_windows:
    what a row or a column of the grid sees, (from, to) in shares of a tile; neighbours overlap where the patches do not divide.
    """

    num_visual_tokens: int
    rows: int
    columns: int
    tiles: tuple[int, int]
    has_thumbnail: bool
    row_windows: list[Window]
    column_windows: list[Window]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def windows(length: int, parts: int, mode: str = "adaptive") -> list[Window]:
    """The windows of `parts` tokens over `length` patches, in shares of the whole (paper section 3.1; `model.pooling.pool_grid`)."""
    if mode == "resize":
        return [(part / parts, (part + 1) / parts) for part in range(parts)]
    return [(part * length // parts / length, -(-(part + 1) * length // parts) / length) for part in range(parts)]


def seen_images(
    generator: Generator, messages: Sequence[Mapping[str, Any]], inputs: Mapping[str, Any]
) -> tuple[SeenImage, ...]:
    """The images of a conversation (encoded bytes, or frames [H, W, 3]) and the inputs that `generator` made of it -> what their tokens see."""
    model, tiler = generator.model, generator.processor.image_processor
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    images = [item["image"] for content in contents for item in content if item["type"] == "image"]
    runs = image_runs(inputs["input_ids"], model.config.image_token_id)
    asked = inputs.get("num_visual_tokens")
    asked = asked if isinstance(asked, list) else [asked] * len(images)
    found = []
    for image, (_, _, length), num_tiles, count in zip(
        images, runs, inputs["num_tiles"].tolist() if images else (), asked
    ):
        width_px, height_px = _upright_size(image)
        tile_rows, tile_columns = grids_for(width_px, height_px, tiler.max_tiles, (tiler.height, tiler.width))
        sizes = tiler.tile_sizes(width_px, height_px).tolist()
        rows, columns = generator.processor.tile_sides(count or length // num_tiles, sizes)[0]
        (height, width), mode = model.patch_grid, model.config.pooling_mode
        found.append(
            SeenImage(
                num_visual_tokens=length,
                rows=rows,
                columns=columns,
                tiles=(int(tile_rows), int(tile_columns)),
                has_thumbnail=bool(num_tiles > tile_rows * tile_columns),
                row_windows=windows(height, rows, mode),
                column_windows=windows(width, columns, mode),
            )
        )
    return tuple(found)


def _upright_size(image: bytes | np.ndarray) -> tuple[int, int]:
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    header = read_header(image, Limits())
    return header.width, header.height
