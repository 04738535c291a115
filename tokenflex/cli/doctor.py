"""`tokenflex doctor`: is this machine fit to train?"""

import argparse
import json
from collections.abc import Callable

from .options import Commands, add_debug, add_recipe, positive


def add_to(commands: Commands) -> None:
    """Add the command to a parser's sub-commands."""
    command = commands.add_parser(
        "doctor",
        help="is this machine fit to train?",
        description="Check versions, GPUs, kernels, compiler, disks, shared memory, file limits, port and hub; each line says what to do. "
        "Ends with status 1 if a check failed. Every run leaves the same in its folder as doctor.json, without the disks' speed.",
    )
    add_recipe(command)
    add = command.add_argument
    add("--quick", action="store_true", help="do not measure disks or run kernels")
    add("--port", type=positive, default=29500, metavar="N", help="that ranks would meet at (default 29500)")
    add("--json", action="store_true", help="print it as JSON")
    add_debug(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    from ..config import load_config
    from ..doctor import FAIL, as_json, describe, examine, worst

    config = load_config(arguments.config, arguments.set)
    folders = [config.output_dir, config.data.cache_dir]
    findings = examine(folders, is_thorough=not arguments.quick, port=arguments.port)
    say(json.dumps(as_json(findings), indent=1) if arguments.json else describe(findings))
    return int(worst(findings) == FAIL)
