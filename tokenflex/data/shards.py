"""Webdataset shards: find them, walk them, and read one sample by its place, without unpacking anything to disk."""

import glob
import io
import os
import re
from pathlib import Path

from ..errors import UserError
from .problems import BadSample, Limits
from .scan import read_lone_sample, scan_shard

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
"""What makes a source a URL. None is opened: webdataset's `pipe:`, for one, would run it as a shell command."""


def find_shards(sources, what="data.train"):
    """Sorted tar files of paths, folders and glob patterns; each source's in turn.

    Raises:
        UserError: a source without any shard.
    """
    shards = []
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


def walk_shard(path, limits=Limits()):  # noqa: B008  frozen
    """Yield (members, offset, num_bytes) of each sample of a shard, in order.

    `members` is {"__key__": key, extension: bytes}; the sample's members lie in the tar's bytes [offset, offset +
    num_bytes). Members of one key must follow each other, as webdataset wants them.

    Raises:
        BadSample: the tar is damaged, or holds a member that may not be read; `scan_shard` goes on past such.
        UserError: the file cannot be read.
    """
    try:
        for scanned in scan_shard(path, limits, parse=lambda members, where: members):
            if scanned.problem is not None:
                raise scanned.problem
            yield scanned.sample, scanned.offset, scanned.num_bytes
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a tar file") from None


def read_sample(file, offset, num_bytes, where, limits=Limits()):  # noqa: B008  frozen
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
