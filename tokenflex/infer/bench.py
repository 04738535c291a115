"""What a visual token costs at inference: time to the first token, tokens per second and memory, by count and batch size."""

import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, CompileConfig

from ..errors import UserError
from ..export import is_exported
from ..files import write_whole
from ..plots import new_figure
from ..telemetry.memory import peak_memory_gb
from .generate import Generator


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: medians over rounds.

    encode_s: the vision encoder over the batch's images. first_token_s: from pixels to the first token of every answer, the
    encoder included. from_features_s: the same from features that are there. tokens_per_s: of all answers together, after the
    first. prompt_tokens: of one prompt. memory_gb: the most that was held on a GPU, or by the process on a CPU up to then.
    cache: `dynamic` grows with the text; `static` has one size, and the step over it is compiled.
    """

    num_visual_tokens: int
    batch_size: int
    cache: str
    prompt_tokens: int
    encode_s: float
    first_token_s: float
    from_features_s: float
    tokens_per_s: float
    memory_gb: float


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is asked: `prompt` about one image of noise per row, `new_tokens` of answer, in `rounds` shuffled rounds."""

    counts: Sequence[int]
    batch_sizes: Sequence[int] = (1, 16)
    caches: Sequence[str] = ("dynamic",)
    prompt: str = "Describe the image."
    new_tokens: int = 32
    rounds: int = 5


def bench(folder: str | PathLike, workload: Workload, say: Callable[[str], None] = print) -> list[Case]:
    """Time an exported model; cases take turns, so that what disturbs the machine disturbs all.

    Raises:
        UserError: no exported model, a count that its context does not hold, or a workload without counts, batch sizes, answers
            or rounds.
    """
    if (
        workload.new_tokens < 2
        or workload.rounds < 1
        or not workload.counts
        or min(workload.batch_sizes, default=0) < 1
    ):
        raise UserError(
            f"bench: {workload.new_tokens} new tokens, {workload.rounds} rounds, counts {list(workload.counts)}, batch sizes "
            f"{list(workload.batch_sizes)}; wanted 2 or more tokens and at least one of each of the others"
        )
    generator = Generator(folder, cached_images=0)
    generator.check_room(max(workload.counts) + workload.new_tokens - 1, "--counts")
    cases = list(itertools.product(workload.counts, workload.batch_sizes, workload.caches))
    inputs = {case: _inputs(generator, workload.prompt, *case[:2]) for case in cases}
    longest = max(its["input_ids"].shape[1] for its in inputs.values()) + workload.new_tokens
    times: dict[tuple[int, int, str], list[tuple[float, ...]]] = {case: [] for case in cases}
    memory = dict.fromkeys(cases, 0.0)
    order = random.Random(0)
    for round_number in range(workload.rounds + 1):  # the first one warms up
        for case in order.sample(cases, len(cases)):
            _reset_memory(generator.model.device)
            measured = _measure(generator, inputs[case], workload.new_tokens, _options(case[2], longest))
            memory[case] = max(memory[case], peak_memory_gb(generator.model.device))
            if round_number:
                times[case].append(measured)
        say(f"bench     round {round_number} of {workload.rounds}" + ("" if round_number else " (warm-up)"))
    result = []
    for case in cases:
        medians = [statistics.median(values) for values in zip(*times[case])]
        length = inputs[case]["input_ids"].shape[1]
        encode_s, first_s, again_s, rate = medians
        result.append(Case(*case, length, encode_s, first_s, again_s, rate, round(memory[case], 3)))
    return result


def trained_counts(folder: str | PathLike) -> list[int]:
    """The counts that an exported model was trained at.

    Raises:
        UserError: no exported model.
    """
    if not is_exported(folder):
        raise UserError(
            f"bench {folder}: no exported model there; give the folder that training wrote, runs/NAME/model"
        )
    return list(AutoConfig.from_pretrained(folder).trained_num_visual_tokens)


def _inputs(generator, prompt, count, batch_size):
    size = (generator.processor.image_processor.width, generator.processor.image_processor.height)
    talks = [
        [{"role": "user", "content": [{"type": "image", "image": Image.effect_noise(size, 90).convert("RGB")}, {"type": "text", "text": prompt}]}]
        for _ in range(batch_size)
    ]  # fmt: skip
    try:
        inputs = generator.processor.apply_chat_template(
            talks, tokenize=True, add_generation_prompt=True, num_visual_tokens=count
        )
    except ValueError as error:
        raise UserError(f"--counts {count}: {error}") from None
    return inputs.to(generator.model.device)


def _options(cache, longest):
    """Keywords of `generate`. With a static cache transformers compiles the step by itself on a GPU, elsewhere if it is told to."""
    plain = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if cache == "dynamic":
        return plain
    compiled = CompileConfig()
    compiled._compile_all_devices = True
    return {**plain, "cache_implementation": cache, "max_cache_len": longest, "compile_config": compiled}


@torch.no_grad()
def _measure(generator, inputs, new_tokens, options):
    model = generator.model
    features, encode_s = _timed(model.device, lambda: model.encode_images(inputs["pixel_values"]))
    from_features = {**inputs, "pixel_values": features}
    _, first_s = _timed(model.device, lambda: model.generate(**inputs, max_new_tokens=1, **options))
    _, again_s = _timed(model.device, lambda: model.generate(**from_features, max_new_tokens=1, **options))
    _, whole_s = _timed(model.device, lambda: model.generate(**from_features, max_new_tokens=new_tokens, **options))
    rest = max(whole_s - again_s, 1e-9)
    return encode_s, first_s, again_s, len(inputs["input_ids"]) * (new_tokens - 1) / rest


def _timed(device, work):
    _synchronise(device)
    begin = time.perf_counter()
    result = work()
    _synchronise(device)
    return result, time.perf_counter() - begin


def _synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def table(cases: Sequence[Case]) -> str:
    """The cases as a Markdown table."""
    heads = "visual tokens|batch|cache|prompt tokens|encoder|first token|from features|tokens/s|memory".split("|")
    rows = [f"| {' | '.join(heads)} |", "|---:" * len(heads) + "|"]
    for case in cases:
        seconds = (case.encode_s, case.first_token_s, case.from_features_s)
        cells = [str(case.num_visual_tokens), str(case.batch_size), case.cache, str(case.prompt_tokens)]
        cells += [f"{1e3 * second:.1f} ms" for second in seconds]
        rows.append(f"| {' | '.join([*cells, f'{case.tokens_per_s:.0f}', f'{case.memory_gb:.2f} GB'])} |")
    return "\n".join(rows)


def write(cases: Sequence[Case], folder: str | PathLike) -> list[Path]:
    """`bench.json` and `bench.png` in a folder; returns their paths."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    write_whole(
        path / "bench.json", json.dumps({"device": device, "cases": [asdict(case) for case in cases]}, indent=1)
    )
    figure = new_figure(8, 3.6)
    left, right = figure.subplots(1, 2)
    kinds = dict.fromkeys((case.batch_size, case.cache) for case in cases)
    for number, kind in enumerate(kinds):
        its = sorted(
            (case for case in cases if (case.batch_size, case.cache) == kind), key=lambda case: case.num_visual_tokens
        )
        counts, colour = [case.num_visual_tokens for case in its], f"C{number}"
        name = f"batch {kind[0]}" + (", static" if kind[1] == "static" else "")
        left.plot(counts, [1e3 * case.first_token_s for case in its], "o-", color=colour, label=name)
        left.plot(counts, [1e3 * case.from_features_s for case in its], "o--", color=colour, alpha=0.6)
        right.plot(counts, [case.tokens_per_s for case in its], "o-", color=colour, label=name)
    left.set_ylabel("first token, ms (dashed: from features)")
    right.set_ylabel("tokens per second")
    for axes in (left, right):
        axes.set_xlabel("visual tokens per image")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path / "bench.png")
    return [path / "bench.json", path / "bench.png"]
