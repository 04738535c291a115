"""What sides by the image's aspect gain on wide pages: two arms that differ in `budget.sides` alone.

python tests/benchmarks/wide_pages.py DIR [--steps 400] [--seeds 0]   (DIR: an empty folder; 7 minutes of a CPU core)

A page is four times as wide as high and shows a row of handwritten digits over a photograph; a question asks for one of
them, or for all. At 9, 16, 36 and 64 visual tokens, all of which are trained, it is seen as 3 x 3, 4 x 4, 6 x 6 and 8 x 8,
or as 1 x 9, 2 x 8, 3 x 12 and 4 x 16.

Both arms begin with parts that have learned their own trade, since from scratch they differ most in when each leaves the
plateau on which nothing is read: the language model of configs/paper.yaml, and its encoder, frozen, pretrained on labelled
patches of such pages. So features are made once, and the arms train projector and language model on the same pages in the
same order.

Digits and photographs of the questions are in no page that is trained on. An answer counts where each of its tokens is the
likeliest behind those before it, which is what greedy decoding writes. The record goes to docs/results/wide-pages.json, and
as a table into docs/training.md.
"""

import argparse
import datetime
import json
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from tokenflex.config import load_config
from tokenflex.corpus import encoder, resolve_embedded
from tokenflex.corpus.glyphs import load_sources
from tokenflex.corpus.questions import cell_name
from tokenflex.data.sample import parse_message
from tokenflex.files import write_whole
from tokenflex.model import TokenFlexImageProcessor, build_model, build_processor

ROOT = Path(__file__).parent.parent.parent
RECORD, PAGE = ROOT / "docs" / "results" / "wide-pages.json", ROOT / "docs" / "training.md"
BEGIN, END = "<!-- begin: wide_pages.py -->", "<!-- end: wide_pages.py -->"
WIDTH, HEIGHT = 192, 48
SIZE = (HEIGHT, WIDTH)
DIGITS, EASY_DIGITS, EASY_SHARE = (4, 5, 6, 7), (2, 3), 0.25
"""In a page; the first of those that are trained on have fewer, as the quick start's."""
TASKS = {"few": "one digit of 4 or 5", "many": "one digit of 6 or 7", "all": "all digits"}
SIDES = ("square", "aspect")
COUNTS = (9, 16, 36, 64)
ENCODER_PAGES, ENCODER_STEPS = 4096, 400
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS, DECAY_SHARE = 24, 1e-3, 30, 0.35
LOG_EVERY = 50


class Pages(NamedTuple):
    """features [N, P, C] of the patches of pages, the digits of each from left to right, which are asked for singly."""

    features: torch.Tensor
    digits: list[list[int]]
    asked: list[list[int]]


def page(rng, sources, num_digits):
    """A page that is drawn at random: pixels [48, 192, 3], digits from left to right, the digit at each of 16 x 16 patches."""
    digits, cell = rng.integers(10, size=num_digits), WIDTH / num_digits
    ink, boxes = np.zeros(SIZE, np.uint8), np.full(SIZE, encoder.BACKGROUND)
    for column, digit in enumerate(digits):
        glyphs = sources.glyphs[digit]
        side = round(min(cell, HEIGHT) * rng.uniform(0.8, 1.0))
        left, top = int(column * cell + rng.uniform(0, cell - side)), rng.integers(HEIGHT - side + 1)
        drawn = Image.fromarray(glyphs[rng.integers(len(glyphs))]).resize((side, side), Image.Resampling.BILINEAR)
        patch = ink[top : top + side, left : left + side]
        np.maximum(patch, np.asarray(drawn)[:, : patch.shape[1]], out=patch)
        margin = side // 12  # the ink is 5/6 of a glyph's box
        boxes[top + margin : top + side - margin, left + margin : left + side - margin] = digit
    photo = sources.photos[rng.integers(len(sources.photos))]
    photo = photo if photo.shape[1] >= WIDTH else photo.swapaxes(0, 1)
    top, left = rng.integers(photo.shape[0] - HEIGHT + 1), rng.integers(photo.shape[1] - WIDTH + 1)
    ground = photo[top : top + HEIGHT, left : left + WIDTH] * rng.uniform(0.1, 0.4)
    shown = np.maximum(ground, ink[..., None] * (240 / 255)).astype(np.uint8)
    rows, columns = (((np.arange(encoder.GRID_SIDE) + 0.5) * length / encoder.GRID_SIDE).astype(int) for length in SIZE)
    return shown, digits.tolist(), boxes[np.ix_(rows, columns)]


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


def seeing_encoder(folder, images):
    """Folder of an encoder that names the digit at each patch of wide pages, squeezed to squares as every image is."""
    rng, sources = np.random.default_rng(2), load_sources("train")
    drawn = [page(rng, sources, int(rng.choice(EASY_DIGITS + DIGITS))) for _ in range(ENCODER_PAGES)]
    pixels = np.concatenate([images.tiled(shown) for shown, _, _ in drawn])
    labels, one_ink = np.stack([labels for _, _, labels in drawn]), torch.zeros(len(drawn), dtype=torch.long)
    tower = encoder.pretrain(torch.from_numpy(pixels), torch.from_numpy(labels), one_ink, 0, ENCODER_STEPS)
    tower.save_pretrained(folder)
    return folder


@torch.no_grad()
def drawn_pages(split, number, model, images):
    """`Pages`; in one that is trained on two digits are asked for singly, in another one."""
    rng, sources = np.random.default_rng(split == "eval"), load_sources(split)
    pages = Pages([], [], [])
    for place in range(number):
        is_easy = split == "train" and place < EASY_SHARE * number
        shown, digits, _ = page(rng, sources, int(rng.choice(EASY_DIGITS if is_easy else DIGITS)))
        pages.features.append(model.encode_images(images(shown)["pixel_values"]).half())
        pages.digits.append(digits)
        pages.asked.append(rng.permutation(len(digits))[: 2 if split == "train" else 1].tolist())
    return pages._replace(features=torch.cat(pages.features))


def answered(model, processor, features, conversations, count):
    """Of conversations about pages at a count: logits, tokens to predict, whether they are learned; [B, T - 1, ...]."""
    encoded = [processor.encode([parse_message(turn) for turn in talk], [count]) for talk in conversations]
    padded = torch.nn.utils.rnn.pad_sequence
    ids = padded([torch.tensor(one.input_ids) for one in encoded], True, processor.tokenizer.pad_token_id)
    is_target = padded([torch.tensor(one.is_target) for one in encoded], True)
    mask = padded([torch.ones(len(one.input_ids), dtype=torch.long) for one in encoded], True)
    sizes = torch.tensor([SIZE] * len(encoded))
    output = model(ids, features.float(), count, attention_mask=mask, tile_sizes=sizes, use_cache=False)
    return output.logits[:, :-1], ids[:, 1:], is_target[:, 1:]


def train(model, processor, pages, seed, steps):
    """Train projector and language model; returns the mean loss of every `LOG_EVERY` steps. Easy pages come first."""
    parameters = [*model.projector.parameters(), *model.language_model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    share = lambda step: min((step + 1) / WARMUP_STEPS, (steps - step) / (steps * DECAY_SHARE), 1.0)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    rng, losses = np.random.default_rng(seed), []
    model.train()
    for step in range(steps):
        reach = min(1.0, EASY_SHARE + 2 * step / steps)
        places = rng.integers(int(reach * len(pages.digits)), size=BATCH_SIZE).tolist()
        talks = [turns(pages.digits[place], pages.asked[place], True) for place in places]
        count = int(rng.choice(COUNTS))
        logits, ids, is_target = answered(model, processor, pages.features[places], talks, count)
        loss = F.cross_entropy(logits[is_target], ids[is_target])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % LOG_EVERY == 0:
            print(f"step {step + 1}: loss {statistics.mean(losses[-LOG_EVERY:]):.3f}", flush=True)
    return [round(statistics.mean(losses[at : at + LOG_EVERY]), 4) for at in range(0, steps, LOG_EVERY)]


@torch.no_grad()
def ask(model, processor, pages):
    """{task: {count: share of exact answers}}."""
    model.eval()
    right = {task: {str(count): [] for count in COUNTS} for task in TASKS}
    for count in COUNTS:
        for place, (digits, asked) in enumerate(zip(pages.digits, pages.asked)):
            single = "few" if len(digits) < 6 else "many"
            for task, talk in ((single, turns(digits, asked, False)), ("all", turns(digits, [], True))):
                logits, ids, is_target = answered(model, processor, pages.features[[place]], [talk], count)
                right[task][str(count)].append(bool((logits.argmax(-1) == ids)[is_target].all()))
    return {task: {count: statistics.mean(some) for count, some in counts.items()} for task, counts in right.items()}


def configured(sides, encoder_folder):
    """The recipe of an arm, its parts in place."""
    budget = [f"budget.num_visual_tokens={list(COUNTS)}", f"budget.probabilities={[1] * len(COUNTS)}"]
    overrides = [
        *budget,
        f"budget.sides={sides}",
        f"model.vision={encoder_folder}",
        "data.train=[]",
        "data.evaluation=[]",
    ]
    return resolve_embedded(load_config(ROOT / "configs" / "paper.yaml", overrides))


def built(config, seed):
    """(model, processor) of an arm before training."""
    processor = build_processor(config.model, config.budget)
    torch.manual_seed(seed)
    model = build_model(config.model, config.budget, processor, torch.float32)
    model.language_model.set_attn_implementation("sdpa")
    return model, processor


def table(record):
    """The record as Markdown; a line that says so where nothing was measured."""
    if not record:
        return "Not measured."
    seeds = len(record["accuracy"]["square"])
    lines = [
        f"Exact answers in percent, {record['date']}, one CPU core: {record['steps']} steps, {record['pages']:,} pages, "
        f"{record['questions']} others asked about, "
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
    parser.add_argument("--pages", type=int, default=6000)
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--try", action="store_true", dest="is_try", help="show the table and write nothing into docs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = TokenFlexImageProcessor(encoder.INPUT_SIDE, encoder.INPUT_SIDE)
    folder = seeing_encoder(arguments.folder.resolve() / "encoder", images)
    model, _ = built(configured("square", folder), 0)
    asked_about = drawn_pages("eval", arguments.questions, model, images)
    trained_on = drawn_pages("train", arguments.pages, model, images)
    record = {
        "date": datetime.date.today().isoformat(),
        "steps": arguments.steps,
        "pages": arguments.pages,
        "questions": arguments.questions,
        "accuracy": {sides: {} for sides in SIDES},
        "loss": {sides: {} for sides in SIDES},
    }
    for seed in arguments.seeds:
        for sides in SIDES:
            model, processor = built(configured(sides, folder), seed)
            record["loss"][sides][str(seed)] = train(model, processor, trained_on, seed, arguments.steps)
            record["accuracy"][sides][str(seed)] = ask(model, processor, asked_about)
            print(sides, seed, record["accuracy"][sides][str(seed)], flush=True)
    print(table(record))
    if not arguments.is_try:
        write_whole(RECORD, json.dumps(record, indent=1) + "\n")
        write_whole(PAGE, written(PAGE.read_text(), record))


if __name__ == "__main__":
    main()
