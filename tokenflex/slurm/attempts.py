"""Starts of one job and what came of them: whether to requeue, and when a job that gets nowhere has had its chances."""

import json
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path

from ..errors import UserError
from ..files import write_whole
from ..layout import DONE, MANIFEST, REQUEUE, STOP_SIGNALS, step_of


@dataclass
class Start:
    """One start: `step_before` is the newest checkpoint's step when it began; `decision` is empty if it had no end."""

    number: int
    job_id: str
    nodes: list[str]
    began: float
    step_before: int
    status: int | None = None
    decision: str = ""


@dataclass
class Starts:
    """All starts of a job (or of a chain of array tasks), kept in one JSON file."""

    path: Path
    starts: list[Start] = field(default_factory=list)

    @classmethod
    def load(cls, path: str | PathLike) -> "Starts":
        """The record at `path`; an empty one where there is none.

        Raises:
            UserError: the file is not such a record.
        """
        try:
            return cls(Path(path), [Start(**entry) for entry in json.loads(Path(path).read_text())])
        except FileNotFoundError:
            return cls(Path(path))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not a record of starts ({error}); remove it to count from zero") from None

    def save(self) -> None:
        """Write the record so that a kill leaves the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps([asdict(start) for start in self.starts], indent=1))

    def num_without_progress(self, step_now: int) -> int:
        """Starts at the end of the record that left the newest checkpoint where they found it.

        `step_now` is where the newest checkpoint stands now, after the last of them.
        """
        steps = [start.step_before for start in self.starts] + [step_now]
        number = 0
        for before, after in zip(reversed(steps[:-1]), reversed(steps[1:])):
            if after > before:
                break
            number += 1
        return number


def newest_step(checkpoints: str | PathLike) -> tuple[int, float]:
    """(step, modification time in seconds) of the newest whole checkpoint in a folder; (0, 0.0) where there is none."""
    found = [(0, 0.0)]
    for folder in Path(checkpoints).glob("*"):
        step, mark = step_of(folder.name), folder / MANIFEST
        if step is not None and mark.is_file():
            found.append((step, mark.stat().st_mtime))
    return max(found)


def first_status(folder: str | PathLike) -> tuple[int, int] | None:
    """(rank, status) of the rank that was first to end with anything but 0, by the files the ranks leave; None without.

    One that ended well before the others says nothing about them, and what follows the first is its consequence.
    """
    ended = []
    for path in Path(folder).glob("rank-*"):
        text = path.read_text().strip()
        if text.isdecimal() and int(text) != DONE:
            ended.append((path.stat().st_mtime_ns, int(path.name.removeprefix("rank-")), int(text)))
    if not ended:
        return None
    _, rank, status = min(ended)
    return rank, status


def outcome(srun_status: int, first: tuple[int, int] | None) -> int:
    """The job's status from srun's and the first rank's: DONE, REQUEUE, or why not to start again.

    srun reports the highest status, which is that of a rank killed for another's sake; so the first rank's word counts.
    A stop signal that came before the ranks listened for it kills them; that is no failure either.
    """
    if srun_status == 0:
        return DONE
    if first is not None:
        return first[1]
    if srun_status in {128 + number for number in STOP_SIGNALS}:
        return REQUEUE
    return srun_status if srun_status > 0 else 128 - srun_status
