"""Questions and answers about scenes, and the samples made of them.

Why this file exists: the phrasing of every task in one place. A cell is named as in a spreadsheet, column letter and row
number ("B3"), and the tokenizer knows every name as one token: a name of two tokens is bound to its place one axis at a
time, with a plateau of unknown length between the two, one of a single token within a hundred steps. The answer repeats
the name before the digit, so that a whole grid can be read in one answer and each digit stands right behind its name: up
to 49 supervised digits per image.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .glyphs import Sources
from .scenes import Scene, draw_grid, draw_word

TASKS = ("control", "coarse", "dense", "row", "count", "word", "pair", "text")
COARSE_CELLS = (2, 3)
# Several densities, none alone: a grid of as many cells as there are visual tokens is read more easily than at other counts.
DENSE_CELLS = (5, 6, 7)
ALL_CELLS = (2, 3, 4, 5, 6, 7)
# A training set begins with small grids: that a name stands for a place is learned from them in half the steps.
EASY_CELLS = (2, 3, 4)
GRID_CELLS = (2, 3, 4, 5, 5, 6, 6, 7, 7)
# What the training set is made of. A grid sample asks for the whole of its grid, for two of its cells and sometimes for
# its colour and for a row.
TRAIN_SHARES = {"grid": 0.64, "control": 0.1, "count": 0.06, "word": 0.08, "pair": 0.06, "text": 0.06}


def cell_name(row: int, column: int) -> str:
    """Returns the spreadsheet name of a cell: `cell_name(2, 1)` is "B3"."""
    return f"{chr(ord('A') + column)}{row + 1}"


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

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON of a shard; the images are named once, in the first user message. An answer starts with a space,
        so that its first name or digit is the same token as any later one."""
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            content = [{"type": "text", "text": turn.question}]
            if not messages:
                content = [{"type": "image"}] * len(self.scenes) + content
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": f" {turn.answer}"}]})
        return {"messages": messages, "task": self.task, "source": "embedded"}


def draw_train_sample(rng: np.random.Generator, sources: Sources, *, cells: tuple[int, ...] = GRID_CELLS) -> Sample:
    """Returns a training sample, most are several turns long; a grid has one of `cells` a side."""
    task = str(rng.choice(list(TRAIN_SHARES), p=list(TRAIN_SHARES.values())))
    scenes = _draw_scenes(rng, sources, task, cells)
    return Sample(task=task, scenes=scenes, turns=tuple(_train_turns(task, scenes, rng)))


def draw_eval_sample(rng: np.random.Generator, sources: Sources, *, task: str) -> Sample:
    """Returns a sample of `task` with one question."""
    scenes = _draw_scenes(rng, sources, task, {"coarse": COARSE_CELLS, "dense": DENSE_CELLS}.get(task, ALL_CELLS))
    candidates = _eval_turns(task, scenes, rng)
    return Sample(task=task, scenes=scenes, turns=(candidates[rng.integers(len(candidates))],))


def _draw_scenes(rng: np.random.Generator, sources: Sources, task: str, cells: tuple[int, ...]) -> tuple[Scene, ...]:
    if task == "text":
        return ()
    if task == "word":
        return (draw_word(rng),)
    if task == "pair":
        first = draw_grid(rng, sources, num_cells=1)
        second = first
        while second.rows == first.rows:
            second = draw_grid(rng, sources, num_cells=1)
        return first, second
    if task == "count":
        return (draw_grid(rng, sources, num_cells=3, fill=rng.uniform(0.1, 1.0)),)
    return (draw_grid(rng, sources, num_cells=int(rng.choice(cells))),)


def _train_turns(task: str, scenes: tuple[Scene, ...], rng: np.random.Generator) -> list[Turn]:
    if task == "text":
        return [_text_turn(rng) for _ in range(4)]
    if task == "count":
        return _shuffled(_count_turns(scenes[0], rng), rng)
    if task != "grid":
        return _eval_turns(task, scenes, rng)
    scene = scenes[0]
    turns = [_cell_turn(scene, cell) for cell in _shuffled(_cells(scene), rng)[:2]]
    turns.append(_grid_turn(scene))
    if rng.random() < 0.5:
        turns.append(_colour_turn(scene))
    if rng.random() < 0.3:
        turns.append(_row_turn(scene, int(rng.integers(len(scene.rows)))))
    return _shuffled(turns, rng)


def _eval_turns(task: str, scenes: tuple[Scene, ...], rng: np.random.Generator) -> list[Turn]:
    """Returns every question of `task` that may be asked about `scenes`."""
    if task == "text":
        return [_text_turn(rng)]
    if task == "word":
        return [_word_turn(scenes[0])]
    if task == "control":
        return [_colour_turn(scenes[0])]
    if task == "pair":
        return _pair_turns(*scenes)
    if task == "count":
        return _count_turns(scenes[0], rng)
    if task == "row":
        return [_row_turn(scenes[0], row) for row in range(len(scenes[0].rows))]
    return [_cell_turn(scenes[0], cell) for cell in _cells(scenes[0])]


def _shuffled(items: list, rng: np.random.Generator) -> list:
    return [items[i] for i in rng.permutation(len(items))]


def _cells(scene: Scene) -> list[tuple[int, int]]:
    return [(row, column) for row, digits in enumerate(scene.rows) for column in range(len(digits))]


def _reading(scene: Scene, cells: list[tuple[int, int]]) -> str:
    return " ".join(f"{cell_name(row, column)} {scene.rows[row][column]}" for row, column in cells)


def _cell_turn(scene: Scene, cell: tuple[int, int]) -> Turn:
    return Turn(question=f"digit at {cell_name(*cell)}", answer=_reading(scene, [cell]))


def _row_turn(scene: Scene, row: int) -> Turn:
    cells = [(row, column) for column in range(len(scene.rows[row]))]
    return Turn(question=f"read row {row + 1}", answer=_reading(scene, cells))


def _grid_turn(scene: Scene) -> Turn:
    return Turn(question="read digits", answer=_reading(scene, _cells(scene)))


def _colour_turn(scene: Scene) -> Turn:
    return Turn(question="which color", answer=scene.ink)


def _word_turn(scene: Scene) -> Turn:
    return Turn(question="read word", answer=scene.word)


def _pair_turns(first_scene: Scene, second_scene: Scene) -> list[Turn]:
    first, second = first_scene.rows[0][0], second_scene.rows[0][0]
    assert first is not None and second is not None, "grids of pairs have no empty cell"
    return [
        Turn(question="digit in image 1", answer=str(first)),
        Turn(question="digit in image 2", answer=str(second)),
        Turn(question="larger image", answer="1" if first > second else "2"),
    ]


def _count_turns(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    shown = [digit for row in scene.rows for digit in row if digit is not None]
    wanted = [int(digit) for digit in rng.choice(sorted(set(shown)), size=min(2, len(set(shown))), replace=False)]
    turns = [Turn(question="count digits", answer=str(len(shown)))]
    return turns + [Turn(question=f"count {digit}", answer=str(shown.count(digit))) for digit in wanted]


def _text_turn(rng: np.random.Generator) -> Turn:
    left, right = (int(digit) for digit in rng.integers(10, size=2))
    if rng.random() < 0.5:
        return Turn(question=f"larger of {left} {right}", answer=str(max(left, right)))
    return Turn(question=f"difference of {left} {right}", answer=str(abs(left - right)))
