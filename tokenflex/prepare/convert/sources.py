"""Where records come from: JSON and JSONL files, parquet folders, plain webdataset shards, cut into parts of one shard each.

A part is small and picklable: it names bytes or rows of a file, and a worker reads them. So a conversion holds no data set
in memory, can be done in any order by any number of processes, and can be taken up again part by part.
"""

import csv
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from ...data.problems import BadSample, Limits
from ...data.sample import VIDEO_EXTENSIONS
from ...data.scan import scan_shard
from ...data.shards import find_shards
from ...errors import UserError
from .huggingface import chosen_files

CHUNK = 2**22
IMAGES = ("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif")
OTHER_MEDIA = ("mp3", "wav", "flac", "ogg", "m4a", "pdf")
"""Members of a plain shard that show something: the first are read, the others lead to a skip."""
_BLANK = re.compile(rb"[\s,]*")

Span = tuple[int, int, int]
"""Number of a record from 1, its first byte, its last byte + 1."""
Placed = tuple[str, Any, tuple[str, ...]]
"""Where a record stands, the record or the BadSample in its place, and its repairs."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Records that become one shard.

    path: the file. images: folder that image paths are relative to, or None. size, mtime_ns: of the file, to notice that
    it has changed.
    """

    path: str
    images: str | None
    size: int
    mtime_ns: int

    def fingerprint(self) -> str:
        """What the shard of this part depends on."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class JsonPart(Part):
    """Spans (number from 1, first byte, last byte + 1) of a JSON or JSONL file; `duplicates` and `shared` are numbers."""

    spans: tuple[Span, ...]
    duplicates: frozenset[int] = frozenset()
    shared: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.spans)

    def records(self, limits: Limits) -> Iterator[Placed]:
        """Yield (place, record or BadSample, repairs)."""
        with open(self.path, "rb") as file:
            for number, start, stop in self.spans:
                file.seek(start)
                place = f"record {number}"
                if number in self.duplicates:
                    yield place, BadSample("duplicate", "the same record has come before"), ()
                    continue
                try:
                    record = json.loads(file.read(stop - start))
                except (ValueError, RecursionError) as error:
                    yield place, BadSample("json", f"is not valid JSON ({error})"), ()
                    continue
                yield place, record, ("id-shared",) if number in self.shared else ()


@dataclass(frozen=True, kw_only=True)
class ParquetPart(Part):
    """Rows [start, stop) of a parquet file, which lie in its row groups `groups`, the first of which begins at `base`."""

    start: int
    stop: int
    base: int
    groups: tuple[int, ...]

    def __len__(self) -> int:
        return self.stop - self.start

    def records(self, limits: Limits) -> Iterator[Placed]:
        pyarrow, parquet = _pyarrow()
        row = self.base
        try:
            with parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=64, row_groups=list(self.groups)):
                    wanted = range(max(self.start, row), min(self.stop, row + len(batch)))
                    for number in wanted:
                        yield f"row {number}", batch.slice(number - row, 1).to_pylist()[0], ()
                    row += len(batch)
        except (pyarrow.ArrowException, OSError) as error:
            text = " ".join(str(error).split())[:200]
            for number in range(max(self.start, row), self.stop):
                yield f"row {number}", BadSample("tar-damaged", f"cannot be read ({text})"), ()


@dataclass(frozen=True, kw_only=True)
class ShardPart(Part):
    """A plain webdataset shard: images, and a conversation or caption in `.json` or `.txt`."""

    def __len__(self) -> int:
        return 1

    def records(self, limits: Limits) -> Iterator[Placed]:
        wanted = rf"([^.]+\.)?({'|'.join((*IMAGES, *VIDEO_EXTENSIONS, *OTHER_MEDIA, 'json', 'txt', 'caption'))})"
        limits = type(limits)(**{**limits.to_json(), "extensions": wanted, "ignore_others": True})
        for scanned in scan_shard(self.path, limits, parse=lambda members, path: members):
            if scanned.problem is not None:
                if scanned.problem.reason == "member-type" or not scanned.key and scanned.problem.offset == 0:
                    continue
                yield f"sample {scanned.key}", scanned.problem, ()
            else:
                yield f"sample {scanned.key}", *_plain_record(scanned.sample)  # type: ignore[arg-type]  # what `parse` made


@dataclass(frozen=True, kw_only=True)
class ReadPart(Part):
    """Records [start, stop) of those that a function of this module yields of a file, read from its beginning."""

    # A function's address is another in every process: no part of the fingerprint.
    read: Callable[[str | os.PathLike], Iterable] = field(repr=False)
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def records(self, limits: Limits) -> Iterator[Placed]:
        for number, record in enumerate(itertools.islice(self.read(self.path), self.start, self.stop), self.start + 1):
            yield f"record {number}", record, ()


AnyPart = JsonPart | ParquetPart | ShardPart | ReadPart


def read_parts(
    path: str | os.PathLike, images: str | None, per_shard: int, read: Callable[[str | os.PathLike], Iterable]
) -> Iterator[ReadPart]:
    """Parts of a file of which `read(path)` yields the records: all that a format needs whose records are cheap to pass over.

    Raises:
        UserError: no such file, or no record in it.
    """
    path = _file(path)
    number = sum(1 for _ in read(path))
    if not number:
        raise UserError(f"{path}: holds no record")
    for start in range(0, number, per_shard):
        place: dict[str, Any] = {"read": read, "start": start, "stop": min(start + per_shard, number)}
        yield ReadPart(path=str(path), images=images, **place, **_stamp(path))


def csv_records(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Rows of a CSV file whose first line names the columns, without the empty cells.

    Raises:
        UserError: it is no CSV file, or not UTF-8.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            for row in csv.DictReader(file):
                yield {name: value for name, value in row.items() if value not in ("", None)}
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}: is not a CSV file in UTF-8 ({error}); write it again as one") from None


def json_parts(path: str | os.PathLike, images: str | None, per_shard: int) -> Iterator[JsonPart]:
    """Parts of a JSON array or a JSONL file, told apart by the first byte.

    Raises:
        UserError: no such file, or neither form.
    """
    path = _file(path)
    spans = list(_spans(path))
    if not spans:
        raise UserError(f"{path}: holds no record; wanted a JSON array of objects, or one object per line")
    _check_gaps(path, spans)
    duplicates, shared = _repeated(path, spans)
    stamp = _stamp(path)
    for begin in range(0, len(spans), per_shard):
        chunk = tuple(spans[begin : begin + per_shard])
        numbers = {number for number, _, _ in chunk}
        yield JsonPart(
            path=str(path),
            images=images,
            spans=chunk,
            duplicates=frozenset(duplicates & numbers),
            shared=frozenset(shared & numbers),
            **stamp,
        )


def parquet_parts(
    folder: str | os.PathLike, images: str | None, per_shard: int, split: str = "", subset: str = ""
) -> Iterator[ParquetPart]:
    """Parts of the parquet files of a Hugging Face dataset folder (or of one file), of one configuration and split, or of `all`.

    Raises:
        UserError: no parquet there, several of either and none named, or pyarrow is not installed.
    """
    pyarrow, parquet = _pyarrow()
    folder = Path(folder).expanduser()
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.parquet"))
    if not files:
        raise UserError(f"{folder}: holds no .parquet file; wanted the folder of a Hugging Face dataset as downloaded")
    for path in files if folder.is_file() else chosen_files(folder, files, subset, split):
        try:
            metadata = parquet.read_metadata(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable parquet file ({' '.join(str(error).split())[:200]})") from None
        begins = [0]
        for group in range(metadata.num_row_groups):
            begins.append(begins[-1] + metadata.row_group(group).num_rows)
        for start in range(0, metadata.num_rows, per_shard):
            stop = min(start + per_shard, metadata.num_rows)
            groups = tuple(g for g in range(metadata.num_row_groups) if begins[g] < stop and begins[g + 1] > start)
            root = images or str(folder if folder.is_dir() else folder.parent)
            place: dict[str, Any] = {"start": start, "stop": stop, "base": begins[groups[0]], "groups": groups}
            yield ParquetPart(path=str(path), images=root, **place, **_stamp(path))


def shard_parts(sources: str, images: str | None, per_shard: int) -> Iterator[ShardPart]:
    """One part per plain webdataset shard."""
    for path in find_shards([sources], what="data convert"):
        yield ShardPart(path=str(path), images=images, **_stamp(path))


def _plain_record(members: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """The record of a plain sample's members and its repairs, or the BadSample in its place."""
    images, videos = (_in_order(members, extensions) for extensions in (IMAGES, VIDEO_EXTENSIONS))
    media = next((name for name in members if name.rpartition(".")[2].casefold() in OTHER_MEDIA), None)
    if media is not None:
        return BadSample("media", f"has the member .{media}; only images and videos are read"), ()
    record = {}
    if "json" in members:
        try:
            record = json.loads(members["json"])
        except (ValueError, RecursionError) as error:
            return BadSample("json", f"its .json is not valid JSON ({error})"), ()
        if not isinstance(record, dict):
            return BadSample("json", f"its .json holds a {type(record).__name__}; wanted an object"), ()
    text = members.get("txt", members.get("caption"))
    if text is not None and not any(key in record for key in ("messages", "conversations", "texts")):
        try:
            record = {**record, "caption": text.decode()}
        except UnicodeDecodeError as error:
            return BadSample("json", f"its text is not UTF-8 ({error})"), ()
    clips = {"videos": videos, "video": None} if videos else {}
    return {**record, "images": images, "image": None, **clips}, ()


def _in_order(members: dict[str, Any], extensions: tuple[str, ...]) -> list[bytes]:
    """The members of these extensions, by the numbers in their names."""
    some = [(name, data) for name, data in members.items() if name.rpartition(".")[2].casefold() in extensions]
    some.sort(key=lambda item: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", item[0])])
    return [data for _, data in some]


def _spans(path: Path) -> Iterator[Span]:
    """(number, first byte, last byte + 1) of every record."""
    with open(path, "rb") as file:
        head = file.read(CHUNK)
        first = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        file.seek(0)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head[:4]:
            raise UserError(
                f"{path}: is not UTF-8 but UTF-16 or the like; write it again: iconv -f UTF-16 -t UTF-8 {path} > new.json"
            )
        if head[:2] in (b"\x1f\x8b", b"PK"):
            raise UserError(f"{path}: is compressed; unpack it first")
        if first == b"{" and _is_spread_over_lines(head):
            yield from _spans_within(file, path, depth_of_records=1)
        elif first == b"{":
            offset = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, offset, offset + len(line)
                offset += len(line)
        elif first == b"[":
            yield from _spans_within(file, path, depth_of_records=2)
        else:
            raise UserError(f"{path}: begins with {first!r}; wanted a JSON array of objects, or one object per line")


def _is_spread_over_lines(head: bytes) -> bool:
    """Whether the begin of a file is an object on several lines, not one object per line, perhaps with a broken first."""
    lines = [line for line in head.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    if len(lines) < 2 or lines[1].lstrip()[:1] == b"{" and lines[1][:1] == b"{":
        return False
    try:
        json.loads(lines[0])
    except (ValueError, RecursionError):
        return True
    return False


def _spans_within(file: BinaryIO, path: Path, depth_of_records: int) -> Iterator[Span]:
    """Spans of the objects of an array, or of those in a row (depth 1), found by brackets and quotes: none is parsed, and
    no file is held whole."""
    token = re.compile(rb'[{}\[\]"\\]')
    depth, in_text, start, number, offset, skip = 0, False, 0, 0, 0, -1
    while chunk := file.read(CHUNK):
        for match in token.finditer(chunk):
            place, byte = offset + match.start(), match[0]
            if place == skip:
                continue
            if byte == b"\\":
                skip = place + 1 if in_text else -1
            elif byte == b'"':
                in_text = not in_text
            elif not in_text and byte in b"{[":
                depth += 1
                if depth == depth_of_records:
                    start = place
            elif not in_text:
                depth -= 1
                if depth == depth_of_records - 1:
                    number += 1
                    yield number, start, place + 1
        offset += len(chunk)
    if depth:
        raise UserError(
            f"{path}: ends within a record or its array after {number} records ({offset} bytes); the file is cut short: get it again"
        )


def _check_gaps(path: Path, spans: list[Span]) -> None:
    """What stands between an array's objects is white space and commas.

    Raises:
        UserError: it is not; such an entry would be passed over without a word.
    """
    with open(path, "rb") as file:
        for (number, _, stop), (_, start, _) in zip(spans, spans[1:]):
            if start - stop > 2:
                file.seek(stop)
                gap = file.read(start - stop)
                if _BLANK.fullmatch(gap) is None:
                    raise UserError(
                        f"{path}: after record {number} comes {gap.strip(b', ')[:60]!r}; wanted objects only"
                    )


def _repeated(path: Path, spans: list[Span]) -> tuple[set[int], set[int]]:
    """Numbers of records that are the same bytes as an earlier one, and of those that only share an earlier one's id."""
    bodies: set[bytes] = set()
    ids: set[bytes] = set()
    duplicates: set[int] = set()
    shared: set[int] = set()
    identity = re.compile(rb'"id"\s*:\s*("(?:[^"\\]|\\.)*"|-?\d+)')
    with open(path, "rb") as file:
        for number, start, stop in spans:
            file.seek(start)
            data = file.read(stop - start).strip()
            body = hashlib.blake2b(data, digest_size=12).digest()
            if body in bodies:
                duplicates.add(number)
                continue
            bodies.add(body)
            found = identity.search(data)
            if found:
                name = hashlib.blake2b(found[1], digest_size=12).digest()
                if name in ids:
                    shared.add(number)
                ids.add(name)
    return duplicates, shared


def _file(path: str | os.PathLike) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the JSON or JSONL file of the data set")
    return path


def _stamp(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            "data convert: parquet needs the package pyarrow; run: pip install 'tokenflex[parquet]'"
        ) from None
    return pyarrow, parquet
