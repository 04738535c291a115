"""Webdataset shards: find them, walk them, and read one sample by its place, without unpacking anything to disk."""

import glob
import io
import tarfile
from pathlib import Path

from webdataset.tariterators import base_plus_ext

from ..errors import UserError


def find_shards(sources, what="data.train"):
    """Sorted tar files of paths, folders and glob patterns; each source's in turn.

    Raises:
        UserError: a source without any shard.
    """
    shards = []
    for source in sources:
        path = Path(source).expanduser()
        found = sorted(path.glob("*.tar")) if path.is_dir() else [Path(p) for p in sorted(glob.glob(str(path)))]
        if not found:
            raise UserError(
                f"{what}: no shard at {source}; wanted a .tar file, a folder of them or a glob pattern such as data/*.tar"
            )
        shards += found
    return shards


def walk_shard(path):
    """Yield (members, offset, num_bytes) of each sample of a shard, in order.

    `members` is {"__key__": key, extension: bytes}; the sample's members lie in the tar's bytes [offset, offset +
    num_bytes). Members of one key must follow each other, as webdataset wants them.

    Raises:
        UserError: the tar is damaged, or holds a member that is no regular file.
    """
    try:
        with tarfile.open(path, mode="r:") as tar:
            members, start = None, 0
            for info in tar:
                key, extension = base_plus_ext(info.name)
                if key is None:
                    raise UserError(
                        f"{path}: member {info.name!r} has no extension; wanted names such as 000001.json, 000001.0.jpg"
                    )
                if members is not None and members["__key__"] != key:
                    yield members, start, info.offset - start
                    members = None
                if members is None:
                    members, start = {"__key__": key}, info.offset
                _add_member(members, tar, info, path)
            if members is not None:
                yield members, start, tar.offset - start
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: not a readable tar file ({error}); build the shard again") from None


def read_sample(file, offset, num_bytes, where):
    """Members of the one sample that lies at `offset` of an open shard; see `walk_shard`."""
    file.seek(offset)
    data = file.read(num_bytes)
    if len(data) != num_bytes:
        raise UserError(
            f"{where}: ends at {offset + len(data)} bytes, the index says {offset + num_bytes}; the shard has changed: index it again"
        )
    members = None
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for info in tar:
            key, _ = base_plus_ext(info.name)
            members = members or {"__key__": key}
            if members["__key__"] != key:
                raise UserError(
                    f"{where}: holds {key!r} where the index says {members['__key__']!r}; the shard has changed: index it again"
                )
            _add_member(members, tar, info, where)
    return members


def _add_member(members, tar, info, where):
    if not info.isreg():
        raise UserError(
            f"{where}: member {info.name!r} is not a regular file; links and folders have no place in a shard"
        )
    extension = base_plus_ext(info.name)[1].lower()
    if extension in members:
        raise UserError(f"{where}: member {info.name!r} comes twice; keys must be unique within a shard")
    members[extension] = tar.extractfile(info).read()
