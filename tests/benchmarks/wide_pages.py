"""What sides by the image's aspect gain on wide pages: two runs of the quick start's model that differ in `budget.sides` alone.

python tests/benchmarks/wide_pages.py DIR [--steps 400] [--seeds 0]   (DIR: an empty folder; written for a CPU core and 12 minutes)

A page is four times as wide as high and shows a row of handwritten digits over a photograph; a question asks for one of them, or
for all. Trained and asked at 16, 36 and 64 visual tokens, which are 4 x 4, 6 x 6 and 8 x 8 or, of such a page, 2 x 8, 3 x 12 and
4 x 16. Digits and photographs of the questions are in no page that is trained on. Of the likeliest answers those that are right to
the last character are counted; they go to docs/results/wide-pages.json, and as a table into docs/training.md.
"""

import argparse
import datetime
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tokenflex.corpus.glyphs import load_sources
from tokenflex.corpus.questions import cell_name
from tokenflex.corpus.tokenizer import build_tokenizer
from tokenflex.files import write_whole

ROOT = Path(__file__).parent.parent.parent
RECORD, PAGE = ROOT / "docs" / "results" / "wide-pages.json", ROOT / "docs" / "training.md"
BEGIN, END = "<!-- begin: wide_pages.py -->", "<!-- end: wide_pages.py -->"
WIDTH, HEIGHT = 192, 48
DIGITS, EASY_DIGITS, EASY_SHARE = (4, 5, 6, 7), (2, 3), 0.2
"""In a page; the first of those that are trained on have fewer, as the quick start's."""
TASKS = {"one": "one digit", "all": "all digits"}
SIDES = ("square", "aspect")
COUNTS = (16, 36, 64)
PER_SHARD = 500


def page(rng, sources, num_digits):
    """(PNG bytes, digits from left to right) of a page that is drawn at random."""
    digits, cell = rng.integers(10, size=num_digits), WIDTH / num_digits
    ink = np.zeros((HEIGHT, WIDTH), np.uint8)
    for column, digit in enumerate(digits):
        glyphs = sources.glyphs[digit]
        side = round(min(cell, HEIGHT) * rng.uniform(0.8, 1.0))
        left, top = int(column * cell + rng.uniform(0, cell - side)), rng.integers(HEIGHT - side + 1)
        drawn = Image.fromarray(glyphs[rng.integers(len(glyphs))]).resize((side, side), Image.Resampling.BILINEAR)
        patch = ink[top : top + side, left : left + side]
        np.maximum(patch, np.asarray(drawn)[:, : patch.shape[1]], out=patch)
    photo = sources.photos[rng.integers(len(sources.photos))]
    photo = photo if photo.shape[1] >= WIDTH else photo.swapaxes(0, 1)
    top, left = rng.integers(photo.shape[0] - HEIGHT + 1), rng.integers(photo.shape[1] - WIDTH + 1)
    ground = photo[top : top + HEIGHT, left : left + WIDTH] * rng.uniform(0.1, 0.4)
    shown = np.maximum(ground, ink[..., None] * (240 / 255)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(shown).save(file, "PNG")
    return file.getvalue(), digits.tolist()


def turns(digits, columns, reads_all):
    """Questions for the digits in some columns, and for all of them."""
    read = lambda some: " " + " ".join(f"{cell_name(0, column)} {digits[column]}" for column in some)  # noqa: E731
    asked = [(f"digit at {cell_name(0, column)}", read([column])) for column in columns]
    asked += [("read digits", read(range(len(digits))))] if reads_all else []
    messages = []
    for question, answer in asked:
        image = [] if messages else [{"type": "image"}]
        messages += [
            {"role": "user", "content": [*image, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    return messages


def samples(split, number):
    """(record, PNG bytes) of pages: two digits and all of them asked for in one that is trained on, one of the two in the others."""
    rng, sources = np.random.default_rng(split == "eval"), load_sources(split)
    for place in range(number):
        is_easy = split == "train" and place < EASY_SHARE * number
        image, digits = page(rng, sources, int(rng.choice(EASY_DIGITS if is_easy else DIGITS)))
        columns = rng.permutation(len(digits)).tolist()
        task = "all" if place % 2 else "one"
        own = (
            turns(digits, columns[:2], True)
            if split == "train"
            else turns(digits, columns[: task == "one"], task == "all")
        )
        yield {"messages": own, "task": task}, image


def write(folder, split, number):
    """Shards of `number` samples."""
    folder.mkdir(parents=True)
    drawn = enumerate(samples(split, number))
    for first in range(0, number, PER_SHARD):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as tar:
            for _, (key, (record, image)) in zip(range(PER_SHARD), drawn):
                for name, data in ((f"{key}.json", json.dumps(record).encode()), (f"{key}.0.png", image)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def accuracy(folder, sides, seed, steps):
    """{task: {count: share of exact answers}} after a run with these sides."""
    name = f"{sides}-{seed}"
    overrides = {
        "name": name,
        "output_dir": folder / "runs",
        "data.train": folder / "train",
        "data.evaluation": folder / "eval",
        "data.cache_dir": folder / "cache",
        "data.num_workers": 0,
        "model.tokenizer": folder / "tokenizer",
        "budget.num_visual_tokens": list(COUNTS),
        "budget.probabilities": [1] * len(COUNTS),
        "budget.sides": sides,
        "evaluate.num_visual_tokens": list(COUNTS),
        "evaluate.tasks": list(TASKS),
        "evaluate.router_samples": 0,
        "train.num_steps": steps,
        "train.save_every": 0,
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
    return json.loads((folder / "runs" / name / "accuracy.json").read_text())["accuracy"]


def table(record):
    """The record as Markdown; a line that says so where nothing was measured."""
    if not record:
        return "Not measured."
    seeds = len(record["accuracy"]["square"])
    lines = [
        f"Exact answers in percent, {record['date']}, one CPU core: {record['steps']} steps, {record['pages']:,} pages, {record['questions']} questions, "
        + (f"means of {seeds} seeds with the lowest and the highest." if seeds > 1 else "one seed."),
        "", f"| asked for | sides | {' | '.join(map(str, COUNTS))} |", "|---|---|" + "---:|" * len(COUNTS),
    ]  # fmt: skip
    for task, words in TASKS.items():
        for sides in SIDES:
            runs = record["accuracy"][sides].values()
            shares = [[100 * run[task][str(count)] for run in runs] for count in COUNTS]
            spread = lambda some: f" ({min(some):.1f} to {max(some):.1f})" if seeds > 1 else ""  # noqa: E731
            cells = [f"{statistics.mean(some):.1f}{spread(some)}" for some in shares]
            lines.append(f"| {words} | {sides} | {' | '.join(cells)} |")
    return "\n".join(lines)


def written(text, record):
    """A page with the record's table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(record)}\n{END}{after}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pages", type=int, default=8000)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--try", action="store_true", dest="is_try", help="show the table and write nothing into docs")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    write(folder / "train", "train", arguments.pages)
    write(folder / "eval", "eval", arguments.questions)
    build_tokenizer().save_pretrained(folder / "tokenizer")
    record = {
        "date": datetime.date.today().isoformat(),
        "steps": arguments.steps,
        "pages": arguments.pages,
        "questions": arguments.questions,
        "accuracy": {
            sides: {str(seed): accuracy(folder, sides, seed, arguments.steps) for seed in arguments.seeds}
            for sides in SIDES
        },
    }
    print(table(record))
    if not arguments.is_try:
        write_whole(RECORD, json.dumps(record, indent=1) + "\n")
        write_whole(PAGE, written(PAGE.read_text(), record))


if __name__ == "__main__":
    main()
