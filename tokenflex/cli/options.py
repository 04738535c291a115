"""Options that several commands share, so that they read and default the same everywhere."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..config import DataConfig

if TYPE_CHECKING:
    from ..estimate.gpus import Gpu
    from ..plan import Lengths

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


def non_negative(text: str) -> int:
    """A whole number, zero or above; argparse says so otherwise."""
    number = int(text)
    if number < 0:
        raise ValueError
    return number


non_negative.__name__ = "whole number"


def share(text: str) -> float:
    """A number from 0 to 1; argparse says so otherwise."""
    number = float(text)
    if not 0 <= number <= 1:
        raise ValueError
    return number


share.__name__ = "number from 0 to 1"


def add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", default=str(QUICKSTART), metavar="FILE", help="recipe (default: the quick start)")
    text = "override a value of the recipe"
    command.add_argument("--set", action="append", default=[], metavar="section.key=value", help=text)


def add_ds_config(command: argparse.ArgumentParser) -> None:
    default = str(QUICKSTART.parent / "zero3.json")
    command.add_argument(
        "--ds_config", default=default, metavar="FILE", help="DeepSpeed JSON (default: configs/zero3.json)"
    )


def add_gpu(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--gpu", default="h100", metavar="NAME", help="which GPU: a100, h100, h200, b200, ... (default h100)")
    add(
        "--peak-tflops", type=float, metavar="X", help="of a GPU that is not in the table: dense bf16, 10^12 per second"
    )
    add("--gpu-memory-gb", type=float, metavar="X", help="and its memory")


def gpu_of(arguments: argparse.Namespace) -> "Gpu":
    """The GPU of the arguments: of the table, or by its figures.

    Raises:
        UserError: it is not in the table, and its figures are not given.
    """
    from ..estimate.gpus import Gpu, gpu_named

    if arguments.peak_tflops and arguments.gpu_memory_gb:
        return Gpu(name=arguments.gpu, flops=arguments.peak_tflops * 1e12, memory=arguments.gpu_memory_gb * 1e9)
    return gpu_named(arguments.gpu)


def add_lengths(command: argparse.ArgumentParser) -> None:
    which = command.add_mutually_exclusive_group()
    text = "plan these samples, not the recipe's: .npz with the int arrays text and tiles"
    which.add_argument("--lengths", metavar="FILE", help=text)
    which.add_argument("--index", metavar="DIR", help="likewise: an index of shards")


def lengths_of(arguments: argparse.Namespace) -> "Lengths | None":
    """The lengths that the arguments name, or None.

    Raises:
        UserError: they cannot be read.
    """
    if arguments.lengths:
        from ..plan.table import load_table

        return load_table(arguments.lengths)
    if arguments.index:
        from ..data.index import open_index

        return open_index(arguments.index)
    return None


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
