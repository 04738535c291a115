"""Frozen weights are written once and then linked: every checkpoint has them whole, and the disk has them twice.

A checkpoint's `frozen-RANK` file is a hard link to one of two copies with the same checksum, by turns. So a checkpoint's folder
is complete in itself, what retention removes frees no byte that another checkpoint needs, and where one copy is damaged the
other is found in the checkpoint before. Where the file system has no hard links the file is written anew, as any other.
"""

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import failpoints
from .disk import checksum_of, replace_synced
from .folder import check_file, tags
from .manifest import Damaged, FileEntry, Manifest, read_manifest
from .shard import describe_shard, write_shard

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What a file system answers that has no hard links, or no more of them."""


@dataclass
class _Copy:
    """One inode, by the paths of the checkpoints that have a link to it, newest last."""

    paths: list[Path] = field(default_factory=list)

    def alive(self, size: int) -> Path | None:
        """A path that still leads to it, or None where retention has removed the last."""
        while self.paths:
            try:
                if self.paths[-1].lstat().st_size == size:
                    return self.paths[-1]
            except FileNotFoundError:
                pass
            self.paths.pop()
        return None


class FrozenFile:
    """This rank's frozen tensors, which are the same in every checkpoint of a start.

    Args:
        folder: of the run's checkpoints.
        num_copies: 2, or 1 where a single checkpoint is kept (a second copy would have no place).
    """

    def __init__(self, folder: Path, num_copies: int):
        self.folder, self.num_copies = folder, num_copies
        self._entry: FileEntry | None = None
        self._copies: list[_Copy] = []

    def put(self, place: Path, target: Path, tensors: Mapping[str, torch.Tensor], step: int) -> tuple[FileEntry, int]:
        """Have the file at `place` (which becomes `target`); returns what a manifest says of it, and the bytes written.

        Raises:
            OSError: the disk is full or fails.
        """
        if self._entry is None:
            self._find(place.name, tensors)
        entry = self._entry
        known = [(copy, path) for copy in self._copies if (path := copy.alive(entry["size"]))] if entry else []
        self._copies = [copy for copy, _ in known]
        if entry is not None and len(known) >= self.num_copies:
            copy, path = known[0]  # the one whose turn was longest ago
            if _link(path, place):
                self._copies = [*self._copies[1:], copy]
                copy.paths.append(target)
                return entry, 0
        self._entry = entry = write_shard(place, tensors, step)
        self._copies.append(_Copy([target]))
        return entry, entry["size"]

    def _find(self, name, tensors):
        """Copies that an earlier start has left: by their bytes, not by what is said of them."""
        found: dict[int, Path] = {}
        for tag in tags(self.folder):
            path = self.folder / tag / name
            if path.is_file() and not path.is_symlink():
                found[path.stat().st_ino] = path
        if not found:
            return
        wanted = describe_shard(tensors)
        for path in list(found.values())[-self.num_copies :]:
            if path.stat().st_size == wanted["size"] and checksum_of(path) == wanted["blake3"]:
                self._copies.append(_Copy([path]))
                self._entry = wanted


def checked_and_repaired(place: Path, rank: int = 0, num_ranks: int = 1) -> tuple[Manifest, list[str]]:
    """(manifest, what was repaired) of a checkpoint, once this rank's share of its files is good.

    A damaged file of frozen weights is replaced by the good copy that another checkpoint of the run has.

    Raises:
        Damaged: with the reason.
    """
    if place.is_symlink():
        raise Damaged("is a link, which is never followed")
    manifest, repaired = read_manifest(place), []
    for name in sorted(manifest.files)[rank::num_ranks]:
        try:
            check_file(place / name, manifest.files[name])
        except Damaged as damage:
            source = _repair(place / name, manifest.files[name]) if name.startswith("frozen") else None
            if source is None:
                raise
            repaired.append(f"{damage}; a good copy was found in {source}")
    return manifest, repaired


def _repair(path, entry):
    """Put a good copy of a damaged file in its place, from another checkpoint of the run; returns whose, or None."""
    tried = {path.stat().st_ino} if path.exists() else set()
    for tag in reversed(tags(path.parent.parent)):
        other = path.parent.parent / tag / path.name
        if not other.is_file() or other.is_symlink() or (inode := other.stat().st_ino) in tried:
            continue
        tried.add(inode)
        if other.stat().st_size == entry["size"] and checksum_of(other) == entry["blake3"]:
            temporary = path.with_name(f".{path.name}-{os.getpid()}")
            try:
                if _link(other, temporary):
                    replace_synced(temporary, path)
                    return other.parent
            except OSError:  # a folder that cannot be written to: the checkpoint stays damaged, and is passed over
                return None
    return None


def _link(source, target):
    """Whether `target` is now a hard link to `source`; False where that cannot be had here."""
    try:
        failpoints.io_limit("link")
        os.link(source, target)
    except FileNotFoundError:  # removed since it was looked at
        return False
    except OSError as error:
        if error.errno in NO_LINKS:
            return False
        raise
    return True
