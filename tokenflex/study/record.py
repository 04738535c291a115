"""What a study found, as one JSON: every run's answers and costs, under the protocol, code and corpus that made them."""

import ast
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenflex_kernels

from ..config import RunConfig
from ..data.index import file_sha256
from ..errors import UserError
from ..files import write_whole
from ..layout import RunLayout
from .jobs import Job

PACKAGES = (Path(__file__).parent.parent, Path(tokenflex_kernels.__file__).parent)
NOT_OF_A_RUN = ("infer", "prepare", "serve", "slurm", "study")
"""Rooms that no run of a study enters."""


def code_version() -> str:
    """16 hex digits over the code that trains and asks: two runs with the same were made by the same, as one Python reads it.

    What is read is the syntax without comments and docstrings, of both packages but for `NOT_OF_A_RUN`.
    """
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            place = path.relative_to(package)
            if place.parts[0] not in NOT_OF_A_RUN:
                digest.update(f"{package.name}/{place}\0{meaning(path.read_text(encoding='utf-8'))}".encode())
    return digest.hexdigest()[:16]


def meaning(source: str) -> str:
    """The syntax tree of a file, without what only people read: comments, docstrings, and strings that stand for themselves."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]  # it has one
                line for line in body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            ]
    return ast.dump(tree)


class MadeBy(NamedTuple):
    """What a run's answers hang on, beside its recipe and samples; runs that differ in it are not averaged.

    code: `code_version`. parts: 16 hex digits over the weights that every run starts from. The embedded ones are the same on every
    x86 machine (`tokenflex.corpus.apart`), so that runs of several machines make up one record.
    """

    code: str
    parts: str

    @staticmethod
    def here(config: RunConfig) -> "MadeBy":
        """Of runs of this recipe, whose embedded parts are built."""
        folders = [Path(part) for part in (config.model.vision, config.model.text) if isinstance(part, str)]
        weights = [file_sha256(path) for folder in folders for path in sorted(folder.glob("*.safetensors"))]
        return MadeBy(code_version(), hashlib.sha256("".join(weights).encode()).hexdigest()[:16])


def protocol_version(protocol: Path, recipe: Path, overrides: Sequence[str] = ()) -> str:
    """16 hex digits of a protocol: its text, the recipe that it speaks of and what overrides that.

    Raises:
        UserError: either cannot be read.
    """
    try:
        return hashlib.sha256(
            protocol.read_bytes() + b"\0" + recipe.read_bytes() + repr(tuple(overrides)).encode()
        ).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; the protocol and its recipe come first") from None


@dataclass
class Record:
    """The JSON of a study: `protocol`, `questions` and `runs` by name (see `run_record`), and `times` (see `times.measure`)."""

    protocol: str
    questions: dict[str, Any]
    runs: dict[str, dict[str, Any]]
    times: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def open(path: Path, protocol: str) -> "Record":
        """The record at `path`, or a new one.

        Raises:
            UserError: it was made under another protocol.
        """
        if not path.exists():
            return Record(protocol, {}, {})
        stored = json.loads(path.read_text())
        if stored["protocol"] != protocol and stored["runs"]:
            raise UserError(
                f"{path}: holds {len(stored['runs'])} runs under the protocol {stored['protocol']}, the protocol or its recipe is "
                f"{protocol} now; restore it, or move the results away and begin anew: a protocol is not changed after its results"
            )
        return Record(protocol, stored["questions"], stored["runs"], stored["times"])

    def save(self, path: Path) -> None:
        """Write it, whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {**vars(self), "runs": dict(sorted(self.runs.items()))}
        write_whole(path, json.dumps(content, indent=1) + "\n")

    def add(self, job: Job, layout: RunLayout, made_by: MadeBy) -> None:
        """Take in a run that is complete.

        Raises:
            UserError: it was asked other questions than those that are there, or was not evaluated.
        """
        if not layout.answers.exists():
            raise UserError(f"run {layout.root}: has no {layout.answers.name}; it was not evaluated: run it again")
        answers = json.loads(layout.answers.read_text())
        questions = {"keys": answers["keys"], "tasks": answers["tasks"]}
        digest = hashlib.sha256(json.dumps(questions).encode()).hexdigest()[:16]
        if self.questions and self.questions["digest"] != digest:
            raise UserError(
                f"run {layout.root}: was asked other questions ({digest}) than the runs before it ({self.questions['digest']})"
            )
        self.questions = {"digest": digest, **questions}
        self.runs[job.name] = run_record(job, layout, answers, made_by)

    def right(self, name: str, count: int) -> np.ndarray:
        """[Q] bool: which questions a run answered at a count."""
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(self.runs[name]["right"][str(count)]), np.uint8))
        return bits[: len(self.questions["keys"])].astype(bool)

    def usable(self, seeds: list[int], arms: list[str]) -> tuple[dict[str, list[str]], list[str]]:
        """(arm -> its runs of all seeds, a line for what is left out, and why).

        The runs of the first arm, the flexible one, say which code, corpus and parts count.
        """
        names = {arm: [f"{arm}-seed{seed}" for seed in seeds] for arm in arms}
        first = next((self.runs[name] for name in names[arms[0]] if name in self.runs), None)
        if first is None:
            return {}, [f"{', '.join(names[arms[0]])}: missing"]
        problems: list[str] = []
        not_run: list[str] = []
        found: dict[str, list[str]] = {}
        for arm, its in names.items():
            absent = [name for name in its if name not in self.runs]
            if len(absent) == len(its):
                not_run.append(arm)
                continue
            problems += [f"{', '.join(absent)}: missing"] if absent else []
            for what in ("code", "corpus", "parts"):
                others = [
                    name for name in its if name in self.runs and self.runs[name][what] not in (None, first[what])
                ]
                problems += [f"{', '.join(others)}: of another {what} than {arms[0]}"] if others else []
                absent += others
            if not absent:
                found[arm] = its
        return found, problems + ([f"{', '.join(not_run)}: not run"] if not_run else [])


def run_record(job: Job, layout: RunLayout, answers: dict[str, Any], made_by: MadeBy) -> dict[str, Any]:
    """What is kept of a run.

    right: {count: hex of [Q] bits}. tokens, visual_tokens, samples: seen in training. seconds: of training, as measured, on a
    machine that may have run others beside it. half_time_loss, final_loss: means of a tenth of the steps at the half and at the
    end. corpus: which samples it saw; None for those made without images. code, parts: see `MadeBy`.
    """
    lines = [json.loads(line) for line in layout.metrics.read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["loss"] is not None]
    tenth = max(1, len(losses) // 10)
    half = len(losses) // 2
    bits = {
        count: np.packbits(np.frombuffer(right.encode(), np.uint8) == ord("1")).tobytes().hex()
        for count, right in answers["right"].items()
    }
    return {
        "arm": job.arm.name,
        "seed": job.seed,
        "num_steps": job.num_steps,
        "tokens": sum(line["num_tokens"] for line in lines),
        "visual_tokens": sum(line["num_visual_tokens"] for line in lines),
        "samples": sum(line["num_samples"] for line in lines),
        "seconds": round(sum(line["seconds"] for line in lines), 1),
        "half_time_loss": round(float(np.mean(losses[half : half + tenth])), 4),
        "final_loss": round(float(np.mean(losses[-tenth:])), 4),
        "corpus": None if job.arm.without_images else _corpus(layout),
        **made_by._asdict(),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "right": bits,
    }


def _corpus(layout: RunLayout) -> str:
    """Which samples it was trained on, whatever was made of their lengths."""
    sources = json.loads(layout.data.read_text())["sources"]
    shards = [shard[1:] for source in sources for shard in source["shards"]]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]
