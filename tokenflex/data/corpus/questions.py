"""Questions and answers about scenes, and the samples made of them.

Why this file exists: the phrasing of every task in one place. A cell is named as in a spreadsheet, column letter and row
number ("B3"): two tokens of different sets, which a small language model learns to bind to a place several times sooner
than "row 3 column 2". Prompts are short on
purpose: on two CPU cores the language model costs more than the vision encoder, and its cost is the sequence length.
"""

from dataclasses import dataclass

import numpy as np

from .glyphs import Sources
from .scenes import Scene, draw_grid, draw_word
from .words import EVAL_WORDS, TRAIN_WORDS

TASKS = ("control", "coarse", "dense", "row", "count", "word", "pair", "text")
COARSE_CELLS = (2, 3)
DENSE_CELLS = (6, 7)
SPOT_CELLS = (3, 4, 5, 6, 7)


@dataclass(frozen=True, kw_only=True)
class Level:
    """A stretch of the training set, which is written from easy to hard.

    Measured with perfect digit features: mixed grids of 2 to 7 cells are not read after 1,200 steps, while grids of 2 and 3
    cells first, then 4, then more, are read at 99 % after 700.
    """

    until: float
    """Where the level ends, as a share of the training samples."""
    shares: dict[str, float]
    """Share of each task. "spot" is trained only: one digit of any size at any place, which teaches the glyphs at every
    scale before there is anything to address."""
    cells: tuple[int, ...]
    """Densities of the grids of the task "dense"."""


CURRICULUM = (
    Level(until=0.20, shares={"control": 0.1, "spot": 0.2, "coarse": 0.65, "text": 0.05}, cells=(2,)),
    Level(
        until=0.35,
        shares={"control": 0.06, "spot": 0.06, "coarse": 0.5, "dense": 0.2, "pair": 0.08, "text": 0.04, "count": 0.06},
        cells=(3, 4),
    ),
    Level(
        until=0.5,
        shares={"control": 0.05, "spot": 0.04, "coarse": 0.2, "dense": 0.54, "pair": 0.06, "text": 0.04, "count": 0.07},
        cells=(3, 4, 5),
    ),
    Level(
        until=1.0,
        shares={
            "control": 0.05,
            "coarse": 0.12,
            "dense": 0.60,
            "pair": 0.06,
            "text": 0.04,
            "count": 0.06,
            "word": 0.07,
        },
        cells=(4, 5, 6, 6, 7, 7),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation: the scenes of its images, in order, then its turns."""

    task: str
    scenes: tuple[Scene, ...]
    turns: tuple[Turn, ...]

    def to_json(self) -> dict:
        """Returns the JSON of a shard; the images are named once, in the first user message."""
        messages = []
        for turn in self.turns:
            content = [{"type": "text", "text": turn.question}]
            if not messages:
                content = [{"type": "image"}] * len(self.scenes) + content
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        return {"messages": messages, "task": self.task, "source": "embedded"}


def draw_train_sample(rng: np.random.Generator, sources: Sources, *, progress: float) -> Sample:
    """Returns a training sample, several turns long, as hard as `progress` through the training set (0 to 1) asks."""
    level = next(level for level in CURRICULUM if progress < level.until)
    task = str(rng.choice(list(level.shares), p=list(level.shares.values())))
    return _draw_sample(rng, sources, "train", task, level.cells)


def draw_eval_sample(rng: np.random.Generator, sources: Sources, *, task: str) -> Sample:
    """Returns a sample of `task` with one question."""
    return _draw_sample(rng, sources, "eval", task, DENSE_CELLS)


def _draw_sample(rng: np.random.Generator, sources: Sources, split: str, task: str, cells: tuple[int, ...]) -> Sample:
    scenes = _draw_scenes(rng, sources, split, task, cells)
    candidates = _turns(task, scenes, rng)
    num_turns = {"pair": 3, "text": 8, "count": 4, "coarse": 6, "dense": 8}.get(task, 1)
    if split == "eval":
        num_turns = 1
        if task in ("coarse", "dense"):
            candidates = [turn for turn in candidates if turn.question.startswith("digit at")]
    picked = rng.permutation(len(candidates))[:num_turns]
    return Sample(task=task, scenes=scenes, turns=tuple(candidates[i] for i in picked))


def _draw_scenes(
    rng: np.random.Generator, sources: Sources, split: str, task: str, cells: tuple[int, ...]
) -> tuple[Scene, ...]:
    if task == "text":
        return ()
    if task == "word":
        if split == "train":
            return (draw_word(rng, TRAIN_WORDS, random_share=0.6),)
        return (draw_word(rng, EVAL_WORDS, random_share=0.0),)
    if task == "control":
        return (draw_grid(rng, sources, num_cells=int(rng.choice(SPOT_CELLS)), fill=0.5),)
    if task == "spot":
        return (draw_grid(rng, sources, num_cells=int(rng.choice(SPOT_CELLS)), fill=0.0),)
    if task == "pair":
        first = draw_grid(rng, sources, num_cells=1)
        second = first
        while second.rows == first.rows:
            second = draw_grid(rng, sources, num_cells=1)
        return first, second
    if task == "count":
        return (draw_grid(rng, sources, num_cells=3, fill=rng.uniform(0.1, 1.0)),)
    cells = COARSE_CELLS if task == "coarse" else cells
    return (draw_grid(rng, sources, num_cells=int(rng.choice(cells))),)


def _turns(task: str, scenes: tuple[Scene, ...], rng: np.random.Generator) -> list[Turn]:
    """Returns every question of `task` that may be asked about `scenes`."""
    if task == "text":
        return [_text_turn(rng) for _ in range(8)]
    if task == "word":
        return [Turn(question="read word", answer=scenes[0].word)]
    if task == "control":
        return [Turn(question="which color", answer=scenes[0].ink)]
    if task == "spot":
        (digit,) = (digit for row in scenes[0].rows for digit in row if digit is not None)
        return [Turn(question="which digit", answer=str(digit))]
    if task == "pair":
        first, second = (scene.rows[0][0] for scene in scenes)
        return [
            Turn(question="digit in image 1", answer=str(first)),
            Turn(question="digit in image 2", answer=str(second)),
            Turn(question="larger image", answer="1" if first > second else "2"),
        ]
    rows = scenes[0].rows
    if task == "count":
        shown = [digit for row in rows for digit in row if digit is not None]
        wanted = [int(digit) for digit in rng.choice(sorted(set(shown)), size=min(3, len(set(shown))), replace=False)]
        turns = [Turn(question="count digits", answer=str(len(shown)))]
        return turns + [Turn(question=f"count {digit}", answer=str(shown.count(digit))) for digit in wanted]
    whole_rows = [Turn(question=f"read row {i + 1}", answer="".join(map(str, row))) for i, row in enumerate(rows)]
    if task == "row":
        return whole_rows
    cells = [
        Turn(question=f"digit at {chr(ord('A') + j)}{i + 1}", answer=str(digit))
        for i, row in enumerate(rows)
        for j, digit in enumerate(row)
    ]
    # Mostly cells, which bind letter and number to a place; a row supervises more digits per token of prompt.
    kept_rows = [whole_rows[i] for i in rng.permutation(len(whole_rows))[:2]]
    return kept_rows + [cells[i] for i in rng.permutation(len(cells))[:6]]


def _text_turn(rng: np.random.Generator) -> Turn:
    kind = rng.integers(3)
    if kind == 0:
        left, right = rng.integers(10, size=2)
        return Turn(question=f"add {left} {right}", answer=str(left + right))
    digits = [str(digit) for digit in rng.integers(10, size=3)]
    text = "".join(digits)
    if kind == 1:
        return Turn(question=f"copy {text}", answer=text)
    return Turn(question=f"sort {text}", answer="".join(sorted(digits)))
