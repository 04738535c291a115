"""What reading data uses of a processor: text and images in, token ids and tiles out.

The one that there is lies in `tokenflex.model`, which this room does not know.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch


class Encoded(Protocol):
    """A conversation as tokens; see `tokenflex.model.processing_tokenflex.EncodedConversation`."""

    @property
    def input_ids(self) -> list[int]:
        """The tokens, with one run of image tokens per image."""

    @property
    def is_target(self) -> list[bool]:
        """Per token, whether it is learned."""

    @property
    def image_starts(self) -> list[int]:
        """Where each image's run begins."""


class ImageProcessor(Protocol):
    """See `tokenflex.model.TokenFlexImageProcessor`."""

    @property
    def height(self) -> int:
        """Of a tile, in pixels."""

    @property
    def width(self) -> int:
        """Likewise."""

    def num_tiles(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """Tiles that images of these sizes are cut into: [N], [N] -> [N]."""

    def shown(self, image: bytes) -> tuple[np.ndarray, np.ndarray]:
        """An encoded image -> its tiles [tiles, H, W, 3] of uint8, and height and width [tiles, 2] of what each shows of it."""

    def normalised(self, tiles_BHW3: torch.Tensor) -> torch.Tensor:
        """Tiles of bytes -> pixel values [B, 3, H, W]."""


class Processor(Protocol):
    """See `tokenflex.model.TokenFlexProcessor`."""

    render_date: str
    """ISO date that the chat template takes for today's; empty is the day it runs on."""

    @property
    def image_processor(self) -> ImageProcessor:
        """What cuts images into tiles."""

    @property
    def tokenizer(self) -> Any:
        """A fast tokenizer of transformers."""

    @property
    def chat_template(self) -> Any:
        """The text of the template, or several by name."""

    @property
    def image_start_token(self) -> str:
        """The token before an image."""

    @property
    def image_token(self) -> str:
        """The token that stands for each of its places."""

    @property
    def image_end_token(self) -> str:
        """The token behind it."""

    @property
    def image_token_id(self) -> int:
        """Of `image_token`."""

    @property
    def image_end_token_id(self) -> int:
        """Of `image_end_token`."""

    def tile_sides(
        self, num_visual_tokens: int | tuple[int, int], sizes: Sequence[Sequence[int]]
    ) -> list[tuple[int, int]]:
        """(rows, columns) of visual tokens of each tile of an image; `sizes` as `ImageProcessor.shown` gives them."""

    def shared_counts(self, count: int, sizes: Sequence[Sequence[Sequence[int]]]) -> list[int]:
        """Visual tokens per tile of each image of a sample that has `count` per tile, `sizes` of its tiles for each image."""

    def encode(self, messages: list[dict[str, Any]], lengths: list[int]) -> Encoded:
        """A conversation as tokens, image i as a run of `lengths[i]`."""

    def frames(self, clip: bytes | list[bytes]) -> list[Any]:
        """A video file's bytes, or a list of frames, -> frames as encoded bytes or arrays [H, W, 3]."""

    @property
    def frames_per_second(self) -> float:
        """At which video files are sampled."""

    @property
    def max_frames(self) -> int:
        """Of a clip."""

    def rendering_key(self) -> str:
        """What the text of a conversation depends on."""
