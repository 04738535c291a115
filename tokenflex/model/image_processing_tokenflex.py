"""Images to pixels: decoded, turned upright, laid on white, cut into tiles of one size, normalised.

One path for training, evaluation and inference: encoded bytes and files are decoded here, JPEGs by libjpeg-turbo at the
smallest of its sizes (1, 1/2, 1/4, 1/8) that is not below what the tiles need. Travels with every exported model, so it
imports nothing but PIL, numpy, torch, transformers and its sibling; simplejpeg is used where it is installed.
"""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .tiling import grids_for, tiles_for

try:
    import simplejpeg
except ImportError:  # Pillow decodes to the same pixels
    simplejpeg = None

ORIENTATION = 0x0112  # EXIF


class TokenFlexImageProcessor(BaseImageProcessor):
    """Images as tiles of `height` x `width` pixels, then (x / 255 - mean) / std per channel.

    Args:
        height, width: of a tile. Aspect ratios are not kept within a tile, as in InternVL.
        max_tiles: 1 takes every image as one tile; more cut it into a grid chosen by its aspect ratio (`tiling.py`).
        thumbnail: whether a grid of several tiles is followed by the whole image as one more.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        height=378,
        width=378,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        max_tiles=1,
        thumbnail=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.height = height
        self.width = width
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.max_tiles = max_tiles
        self.thumbnail = thumbnail

    def preprocess(self, images, return_tensors="pt", **kwargs):
        """Images (bytes, path, PIL, or array [H, W, 3] of bytes; one or a list) -> model inputs.

        Returns:
            `pixel_values` [tiles, 3, height, width], image after image, and `num_tiles` [images].
        """
        images = images if isinstance(images, (list, tuple)) else [images]
        tiled = [self.tiled(image) for image in images]
        pixels = self.normalised(torch.from_numpy(np.concatenate(tiled)))
        num_tiles = torch.tensor([len(tiles) for tiles in tiled])
        return BatchFeature({"pixel_values": pixels, "num_tiles": num_tiles}, tensor_type=return_tensors)

    def num_tiles(self, widths, heights):
        """Tiles of images by their upright sizes: [S], [S] -> [S] int64. What `tiled` returns as many of."""
        return tiles_for(widths, heights, self.max_tiles, self.thumbnail, (self.height, self.width))

    def tiled(self, image):
        """One image -> bytes [tiles, height, width, 3]: the grid row by row, then the thumbnail.

        Raises:
            ValueError, OSError: bytes or a file that cannot be decoded.
        """
        pixels_HW3, rows, columns = self._decoded(image)
        whole = resized(pixels_HW3, rows * self.height, columns * self.width)
        tiles = whole.reshape(rows, self.height, columns, self.width, 3).swapaxes(1, 2)
        tiles = tiles.reshape(rows * columns, self.height, self.width, 3)
        if len(tiles) > 1 and self.thumbnail:
            tiles = np.concatenate([tiles, resized(pixels_HW3, self.height, self.width)[None]])
        return tiles

    def normalised(self, tiles_BHW3):
        """Bytes [B, height, width, 3] -> float32 `pixel_values` [B, 3, height, width], on the device they are on."""
        mean, std = (torch.tensor(x, device=tiles_BHW3.device).view(3, 1, 1) for x in (self.image_mean, self.image_std))
        return (tiles_BHW3.permute(0, 3, 1, 2).float() / 255 - mean) / std

    def _decoded(self, image):
        """Upright RGB bytes [H, W, 3], perhaps at a smaller scale, and the rows and columns of tiles that it is cut into."""
        if isinstance(image, (str, Path)):
            image = Path(image).read_bytes()
        orientation = 0
        if isinstance(image, (bytes, bytearray, memoryview)):
            data = bytes(image)
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                orientation = image.getexif().get(ORIENTATION, 1) if "exif" in image.info else 1
        if not orientation:
            pixels_HW3 = np.asarray(upright_rgb(image))
            return pixels_HW3, *self._grid(pixels_HW3.shape[1], pixels_HW3.shape[0])
        width, height = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
        rows, columns = self._grid(width, height)
        fits = min(width / (columns * self.width), height / (rows * self.height))
        scale = next(scale for scale in (8, 4, 2, 1) if scale <= max(fits, 1))
        return decode_jpeg(data, image, scale, orientation), rows, columns

    def _grid(self, width, height):
        rows, columns = grids_for(width, height, self.max_tiles, (self.height, self.width))
        return int(rows), int(columns)


def decode_jpeg(data, image, scale, orientation=1):
    """Bytes of a JPEG -> upright RGB bytes [H / scale, W / scale, 3].

    `image` is the same, opened by Pillow, which takes what the faster decoder refuses, to the same pixels.

    Raises:
        OSError: it is truncated.
    """
    width, height = image.size
    pixels_HW3 = None
    if simplejpeg is not None:
        try:
            pixels_HW3 = simplejpeg.decode_jpeg(
                data, "RGB", min_height=-(-height // scale), min_width=-(-width // scale), min_factor=scale
            )
        except ValueError:  # a flaw that can be read past, or a truncated file: Pillow tells them apart
            pixels_HW3 = None
    if pixels_HW3 is None:
        image.draft("RGB", (width // scale, height // scale))
        pixels_HW3 = np.asarray(image.convert("RGB"))
    # libjpeg rounds sizes up; the part of a pixel that lies outside the image would shift all others
    pixels_HW3 = pixels_HW3[: max(1, round(height / scale)), : max(1, round(width / scale))]
    return _upright(pixels_HW3, orientation)


def _upright(pixels_HW3, orientation):
    """The array turned and mirrored as EXIF's orientation says."""
    if orientation in (5, 6, 7, 8):
        pixels_HW3 = pixels_HW3.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels_HW3 = pixels_HW3[::-1]
    if orientation in (2, 3, 6, 7):
        pixels_HW3 = pixels_HW3[:, ::-1]
    return np.ascontiguousarray(pixels_HW3)


def resized(pixels_HW3, height, width):
    """Bytes [H, W, 3] -> bytes [height, width, 3], bicubic and antialiased.

    torch's byte path gives what Pillow's resize does (within 2 of 255) in an eighth of the time: it is vectorised. It is
    told that colours lie together by the strides, so the batch axis must be made first: 0.38 ms against 0.56 ms for a
    640 x 480 image to 378 x 378 on one AVX-512 core.
    """
    if pixels_HW3.shape[:2] == (height, width):
        return pixels_HW3
    if not pixels_HW3.flags.writeable:
        pixels_HW3 = pixels_HW3.copy()  # torch warns of memory that it may not write
    pixels_13HW = torch.from_numpy(pixels_HW3).unsqueeze(0).permute(0, 3, 1, 2)
    resized_13HW = F.interpolate(pixels_13HW, size=(height, width), mode="bicubic", antialias=True)
    return resized_13HW.permute(0, 2, 3, 1)[0].contiguous().numpy()


def upright_rgb(image):
    """Any image (PIL, path, array) as upright 8-bit RGB: EXIF rotation applied, alpha laid on white, 16 bit scaled."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    elif not isinstance(image, Image.Image):
        with Image.open(image) as file:
            file.load()
            image = file
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "I;16", "I;16B", "F"):
        array = np.asarray(image, dtype=np.float32)
        highest = array.max(initial=0.0)
        scale = 255.0 / 65535.0 if highest > 255 else 255.0 if image.mode == "F" and highest <= 1 else 1.0
        image = Image.fromarray((array * scale).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
