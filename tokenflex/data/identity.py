"""What the samples of a run are, as plain JSON, and what has changed of them: a place in the data means nothing in other data.

A run's settings hold paths; its identity holds what lay there: for each source the fingerprint of its index and name, size,
checksum and number of samples of each shard, in their order, under one digest. A run that goes on compares.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..plan import Position
from .index import Index

MAX_NAMED = 3
"""Shards that a line names of those that changed in one way."""
PARTS = ("tokenizer", "chat template", "tiling")
"""What the three parts of an index's fingerprint stand for."""


def data_identity(names: Sequence[str], indexes: Sequence[Index], render_date: str = "") -> dict[str, Any]:
    """The identity of sources by their names and opened indexes.

    Returns {"digest", "render_date", "sources": [{"name", "summary", "fingerprint", "shards": [[name, bytes, first 16 hex
    digits of the sha256, samples], ...]}, ...]}. The same samples under other paths have the same digest.
    """
    sources = []
    for name, index in zip(names, indexes, strict=True):
        shards = [[e["name"], e["size"], e["sha256"][:16], e["num_samples"]] for e in index.entries]
        num_bytes = sum(size for _, size, _, _ in shards)
        summary = f"{len(index)} samples of {len(shards)} shards, {num_bytes / 1e9:.3f} GB"
        sources.append({"name": name, "summary": summary, "fingerprint": index.fingerprint, "shards": shards})
    digest = hashlib.sha256()
    for source in sources:
        contents = [source["fingerprint"], [shard[1:] for shard in source["shards"]]]
        digest.update(json.dumps(contents).encode())
    return {"digest": digest.hexdigest()[:32], "render_date": render_date, "sources": sources}


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of the data has changed, a line each; empty where nothing has."""
    if before["digest"] == now["digest"]:
        return []
    lines = []
    if before["render_date"] != now["render_date"]:
        lines.append(f"the date in the chat template was {before['render_date']}, it is {now['render_date']}")
    if len(before["sources"]) != len(now["sources"]):
        lines.append(f"there were {len(before['sources'])} sources, there are {len(now['sources'])}")
    for was, source in zip(before["sources"], now["sources"]):
        lines += [f"{source['name']}: {line}" for line in _changes_of_source(was, source)]
    return lines or ["its samples are others than those that are remembered"]


def _changes_of_source(was: dict[str, Any], source: dict[str, Any]) -> list[str]:
    lines = []
    for part, old, new in zip(PARTS, was["fingerprint"].split("-"), source["fingerprint"].split("-")):
        if old != new:
            lines.append(f"the {part} is another ({old} before, {new} now)")
    old = {name: [size, checksum, samples] for name, size, checksum, samples in was["shards"]}
    new = {name: [size, checksum, samples] for name, size, checksum, samples in source["shards"]}
    replaced = [name for name in new if name in old and old[name][:2] != new[name][:2]]
    recounted = [name for name in new if name in old and old[name][:2] == new[name][:2] and old[name] != new[name]]
    for words, names in (
        ("added", [name for name in new if name not in old]),
        ("removed", [name for name in old if name not in new]),
        ("replaced", [f"{name}: {old[name][0]} bytes before, {new[name][0]} now" for name in replaced]),
        ("with other samples left out", [f"{name}: {old[name][2]} before, {new[name][2]} now" for name in recounted]),
    ):
        if names:
            more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            lines.append(f"{len(names)} shards {words} ({', '.join(names[:MAX_NAMED])}{more})")
    if not lines and was["shards"] != source["shards"]:
        lines.append("the shards come in another order")
    return lines


def check_same_data(before: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """That a run goes on with the data that it began with; `where` names the run.

    Raises:
        UserError: it is other data; the line names what has changed and what can be done.
    """
    lines = changes(before, now)
    if lines:
        raise UserError(
            f"{where}: its data have changed since its checkpoints were made: {'; '.join(lines)}; restore them, choose another "
            "name=..., go on from the next epoch with --accept-new-data, or begin anew with --fresh"
        )


def after_change(position: Position) -> Position:
    """Where a run goes on that accepts other data than it began with: at the beginning of its next epoch.

    What was left of the epoch was planned of the old samples and is given up; the next epoch has all of the new ones.
    """
    return Position(position.epoch + 1)
