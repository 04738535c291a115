"""A record's image reference -> bytes that may go into a shard: paths confined, schemes allow-listed, every pixel decoded."""

import base64
import binascii
import io
import os
import stat
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from ...data.images import EXTENSION, verify_image
from ...data.problems import BadSample, Limits
from ...data.shards import SCHEME

try:
    import pillow_heif
except ImportError:  # HEIC photos are named as such
    pillow_heif = None  # type: ignore[assignment]

OTHER_FORMATS = ("GIF", "BMP", "TIFF", "AVIF", "HEIF")
"""Formats that are written as PNG, where Pillow has their decoder; shards hold JPEG, PNG and WebP only."""
_BRANDS = {
    b"avif": "AVIF",
    b"avis": "AVIF",
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"), "HEIF"),
}
_DECODERS = {"AVIF": "a Pillow with AVIF (11.3 or newer)", "HEIF": "the package pillow-heif"}


def fetch_image(reference: object, root: str | os.PathLike | None, limits: Limits) -> bytes:
    """The bytes of an image: given as bytes, as a `data:` URL, or as a path below `root`.

    Raises:
        BadSample: a path that leaves the folder, another scheme, no such file, or too large a file.
    """
    if isinstance(reference, dict):  # the cell of a Hugging Face image column
        reference = reference.get("bytes") or reference.get("path")
    if isinstance(reference, (bytes, bytearray, memoryview)):
        return _within(bytes(reference), limits)
    if not isinstance(reference, str) or not reference:
        raise BadSample("image-missing", f"an image is given as {reference!r:.80}; wanted a path, a data: URL or bytes")
    if reference.startswith("data:"):
        return _within(_from_data_url(reference), limits)
    scheme = SCHEME.match(reference)
    if scheme:
        raise BadSample(
            "image-path",
            f"image {reference!r:.120} is of the scheme {scheme[1]!r}; only data: URLs and relative paths are read: download it first",
        )
    return _from_path(reference, root, limits)


def checked_image(data: bytes, limits: Limits) -> tuple[bytes, str, tuple[str, ...]]:
    """(bytes, extension, repairs) of an image that decodes to its last pixel; other formats are written as PNG.

    Raises:
        BadSample: it does not decode, or is larger than the limit.
    """
    try:
        header = verify_image(data, limits)
    except BadSample as problem:
        if problem.reason != "image-format":
            raise
        data = _as_png(data, limits, problem)
        header = verify_image(data, limits)
        return data, "png", (*header.repairs, "transcoded")
    return data, EXTENSION[header.format], header.repairs


def _within(data: bytes, limits: Limits) -> bytes:
    if len(data) > limits.max_member_bytes:
        raise BadSample("member-size", f"an image has {len(data)} bytes, at most {limits.max_member_bytes} are allowed")
    return data


def _from_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise BadSample("image-path", f"image {url[:40]!r}...: wanted data:image/...;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("image-data", f"image {url[:40]!r}...: not base64 ({error})") from None


def _from_path(name: str, root: str | os.PathLike | None, limits: Limits) -> bytes:
    plain = PurePosixPath(name.replace("\\", "/"))
    if plain.is_absolute() or ".." in plain.parts or "\0" in name:
        raise BadSample(
            "image-path",
            f"image path {name!r:.200} is absolute or leaves the image folder; wanted a path relative to --images",
        )
    if root is None:
        raise BadSample("image-missing", f"image {name!r:.200} is given by a path; name its folder with --images")
    path = Path(root) / plain
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadSample("image-missing", f"{path} is not a regular file")
        if status.st_size > limits.max_member_bytes:
            raise BadSample(
                "member-size", f"{path} has {status.st_size} bytes, at most {limits.max_member_bytes} are allowed"
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise BadSample("image-missing", f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _as_png(data: bytes, limits: Limits, problem: BadSample) -> bytes:
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            if image.width * image.height > limits.max_image_pixels:
                raise BadSample(
                    "image-pixels",
                    f"{image.width} x {image.height} pixels, at most {limits.max_image_pixels} are allowed",
                )
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("F", "I"):
                upright = _eight_bit(upright)
            if upright.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
                upright = upright.convert("RGB")
            file = io.BytesIO()
            upright.save(file, "PNG", compress_level=1)
    except Image.UnidentifiedImageError:
        kind = _BRANDS.get(bytes(data[8:12])) if data[4:8] == b"ftyp" else None
        if kind and kind not in _formats():
            raise BadSample("image-format", f"an {kind} image, which is read with {_DECODERS[kind]}") from None
        raise problem from None
    except Image.DecompressionBombError as error:
        raise BadSample("image-pixels", f"not a readable image ({error})") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError) as error:
        raise BadSample("image-data", f"not a readable image ({' '.join(str(error).split())})") from None
    return file.getvalue()


def _formats() -> list[str]:
    """Those of the other formats that this Pillow reads; asked for another, it would raise a KeyError."""
    Image.init()
    if pillow_heif is not None:
        pillow_heif.register_heif_opener()
    return [name for name in OTHER_FORMATS if name in Image.OPEN]


def _eight_bit(image: Image.Image) -> Image.Image:
    """Floating-point or 32-bit grey as bytes, if its values are of a range that is known: 0 to 1, to 255 or to 65535.

    Raises:
        BadSample: other values, of which it is not clear what is black and what is white.
    """
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    scale = next((255 / top for top in (1, 255, 65535) if high <= top), None)
    if scale is None or low < 0 or not np.isfinite(values).all():
        raise BadSample(
            "image-data",
            f"floating-point or 32-bit values from {low:g} to {high:g}; wanted 0 to 1, 0 to 255 or 0 to 65535",
        )
    if image.mode == "I" and high <= 1:
        scale = 1.0
    return Image.fromarray((values * scale).round().astype(np.uint8))
