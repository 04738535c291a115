"""Pictures of samples that a run named: read again from their shards, where these are still there, and never believed."""

import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...data import BadSample, Limits
from ...data.images import read_header, thumbnail_jpeg

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_IMAGES = 4
"""Pictures of one sample."""
MAX_MEMBERS = 64
"""Files of one sample."""
MAX_WALKED = 1_000_000
"""Files of a shard that are passed in search of samples."""


def pictures_at(shard: str, offset: int, key: str, limits: Limits) -> list[bytes]:
    """Small JPEGs of the sample that begins at a byte of a shard; none where the shard is not on this machine.

    Without a `key` (it was not known) the sample is whose file comes first.
    """
    images: list[bytes] = []
    for member, tar in _members(shard, offset, MAX_MEMBERS):
        key = key or _key(member.name)
        if _key(member.name) != key:
            break
        images += _thumbnail(tar, member, limits)
    return images[:MAX_IMAGES]


def pictures_of(shard: str, keys: Iterable[str], limits: Limits) -> dict[str, list[bytes]]:
    """{key: small JPEGs} of samples that are sought in a shard by their keys."""
    wanted, found = set(keys), dict[str, list[bytes]]()
    for member, tar in _members(shard, 0, MAX_WALKED):
        key = _key(member.name)
        if key not in wanted and wanted <= found.keys():
            break
        if key in wanted:
            found.setdefault(key, []).extend(_thumbnail(tar, member, limits))
    return {key: images[:MAX_IMAGES] for key, images in found.items()}


def _members(shard: str, offset: int, most: int) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The files of a shard from a byte on, as far as it can be read."""
    path = Path(shard)
    if offset < 0 or not os.path.isfile(path) or path.is_symlink():
        return
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for _ in range(most):
                    member = tar.next()
                    if member is None:
                        return
                    tar.members = []  # type: ignore[attr-defined]  # else it remembers every file that it has passed
                    yield member, tar
    except (OSError, tarfile.TarError, ValueError):
        return


def _thumbnail(tar: tarfile.TarFile, member: tarfile.TarInfo, limits: Limits) -> list[bytes]:
    """The picture in a file, as a list of one; empty where it is none, or too large, or does not decode."""
    if not member.isreg() or not member.name.lower().endswith(SUFFIXES) or member.size > limits.max_member_bytes:
        return []
    try:
        file = tar.extractfile(member)
        data = file.read() if file else b""
        read_header(data, limits)
        return [thumbnail_jpeg(data, longest=200)]
    except (BadSample, OSError, tarfile.TarError):
        return []


def _key(name: str) -> str:
    """The part of a member's name that its sample shares, as webdataset cuts it: up to the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"
