#!/usr/bin/env python3
"""Evaluate an exported model on a run's evaluation shards, on all ranks of the launcher.

deepspeed launch/evaluate.py --config recipe.yaml
python launch/evaluate.py --model DIR evaluate.num_visual_tokens=[64,100,256]
"""

import argparse
import sys
from collections.abc import Sequence

from tokenflex.cli.launching import Say, entry_point, print_check
from tokenflex.cli.options import launch_parser
from tokenflex.config import load_config
from tokenflex.corpus import resolve_embedded
from tokenflex.layout import DONE


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = launch_parser(__doc__)
    parser.add_argument("--model", help="exported model folder (default: the run's own)")
    return parser.parse_intermixed_args(argv)


def main(arguments: argparse.Namespace, say: Say) -> int:
    """Evaluate; returns the exit status."""
    config = load_config(arguments.config, arguments.overrides)
    if arguments.check:
        return print_check(config)
    from tokenflex import parallel

    parallel.quiet_libraries()
    from tokenflex.evaluate import evaluate_run

    launch = parallel.join()
    say.is_main = launch.rank == 0
    config = resolve_embedded(config, say)
    ranks = parallel.join_ranks(launch)
    say(f"world     {parallel.check_world(ranks)}")
    evaluate_run(config, ranks, say, arguments.model)
    return DONE


if __name__ == "__main__":
    sys.exit(entry_point(main, parse(sys.argv[1:]), is_job=True))
