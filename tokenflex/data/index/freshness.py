"""What of an index still holds: whether it counts as the processor does, and which of its shards are what they were."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from ..processor import Processor
from ..shards import Shard, Stamp

VERSION = 2
"""Of the index's format."""


def tiling_of(processor: Processor) -> str:
    """What the number of tiles of an image depends on, as text."""
    names = ("max_tiles", "thumbnail", "height", "width")
    return " ".join(f"{name}={getattr(processor.image_processor, name)}" for name in names)


def sampling_of(processor: Processor) -> str:
    """What the number of frames of a clip depends on, as text; empty is the sampling by default, as indexes before it have it."""
    sampling = f"frames_per_second={processor.frames_per_second:g} max_frames={processor.max_frames}"
    return "" if sampling == "frames_per_second=1 max_frames=16" else f"\0{sampling}"


def tells_date(processor: Processor) -> bool:
    """Whether the chat template writes the day on which it runs."""
    return "strftime_now" in str(processor.chat_template)


def fingerprint(processor: Processor) -> str:
    """What the lengths in an index depend on: `tokenizer-template-tiling`, eight hex digits each.

    Where the template writes a date, the one that the processor takes for today's (`render_date`) belongs to it.
    """
    tokens = processor.image_start_token + processor.image_token + processor.image_end_token
    date = processor.render_date if tells_date(processor) else ""
    parts = (
        _tokenizer_text(processor.tokenizer.backend_tokenizer) + "\0" + tokens,
        processor.rendering_key() + (f"\0{date}" if date else ""),
        f"{tiling_of(processor)}\0{VERSION}{sampling_of(processor)}",
    )
    return "-".join(hashlib.sha256(part.encode()).hexdigest()[:8] for part in parts)


def _tokenizer_text(tokenizer: Any) -> str:
    """A fast tokenizer as text, without truncation and padding.

    Some `tokenizer.json` have them switched on; each call of the tokenizer sets them as it was asked to, which here is off.
    """
    text = tokenizer.to_str()
    if tokenizer.truncation is None and tokenizer.padding is None:
        return text
    bare = type(tokenizer).from_str(text)
    bare.no_truncation()
    bare.no_padding()
    return bare.to_str()


def stamp_of(entry: dict[str, Any]) -> Stamp:
    """The stamp that a shard had when its entry of a manifest was written."""
    return {name: entry[name] for name in ("size", "mtime_ns", "etag") if name in entry}


@dataclass(frozen=True)
class Changed:
    """A shard whose bytes are no longer those that were indexed: their checksums before and now."""

    shard: Shard
    before: str
    now: str


@dataclass
class Freshness:
    """What an index knows of a list of shards.

    known: number in the manifest of each shard that is as it was. new: shards that it does not have. changed: shards whose
    bytes are others. stamps: of every shard, as it is now.
    """

    known: dict[Shard, int] = field(default_factory=dict)
    new: list[Shard] = field(default_factory=list)
    changed: list[Changed] = field(default_factory=list)
    stamps: dict[Shard, Stamp] = field(default_factory=dict)

    def is_whole(self, entries: list, shards: Sequence[Shard]) -> bool:
        """Whether the index has these shards, in this order, and no others."""
        return [self.known.get(shard) for shard in shards] == list(range(len(entries)))

    def to_scan(self) -> list[Shard]:
        """The shards that must be read, each once."""
        return [*self.new, *(changed.shard for changed in self.changed)]


def compare(entries: list[dict[str, Any]], shards: Sequence[Shard]) -> Freshness:
    """The entries of a manifest beside the shards as they are now.

    A shard with another stamp under a known name has perhaps only been touched or copied: its bytes decide.
    """
    by_stamp: dict[tuple, int] = {}
    by_name: dict[str, int] = {}
    for number, entry in enumerate(entries):
        by_stamp[_key(entry["name"], stamp_of(entry))] = number
        by_name.setdefault(entry["name"], number)
    found = Freshness()
    for shard in dict.fromkeys(shards):
        stamp = found.stamps[shard] = shard.stamp()
        same = by_stamp.get(_key(shard.name, stamp))
        if same is None and shard.name in by_name:
            same = by_name[shard.name]
            before, now = entries[same]["sha256"], file_sha256(shard.at(stamp).local_file())
            if now != before:
                found.changed.append(Changed(shard, before, now))
                continue
        if same is None:
            found.new.append(shard)
        else:
            found.known[shard] = same
    return found


def _key(name: str, stamp: Stamp) -> tuple:
    return (name, *sorted((key, str(value)) for key, value in stamp.items()))


def file_sha256(path: str | PathLike) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()
