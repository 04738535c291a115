"""One index built by many processes: under MPI, or by this one alone."""

import os
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from ...errors import UserError
from ..problems import Limits
from ..processor import Processor
from ..shards import Shard, as_shards
from .builder import ShardScanner, assemble_index, shards_to_scan
from .places import parts_folder
from .reader import open_index


class Communicator(Protocol):
    """What building an index uses of MPI: the communicator of mpi4py, or `Alone`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def Barrier(self) -> None:  # noqa: N802  MPI's name
        """Wait for all processes."""

    def bcast(self, obj: Any) -> Any:
        """What rank 0 gives, on every process."""

    def gather(self, sendobj: Any) -> Any:
        """What every process gives, as a list, on rank 0."""

    def allgather(self, sendobj: Any) -> list:
        """What every process gives, as a list, on every process."""


class Alone:
    """A communicator of one process."""

    rank, size = 0, 1

    def Barrier(self) -> None:  # noqa: N802  MPI's name
        """Nobody to wait for."""

    def bcast(self, obj: Any) -> Any:
        return obj

    def gather(self, sendobj: Any) -> list:
        return [sendobj]

    allgather = gather


def communicator() -> Communicator:
    """All processes of `mpirun`, or this one alone where mpi4py is not installed.

    Raises:
        UserError: started by mpirun without mpi4py: every process would do all the work.
    """
    try:
        from mpi4py import MPI
    except ImportError:
        sizes = (os.environ.get(name, "1") for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
        if any(size != "1" for size in sizes):
            raise UserError("mpirun: needs the package mpi4py; run: pip install 'tokenflex[mpi]'") from None
        return Alone()
    return MPI.COMM_WORLD


def index_together(
    shards: Sequence[Shard],
    processor: Processor,
    folder: str | PathLike,
    limits: Limits,
    mpi: Communicator,
    say: Callable[[str], None] = print,
) -> None:
    """Bring the index at `folder` up to date, all processes together; rank 0 writes.

    Raises:
        UserError: a shard that cannot be read, on every process.
    """
    missing = on_main(mpi, lambda: shards_to_scan(shards, processor, folder))
    scanner = ShardScanner(processor, parts_folder(folder), limits)
    parts, problem = scan_share(scanner, missing[mpi.rank :: mpi.size])
    problems = [text for text in mpi.allgather(problem) if text]
    if problems:  # every process learns of it, so that none waits for the others
        raise UserError(problems[0])
    tables = mpi.gather(parts)
    if mpi.rank == 0:
        assemble_index(shards, processor, folder, {shard: path for table in tables for shard, path in table.items()})
        index = open_index(folder, as_shards(shards))
        say(
            f"index     {folder}: {len(index)} samples of {len(shards)} shards, {len(missing)} of them scanned, "
            f"by {mpi.size} processes"
        )
    mpi.Barrier()


def on_main(mpi: Communicator, function: Callable[[], Any]) -> Any:
    """What `function` gives on rank 0, on every process.

    Raises:
        UserError: what it raised there, on every process.
    """
    result = problem = None
    if mpi.rank == 0:
        try:
            result = function()
        except UserError as error:
            problem = str(error)
    result, problem = mpi.bcast((result, problem))
    if problem:
        raise UserError(problem)
    return result


def scan_share(scanner: ShardScanner, shards: Sequence[Shard]) -> tuple[dict[Shard, Path], str | None]:
    """({shard: part file}, what went wrong or None)."""
    try:
        return {shard: scanner(shard) for shard in shards}, None
    except UserError as error:
        return {}, str(error)
