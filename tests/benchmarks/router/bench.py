#!/usr/bin/env python3
"""What the router costs and saves, end to end: questions to answers at each count and at "auto", one by one and sixteen together.

python tests/benchmarks/router/bench.py runs/quickstart/model --config configs/quickstart.yaml

Writes docs/results/router-time.json and the table of docs/auto.md. Policies take turns in shuffled rounds, so that what disturbs the
machine disturbs all; a round is every question once, from its encoded image to the text of its answer.
"""

import argparse
import json
import random
import re
import statistics
import time
from pathlib import Path

import torch

from tokenflex.config import load_config
from tokenflex.corpus import resolve_embedded
from tokenflex.data import Limits
from tokenflex.data.remote import locate_shards
from tokenflex.errors import UserError
from tokenflex.evaluate.questions import read_questions
from tokenflex.files import write_whole
from tokenflex.infer import Generator, check_auto
from tokenflex.model.router import AUTO

ROOT = Path(__file__).parents[3]
RESULTS, PAGE = ROOT / "docs" / "results" / "router-time.json", ROOT / "docs" / "auto.md"
BLOCK = re.compile(r"<!-- router time -->\n.*?<!-- end router time -->", re.DOTALL)
NOT_MEASURED = "Not measured yet: `make bench-router`, on a quiet machine after `make train`, writes the table here."


def measure(folder, config, batch_sizes=(1, 16), rounds=5, per_task=16, say=print):
    """The record of a model in `folder`: seconds per question (medians over rounds) and visual tokens, by policy and batch size."""
    check_auto(folder)
    shards = locate_shards(config.data.evaluation, config.data, "data.evaluation")
    questions = read_questions(shards, per_task, Limits.of(config.data), config.evaluate.tasks).samples
    random.Random(0).shuffle(questions)  # batches of all tasks, as requests come
    prompts = [sample.messages_with_images()[:-1] for sample in questions if sample.images]
    if not prompts:
        raise UserError("data.evaluation: no question has an image; a router has nothing to choose there")
    generator = Generator(folder, cached_images=0)
    policies = [*generator.model.config.router["num_visual_tokens"], AUTO]
    cases = [(policy, size) for policy in policies for size in batch_sizes]
    seconds, tokens, order = {case: [] for case in cases}, {}, random.Random(0)
    for number in range(rounds + 1):  # the first one warms up
        for case in order.sample(cases, len(cases)):
            begin = time.perf_counter()
            tokens[case] = _answer_all(generator, prompts, *case, config.evaluate.max_new_tokens)
            if number:
                seconds[case].append(time.perf_counter() - begin)
        say(f"round {number} of {rounds}" + ("" if number else " (warm-up)"))
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "num_questions": len(prompts),
        "rounds": rounds,
        "effort": generator.model.config.router["effort"],
        "rows": [
            {
                "policy": policy,
                "batch_size": size,
                "seconds": statistics.median(seconds[policy, size]) / len(prompts),
                "visual_tokens": tokens[policy, size] / len(prompts),
            }
            for policy, size in cases
        ],
    }


def _answer_all(generator, prompts, policy, batch_size, max_new_tokens):
    """Answer every prompt; returns the visual tokens of all."""
    model, processor, total = generator.model, generator.processor, 0
    first = model.config.router["num_visual_tokens"][0]
    for begin in range(0, len(prompts), batch_size):
        inputs = processor.apply_chat_template(
            prompts[begin : begin + batch_size], tokenize=True, add_generation_prompt=True, num_visual_tokens=first
        ).to(model.device)
        tiles = inputs["num_tiles"].tolist()
        counts = [policy] * len(tiles)
        if policy == AUTO:
            inputs["pixel_values"] = model.encode_images(inputs["pixel_values"].to(model.dtype))
            names = ("input_ids", "pixel_values", "attention_mask", "num_tiles")
            counts = model.choose_num_visual_tokens(**{name: inputs[name] for name in names})
        output = model.generate(**inputs, num_visual_tokens=counts, max_new_tokens=max_new_tokens)
        processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        total += sum(count * number for count, number in zip(counts, tiles))
    return total


def block(record):
    """What stands in the page between the marks: the table of a record, or that there is none."""
    if record is None:
        return f"<!-- router time -->\n{NOT_MEASURED}\n<!-- end router time -->"
    sizes = list(dict.fromkeys(row["batch_size"] for row in record["rows"]))
    at = {(row["policy"], row["batch_size"]): row for row in record["rows"]}
    policies = list(dict.fromkeys(row["policy"] for row in record["rows"]))
    dearest = policies[-2]  # before "auto" stands the largest count
    heads = [f"batch {size}, ms | of the largest's, %" for size in sizes]
    lines = [f"| policy | visual tokens | {' | '.join(heads)} |", "|---|---:|" + "---:|---:|" * len(sizes)]
    for policy in policies:
        name = f"auto, effort {record['effort']:g}" if policy == AUTO else f"always {policy}"
        cells = [f"{at[policy, sizes[0]]['visual_tokens']:.1f}"]
        for size in sizes:
            own, largest = at[policy, size]["seconds"], at[dearest, size]["seconds"]
            cells += [f"{1e3 * own:.1f}", f"{100 * own / largest:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    about = (
        f"Per question, from the encoded image to the text of its answer, encoder and choice included: medians of {record['rounds']} "
        f"rounds over {record['num_questions']} questions, {record['device']}. `make bench-router`, `docs/results/router-time.json`"
    )
    return "<!-- router time -->\n" + "\n".join([about, "", *lines]) + "\n<!-- end router time -->"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config = resolve_embedded(load_config(arguments.config, []), print)
    record = measure(arguments.model, config, rounds=arguments.rounds)
    write_whole(RESULTS, json.dumps(record, indent=1) + "\n")
    write_whole(PAGE, BLOCK.sub(lambda _: block(record), PAGE.read_text()))
    print(block(record))


if __name__ == "__main__":
    main()
