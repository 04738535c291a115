"""Encoded images under suspicion: what the header says before anything is decoded, and whether all of it decodes.

Formats are told by their bytes, never by a file's name, and only JPEG, PNG and WebP are ever opened. Decoding for the
model is the image processor's work (`tokenflex.model.image_processing_tokenflex`); here is what decides whether it may.
"""

import io
import struct
import warnings
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from .problems import BadSample, Limits

try:
    import simplejpeg
except ImportError:  # Pillow does the same, somewhat slower
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP")
_SIGNATURES = {"JPEG": (0, b"\xff\xd8\xff"), "PNG": (0, b"\x89PNG\r\n\x1a\n"), "WEBP": (8, b"WEBP")}
EXTENSION = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
ORIENTATION = 0x0112  # EXIF
_WIDE_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class ImageHeader:
    """format: one of `FORMATS`. width, height: pixels once upright. repairs: what reading will put right."""

    format: str
    width: int
    height: int
    repairs: tuple[str, ...]


def read_header(data: bytes, limits: Limits) -> ImageHeader:
    """`ImageHeader` of encoded bytes, without decoding a pixel.

    Raises:
        BadSample: not an image of a known format, a broken header, or more pixels than the limit.
    """
    _check_pixels(_webp_canvas(data), limits)  # before Pillow, which allocates a WebP's canvas when it opens it
    with _open(data) as image:
        _check_pixels(image.size, limits)
        width, height = image.size
        orientation = _orientation(image)
        if orientation >= 5:
            width, height = height, width
        repairs = _repairs(image, orientation)
        # a photo with a second one behind it, as many phones write, is a JPEG whose first image counts
        return ImageHeader("JPEG" if image.format == "MPO" else image.format, width, height, repairs)


def verify_image(data: bytes, limits: Limits) -> ImageHeader:
    """`ImageHeader` after decoding every pixel; flaws that a decoder reads past are named among the repairs.

    Raises:
        BadSample: as `read_header`, or the data is truncated or broken.
    """
    header = read_header(data, limits)
    if header.format == "JPEG" and simplejpeg is not None and "cmyk" not in header.repairs:
        try:
            simplejpeg.decode_jpeg(data, strict=True)
            return header
        except ValueError:
            repairs = (*header.repairs, "jpeg-warning")  # what the strict decoder refuses, the lenient one decides
            header = ImageHeader(header.format, header.width, header.height, repairs)
    with _open(data) as image:
        _load(image)
    return header


def decode_image(data: bytes, where: str, limits: Limits) -> Image.Image:
    """Encoded bytes -> PIL image, fully read.

    Raises:
        BadSample: not an image, truncated, or larger than the limit.
    """
    try:
        read_header(data, limits)
        image = _open(data)
        _load(image)
    except BadSample as problem:
        raise BadSample(problem.reason, f"{where}: {problem.detail}") from None
    return image


def _open(data: bytes) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit decides
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        begin = bytes(data[:8])
        # Releases of Pillow differ in which error a cut header gives; the sample's bytes do not.
        for name, (at, signature) in _SIGNATURES.items():
            if data[at : at + len(signature)] == signature:
                raise BadSample(
                    "image-data", f"not a readable image (a broken {name}); repair or remove the sample"
                ) from None
        raise BadSample(
            "image-format", f"not a readable image (begins with {begin!r}); wanted a JPEG, PNG or WebP file"
        ) from None
    except Image.DecompressionBombError as error:
        raise BadSample("image-pixels", f"not a readable image ({error})") from None
    except (OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError, KeyError, OverflowError) as error:
        raise BadSample(
            "image-data", f"not a readable image ({_one_line(error)}); repair or remove the sample"
        ) from None


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError, OverflowError) as error:
        raise BadSample(
            "image-data", f"not a readable image ({_one_line(error)}); repair or remove the sample"
        ) from None


def _check_pixels(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height > limits.max_image_pixels:
        raise BadSample(
            "image-pixels",
            f"not a readable image ({width} x {height} pixels by its header, at most {limits.max_image_pixels} are allowed); "
            "shrink it or raise data.max_image_pixels",
        )


def _webp_canvas(data: bytes) -> tuple[int, int]:
    """Width and height that a WebP's header announces; (0, 0) for anything else or too short."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return 0, 0
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, struct.error, KeyError, IndexError):
        return 1  # EXIF is decoration: broken, it says nothing


def _repairs(image: Any, orientation: int) -> tuple[str, ...]:
    width, height = image.size
    checks = {
        "exif-rotated": 2 <= orientation <= 8,
        "alpha": image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info,
        "palette": image.mode in ("P", "PA"),
        "cmyk": image.mode in ("CMYK", "YCbCr", "LAB", "HSV"),
        "16-bit": image.mode in _WIDE_MODES,
        "grey": image.mode in ("L", "1", "LA"),
        "animated": getattr(image, "n_frames", 1) > 1,
        "extreme-shape": min(width, height) < 4 or max(width, height) > 50 * min(width, height),
    }
    return tuple(name for name, holds in checks.items() if holds)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def thumbnail_jpeg(data: bytes, longest: int = 320) -> bytes:
    """A small upright JPEG of an encoded image that `read_header` lets pass, for a page that shows it.

    Raises:
        BadSample: the image cannot be read.
    """
    image = _open(data)
    _load(image)
    image = ImageOps.exif_transpose(image).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.thumbnail((longest, longest))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()
