"""Greedy exact-match accuracy of an exported model, per task and visual-token count."""

import json
import logging
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..data import Limits, decode_image, parse_sample, walk_shard
from ..data.remote import locate_shards
from ..data.shards import as_shards
from ..errors import UserError
from ..export import is_exported, loading_code
from ..layout import RunLayout
from .report import accuracy_table, plot_accuracy


def evaluate_run(config, ranks, say, model_folder=None):
    """Evaluate the exported model of a run on its evaluation shards, all ranks together; print table, plot and loading code.

    Writes `accuracy.json` and `accuracy.png` into the run's folder. Returns {task: {count: accuracy}} on every rank.

    Raises:
        UserError: no exported model, or no evaluation shards.
    """
    layout = RunLayout.of(config)
    folder = Path(model_folder or layout.model)
    if not is_exported(folder):
        raise UserError(f"evaluation: no exported model at {folder}; train first, or give --model DIR")
    if not config.data.evaluation:
        raise UserError("data.evaluation: empty; name shards of held-out questions")
    shards = locate_shards(config.data.evaluation, config.data, "data.evaluation")
    samples = read_samples(shards, config.evaluate.max_samples_per_task, Limits.of(config.data))
    say(f"evaluate  {len(samples)} questions at {list(config.evaluate.num_visual_tokens)} visual tokens")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").to(ranks.device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    right, asked = evaluate_model(model, processor, samples[ranks.rank :: ranks.num_ranks], config.evaluate, say)
    accuracy, totals = _over_ranks(right, asked, config.evaluate.num_visual_tokens, ranks)
    if ranks.is_main:
        record = {"accuracy": accuracy, "num_questions": totals, "trained": model.config.trained_num_visual_tokens}
        layout.root.mkdir(parents=True, exist_ok=True)
        layout.accuracy.write_text(json.dumps(record, indent=1))
        plot_accuracy(record, layout.accuracy_plot)
        say("\n" + accuracy_table(record))
        say(f"\nplot      {layout.accuracy_plot}\nmodel     {folder}\n\n{loading_code(folder)}")
    return accuracy


def read_samples(shards, max_per_task, limits):
    """Evaluation samples of webdataset shards, at most `max_per_task` of each task, in the shards' order."""
    samples, per_task = [], Counter()
    for shard in as_shards(shards):
        for members, _, _ in walk_shard(shard.local_file(), limits):
            sample = parse_sample(members, shard)
            if sample.messages[-1]["role"] != "assistant":
                raise UserError(
                    f"{shard}, sample {sample.key}: ends with a {sample.messages[-1]['role']} message; wanted the expected answer"
                )
            if per_task[sample.task] < max_per_task:
                for number, image in enumerate(sample.images):
                    decode_image(image, f"{shard}, sample {sample.key}, image {number}", limits)
                per_task[sample.task] += 1
                samples.append(sample)
    return samples


def exact_match(answer, expected):
    """Whether an answer is the expected one but for case and surrounding space."""
    return answer.strip().casefold() == expected.strip().casefold()


def evaluate_model(model, processor, samples, settings, say=lambda text: None):
    """Right answers and questions asked, as two counters over (task, count).

    Samples without an image are asked once and counted at every count. `settings` is the configuration's evaluate section.
    """
    logging.getLogger(type(model).__module__).setLevel(logging.ERROR)  # untrained counts are the point of the table
    right, asked = Counter(), Counter()
    for with_images in (True, False):
        group = [sample for sample in samples if bool(sample.images) == with_images]
        for count in settings.num_visual_tokens if with_images else settings.num_visual_tokens[:1]:
            hits = _hits(model, processor, group, count, settings)
            for shown in (count,) if with_images else settings.num_visual_tokens:
                for sample, hit in zip(group, hits):
                    asked[sample.task, shown] += 1
                    right[sample.task, shown] += hit
    return right, asked


def _hits(model, processor, samples, count, settings):
    """Per sample, whether its last message is answered exactly."""
    hits = []
    for begin in range(0, len(samples), settings.batch_size):
        batch = samples[begin : begin + settings.batch_size]
        prompts = [sample.messages_with_images()[:-1] for sample in batch]
        inputs = processor.apply_chat_template(
            prompts, tokenize=True, add_generation_prompt=True, num_visual_tokens=count
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=settings.max_new_tokens, do_sample=False)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        expected = ["".join(item["text"] for item in sample.messages[-1]["content"]) for sample in batch]
        hits += map(exact_match, answers, expected)
    return hits


def _over_ranks(right, asked, counts, ranks):
    """{task: {count: accuracy}} and {task: questions} from every rank's counters."""
    names = ranks.all_gather(sorted({task for task, _ in asked}))
    tasks = sorted({task for some in names for task in some})
    table = torch.tensor([[[right[t, c], asked[t, c]] for c in counts] for t in tasks], dtype=torch.float64)
    table = ranks.all_reduce_sum(table).tolist()
    accuracy = {task: {str(c): hit / total for c, (hit, total) in zip(counts, row)} for task, row in zip(tasks, table)}
    return accuracy, {task: int(row[0][1]) for task, row in zip(tasks, table)}
