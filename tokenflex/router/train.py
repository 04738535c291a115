"""`tokenflex train-router`: from an exported model and training data to the same export with a router, and its evaluation."""

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from ..config import RunConfig
from ..data import BadSample, Limits, Sample, decode_image
from ..data.clips import FramesOf, with_frames
from ..data.remote import locate_shards
from ..errors import UserError
from ..evaluate.questions import read_questions
from ..export import export_router, is_exported
from ..files import write_whole
from ..layout import RunLayout
from ..model import TokenFlexForConditionalGeneration, TokenFlexProcessor
from ..model.generation import greedy
from ..telemetry.bar import Bar
from ..telemetry.stages import stage
from .evaluate import ask, ask_teacher_forced
from .fit import FitSettings, Fitted, fit_router
from .measure import measure
from .policies import rows_of
from .report import plot_policies, policy_table

Say = Callable[[str], None]


def train_router(
    folder: str | PathLike,
    config: RunConfig,
    say: Say,
    settings: FitSettings,
    num_samples: int = 4096,
    target: str | PathLike | None = None,
) -> Fitted:
    """Train a router for the exported model in `folder` on the recipe's training data; the export gains it in one rename.

    Features are made once, every answer is run at every trained count; nothing but the router is trained.

    Args:
        num_samples: conversations with images at most, as many from each shard.
        target: where the export with the router goes; by default it replaces the one in `folder`.

    Raises:
        UserError: no export, a model of one count, or no training data with images.
    """
    counts = _counts(folder)
    samples = _conversations(config, num_samples, say, AutoProcessor.from_pretrained(folder).frames)
    model, processor = _loaded(folder)
    ends = processor.turn_end_id()
    model.config.router = {
        "num_visual_tokens": counts,
        "hidden_size": settings.hidden_size * settings.num_members,
        "turn_end_ids": [] if ends is None else [ends],
        "effort": 1.0,
    }
    say(f"measure   {len(samples)} conversations at {counts} visual tokens")
    with Bar(len(samples), "measure", "conversations", say, True) as bar:
        measured = measure(model, processor, samples, counts, config.evaluate.batch_size, bar.update)
    for place, count in enumerate(counts):
        right = 100 * float(measured.right[:, place].float().mean())
        say(
            f"          {count:5} visual tokens: loss {float(measured.losses[:, place].mean()):.4f}, {right:.1f} % of answers exact"
        )
    try:
        fitted = fit_router(measured, counts, settings)
    except ValueError as error:
        raise UserError(f"data.train: {error}; give more data, or raise --samples") from None
    model.router = fitted.router.to(model.device)
    model.config.router["effort"] = fitted.effort
    export_router(model, processor, folder, target or folder)
    say(
        f"router    held-out loss {fitted.held_out_loss:.4f} (a constant: {fitted.constant_loss:.4f}), default effort {fitted.effort:g}\n"
        f"model     {target or folder}"
    )
    return fitted


def give_router(config: RunConfig, say: Say) -> None:
    """What a run with `evaluate.router_samples` does once its model is exported: the model gets a router, unless it has one.

    A model that was trained at one count alone has nothing to choose from; that is said and left.
    """
    folder = RunLayout.of(config).model
    exported = AutoConfig.from_pretrained(folder)
    if len(exported.trained_num_visual_tokens) < 2:
        say(f"router    none: the model was trained at {list(exported.trained_num_visual_tokens)} visual tokens alone")
    elif exported.router is None:
        with stage("router", "trained on the model's own answers", say):
            train_router(folder, config, say, FitSettings(), config.evaluate.router_samples)


def evaluate_router(
    folder: str | PathLike, config: RunConfig, say: Say, out: str | PathLike, *, teacher_forced: bool = False
) -> dict[str, Any]:
    """Compare the router of an exported model with other ways to choose, on the recipe's held-out questions with images.

    With `teacher_forced` nothing is generated: see `ask_teacher_forced`. Writes `router.json`, `router.md` and `router.png` to the folder `out`, and returns what the first holds.

    Raises:
        UserError: no export, no router in it, or no question with an image.
    """
    _counts(folder)
    if AutoConfig.from_pretrained(folder).router is None:
        raise UserError(f"{folder}: the model there has no router; train one first: tokenflex train-router {folder}")
    if not config.data.evaluation:
        raise UserError("data.evaluation: empty; name shards of held-out questions")
    shards = locate_shards(config.data.evaluation, config.data, "data.evaluation")
    model, processor = _loaded(folder)
    limits = Limits.of(config.data)
    questions = read_questions(shards, config.evaluate.max_samples_per_task, limits, processor.frames)
    questions.tell(say)
    samples = [sample for sample in questions.samples if sample.images]
    if not samples:
        raise UserError("data.evaluation: no question has an image; a router has nothing to choose there")
    model.generation_config = greedy(model.generation_config)
    say(
        f"evaluate  {len(samples)} questions with images at {model.config.router['num_visual_tokens']} visual tokens and as the router chooses"
    )
    with Bar(len(samples), "evaluate", "questions", say, True) as bar:
        answer = ask_teacher_forced if teacher_forced else ask
        asked = answer(model, processor, samples, config.evaluate, bar.update)
    record = {
        "num_questions": len(samples),
        "counts": list(asked.counts),
        "default_effort": model.config.router["effort"],
        "rows": rows_of(asked),
    }
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    table = policy_table(record)
    write_whole(out / "router.json", json.dumps(record, indent=1))
    write_whole(out / "router.md", table + "\n")
    plot_policies(record, out / "router.png")
    say(f"\n{table}\n\nplot      {out / 'router.png'}")
    return record


def _counts(folder):
    """The counts that an exported model was trained at, from its configuration alone.

    Raises:
        UserError: there is no export, or only one count.
    """
    if not is_exported(folder):
        raise UserError(
            f"{folder}: no exported model there (no config.json); give the folder that training wrote, runs/NAME/model"
        )
    counts = AutoConfig.from_pretrained(folder).trained_num_visual_tokens
    if len(counts) < 2:
        raise UserError(
            f"{folder}: the model was trained at {counts} visual tokens alone; a router needs counts to choose among"
        )
    return list(counts)


def _loaded(folder) -> tuple[TokenFlexForConditionalGeneration, TokenFlexProcessor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").to(device).eval()
    return model, AutoProcessor.from_pretrained(folder)


def _conversations(config: RunConfig, number: int, say: Say, frames_of: FramesOf) -> list[Sample]:
    """Training conversations with images, as many from the beginning of each shard; bad ones are left out and counted.

    Raises:
        UserError: there are none.
    """
    paths = [*config.data.train, *(path for source in config.data.sources for path in source.paths)]
    shards = locate_shards(paths, config.data, "data.train")
    limits, num_bad = Limits.of(config.data), 0
    found: list[Sample] = []
    for place, shard in enumerate(shards):
        quota = (number - len(found)) // (len(shards) - place)
        for scanned in shard.scan(limits):
            if quota <= 0:
                break
            try:
                sample = with_frames(scanned.whole, frames_of)
                for image, data in enumerate(sample.images):
                    decode_image(data, f"image {image}", limits)
            except BadSample:
                num_bad += 1
                continue
            if sample.images and any(message["role"] == "assistant" for message in sample.messages):
                found.append(sample)
                quota -= 1
    if num_bad:
        say(f"left out  {num_bad} bad samples; tokenflex data validate names them")
    if not found:
        raise UserError(f"data.train: no conversation with an image and an answer in {len(shards)} shards")
    return found
