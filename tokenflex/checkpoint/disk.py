"""Writing that survives a power cut: every byte synced before a name points to it, every short write carried on.

All writing of checkpoints goes through these few functions, so that tests can make any of their calls fail.
"""

import os
import shutil
from os import PathLike
from pathlib import Path
from types import TracebackType

from blake3 import blake3

from .. import failpoints

CHUNK = 1 << 24
"""Bytes handed to the kernel at once (16 MiB): large enough to cost nothing, small enough to stop between."""


class HashingFile:
    """A new file that is hashed as it is written; closing it syncs it to disk. Use as a context manager.

    Raises:
        OSError: any call may; the caller owns the folder and removes it whole.
    """

    def __init__(self, path: str | PathLike):
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._hash = blake3()
        self.num_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Write all of a bytes-like object."""
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), CHUNK):
            chunk = view[begin : begin + CHUNK]
            self._hash.update(chunk)
            while chunk:
                chunk = chunk[os.write(self._descriptor, chunk[: failpoints.io_limit("write", len(chunk))]) :]
        self.num_bytes += len(view)

    @property
    def checksum(self) -> str:
        """BLAKE3 of what was written, as hexadecimal digits."""
        return self._hash.hexdigest()

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                failpoints.hit("fsync")
                failpoints.io_limit("fsync")
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


def write_synced(path: str | PathLike, data: bytes) -> None:
    """Write bytes to a new file and sync it."""
    with HashingFile(path) as file:
        file.write(data)


def replace_synced(source: str | PathLike, target: str | PathLike) -> None:
    """Rename, over what is there, and sync the folder, so that the new name survives."""
    failpoints.io_limit("rename")
    os.replace(source, target)
    sync_folder(Path(target).parent)


def sync_folder(folder: str | PathLike) -> None:
    """Sync a folder's entries (names of its files) to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        failpoints.io_limit("fsync")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: str | PathLike) -> None:
    """Remove a checkpoint: renamed first, so that half a removal is never taken for a checkpoint."""
    folder = Path(folder)
    doomed = folder.with_name(f".removed-{folder.name}-{os.getpid()}")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def checksum_of(path: str | PathLike) -> str:
    """BLAKE3 of a file's bytes as hexadecimal digits."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def free_bytes(folder: str | PathLike) -> int:
    """Space left where `folder` lies."""
    return shutil.disk_usage(folder).free
