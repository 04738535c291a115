"""`tokenflex report`: a run's folder as one HTML page, or two runs side by side."""

import argparse
from collections.abc import Callable
from pathlib import Path

from .options import Commands, add_debug


def add_to(commands: Commands) -> None:
    """Add the command to a parser's sub-commands."""
    text = "Make one HTML page of what a run did: losses per count, speed, what went wrong, checkpoints, recipe."
    command = commands.add_parser("report", help="a run as one HTML page", description=text)
    add = command.add_argument
    add("run_folder", metavar="RUN", help="a run's folder, for example runs/quickstart")
    add("other_folder", metavar="RUN2", nargs="?", help="another run, to be shown beside it")
    add("--out", metavar="FILE", help="where the page goes (default: RUN/report.html)")
    add_debug(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    from ..layout import RunLayout
    from ..telemetry.report import read_run, write_page

    folders = [folder for folder in (arguments.run_folder, arguments.other_folder) if folder]
    runs = [read_run(folder) for folder in folders]
    path = arguments.out or RunLayout(Path(arguments.run_folder)).report
    write_page(path, runs)
    say(f"report    {path}")
    return 0
