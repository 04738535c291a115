#!/usr/bin/env python3
"""Build the sidecar index of training shards, in parallel under MPI or alone; shards that it knows are not read again.

mpirun -n 8 python launch/index.py --config recipe.yaml
python launch/index.py 'data.train=[/data/shards]' --rebuild
"""

import argparse
import sys
from collections.abc import Sequence

from tokenflex.cli.launching import Say, entry_point, print_check
from tokenflex.cli.options import launch_parser
from tokenflex.config import load_config
from tokenflex.corpus import resolve_embedded


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = launch_parser(__doc__)
    parser.add_argument(
        "--rebuild", action="store_true", help="read every shard again, for another tokenizer, template or tiling"
    )
    return parser.parse_intermixed_args(argv)


def main(arguments: argparse.Namespace, say: Say) -> int:
    """Build the index; returns the exit status."""
    config = load_config(arguments.config, arguments.overrides)
    if arguments.check:
        return print_check(config)
    from tokenflex.data.index import communicator
    from tokenflex.data.sources import index_sources, source_configs
    from tokenflex.model import build_processor

    mpi = communicator()
    say.is_main = mpi.rank == 0
    source_configs(config.data)  # refused before anything is built
    config = resolve_embedded(config, say)
    processor = build_processor(config.model, config.budget)
    index_sources(config.data, processor, mpi, arguments.rebuild, say)
    return 0


if __name__ == "__main__":
    sys.exit(entry_point(main, parse(sys.argv[1:]), is_job=True))
