#!/usr/bin/env python3
"""Build the sidecar index of training shards, in parallel under MPI or alone; shards that it knows are not read again.

mpirun -n 8 python launch/index.py --config recipe.yaml
python launch/index.py 'data.train=[/data/shards]' --rebuild
"""

import os
import shutil
import sys
from contextlib import nullcontext

from tokenflex.cli.launching import entry_point, print_check
from tokenflex.cli.options import launch_parser
from tokenflex.config import load_config
from tokenflex.corpus import resolve_embedded
from tokenflex.errors import UserError


def parse(argv):
    parser = launch_parser(__doc__)
    parser.add_argument(
        "--rebuild", action="store_true", help="read every shard again, for another tokenizer, template or tiling"
    )
    return parser.parse_intermixed_args(argv)


def main(arguments, say):
    config = load_config(arguments.config, arguments.overrides)
    if arguments.check:
        return print_check(config)
    from tokenflex.data.index import sole_builder
    from tokenflex.data.sources import locate_sources
    from tokenflex.model import build_processor

    mpi = communicator()
    say.is_main = mpi.rank == 0
    config = resolve_embedded(config, say)
    processor = build_processor(config.model, config.budget)
    for _, shards, folder in locate_sources(config.data):
        with sole_builder(folder) if mpi.rank == 0 else nullcontext():
            index_shards(mpi, shards, folder, processor, config.data, arguments.rebuild, say)
    return 0


def index_shards(mpi, shards, folder, processor, data, rebuild, say):
    """Index one source, all processes together; rank 0 writes.

    Raises:
        UserError: a shard that cannot be read, on every process.
    """
    from tokenflex.data import Limits
    from tokenflex.data.index import ShardScanner, assemble_index, open_index, parts_folder, shards_to_scan

    if mpi.rank == 0 and rebuild:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(parts_folder(folder), ignore_errors=True)
    missing = mpi.bcast(shards_to_scan(shards, processor, folder) if mpi.rank == 0 else None)
    limits = Limits.of(data)
    scanner = ShardScanner(processor, parts_folder(folder), limits)
    parts, problem = scan_share(scanner, missing[mpi.rank :: mpi.size])
    problems = [text for text in mpi.allgather(problem) if text]
    if problems:  # every process learns of it, so that none waits for the others
        raise UserError(problems[0])
    tables = mpi.gather(parts)
    if mpi.rank == 0:
        parts = {shard: path for table in tables for shard, path in table.items()}
        assemble_index(shards, processor, folder, parts)
        index = open_index(folder, shards)
        say(
            f"index     {folder}: {len(index)} samples of {len(shards)} shards, {len(missing)} of them scanned, "
            f"by {mpi.size} processes"
        )
    mpi.Barrier()


def scan_share(scanner, shards):
    """({shard: part file}, what went wrong or None)."""
    try:
        return {shard: scanner(shard) for shard in shards}, None
    except UserError as error:
        return {}, str(error)


class Alone:
    """The part of an MPI communicator that is used here, of one process."""

    rank, size = 0, 1

    def Barrier(self):  # noqa: N802  MPI's name
        """Nobody to wait for."""

    def bcast(self, value):
        return value

    def gather(self, value):
        return [value]

    allgather = gather


def communicator():
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


if __name__ == "__main__":
    sys.exit(entry_point(main, parse(sys.argv[1:]), is_job=True))
