"""Walk a shard that may be damaged or hostile: every sample, good or bad, comes out with its place; nothing is extracted.

Python's tarfile ends silently at a broken header in the middle of an archive, so a flipped bit would lose every sample
after it without a word. Here the walk goes on at the next sound header, and the gap is reported.
"""

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from webdataset.tariterators import base_plus_ext

from .problems import BadSample, Limits
from .sample import Sample, parse_sample

BLOCK = tarfile.BLOCKSIZE
DAMAGE = (tarfile.TarError, ValueError, OverflowError)
"""What tarfile raises for headers that make no sense (a ValueError for a PAX record, for one)."""


@dataclass(frozen=True, kw_only=True)
class Scanned:
    """One sample of a shard: its place, and either the parsed `sample` (images encoded) or the `problem` with it."""

    key: str
    offset: int
    num_bytes: int
    sample: Sample | None = None
    problem: BadSample | None = None

    @property
    def whole(self) -> Any:
        """The sample.

        Raises:
            BadSample: the problem with it.
        """
        if self.problem is not None:
            raise self.problem
        return self.sample


def scan_shard(path: str | os.PathLike, limits: Limits, parse: Callable = parse_sample) -> Iterator[Scanned]:
    """Yield `Scanned` for every sample of a shard, in order, good or bad, and one per stretch of damage.

    A sample that fails because of damage beside it is reported once, as `tar-damaged` under its key. `parse(members,
    path)` makes the sample of its members.

    Raises:
        OSError: the file cannot be opened or read.
    """
    with open(path, "rb") as file:
        yield from _scan(file, os.fstat(file.fileno()).st_size, str(path), limits, parse)


def count_samples(path: str | os.PathLike) -> int:
    """How many samples a shard holds, good or bad, by its headers alone.

    Raises:
        OSError: the file cannot be opened or read.
    """
    with open(path, "rb") as file:
        return sum(bool(group.infos) for group in _groups(file, os.fstat(file.fileno()).st_size))


def read_lone_sample(file: BinaryIO, size: int, limits: Limits) -> dict[str, Any]:
    """The members of the only sample in a file, a stretch of `size` bytes of a shard; see `read_members`.

    Raises:
        BadSample: the stretch is damaged, holds another number of samples, or a member may not be read.
    """
    groups = _groups(file, size, has_end_mark=False)
    damage = [group.damage for group in groups if group.damage]
    if damage or len(groups) != 1:
        came = damage[0] if damage else f"{len(groups)} samples lie there"
        raise BadSample(
            "tar-damaged", f"{came}, where the index says one sample; the shard has changed: index it again"
        )
    return read_members(file, groups[0].key, groups[0].infos, limits)


def _scan(file: BinaryIO, size: int, path: str, limits: Limits, parse: Callable) -> Iterator[Scanned]:
    groups, pending, has_failed, is_empty = _groups(file, size), None, False, True
    for group in groups:
        if not group.infos:
            problem = BadSample("tar-damaged", group.damage, path, "", group.offset)
            pending = Scanned(key="", offset=group.offset, num_bytes=group.end - group.offset, problem=problem)
            pending = None if has_failed else pending
            is_empty = False
            continue
        scanned = _scan_group(file, group, path, limits, parse)
        has_failed = scanned.problem is not None and scanned.problem.reason == "tar-damaged"
        if pending is not None and not has_failed:
            yield pending
        pending, is_empty = None, False
        yield scanned
    if pending is not None:
        yield pending
    if is_empty:
        problem = BadSample("tar-empty", "holds no sample; remove the shard or build it again", path, "", 0)
        yield Scanned(key="", offset=0, num_bytes=size, problem=problem)


def check_member(info: tarfile.TarInfo, limits: Limits) -> None:
    """Whether a tar member may be read at all, by its header: type, name, size.

    Raises:
        BadSample: it may not.
    """
    name = info.name
    if not info.isreg() or info.issparse():
        raise BadSample(
            "member-type",
            f"member {ascii(name)} is not a regular file; links, folders and devices have no place in a shard",
        )
    if not _is_safe_name(name):
        raise BadSample(
            "member-name",
            f"member {ascii(name)} has an absolute, escaping or undecodable name; wanted a plain relative one",
        )
    if base_plus_ext(name)[0] is None:
        raise BadSample(
            "member-name", f"member {name!r} has no extension; wanted names such as 000001.json, 000001.0.jpg"
        )
    if not _is_wanted(name, limits):
        raise BadSample(
            "member-type",
            f"member {name!r} is of a type that is not read; wanted .json, .jpg, .jpeg, .png or .webp "
            "(for other shards: tokenflex data convert webdataset)",
        )
    if info.size > limits.max_member_bytes:
        raise BadSample(
            "member-size",
            f"member {name!r} has {info.size} bytes, at most {limits.max_member_bytes} are allowed; "
            "shrink it or raise data.max_member_bytes",
        )


def _is_wanted(name: str, limits: Limits) -> bool:
    extension = base_plus_ext(name)[1]
    return bool(extension and re.fullmatch(limits.extensions, extension, re.IGNORECASE))


def _is_safe_name(name: str) -> bool:
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or "\0" in name:
        return False
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in name)  # bytes that were not UTF-8


@dataclass
class _Group:
    """Members of one key that follow each other; or, without members, a stretch of damage."""

    key: str
    offset: int
    end: int = 0
    infos: list[tarfile.TarInfo] = field(default_factory=list)
    damage: str = ""
    is_interleaved: bool = False
    is_repeated: bool = False


def _scan_group(file: BinaryIO, group: _Group, path: str, limits: Limits, parse: Callable) -> Scanned:
    place: dict[str, Any] = {"key": group.key, "offset": group.offset, "num_bytes": group.end - group.offset}
    try:
        if group.is_repeated:
            raise BadSample("key-twice", "its key has come before in this shard; keys must be unique")
        if group.is_interleaved:
            raise BadSample(
                "key-twice", "its members are interleaved with others'; members of one key must follow each other"
            )
        return Scanned(sample=parse(read_members(file, group.key, group.infos, limits), path), **place)
    except BadSample as problem:
        if group.damage and problem.reason in ("no-json", "image-tags", "image-number", "tar-damaged"):
            problem = BadSample("tar-damaged", f"{problem.detail}, because {group.damage}")
        return Scanned(problem=problem.located(path, group.key, group.offset), **place)


def read_members(file: BinaryIO, key: str, infos: list[tarfile.TarInfo], limits: Limits) -> dict[str, Any]:
    """{"__key__": key, extension: bytes} of tar members, each checked before a byte of it is read.

    Raises:
        BadSample: a member that may not be read, comes twice or is cut short.
    """
    members: dict[str, Any] = {"__key__": key}
    for info in infos:
        if limits.ignore_others and not (info.isreg() and _is_wanted(info.name, limits)):
            continue
        check_member(info, limits)
        extension = base_plus_ext(info.name)[1].lower()
        if extension in members:
            raise BadSample("member-twice", f"member {info.name!r} comes twice; keys must be unique within a shard")
        file.seek(info.offset_data)
        members[extension] = file.read(info.size)
        if len(members[extension]) != info.size:
            raise BadSample("tar-damaged", f"member {info.name!r} ends before its {info.size} bytes")
    return members


def _groups(file: BinaryIO, size: int, has_end_mark: bool = True) -> list[_Group]:
    """All groups of a shard from its headers alone; samples' bytes are not kept."""
    groups: list[_Group] = []
    current: _Group | None = None
    for info, offset, end, damage in _walk(file, size, has_end_mark):
        if info is None:
            groups.append(_Group("", offset, end, damage=damage))
            continue
        key = base_plus_ext(info.name)[0]
        if key is None:  # a stray, such as a folder's entry: apart, and it parts no sample
            groups.append(_Group(info.name, offset, end, [info]))
            continue
        if current is not None and current.key == key and groups[-1] is not current and not groups[-1].infos:
            current.damage = groups.pop().damage  # damage within one sample: it is that sample's
        elif current is None or current.key != key:
            current = _Group(key, offset)
            groups.append(current)
        current.infos.append(info)
        current.end = end
        if info.offset_data + info.size > size:
            current.damage = f"the file ends at {size} bytes, within member {info.name!r}"
    _mark_neighbours(groups)
    return _without_parts(groups)


def _mark_neighbours(groups: list[_Group]) -> None:
    """What stands beside a stretch of damage may lack members because of it."""
    for i, group in enumerate(groups):
        if not group.infos:
            for neighbour in (*groups[max(0, i - 1) : i], *groups[i + 1 : i + 2]):
                if neighbour.infos:
                    neighbour.damage = neighbour.damage or group.damage


def _without_parts(groups: list[_Group]) -> list[_Group]:
    """Groups of a key that has come before: a repeated sample has its own JSON, a part of an interleaved one has none."""
    first: dict[str, _Group] = {}
    kept: list[_Group] = []
    for group in groups:
        before = first.setdefault(group.key, group) if group.infos else group
        if before is not group:
            has_json = any(base_plus_ext(info.name)[1] == "json" for info in group.infos)
            if not has_json:
                before.is_interleaved = True
                continue
            group.is_repeated = True
        kept.append(group)
    return kept


def _walk(file: BinaryIO, size: int, has_end_mark: bool) -> Iterator[tuple[tarfile.TarInfo | None, int, int, str]]:
    """Yield (member, offset, end, "") for every header and (None, offset, end, why) for every stretch of damage."""
    offset, is_cut = 0, False
    while offset < size:
        why = ""
        try:
            file.seek(offset)
            tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
            while (info := tar.next()) is not None:
                if info.size < 0:  # the walk would go back and never end
                    raise tarfile.ReadError(f"member of {info.size} bytes")
                is_cut = info.offset_data + info.size > size
                offset = tar.offset
                yield info, info.offset, offset, ""
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
        except DAMAGE as error:
            why = f"there is no sound tar header at byte {offset} ({' '.join(str(error).split())})"
        if offset >= size:
            break
        begin, offset = offset, _next_header(file, offset, size)
        is_blank = _is_blank(file, begin, offset)
        if offset >= size and is_blank and not why:
            return  # the two empty blocks at the end, and padding
        if offset >= size and is_blank and begin == 0:
            return  # nothing but empty blocks: an empty archive
        if is_blank:
            why = why or f"there is an end mark at byte {begin} with members after it"
        yield None, begin, offset, why or f"there is no sound tar header at byte {begin}"
        is_cut = is_cut or offset >= size
    if has_end_mark and offset >= size > 0 and not is_cut:
        yield None, size, size, "the file ends without an end mark: it may be cut short"


def _next_header(file: BinaryIO, offset: int, size: int) -> int:
    """Where the next sound tar header begins, after the block at `offset`; `size` where there is none."""
    place = offset + BLOCK
    while place < size:
        file.seek(place)
        chunk = file.read(2**20)
        for start in range(0, len(chunk), BLOCK):
            block = chunk[start : start + BLOCK]
            if block[257:262] == b"ustar" and _is_header(block):
                return place + start
        place += 2**20
    return size


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except DAMAGE:
        return False
    return True


def _is_blank(file: BinaryIO, begin: int, end: int) -> bool:
    file.seek(begin)
    while begin < end:
        chunk = file.read(min(2**20, end - begin))
        if chunk.strip(b"\0"):
            return False
        begin += len(chunk)
        if not chunk:
            break
    return True
