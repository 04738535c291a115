"""Scenes: what an image shows, drawn at random, and its pixels.

Why this file exists: the answer of every question is computed from a `Scene`, and the image is rendered from the same
`Scene`; no answer is ever read back from pixels.

The grids are jittered in cell size, in offset and inside each cell: a digit grid that lines up with the pooled grid of
visual tokens (8x8 cells at 64 tokens) is read one digit per token and fakes a spike at that count.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .glyphs import NUM_CLASSES, Sources
from .words import WORDS

IMAGE_SIDE = 128
# Side of a glyph's box over the side of its cell; the ink takes 5/6 of the box.
GLYPH_FILL = (0.90, 1.05)
MAX_ROTATION_DEG = 10.0
# A glyph's box is no larger than this, however large its cell: a tiny encoder sees about 50 pixels around a place.
MAX_GLYPH_BOX = (32, 44)
INKS = {
    "white": (240, 240, 240), "red": (255, 110, 95), "green": (110, 235, 110), "blue": (110, 160, 255),
    "yellow": (250, 230, 90), "pink": (250, 130, 235),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What one image shows: a grid of digits, or a word."""

    rows: tuple[tuple[int | None, ...], ...] = ()
    """Digits by row; None is an empty cell. Empty for a word."""
    glyph_ids: tuple[tuple[int, ...], ...] = ()
    """For each cell the row of `mnist_data` it was drawn from; meaningless where `rows` holds None."""
    word: str = ""
    """The rendered word, upper case; empty for a grid."""
    ink: str = "white"
    """Colour of the ink, a key of `INKS`."""


def draw_grid(rng: np.random.Generator, sources: Sources, *, num_cells: int, fill: float = 1.0) -> Scene:
    """Returns a `num_cells` x `num_cells` grid of random digits; each cell is occupied with probability `fill`, one at
    least."""
    digits = rng.integers(NUM_CLASSES, size=(num_cells, num_cells))
    shown = rng.random((num_cells, num_cells)) < fill
    shown.flat[rng.integers(shown.size)] = True
    ids = [[int(rng.choice(sources.glyph_ids[digit])) for digit in row] for row in digits]
    rows = [[int(digit) if keep else None for digit, keep in zip(*pair)] for pair in zip(digits, shown)]
    return Scene(rows=tuple(map(tuple, rows)), glyph_ids=tuple(map(tuple, ids)), ink=_draw_ink(rng))


def draw_word(rng: np.random.Generator) -> Scene:
    """Returns a scene with one of `WORDS`."""
    return Scene(word=WORDS[rng.integers(len(WORDS))].upper(), ink=_draw_ink(rng))


def _draw_ink(rng: np.random.Generator) -> str:
    return str(rng.choice(list(INKS)))


@dataclass(frozen=True, kw_only=True)
class Box:
    """Where a digit's ink lies in the image, in pixels."""

    digit: int
    top: float
    left: float
    side: float


class Glyph(NamedTuple):
    """A digit to be drawn: row of `mnist_data`, place and side of its box in pixels, rotation."""

    digit: int
    glyph_id: int
    top: int
    left: int
    side: int
    angle_deg: float

    @property
    def box(self) -> Box:
        """Where its ink lies: 5/6 of its box."""
        margin = self.side / 12
        return Box(digit=self.digit, top=self.top + margin, left=self.left + margin, side=self.side * 5 / 6)


def render(scene: Scene, rng: np.random.Generator, sources: Sources) -> tuple[Image.Image, list[Box]]:
    """Returns the RGB image of `scene`, `IMAGE_SIDE` square, light ink over a dimmed crop of a photograph; and its digits."""
    ink, boxes = (_word_ink(scene, rng, sources), []) if scene.word else _grid_ink(scene, rng, sources)
    background = _background(rng, sources)
    colour = np.clip(np.array(INKS[scene.ink]) + rng.uniform(-12, 12, size=3), 0, 255).astype(np.float32)
    alpha = ink[:, :, None].astype(np.float32) / 255
    return Image.fromarray((background * (1 - alpha) + colour * alpha).astype(np.uint8)), boxes


def _background(rng: np.random.Generator, sources: Sources) -> np.ndarray:
    """Returns a crop [IMAGE_SIDE, IMAGE_SIDE, 3] of float32, dimmed and of low contrast so that ink stays legible."""
    photo = sources.photos[rng.integers(len(sources.photos))]
    top, left = (rng.integers(side - IMAGE_SIDE + 1) for side in photo.shape[:2])
    crop = photo[top : top + IMAGE_SIDE, left : left + IMAGE_SIDE].astype(np.float32)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return crop * np.float32(rng.uniform(0.1, 0.4)) + np.float32(rng.uniform(0, 20))


def grid_layout(scene: Scene, rng: np.random.Generator) -> list[Glyph]:
    """Returns where the digits of a grid lie, drawn at random, row by row."""
    num_cells = len(scene.rows)
    cell = IMAGE_SIDE * rng.uniform(0.84, 1.0) / num_cells
    largest = rng.uniform(*MAX_GLYPH_BOX)
    slack = IMAGE_SIDE - cell * num_cells
    origin = rng.uniform(0, slack, size=2)
    glyphs = []
    for row, digits in enumerate(scene.rows):
        for column, digit in enumerate(digits):
            fill, angle, shift_y, shift_x = rng.random(4)
            if digit is None:
                continue
            side = round(min(largest, cell * (GLYPH_FILL[0] + fill * (GLYPH_FILL[1] - GLYPH_FILL[0]))))
            free = cell - side * 5 / 6
            margin = side / 12
            top = round(origin[0] + row * cell + shift_y * free - margin)
            left = round(origin[1] + column * cell + shift_x * free - margin)
            top, left = min(max(top, 0), IMAGE_SIDE - side), min(max(left, 0), IMAGE_SIDE - side)
            glyph_id = scene.glyph_ids[row][column]
            glyphs.append(Glyph(digit, glyph_id, top, left, side, MAX_ROTATION_DEG * (2 * angle - 1)))
    return glyphs


def _grid_ink(scene: Scene, rng: np.random.Generator, sources: Sources) -> tuple[np.ndarray, list[Box]]:
    ink, glyphs = np.zeros((IMAGE_SIDE, IMAGE_SIDE), np.uint8), grid_layout(scene, rng)
    for glyph in glyphs:
        drawn = _glyph(glyph.glyph_id, glyph.digit, sources, glyph.side, glyph.angle_deg)
        patch = ink[glyph.top : glyph.top + glyph.side, glyph.left : glyph.left + glyph.side]
        np.maximum(patch, drawn, out=patch)
    return ink, [glyph.box for glyph in glyphs]


def _glyph(glyph_id: int, digit: int, sources: Sources, side: int, angle_deg: float) -> np.ndarray:
    ids = sources.glyph_ids[digit]
    pixels = sources.glyphs[digit][np.flatnonzero(ids == glyph_id)[0]]
    image = Image.fromarray(pixels).rotate(angle_deg, Image.Resampling.BILINEAR)
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


def _word_ink(scene: Scene, rng: np.random.Generator, sources: Sources) -> np.ndarray:
    path = sources.fonts[rng.integers(len(sources.fonts))]
    width = rng.uniform(0.6, 0.95) * IMAGE_SIDE
    reference = ImageFont.truetype(str(path), 32)
    size = int(min(40, 32 * width / reference.getlength(scene.word)))
    font = ImageFont.truetype(str(path), size)
    left, top, right, bottom = font.getbbox(scene.word)
    canvas = Image.new("L", (IMAGE_SIDE, IMAGE_SIDE))
    x = rng.uniform(0, IMAGE_SIDE - (right - left)) - left
    y = rng.uniform(0, IMAGE_SIDE - (bottom - top)) - top
    ImageDraw.Draw(canvas).text((x, y), scene.word, fill=255, font=font)
    return np.asarray(canvas)
