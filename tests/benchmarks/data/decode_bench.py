"""How much preprocessing costs on top of the bare JPEG decoder, per core: `make bench-decode` writes docs/results/decode.json.

Bare is libjpeg-turbo (by simplejpeg) to full-size RGB in memory. Ours is what a loader worker does to an image: header
check, decoding (at a half, quarter or eighth where the tiles need no more), EXIF, tiles, resizing. The images are photographs
that come with scikit-image and scikit-learn, cut and resized to common sizes and saved anew, so every one has its own
content. Times are CPU seconds of this process, the least of several passes, so a busy machine does not count.
"""

import argparse
import io
import json
import platform
import time
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image

from tokenflex.data import Limits
from tokenflex.data.images import read_header
from tokenflex.model.image_processing_tokenflex import TokenFlexImageProcessor

SIZES = [
    (336, 336),
    (640, 480),
    (800, 600),
    (1024, 768),
    (1280, 960),
    (1275, 1650),
    (1600, 1200),
    (2400, 1600),
    (4000, 3000),
]
TILE = 378


def photographs():
    """Photographs of at least 400 pixels as RGB arrays."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    return [*load_sample_images().images, data.astronaut(), data.coffee(), data.rocket()]


def jpegs(size, number, quality=90):
    """`number` JPEGs of (width, height)."""
    made, sources = [], photographs()
    for i in range(number):
        image = Image.fromarray(sources[i % len(sources)])
        margin = 10 * (i // len(sources))
        image = image.crop((margin, margin, *image.size)).resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        made.append(file.getvalue())
    return made


def least_seconds(work, images, num_passes):
    """CPU seconds per image, the least over passes."""
    work(images[0])
    passes = []
    for _ in range(num_passes):
        begin = time.process_time()
        for data in images:
            work(data)
        passes.append(time.process_time() - begin)
    return min(passes) / len(images)


def pillow_way(data):
    """The common path: Pillow decodes whole and resizes."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC))


def measure(sizes, images_per_size=10, num_passes=7):
    """A row per size: milliseconds per image of each way, and the ratio of ours to the bare decoder."""
    whole, tiled = TokenFlexImageProcessor(TILE, TILE), TokenFlexImageProcessor(TILE, TILE, max_tiles=6)
    ways = {
        "bare": simplejpeg.decode_jpeg,
        "ours": lambda data: (read_header(data, Limits()), whole.tiled(data)),
        "ours_6_tiles": lambda data: (read_header(data, Limits()), tiled.tiled(data)),
        "pillow": pillow_way,
    }
    rows = []
    for size in sizes:
        images = jpegs(size, images_per_size)
        ms = {name: 1000 * least_seconds(work, images, num_passes) for name, work in ways.items()}
        rows.append(
            {
                "size": list(size),
                "num_tiles": int(tiled.num_tiles(*size)),
                **{f"{name}_ms": round(value, 3) for name, value in ms.items()},
                "ours_over_bare": round(ms["ours"] / ms["bare"], 3),
                "ours_6_tiles_over_bare": round(ms["ours_6_tiles"] / ms["bare"], 3),
                "pillow_over_bare": round(ms["pillow"] / ms["bare"], 3),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/results/decode.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(SIZES)
    total = {way: sum(row[f"{way}_ms"] for row in rows) for way in ("bare", "ours", "ours_6_tiles", "pillow")}
    record = {
        "what": "CPU milliseconds per image and core; tiles of 378 x 378, JPEG quality 90",
        "machine": {"processor": platform.machine(), "vector": torch.backends.cpu.get_cpu_capability()},
        "rows": rows,
        "over_all_sizes": {f"{way}_over_bare": round(total[way] / total["bare"], 3) for way in total if way != "bare"},
    }
    Path(arguments.out).write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["over_all_sizes"]))


if __name__ == "__main__":
    main()
