"""What a checkpoint says of itself: `manifest.json`, strictly read, because everything else is believed through it."""

import json
import re
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

from blake3 import blake3

from ..layout import MANIFEST, step_of

FORMAT = 2
READ = (1, 2)
"""Formats that are read. 1 has no `places`, and frozen weights in the files of the ranks."""
SHARD = re.compile(r"(rank|frozen)-\d{5}-of-\d{5}\.safetensors")
MAX_BYTES = 256 * 1024 * 1024


class Damaged(Exception):
    """A checkpoint that must not be loaded; the message is why, for the person who reads it."""


class FileEntry(TypedDict):
    """What a manifest says of a file: its bytes, and their checksum as hexadecimal digits."""

    size: int
    blake3: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The record of one checkpoint.

    progress: the loop's own state: step, position in the data, counters. parameters: {name: [shape, dtype, is_trained]}.
    buffers: names. num_updates: of the optimizer. files: {name: {"size": bytes, "blake3": hex digits}}. num_ranks: ranks
    that wrote it. config: the run's configuration. model: the model's own configuration. versions: of the libraries.
    score: validation loss, or mean loss over the last steps where the run does not validate; None where there is neither. attempt:
    which start of the run wrote it. places: {name of a parameter: which rank's file has which elements}, see `places.files_with`;
    empty where it is not known.
    """

    progress: dict[str, Any]
    parameters: dict[str, list]
    buffers: list[str]
    num_updates: int
    files: dict[str, FileEntry]
    num_ranks: int
    config: dict[str, Any]
    model: dict[str, Any]
    versions: dict[str, str]
    score: float | None
    attempt: str
    time: str
    places: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return self.progress["step"]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor files together."""
        return sum(entry["size"] for entry in self.files.values())


def encode(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: the record, and its own checksum over them."""
    record = {"format": FORMAT, **asdict(manifest)}
    text = _canonical(record)
    return json.dumps({**record, "blake3": blake3(text).hexdigest()}, indent=1).encode()


def read_manifest(folder: str | PathLike) -> Manifest:
    """The manifest of a checkpoint folder, checked for form but not against its files.

    Raises:
        Damaged: missing, unreadable, altered, of another format, or naming files that are none of a checkpoint's.
    """
    path = Path(folder) / MANIFEST
    try:
        if path.is_symlink() or not path.is_file():
            raise Damaged(f"has no {MANIFEST}" if not path.exists() else f"its {MANIFEST} is no regular file")
        if path.stat().st_size > MAX_BYTES:
            raise Damaged(f"its {MANIFEST} has {path.stat().st_size} bytes, at most {MAX_BYTES} are read")
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise Damaged(f"its {MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise Damaged(f"its {MANIFEST} is not valid JSON") from None
    if not isinstance(record, dict) or record.get("format") not in READ:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise Damaged(f"its {MANIFEST} is of format {found!r}, this version reads {' and '.join(map(str, READ))}")
    checksum = record.pop("blake3", None)
    if checksum != blake3(_canonical(record)).hexdigest():
        raise Damaged(f"its {MANIFEST} does not match its own checksum")
    del record["format"]
    try:
        manifest = Manifest(**record)
    except TypeError as error:
        raise Damaged(f"its {MANIFEST} has other fields than wanted ({error})") from None
    _check(manifest, Path(folder).name)
    return manifest


def _check(manifest: Manifest, folder_name: str) -> None:
    for name, entry in manifest.files.items():
        if not SHARD.fullmatch(name):
            raise Damaged(f"its {MANIFEST} names the file {name!r}, which is none of a checkpoint's")
        if set(entry) != {"size", "blake3"}:
            raise Damaged(f"its {MANIFEST} says {sorted(entry)} of {name}; wanted size and blake3")
    of_ranks = [name for name in manifest.files if name.startswith("rank")]
    if len(of_ranks) != manifest.num_ranks:
        raise Damaged(f"its {MANIFEST} names {len(of_ranks)} files of {manifest.num_ranks} ranks")
    if step_of(folder_name) not in (None, manifest.step):
        raise Damaged(f"its {MANIFEST} is of step {manifest.step}")


def _canonical(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
