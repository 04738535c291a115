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
from .report import AutoRecord, EvaluationRecord, accuracy_table, plot_accuracy


@dataclass(frozen=True)
class Routed:
    """Question by question, at the counts that the model's router chose: whether it was answered exactly, [Q], the visual tokens of
    all its images, [Q], and how many images these are, [Q]."""

    right: list[bool]
    tokens: list[int]
    images: list[int]


@dataclass(frozen=True)
class Answers:
    """Question by question, whether it was answered exactly. keys, tasks: [Q]. right: {visual-token count: [Q]}. auto: the same as the
    model's router chooses, if it has one."""

    keys: list[str]
    tasks: list[str]
    right: dict[int, list[bool]]
    auto: Routed | None = None

    @staticmethod
    def join(parts: "Sequence[Answers]") -> "Answers":
        """Those of several ranks, in the order of the keys."""
        keys = [key for part in parts for key in part.keys]
        tasks = [task for part in parts for task in part.tasks]
        right = {count: [hit for part in parts for hit in part.right[count]] for count in parts[0].right}
        order = sorted(range(len(keys)), key=keys.__getitem__)
        sort = lambda values: [values[place] for place in order]
        ordered = {count: sort(hits) for count, hits in right.items()}
        chosen = [part.auto for part in parts if part.auto is not None]
        names = ("right", "tokens", "images")
        auto = {name: sort([value for part in chosen for value in getattr(part, name)]) for name in names if chosen}
        return Answers(sort(keys), sort(tasks), ordered, Routed(**auto) if chosen else None)

    def accuracy(self) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
        """{task: {count: share that is right}} and {task: questions}."""
        totals = dict(sorted(Counter(self.tasks).items()))
        accuracy: dict[str, dict[str, float]] = {task: {} for task in totals}
        for count, hits in self.right.items():
            hit = Counter(task for task, is_right in zip(self.tasks, hits) if is_right)
            for task, number in totals.items():
                accuracy[task][str(count)] = hit[task] / number
        return accuracy, totals

    def routed(self, auto: Routed, effort: float) -> AutoRecord:
        """What `auto` came to at the router's own `effort`, task by task."""
        tasks = sorted(set(self.tasks))
        total = lambda values: {task: sum(v for v, own in zip(values, self.tasks) if own == task) for task in tasks}
        return {
            "effort": effort,
            "right": total(auto.right),
            "visual_tokens": total(auto.tokens),
            "images": total(auto.images),
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: `right` as one string of 0 and 1 per count, and of "auto" beside the visual tokens of each question."""
        right = {str(count): "".join("01"[hit] for hit in hits) for count, hits in self.right.items()}
        found: dict[str, Any] = {"keys": self.keys, "tasks": self.tasks, "right": right}
        if self.auto is not None:
            found["auto"] = {"right": "".join("01"[hit] for hit in self.auto.right), "tokens": self.auto.tokens}
        return found


class Answering(Protocol):
    """What evaluation uses of a model: transformers' `generate`, and a router's choice if it is asked for."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    def generate(self, **inputs: Any) -> torch.Tensor:
        """Token ids [B, L] of prompts and answers, for the processor's inputs and settings of generation."""

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features [tiles, P, C] of pixels, to be given in their place."""

    def choose_num_visual_tokens(self, **inputs: Any) -> list[int]:
        """A count per image of the processor's inputs."""


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
    settings, limits = config.evaluate, Limits.of(config.data)
    processor = AutoProcessor.from_pretrained(folder)
    questions = read_questions(shards, settings.max_samples_per_task, limits, processor.frames, tasks=settings.tasks)
    questions.tell(say)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").to(ranks.device).eval()
    model.generation_config = greedy(model.generation_config)
    router = model.config.router
    chosen = f", and as its router chooses at effort {router['effort']:g}" if router else ""
    say(f"evaluate  {len(questions.samples)} questions at {list(settings.num_visual_tokens)} visual tokens{chosen}")
    own = questions.samples[ranks.rank :: ranks.num_ranks]
    num_columns = len(settings.num_visual_tokens) + bool(router)
    num_asked = sum(num_columns if sample.images else 1 for sample in own)
    with Bar(num_asked, "evaluate", "answers of this rank", say, ranks.is_main) as bar:
        answers = evaluate_model(model, processor, own, settings, bar.update, with_auto=bool(router))
    answers = Answers.join(ranks.all_gather(answers))
    accuracy, totals = answers.accuracy()
    if ranks.is_main:
        record: EvaluationRecord = {
            "accuracy": accuracy,
            "num_questions": totals,
            "num_bad_samples": len(questions.problems),
            "trained": model.config.trained_num_visual_tokens,
        }
        if answers.auto is not None:
            record["auto"] = answers.routed(answers.auto, router["effort"])
        _write(layout, record, answers)
        table = accuracy_table(record)
        if folder == layout.model:
            add_figures(folder, f"Exact match in %, by visual tokens per image (bold: trained):\n\n{table}")
        say("\n" + table)
        say(f"\nplot      {layout.accuracy_plot}\nmodel     {folder}\n\n{loading_code(folder)}")
    return accuracy


def _write(layout, record, answers):
    """`accuracy.json`, `answers.json` and `accuracy.png` of a run."""
    layout.root.mkdir(parents=True, exist_ok=True)
    layout.accuracy.write_text(json.dumps(record, indent=1))
    layout.answers.write_text(json.dumps(answers.as_dict()))
    plot_accuracy(record, layout.accuracy_plot)


def exact_match(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one but for case and surrounding space."""
    return answer.strip().casefold() == expected.strip().casefold()


def evaluate_model(
    model: Answering,
    processor: TokenFlexProcessor,
    samples: Sequence[Sample],
    settings: EvaluateConfig,
    on_answers: Callable[[int], None] = lambda number: None,
    *,
    with_auto: bool = False,
) -> Answers:
    """Which questions are answered exactly, at each count, and with `with_auto` as the model's router chooses at its own effort.

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
    auto = None
    if with_auto:
        auto = Routed(list(right[settings.num_visual_tokens[0]]), [0] * len(samples), [0] * len(samples))
        for begin in range(0, len(with_image), settings.batch_size):
            numbers = with_image[begin : begin + settings.batch_size]
            _ask_auto(model, processor, numbers, samples, settings, auto)
            on_answers(len(numbers))
    return Answers([sample.key for sample in samples], [sample.task for sample in samples], right, auto)


def _ask_auto(model, processor, numbers, samples, settings, auto):
    """Ask samples, by their numbers, at the router's counts, and note in `auto` what came of it."""
    batch = [samples[number] for number in numbers]
    inputs = _rendered(model, processor, batch, model.config.router["num_visual_tokens"][0])
    inputs["pixel_values"] = model.encode_images(inputs["pixel_values"].to(model.dtype))
    seen = {name: inputs[name] for name in ("input_ids", "pixel_values", "attention_mask", "num_tiles")}
    counts = model.choose_num_visual_tokens(**seen)
    found = _generated(model, processor, batch, inputs, settings, num_visual_tokens=counts)
    tokens = iter([count * tiles for count, tiles in zip(counts, inputs["num_tiles"].tolist())])
    for number, sample, is_right in zip(numbers, batch, found):
        auto.right[number], auto.images[number] = is_right, len(sample.images)
        auto.tokens[number] = sum(next(tokens) for _ in sample.images)


def hits(
    model: Answering,
    processor: TokenFlexProcessor,
    samples: Sequence[Sample],
    count: int,
    settings: EvaluateConfig,
    **options: Any,
) -> list[bool]:
    """Per sample of a batch, whether its last message is answered exactly at `count` visual tokens; `options` are `generate`'s."""
    return _generated(model, processor, samples, _rendered(model, processor, samples, count), settings, **options)


def _rendered(model, processor, samples, count):
    """The model's inputs for all but the last message of samples."""
    prompts = [sample.messages_with_images()[:-1] for sample in samples]
    return processor.apply_chat_template(
        prompts, tokenize=True, add_generation_prompt=True, num_visual_tokens=count
    ).to(model.device)


def _generated(model, processor, samples, inputs, settings, **options):
    """Per sample, whether what the model goes on with is exactly the last message."""
    output = model.generate(**inputs, max_new_tokens=settings.max_new_tokens, do_sample=False, **options)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    expected = ["".join(item["text"] for item in sample.messages[-1]["content"]) for sample in samples]
    return list(map(exact_match, answers, expected))
