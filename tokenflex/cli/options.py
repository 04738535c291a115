"""Options that several commands share, so that they read and default the same everywhere."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from ..config import DataConfig

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What commands are added to: what `add_subparsers` gives."""
QUICKSTART = Path(__file__).parent.parent.parent / "configs" / "quickstart.yaml"


def positive(text: str) -> int:
    """A whole number above zero; argparse says so otherwise."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


positive.__name__ = "positive number"  # argparse names the type in its message


def listed(kind: Callable) -> Callable[[str], list]:
    """A converter of `1,2,3` to a list of `kind`."""

    def numbers(text: str) -> list:
        return [kind(part) for part in text.split(",")]

    return numbers


def steps(text: str) -> tuple[int, int]:
    """(first, last) of `5-7` or `5`; argparse says so where it is none."""
    first, _, last = text.partition("-")
    found = positive(first), positive(last or first)
    if found[1] < found[0]:
        raise ValueError
    return found


steps.__name__ = "range of steps such as 5-7"


def add_debug(command: argparse.ArgumentParser) -> None:
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_limits(command: argparse.ArgumentParser) -> None:
    """What a sample may hold, as `DataConfig` defaults it."""
    defaults = DataConfig()
    for name, default, text in (
        ("--max-image-pixels", defaults.max_image_pixels, "larger images are bad (default 1e8)"),
        ("--max-member-bytes", defaults.max_member_bytes, "larger files are bad (default 64 MiB)"),
    ):
        command.add_argument(name, type=positive, default=default, metavar="N", help=text)


def add_workers(command: argparse.ArgumentParser) -> None:
    number = os.cpu_count() or 1
    text = "processes (default: one per core)"
    command.add_argument("--workers", type=positive, default=number, metavar="N", help=text)


def launch_parser(description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """The parser of an entry point under a launcher: a recipe, overrides, --check, --debug, and what launchers add."""
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override any value of the configuration"
    )
    parser.add_argument("--config", default=str(QUICKSTART), help="recipe in YAML (default: the quick start)")
    parser.add_argument("--local_rank", type=int, help="set by launchers; the environment is what counts")
    parser.add_argument(
        "--check", action="store_true", help="check the configuration, print the run's folders as JSON and end"
    )
    add_debug(parser)
    return parser
