#!/usr/bin/env python3
"""The claim, tried: one flexible model against a specialist for every count, under docs/paper-protocol.md.

python launch/paper.py                             trains what is missing, judges, writes docs/results/paper.json, plots and docs/paper.md
python launch/paper.py --seeds 1 --arms flexible,fixed-9
python launch/paper.py --times 5                   five rounds of short runs by turns, on a quiet machine: does time follow tokens?
python launch/paper.py --report                    judges what is there
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenflex.cli.launching import Say, entry_point
from tokenflex.cli.options import add_debug, positive
from tokenflex.layout import DONE, FAILED, REQUEUE

ROOT = Path(__file__).parent.parent


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override the base recipe, for trials"
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "paper.yaml", help="the base recipe")
    parser.add_argument(
        "--protocol", type=Path, default=ROOT / "docs" / "paper-protocol.md", help="what was settled before"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "paper.json", help="the record")
    parser.add_argument(
        "--beside",
        type=Path,
        metavar="RECORD",
        help="another record under the same protocol, shown as well and both together",
    )
    parser.add_argument(
        "--page", type=Path, default=ROOT / "docs" / "paper.md", help="the page whose tables are filled in"
    )
    parser.add_argument("--arms", default="core", help="core, all, or names with commas between them (default: core)")
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="runs of each arm (default: 5)")
    parser.add_argument(
        "--workers",
        type=positive,
        default=os.cpu_count() or 1,
        metavar="N",
        help="runs at once (default: one per core)",
    )
    parser.add_argument(
        "--minutes",
        type=positive,
        metavar="N",
        help="stop what runs after so long, as a signal would; the same command goes on",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--times", type=positive, metavar="ROUNDS", help="train no arm to its end; time them by turns")
    only.add_argument("--report", action="store_true", help="train nothing")
    add_debug(parser)
    return parser.parse_intermixed_args(argv)


def main(arguments: argparse.Namespace, say: Say) -> int:
    """Train, record, judge; returns the exit status."""
    from tokenflex import parallel

    parallel.quiet_libraries()
    from tokenflex.study.study import judge, open_study, take_times, train

    study = open_study(arguments.config, arguments.protocol, arguments.results, tuple(arguments.overrides), say)
    arms, seeds = study.arms(arguments.arms), list(range(1, arguments.seeds + 1))
    if arguments.times:
        take_times(study, arguments.times, say)
    elif not arguments.report:
        if arguments.minutes:
            signal.alarm(60 * arguments.minutes)
        left, is_stopped = train(study, arms, seeds, arguments.workers, say)
        signal.alarm(0)
        if is_stopped:
            return REQUEUE
        if left:
            say(f"failed    {', '.join(job.name for job in left)}; the same command tries them again")
            return FAILED
    judge(study, seeds, arguments.page, say, arguments.beside)
    return DONE


if __name__ == "__main__":
    sys.exit(entry_point(main, parse(sys.argv[1:])))
