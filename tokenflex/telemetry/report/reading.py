"""A run's folder read as it is: every file may be missing, cut off or written by an earlier release."""

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from ...checkpoint import Entry, entries
from ...errors import UserError
from ...layout import RunLayout

MAX_BAD_SAMPLES = 20_000
"""Records of bad samples that are read."""
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run's folder holds.

    metrics, validations, events: in order. bad_samples: of all ranks, by step. checkpoints: oldest first. recipe: as text; settings:
    the same as nested values. accuracy: the table at the end, or None. unread: lines that were no JSON.
    """

    name: str
    folder: Path
    metrics: list[Record]
    validations: list[Record]
    events: list[Record]
    bad_samples: list[Record]
    checkpoints: list[Entry]
    recipe: str
    settings: Record
    accuracy: Record | None
    unread: int

    @property
    def counts(self) -> list[str]:
        """Visual-token counts that a figure is known at, and `text` last."""
        names = {
            name
            for record in (*self.metrics, *self.validations)
            for key in ("loss_per_count", "images_per_count")
            for name in record.get(key) or {}
        }
        return sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))

    @property
    def versions(self) -> dict[str, str]:
        """Of the libraries, by the newest good checkpoint."""
        good = [entry.manifest for entry in self.checkpoints if entry.manifest]
        return dict(good[-1].versions) if good else {}


def read_run(folder: str | PathLike) -> RunRecord:
    """Everything that a run's folder tells.

    Raises:
        UserError: it is no run's folder, or cannot be read.
    """
    layout = RunLayout(Path(folder))
    if not layout.root.is_dir():
        raise UserError(f"report {folder}: no such folder; give a run's, for example runs/quickstart")
    if not layout.config.is_file() or not (layout.metrics.is_file() or layout.events.is_file()):
        raise UserError(
            f"report {folder}: no run there (a run's folder has config.yaml and metrics.jsonl); give one, for example runs/quickstart"
        )
    try:
        recipe = layout.config.read_text(encoding="utf-8", errors="replace")
        unread: list[str] = []
        bad = [
            _bad_sample(record, int(path.stem.rpartition("-")[2]))
            for path in sorted((layout.root / "bad-samples").glob("rank-[0-9]*.jsonl"))
            for record in _lines(path, unread)
        ]
        return RunRecord(
            name=layout.root.resolve().name,
            folder=layout.root,
            metrics=[record for record in _lines(layout.metrics, unread) if _is_number(record.get("step"))],
            validations=[record for record in _lines(layout.validation, unread) if _is_number(record.get("step"))],
            events=[event for event in _lines(layout.events, unread) if isinstance(event.get("event"), str)],
            bad_samples=sorted(bad[:MAX_BAD_SAMPLES], key=lambda record: record["step"]),
            checkpoints=entries(layout.checkpoints),
            recipe=recipe,
            settings=_mapping(recipe),
            accuracy=_accuracy(layout.accuracy),
            unread=len(unread),
        )
    except OSError as error:
        raise UserError(
            f"report {error.filename or folder}: {error.strerror}; the run's files must be readable"
        ) from None


def _lines(path: Path, unread: list[str]) -> list[Record]:
    """The records of a file of JSON lines; what is none is added to `unread`."""
    records: list[Record] = []
    if not path.is_file():
        return records
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                records.append(record)
            elif line.strip():
                unread.append(line)
    return records


def _mapping(text: str) -> Record:
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _accuracy(path: Path) -> Record | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("accuracy"), dict) else None


def _bad_sample(record: Record, rank: int) -> Record:
    """A record of a bad sample with every field of its type, whatever the file says."""
    offset = record.get("offset")
    texts = {name: str(record.get(name) or "") for name in ("shard", "key", "reason", "detail")}
    step = record.get("step")
    return {
        **texts,
        "step": step if _is_number(step) else 0,
        "offset": offset if _is_whole(offset) else -1,
        "rank": rank,
    }


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def flattened(settings: Record, prefix: str = "") -> dict[str, str]:
    """{dotted key: value as JSON text} of nested settings."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, default=str)
    return flat
