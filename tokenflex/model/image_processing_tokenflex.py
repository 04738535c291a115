"""Images to pixels: decoded, turned upright, laid on white, cut into tiles of one size, normalised.

One path for training, evaluation and inference: encoded bytes and files are decoded here, JPEGs by libjpeg-turbo at the
smallest of its sizes (1, 1/2, 1/4, 1/8) that is not below what the tiles need. Travels with every exported model, so it
imports nothing but PIL, numpy, torch, transformers and its sibling; simplejpeg is used where it is installed.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image
from transformers.processing_utils import ImagesKwargs, Unpack

from .tiling import grids_for, tiles_for

try:
    import simplejpeg
except ImportError:  # Pillow decodes to the same pixels
    simplejpeg = None

ORIENTATION = 0x0112  # EXIF


CALL_KWARGS = (
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "size",
    "max_tiles",
    "thumbnail",
)
"""What a call may set for itself; `size` is height and width of a tile."""
CHANNELS = (1, 3, 4)
SIDES = ("square", "aspect")
OneImage = bytes | bytearray | memoryview | str | Path | Image.Image | np.ndarray | torch.Tensor
"""What an image may come as; a text is a path, a URL or base64."""


class TokenFlexImageProcessorKwargs(ImagesKwargs, total=False):
    """What may be given to a call: see `TokenFlexImageProcessor`."""

    max_tiles: int
    thumbnail: bool


class TokenFlexImageProcessor(BaseImageProcessor):
    """Images as tiles of `height` x `width` pixels, then (x / 255 - mean) / std per channel.

    Args:
        height, width: of a tile. Aspect ratios are not kept within a tile, as in InternVL.
        max_tiles: 1 takes every image as one tile; more cut it into a grid chosen by its aspect ratio (`tiling.py`).
        thumbnail: whether a grid of several tiles is followed by the whole image as one more.
        sides: how the model's visual tokens lie over a tile: `square`, as its pixels do, or `aspect`, as what it shows of the image
            does; the model then needs `tile_sizes`.

    Raises:
        ValueError: other sides.
    """

    valid_kwargs = TokenFlexImageProcessorKwargs
    do_rescale, rescale_factor, do_normalize = True, 1 / 255, True

    def __init__(
        self,
        height: int = 378,
        width: int = 378,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        max_tiles: int = 1,
        thumbnail: bool = True,
        *,
        sides: str = "square",
        **kwargs: Unpack[ImagesKwargs],
    ):
        if sides not in SIDES:
            raise ValueError(f"sides is {sides!r}; it must be one of {', '.join(SIDES)}")
        kwargs.pop("auto_map", None)  # of the file that it came from; written anew with every save
        super().__init__(**kwargs)
        self.height = height
        self.width = width
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.max_tiles = max_tiles
        self.thumbnail = thumbnail
        self.sides = sides

    @property
    def model_input_names(self) -> list[str]:
        """What a call returns."""
        return ["pixel_values", "num_tiles", *(["tile_sizes"] if self.sides == "aspect" else [])]

    def preprocess(
        self,
        images: OneImage | Sequence | None,
        return_tensors: str | None = "pt",
        return_tile_sizes: bool = False,
        **kwargs: Unpack[ImagesKwargs],
    ) -> BatchFeature:
        """Images (bytes, path, URL, PIL, tensor, or array of bytes or of 0 to 1; one or a list) -> model inputs.

        Arrays have their channels last, tensors first, unless their shape says otherwise. `CALL_KWARGS` may be set for one call.

        Returns:
            `pixel_values` [tiles, 3, height, width], image after image, and `num_tiles` [images]; with `sides="aspect"` or where
            `return_tile_sizes` asks for them also `tile_sizes` [tiles, 2], height and width in pixels of what each tile shows.

        Raises:
            ValueError: a keyword that asks for something else than is done here.
        """
        call = self._for_call(kwargs)
        tiled, sizes = zip(*(call.shown(image) for image in flattened(images)))
        pixels = call.normalised(torch.from_numpy(np.concatenate(tiled)))
        data = {"pixel_values": pixels, "num_tiles": torch.tensor([len(tiles) for tiles in tiled])}
        if self.sides == "aspect" or return_tile_sizes:
            data["tile_sizes"] = torch.from_numpy(np.concatenate(sizes))
        if return_tensors == "np":
            data = {name: values.numpy() for name, values in data.items()}
        return BatchFeature(data, tensor_type=return_tensors)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> list[str]:
        """Write the configuration and its code; the addresses of the code are of the files alone, not of this object."""
        saved = super().save_pretrained(*args, **kwargs)
        vars(self).pop("auto_map", None)
        return saved

    def _for_call(self, kwargs):
        """The processor with what a call sets, which is this one where it sets nothing."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        known = {name: given.pop(name) for name in CALL_KWARGS if name in given}
        harmless = {"do_resize": True, "do_convert_rgb": True, "data_format": "channels_first", "device": "cpu"}
        for name, value in given.items():
            if harmless.get(name) not in (value, str(value)) and name not in ("input_data_format", "disable_grouping"):
                raise ValueError(f"{name}={value!r} is not done here; known are {', '.join(CALL_KWARGS)}")
        size = known.pop("size", None)
        if not known and size is None:
            return self
        if size is not None:
            known["height"], known["width"] = (size, size) if isinstance(size, int) else (size["height"], size["width"])
        names = {"height", "width", "sides", *CALL_KWARGS} - {"size"}
        call = type(self)(**{name: getattr(self, name) for name in names})
        for name, value in known.items():
            setattr(call, name, value)
        return call

    def num_tiles(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """Tiles of images by their upright sizes: [S], [S] -> [S] int64. What `tiled` returns as many of."""
        return tiles_for(widths, heights, self.max_tiles, self.thumbnail, (self.height, self.width))

    def tile_sizes(self, width: int, height: int) -> np.ndarray:
        """Pixels [tiles, 2] int64, height and width, that each tile of an upright image shows of it; the thumbnail all of them."""
        rows, columns = self._grid(width, height)
        sizes = [(max(1, round(height / rows)), max(1, round(width / columns)))] * (rows * columns)
        if len(sizes) > 1 and self.thumbnail:
            sizes.append((height, width))
        return np.array(sizes, dtype=np.int64)

    def tiled(self, image: OneImage) -> np.ndarray:
        """One image -> bytes [tiles, height, width, 3]; see `shown`."""
        return self.shown(image)[0]

    def shown(self, image: OneImage) -> tuple[np.ndarray, np.ndarray]:
        """One image -> bytes [tiles, height, width, 3], the grid row by row, then the thumbnail; and their `tile_sizes`.

        Raises:
            ValueError, OSError: bytes or a file that cannot be decoded.
        """
        pixels_HW3, width, height = self._decoded(image)
        rows, columns = self._grid(width, height)
        whole = resized(pixels_HW3, rows * self.height, columns * self.width)
        tiles = whole.reshape(rows, self.height, columns, self.width, 3).swapaxes(1, 2)
        tiles = tiles.reshape(rows * columns, self.height, self.width, 3)
        if len(tiles) > 1 and self.thumbnail:
            tiles = np.concatenate([tiles, resized(pixels_HW3, self.height, self.width)[None]])
        return tiles, self.tile_sizes(width, height)

    def normalised(self, tiles_BHW3: torch.Tensor) -> torch.Tensor:
        """Bytes [B, height, width, 3] -> float32 `pixel_values` [B, 3, height, width], on the device they are on."""
        if not (self.do_rescale and self.do_normalize and self.rescale_factor == 1 / 255):
            pixels_B3HW = tiles_BHW3.permute(0, 3, 1, 2).float() * (self.rescale_factor if self.do_rescale else 1)
            if not self.do_normalize:
                return pixels_B3HW
            mean, std = (torch.tensor(x).view(3, 1, 1).to(pixels_B3HW) for x in (self.image_mean, self.image_std))
            return (pixels_B3HW - mean) / std
        mean, std = (torch.tensor(x, device=tiles_BHW3.device).view(3, 1, 1) for x in (self.image_mean, self.image_std))
        return (tiles_BHW3.permute(0, 3, 1, 2).float() / 255 - mean) / std

    def _decoded(self, image):
        """Upright RGB bytes [H, W, 3], perhaps at a smaller scale, and the width and height of the upright image itself."""
        image = fetched(image)
        orientation = 0
        if isinstance(image, (bytes, bytearray, memoryview)):
            data = bytes(image)
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                orientation = image.getexif().get(ORIENTATION, 1) if "exif" in image.info else 1
        if not orientation:
            pixels_HW3 = np.asarray(upright_rgb(image))
            return pixels_HW3, pixels_HW3.shape[1], pixels_HW3.shape[0]
        width, height = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
        rows, columns = self._grid(width, height)
        fits = min(width / (columns * self.width), height / (rows * self.height))
        scale = next(scale for scale in (8, 4, 2, 1) if scale <= max(fits, 1))
        return decode_jpeg(data, image, scale, orientation), width, height

    def _grid(self, width, height):
        rows, columns = grids_for(width, height, self.max_tiles, (self.height, self.width))
        return int(rows), int(columns)


def flattened(images: OneImage | Sequence | None) -> list[OneImage]:
    """One image, or lists of images and of lists of them, as one list."""
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for entry in images for image in flattened(entry)]


def fetched(image: OneImage) -> OneImage:
    """An image as its encoded bytes where it is a path or a `data:` URL, so that it is decoded as in training; other URLs and
    base64 text through transformers; anything else as it is."""
    if isinstance(image, Path):
        return image.read_bytes()
    if not isinstance(image, str):
        return image
    if image.startswith("data:"):
        return base64.b64decode(image.partition(",")[2])
    if image.startswith(("http://", "https://")) or (len(image) > 4096 and "." not in image):
        return load_image(image)
    return Path(image).read_bytes()


def array_image(image: np.ndarray | torch.Tensor) -> Image.Image:
    """An array or tensor of bytes, or of numbers from 0 to 1, as a PIL image."""
    is_tensor = torch.is_tensor(image)
    pixels = image.detach().cpu().numpy() if is_tensor else image
    if pixels.ndim == 3:
        is_first, is_last = pixels.shape[0] in CHANNELS, pixels.shape[-1] in CHANNELS
        if is_first and (is_tensor or not is_last):
            pixels = pixels.transpose(1, 2, 0)
        if pixels.shape[-1] == 1:
            pixels = pixels[..., 0]
    if pixels.dtype.kind == "f" and pixels.ndim == 3:
        highest = pixels.max(initial=0)
        pixels = (pixels * (255 if highest <= 1 else 1)).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels))


def decode_jpeg(data: bytes, image: Image.Image, scale: int, orientation: int = 1) -> np.ndarray:
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


def resized(pixels_HW3: np.ndarray, height: int, width: int) -> np.ndarray:
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


def upright_rgb(image: str | Path | Image.Image | np.ndarray | torch.Tensor) -> Image.Image:
    """Any image (PIL, path, array, tensor) as upright 8-bit RGB: EXIF rotation applied, alpha laid on white, 16 bit scaled."""
    if isinstance(image, np.ndarray) or torch.is_tensor(image):
        image = array_image(image)
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
