"""The command `tokenflex`: the single-process tools. What runs under a launcher is in `launch/`."""

import argparse
from collections.abc import Sequence

from . import (
    bench,
    checkpoint,
    convert,
    demo,
    doctor,
    estimate,
    generate,
    index,
    inspect,
    plan,
    report,
    serve,
    simulate,
    train_router,
    validate,
)
from .launching import entry_point


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, the function of (arguments, say) that does it."""
    top = argparse.ArgumentParser(
        prog="tokenflex", description="Vision-language models with any number of visual tokens."
    )
    top.set_defaults(debug=False)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    generate.add_to(commands)
    serve.add_to(commands)
    demo.add_to(commands)
    data = commands.add_parser(
        "data", help="convert, validate, inspect or index data", description="Bring in and check data."
    )
    of_data = data.add_subparsers(required=True, metavar="COMMAND")
    convert.add_to(of_data)
    validate.add_to(of_data)
    inspect.add_to(of_data)
    index.add_to(of_data)
    checkpoint.add_to(commands)
    plan.add_to(commands)
    estimate.add_to(commands)
    simulate.add_to(commands)
    doctor.add_to(commands)
    report.add_to(commands)
    train_router.add_to(commands)
    bench.add_to(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    arguments = parser().parse_args(argv)
    return entry_point(arguments.run, arguments)
