#!/usr/bin/env python3
"""Build the sidecar index of training shards, in parallel under MPI or alone.

mpirun -n 8 python launch/index.py --config recipe.yaml
python launch/index.py 'data.train=[/data/shards]' --rebuild
"""

import argparse
import shutil
import sys
from pathlib import Path

from tokenflex.config import load_config
from tokenflex.launching import add_check, entry_point, print_check

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override any value of the configuration"
    )
    parser.add_argument("--config", default=str(QUICKSTART), help="recipe in YAML (default: the quick start)")
    parser.add_argument("--rebuild", action="store_true", help="build again even if an index is there")
    add_check(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_intermixed_args(argv)


def main(arguments, say):
    config = load_config(arguments.config, arguments.overrides)
    if arguments.check:
        return print_check(config)
    from mpi4py import MPI

    from tokenflex.data import (
        embedded_corpus,
        find_shards,
        index_folder,
        load_or_build_index,
        with_embedded_encoder,
    )
    from tokenflex.data.index import ShardScanner, build_index
    from tokenflex.model import build_processor

    mpi = MPI.COMM_WORLD
    say.is_main = mpi.rank == 0
    if mpi.rank == 0:
        with_embedded_encoder(config, say)
    mpi.Barrier()
    config = with_embedded_encoder(config)
    corpus = None
    if "embedded" in config.data.train:
        if mpi.rank == 0:
            embedded_corpus(config.data, say)
        mpi.Barrier()
        corpus = embedded_corpus(config.data, say)
    processor = build_processor(config.model, config.budget, str(corpus / "tokenizer") if corpus else "")
    shards = find_shards([str(corpus / "train") if source == "embedded" else source for source in config.data.train])
    folder = index_folder(shards, config.data.cache_dir)
    if mpi.rank == 0 and arguments.rebuild:
        shutil.rmtree(folder, ignore_errors=True)
    mine = {shard: ShardScanner(processor)(shard) for shard in shards[mpi.rank :: mpi.size]}
    tables = mpi.gather(mine)
    if mpi.rank == 0:
        columns = {shard: arrays for table in tables for shard, arrays in table.items()}
        build_index(shards, processor, folder, map_shards=lambda scan, items: (columns[shard] for shard in items))
        index = load_or_build_index(shards, processor, folder)
        say(f"index     {folder}: {len(index)} samples of {len(shards)} shards, by {mpi.size} processes")
    mpi.Barrier()
    return 0


if __name__ == "__main__":
    sys.exit(entry_point(main, parse(sys.argv[1:]), is_job=True))
