"""What sides by the image's aspect gain on wide pages: two runs that differ in `budget.sides` alone, by seed.

python tests/benchmarks/wide_pages.py DIR [--steps 1100] [--seeds 0 1 2]   (DIR: an empty folder; a CPU core, hours)

A page is four times as wide as high and shows two rows of digits, jittered in place and size; a question asks for one of them.
Accuracy is of exact answers to held-out pages, per visual-token count. The last line is the table as JSON.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent.parent
WIDTH, HEIGHT, ROWS, COLUMNS = 256, 64, 2, (4, 5, 6, 7)
SIDES = ("square", "aspect")
COUNTS = (16, 36, 64)
"""Of which a square is 4 x 4, 6 x 6 and 8 x 8, and a rectangle for such a page 2 x 8, 3 x 12 and 4 x 16."""
PER_SHARD = 500


def page(rng):
    """(PNG bytes, digits by row) of a page that is drawn at random."""
    digits = rng.integers(10, size=(ROWS, int(rng.choice(COLUMNS))))
    image = Image.new("RGB", (WIDTH, HEIGHT), tuple(int(x) for x in rng.integers(0, 90, size=3)))
    draw, cell = ImageDraw.Draw(image), (WIDTH / digits.shape[1], HEIGHT / ROWS)
    for (row, column), digit in np.ndenumerate(digits):
        size = rng.uniform(20, 28)
        left = (column + rng.uniform(0.1, 0.9) * (1 - 0.6 * size / cell[0])) * cell[0]
        top = row * cell[1] + rng.uniform(0, cell[1] - size)
        draw.text((left, top), str(digit), fill=(240, 240, 240), font=ImageFont.load_default(size))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue(), digits


def sample(rng, num_questions):
    """(messages, image) of a page; with more than one question the whole page is read too."""
    data, digits = page(rng)
    read = lambda cells: (
        " " + " ".join(f"{chr(ord('A') + column)}{row + 1} {digits[row, column]}" for row, column in cells)
    )  # noqa: E731
    cells = [(int(row), int(column)) for row, column in np.ndindex(digits.shape)]
    asked = [cells[place] for place in rng.permutation(len(cells))[:num_questions]]
    turns = [(f"digit at {read([cell])[1:3]}", read([cell])) for cell in asked]
    turns += [("read digits", read(cells))] if num_questions > 1 else []
    messages = []
    for question, answer in turns:
        content = ([] if messages else [{"type": "image"}]) + [{"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}]
        messages += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return messages, data


def write(folder, number, num_questions, seed):
    """Shards of `number` samples."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for first in range(0, number, PER_SHARD):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as tar:
            for key in range(first, min(first + PER_SHARD, number)):
                messages, image = sample(rng, num_questions)
                record = json.dumps({"messages": messages, "task": "cell"}).encode()
                for name, data in ((f"{key}.json", record), (f"{key}.0.png", image)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def accuracy(folder, sides, seed, steps):
    """{count: share of exact answers} after a run with these sides."""
    name = f"{sides}-{seed}"
    overrides = {
        "name": name,
        "output_dir": folder / "runs",
        "data.train": folder / "train",
        "data.evaluation": folder / "eval",
        "data.cache_dir": folder / "cache",
        "model.text": "embedded",
        "model.image_size": [128, 128],
        "budget.num_visual_tokens": list(COUNTS),
        "budget.probabilities": [1] * len(COUNTS),
        "budget.sides": sides,
        "evaluate.num_visual_tokens": list(COUNTS),
        "train.num_steps": steps,
        "train.seed": seed,
        "train.wandb": '"off"',
    }
    settings = [f"{key}={value}" for key, value in overrides.items()]
    command = [
        sys.executable,
        ROOT / "launch" / "train.py",
        "--config",
        ROOT / "configs" / "quickstart.yaml",
        *settings,
    ]
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads((folder / "runs" / name / "accuracy.json").read_text())["accuracy"]["cell"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pages", type=int, default=8000)
    parser.add_argument("--questions", type=int, default=600)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    write(folder / "train", arguments.pages, 2, 1)
    write(folder / "eval", arguments.questions, 1, 2)
    table = {
        sides: {seed: accuracy(folder, sides, seed, arguments.steps) for seed in arguments.seeds} for sides in SIDES
    }
    print(f"{'exact answers':<16s}" + "".join(f"{count:>14d}" for count in COUNTS))
    for sides, runs in table.items():
        columns = [[100 * run[str(count)] for run in runs.values()] for count in COUNTS]
        print(f"{sides:<16s}" + "".join(f"{np.mean(c):>8.1f} +-{np.std(c):4.1f}" for c in columns))
    print(json.dumps({"steps": arguments.steps, "pages": arguments.pages, "accuracy": table}))


if __name__ == "__main__":
    main()
