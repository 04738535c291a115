"""Greedy exact-match accuracy of an exported model, per task and visual-token count."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..config import EvaluateConfig, RunConfig
from ..data import Limits
from ..data.remote import locate_shards
from ..data.sample import Sample
from ..errors import UserError
from ..export import add_figures, is_exported, loading_code
from ..layout import RunLayout
from ..model import TokenFlexProcessor
from ..model.generation import greedy
from ..parallel import Ranks
from ..telemetry.bar import Bar
from .questions import read_questions
from .report import EvaluationRecord, accuracy_table, plot_accuracy


@dataclass(frozen=True)
class Answers:
    """Question by question, whether it was answered exactly. keys, tasks: [Q]. right: {visual-token count: [Q]}."""

    keys: list[str]
    tasks: list[str]
    right: dict[int, list[bool]]

    @staticmethod
    def join(parts: "Sequence[Answers]") -> "Answers":
        """Those of several ranks, in the order of the keys."""
        keys = [key for part in parts for key in part.keys]
        tasks = [task for part in parts for task in part.tasks]
        right = {count: [hit for part in parts for hit in part.right[count]] for count in parts[0].right}
        order = sorted(range(len(keys)), key=keys.__getitem__)
        ordered = {count: [hits[place] for place in order] for count, hits in right.items()}
        return Answers([keys[place] for place in order], [tasks[place] for place in order], ordered)

    def accuracy(self) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
        """{task: {count: share that is right}} and {task: questions}."""
        totals = dict(sorted(Counter(self.tasks).items()))
        accuracy: dict[str, dict[str, float]] = {task: {} for task in totals}
        for count, hits in self.right.items():
            hit = Counter(task for task, is_right in zip(self.tasks, hits) if is_right)
            for task, number in totals.items():
                accuracy[task][str(count)] = hit[task] / number
        return accuracy, totals

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: `right` as one string of 0 and 1 per count."""
        right = {str(count): "".join("01"[hit] for hit in hits) for count, hits in self.right.items()}
        return {"keys": self.keys, "tasks": self.tasks, "right": right}


class Answering(Protocol):
    """What evaluation uses of a model: transformers' `generate`."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    def generate(self, **inputs: Any) -> torch.Tensor:
        """Token ids [B, L] of prompts and answers, for the processor's inputs and settings of generation."""


def evaluate_run(
    config: RunConfig, ranks: Ranks, say: Callable[[str], None], model_folder: str | PathLike | None = None
) -> dict[str, dict[str, float]]:
    """Evaluate the exported model of a run on its evaluation shards, all ranks together; print table, plot and loading code.

    Writes `accuracy.json`, `answers.json` (question by question) and `accuracy.png` into the run's folder. Returns {task: {count: accuracy}} on every rank.

    Raises:
        UserError: no exported model, or no evaluation shards.
    """
    if not config.data.evaluation:
        raise UserError("data.evaluation: empty; name shards of held-out questions")
    layout = RunLayout.of(config)
    folder = Path(model_folder or layout.model)
    if not is_exported(folder):
        raise UserError(f"evaluation: no exported model at {folder}; train first, or give --model DIR")
    shards = locate_shards(config.data.evaluation, config.data, "data.evaluation")
    processor = AutoProcessor.from_pretrained(folder)
    limits = Limits.of(config.data)
    questions = read_questions(shards, config.evaluate.max_samples_per_task, limits, processor.frames)
    questions.tell(say)
    samples = questions.samples
    say(f"evaluate  {len(samples)} questions at {list(config.evaluate.num_visual_tokens)} visual tokens")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").to(ranks.device).eval()
    model.generation_config = greedy(model.generation_config)
    own = samples[ranks.rank :: ranks.num_ranks]
    num_asked = sum(len(config.evaluate.num_visual_tokens) if sample.images else 1 for sample in own)
    with Bar(num_asked, "evaluate", "answers of this rank", say, ranks.is_main) as bar:
        answers = evaluate_model(model, processor, own, config.evaluate, bar.update)
    answers = Answers.join(ranks.all_gather(answers))
    accuracy, totals = answers.accuracy()
    if ranks.is_main:
        record: EvaluationRecord = {
            "accuracy": accuracy,
            "num_questions": totals,
            "num_bad_samples": len(questions.problems),
            "trained": model.config.trained_num_visual_tokens,
        }
        layout.root.mkdir(parents=True, exist_ok=True)
        layout.accuracy.write_text(json.dumps(record, indent=1))
        layout.answers.write_text(json.dumps(answers.as_dict()))
        plot_accuracy(record, layout.accuracy_plot)
        table = accuracy_table(record)
        if folder == layout.model:
            add_figures(folder, f"Exact match in %, by visual tokens per image (bold: trained):\n\n{table}")
        say("\n" + table)
        say(f"\nplot      {layout.accuracy_plot}\nmodel     {folder}\n\n{loading_code(folder)}")
    return accuracy


def exact_match(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one but for case and surrounding space."""
    return answer.strip().casefold() == expected.strip().casefold()


def evaluate_model(
    model: Answering,
    processor: TokenFlexProcessor,
    samples: Sequence[Sample],
    settings: EvaluateConfig,
    on_answers: Callable[[int], None] = lambda number: None,
) -> Answers:
    """Which questions are answered exactly, at each count.

    Samples without an image are asked once and stand for every count. `settings` is the configuration's evaluate section;
    `on_answers` is told how many more answers there are.
    """
    logging.getLogger(type(model).__module__).setLevel(logging.ERROR)  # untrained counts are the point of the table
    with_image = [number for number, sample in enumerate(samples) if sample.images]
    without = [number for number, sample in enumerate(samples) if not sample.images]
    right = {count: [False] * len(samples) for count in settings.num_visual_tokens}
    for numbers, counts in ((with_image, settings.num_visual_tokens), (without, settings.num_visual_tokens[:1])):
        for count in counts:
            found: list[bool] = []
            for begin in range(0, len(numbers), settings.batch_size):
                batch = [samples[number] for number in numbers[begin : begin + settings.batch_size]]
                found += hits(model, processor, batch, count, settings)
                on_answers(len(batch))
            for shown in (count,) if numbers is with_image else settings.num_visual_tokens:
                for number, hit in zip(numbers, found):
                    right[shown][number] = hit
    return Answers([sample.key for sample in samples], [sample.task for sample in samples], right)


def hits(
    model: Answering,
    processor: TokenFlexProcessor,
    samples: Sequence[Sample],
    count: int,
    settings: EvaluateConfig,
    **options: Any,
) -> list[bool]:
    """Per sample of a batch, whether its last message is answered exactly at `count` visual tokens; `options` are `generate`'s."""
    prompts = [sample.messages_with_images()[:-1] for sample in samples]
    inputs = processor.apply_chat_template(
        prompts, tokenize=True, add_generation_prompt=True, num_visual_tokens=count
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=settings.max_new_tokens, do_sample=False, **options)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    expected = ["".join(item["text"] for item in sample.messages[-1]["content"]) for sample in samples]
    return list(map(exact_match, answers, expected))
