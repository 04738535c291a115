"""Builds the embedded corpus on disk: webdataset shards, tokenizer, manifest.

Why this file exists: the quick start, the tests and the benchmarks train on the same real data with no network. The
bytes depend on the request only: each sample draws from its own counter-based generator keyed by (seed, split, index),
each shard is written by one process from its own range of samples, and tar times are fixed.
"""

import hashlib
import io
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import webdataset

from ..files import over_processes, staged_folder
from .glyphs import Sources, load_sources
from .questions import EASY_CELLS, GRID_CELLS, TASKS, Sample, draw_eval_sample, draw_train_sample
from .scenes import render
from .tokenizer import build_tokenizer

RECIPE_VERSION = 5
SAMPLES_PER_SHARD = 512
EASY_SHARE = 0.2
"""Of the training samples: so many, from the first, have small grids; `data.shuffle_window` keeps them first."""
JPEG_QUALITY = 92
SPLITS = ("train", "eval")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a corpus is a function of."""

    recipe_version: int
    """Version of the drawing rules: bumped with every change that moves a byte."""
    seed: int
    """Seed of every draw."""
    num_train: int
    """Training samples."""
    num_eval_per_task: int
    """Evaluation samples of each task."""


def build_corpus(
    directory: Path, *, seed: int = 0, num_train: int, num_eval_per_task: int, num_workers: int = 2
) -> Path:
    """Returns `directory`, holding train/ and eval/ shards, tokenizer/ and corpus.json; built only if it is not there.

    The bytes do not depend on `num_workers`. The corpus is written beside `directory` and renamed when complete.
    Raises FileExistsError if `directory` holds anything else than the corpus of this request.
    """
    directory = Path(directory)
    request = Request(
        recipe_version=RECIPE_VERSION, seed=seed, num_train=num_train, num_eval_per_task=num_eval_per_task
    )
    if directory.exists():
        _check_existing(directory, request)
        return directory
    with staged_folder(directory, replaces=False) as staging:
        _write_corpus(staging, request, num_workers)
    _check_existing(directory, request)  # another process may have built it in the meantime
    return directory


def _check_existing(directory: Path, request: Request) -> None:
    manifest = directory / "corpus.json"
    if manifest.is_file():
        found = json.loads(manifest.read_text(encoding="utf-8"))["request"]
        if found == asdict(request):
            return
        reason = f"it holds the corpus of {found}, wanted {asdict(request)}"
    else:
        reason = "it exists and holds no corpus.json"
    raise FileExistsError(f"corpus directory {directory}: {reason}; name another directory or remove this one")


def sample_generator(seed: int, split: str, index: int) -> np.random.Generator:
    """Returns the generator of one sample: counter-based, so that no sample depends on another."""
    return np.random.Generator(np.random.Philox(key=[seed, (SPLITS.index(split) << 48) | index]))


def draw_indexed_sample(
    seed: int, split: str, index: int, sources: Sources, *, num_easy: int = 0
) -> tuple[Sample, list[bytes]]:
    """Returns sample `index` of `split`, of small grids among the first `num_easy`, and its images as JPEG bytes."""
    rng = sample_generator(seed, split, index)
    if split == "train":
        sample = draw_train_sample(rng, sources, cells=EASY_CELLS if index < num_easy else GRID_CELLS)
    else:
        sample = draw_eval_sample(rng, sources, task=TASKS[index % len(TASKS)])
    images = []
    for scene in sample.scenes:
        buffer = io.BytesIO()
        image, _ = render(scene, rng, sources)
        image.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
        images.append(buffer.getvalue())
    return sample, images


def _write_corpus(root: Path, request: Request, num_workers: int) -> None:
    num_easy = int(EASY_SHARE * request.num_train)
    num_samples = {"train": request.num_train, "eval": request.num_eval_per_task * len(TASKS)}
    jobs = []
    for split in SPLITS:
        (root / split).mkdir()
        sources = load_sources(split)
        for shard, start in enumerate(range(0, num_samples[split], SAMPLES_PER_SHARD)):
            stop = min(start + SAMPLES_PER_SHARD, num_samples[split])
            path = root / split / f"shard-{shard:05d}.tar"
            jobs.append((path, request.seed, split, range(start, stop), sources, num_easy))
    counts = [count for _, count in over_processes(_write_shard, jobs, num_workers)]
    build_tokenizer().save_pretrained(root / "tokenizer")
    manifest = {
        "request": asdict(request),
        "num_samples": {
            split: dict(sorted(sum((c for job, c in zip(jobs, counts) if job[2] == split), Counter()).items()))
            for split in SPLITS
        },
        "sha256": {str(job[0].relative_to(root)): _sha256(job[0]) for job in jobs},
    }
    (root / "corpus.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _write_shard(job: tuple[Path, int, str, range, Sources, int]) -> Counter[str]:
    """Writes one shard and returns how many samples of each task it holds."""
    path, seed, split, indices, sources, num_easy = job
    counts: Counter[str] = Counter()
    with open(path, "wb") as file, webdataset.TarWriter(file, mtime=0, encoder=False) as writer:
        for index in indices:
            sample, images = draw_indexed_sample(seed, split, index, sources, num_easy=num_easy)
            counts[sample.task] += 1
            key = f"{split}-{index:07d}"
            # Two writes, because TarWriter sorts the members of one: the JSON comes first, so that a reader knows the
            # conversation before it meets the images.
            writer.write({"__key__": key, "json": json.dumps(sample.to_json()).encode()})
            writer.write({"__key__": key} | {f"{i}.jpg": image for i, image in enumerate(images)})
    return counts


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
