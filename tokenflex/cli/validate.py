"""`tokenflex data validate`: find every bad sample of shards."""

import argparse
import sys
from collections.abc import Callable

from tqdm import tqdm

from .options import Commands, add_debug, add_limits, add_workers


def add_to(commands: Commands) -> None:
    """Add the command to a parser's sub-commands."""
    command = commands.add_parser(
        "validate",
        help="find every bad sample of shards",
        description="Read and decode every sample; name shard, key, offset and reason of each bad one. "
        "Ends with status 0 if all are good, 1 if any is bad.",
    )
    command.add_argument("shards", nargs="+", metavar="SHARDS", help="tar files, folders of them, or glob patterns")
    command.add_argument(
        "--report", metavar="FILE", help="also write the bad samples as JSON lines, and the counts last"
    )
    add_limits(command)
    add_workers(command)
    add_debug(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    from ..data import Limits, find_shards
    from ..prepare.validate import validate, write_report

    shards = find_shards(arguments.shards, what="data validate")
    with tqdm(unit=" samples", disable=not sys.stderr.isatty()) as bar:
        tally, problems = validate(shards, Limits.of(arguments), arguments.workers, progress=bar.update)
    for problem in problems:
        place = f"byte {problem.offset}" if problem.offset >= 0 else "?"
        say(f"{problem.shard}\t{problem.key or '-'}\t{place}\t{problem.reason}\t{problem.detail}")
    say("\n".join(tally.lines()))
    if arguments.report:
        write_report(arguments.report, tally, problems)
    return int(bool(problems))
