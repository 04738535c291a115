"""Small tools around files and processes: what appears whole or not at all, who may be inside, work over fresh processes."""

import errno
import fcntl
import multiprocessing
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_whole(path: str | os.PathLike, data: bytes | str) -> None:
    """Write a file so that a reader, or the next start after a kill, finds the old bytes or the new ones.

    Raises:
        OSError: the file cannot be written; what was there stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged_folder(folder: str | os.PathLike, replaces: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which takes its name in one rename when the block ends well.

    What lay at `folder` is replaced; without `replaces` it stays, and what was staged is dropped: another process was
    faster. The user's umask decides who may read it.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    staging.mkdir()
    try:
        yield staging
        if replaces:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            os.rename(staging, folder)
        except OSError:
            if replaces or not folder.exists():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def only_one_inside(lock: str | os.PathLike) -> Iterator[None]:
    """Within this context no other process holds the lock file `lock`: what is built there is built once.

    The lock ends with its process. Where none can be had (a read-only folder, a file system without locks), there is none.
    """
    descriptor = None
    try:
        Path(lock).parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def over_processes(
    work: Callable, items: Iterable, num_workers: int, in_order: bool = True
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, `work(item)`) over up to `num_workers` processes; in this one where one is enough.

    Processes are spawned, not forked: forking a process that runs torch's or gloo's threads can deadlock. So `work`, items
    and results are pickled. `in_order=False` yields whatever is done first. They end with this process, however it ends.

    Raises:
        BrokenProcessPool: a worker died.
    """
    items = list(items)
    if num_workers <= 1 or len(items) <= 1:
        for item in items:
            yield item, work(item)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(items)), mp_context=context, initializer=_end_with_parent) as pool:
        futures = {pool.submit(work, item): item for item in items}
        try:
            for future in futures if in_order else as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever, since its siblings hold the queue open too."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # spawned by it

    def wait_and_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()
