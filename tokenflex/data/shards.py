"""Webdataset shards: find them, walk them, and read one sample by its place, without unpacking anything to disk."""

import abc
import glob
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..errors import UserError
from .problems import BadSample, Limits
from .scan import Scanned, read_lone_sample, scan_shard

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
"""What makes a source a URL. None is opened: webdataset's `pipe:`, for one, would run it as a shell command."""


Stamp = dict[str, int | str]
"""What tells without reading a shard that it is the same: size and time, or size and entity tag."""


class Shard(Protocol):
    """A file of samples, wherever it lies and whatever its format: what index and loader know of it.

    Its text names it in messages. A sample's place is two whole numbers that `scan` gives and `read` takes.
    """

    @property
    def name(self) -> str:
        """What an index calls it."""

    @property
    def address(self) -> str:
        """Where it lies, in full."""

    @property
    def folder(self) -> Path | None:
        """The folder on this machine that it lies in; None where there is none."""

    def __hash__(self) -> int:
        """Shards are keys: those of one address are one."""

    def stamp(self) -> Stamp:
        """Its stamp now.

        Raises:
            UserError: it is not there.
        """

    def at(self, stamp: Stamp) -> "Shard":
        """The shard as it was under this stamp: its `local_file` has no later bytes, where that can be told."""

    def local_file(self) -> Path:
        """Path of its bytes on this machine, brought here first where they lie elsewhere.

        Raises:
            UserError: it cannot be brought here.
        """

    def scan(self, limits: Limits) -> Iterator[Scanned]:
        """Every sample in order, good or bad, with its place; see `scan_shard`.

        Raises:
            OSError: its bytes cannot be read. UserError: they cannot be brought here.
        """

    def open(self) -> Any:
        """What `read` reads from, with a `close()`; kept open over many samples.

        Raises:
            OSError, UserError: as `scan`.
        """

    def read(self, file: Any, offset: int, num_bytes: int, limits: Limits) -> dict[str, Any]:
        """{"__key__": key, extension: bytes}: the members of the sample at a place.

        Raises:
            BadSample: no one sample lies there, or a member of it may not be read.
        """


class Tar(abc.ABC):
    """The format of shards: a tar, as webdataset writes it. For classes with a `local_file`."""

    @abc.abstractmethod
    def local_file(self) -> Path:
        """As `Shard.local_file`."""

    def scan(self, limits: Limits) -> Iterator[Scanned]:
        return scan_shard(self.local_file(), limits)

    def open(self) -> BinaryIO:
        return open(self.local_file(), "rb")

    def read(self, file: BinaryIO, offset: int, num_bytes: int, limits: Limits) -> dict[str, Any]:
        return read_sample(file, offset, num_bytes, self, limits)


@dataclass(frozen=True)
class TarShard(Tar):
    """A shard on a disk of this machine, or mounted on it."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def address(self) -> str:
        return str(self.path.resolve())

    @property
    def folder(self) -> Path | None:
        return self.path.parent

    def stamp(self) -> Stamp:
        try:
            status = self.path.stat()
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; give the path of a tar file") from None
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}

    def at(self, stamp: Stamp) -> Shard:
        return self  # what has changed since is found by the lengths of its samples

    def local_file(self) -> Path:
        return self.path


ShardLike = Shard | str | os.PathLike
"""A shard, or the path of a tar file."""


def as_shards(shards: Sequence[ShardLike]) -> list[Shard]:
    """Shards, with `TarShard`s for paths."""
    return [
        TarShard(Path(shard)) if isinstance(shard, str | os.PathLike) and not isinstance(shard, TarShard) else shard
        for shard in shards
    ]


def find_shards(sources: Sequence[str], what: str = "data.train") -> list[Path]:
    """Sorted tar files of paths, folders and glob patterns; each source's in turn.

    Raises:
        UserError: a source without any shard.
    """
    shards: list[Path] = []
    for source in sources:
        scheme = SCHEME.match(str(source))
        if scheme and not Path(source).exists():
            raise UserError(
                f"{what}: {source} is a URL of the scheme {scheme[1]!r}, which is not opened; wanted a path of a .tar file, "
                "a folder of them or a glob pattern such as data/*.tar"
            )
        path = Path(source).expanduser()
        found = sorted(path.glob("*.tar")) if path.is_dir() else [Path(p) for p in sorted(glob.glob(str(path)))]
        if not found:
            raise UserError(
                f"{what}: no shard at {source}; wanted a .tar file, a folder of them or a glob pattern such as data/*.tar"
            )
        shards += found
    return shards


def walk_shard(path: str | os.PathLike, limits: Limits) -> Iterator[tuple[dict, int, int]]:
    """Yield (members, offset, num_bytes) of each sample of a shard, in order.

    `members` is {"__key__": key, extension: bytes}; the sample's members lie in the tar's bytes [offset, offset +
    num_bytes). Members of one key must follow each other, as webdataset wants them.

    Raises:
        BadSample: the tar is damaged, or holds a member that may not be read; `scan_shard` goes on past such.
        UserError: the file cannot be read.
    """
    try:
        for scanned in scan_shard(path, limits, parse=lambda members, where: members):
            yield scanned.whole, scanned.offset, scanned.num_bytes
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a tar file") from None


def read_sample(file: BinaryIO, offset: int, num_bytes: int, where: object, limits: Limits) -> dict:
    """Members of the one sample that lies at `offset` of an open shard; see `walk_shard`.

    Raises:
        BadSample: there is no sample of this size, or a member of it may not be read.
    """
    try:
        # Without a file position: loader processes that were forked off share it with their parent and each other.
        data = os.pread(file.fileno(), num_bytes, offset)
    except OSError as error:
        raise BadSample("tar-damaged", f"cannot be read ({error.strerror})", where, "", offset) from None
    if len(data) != num_bytes:
        detail = f"ends at {offset + len(data)} bytes, the index says {offset + num_bytes}; the shard has changed: index it again"
        raise BadSample("tar-damaged", detail, where, "", offset)
    try:
        return read_lone_sample(io.BytesIO(data), num_bytes, limits)
    except BadSample as problem:
        raise problem.located(where, "", offset) from None
