"""`tokenflex checkpoint ...`: list, verify or export a run's checkpoints."""

import argparse
from collections.abc import Callable

from .options import Commands, add_debug


def add_to(commands: Commands) -> None:
    """Add the command and its actions to a parser's sub-commands."""
    command = commands.add_parser("checkpoint", help="list, verify or export a run's checkpoints")
    actions = command.add_subparsers(required=True, metavar="ACTION")
    for name, run, text in (
        ("ls", run_ls, "list a run's checkpoints: step, size, ranks, loss, what is wrong"),
        ("verify", run_verify, "read every byte and compare checksums; status 1 if any is damaged"),
        ("export", run_export, "write a checkpoint's model as a transformers folder"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("folder", metavar="DIR", help="a run's folder (runs/NAME); for export also one checkpoint")
        if name == "export":
            action.add_argument("--to", required=True, metavar="DIR", help="folder to write the model to")
            action.add_argument(
                "--average", action="store_true", help="the average of its weights (train.ema_decay) instead"
            )
        add_debug(action)
        action.set_defaults(run=run)


def run_ls(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    """`tokenflex checkpoint ls`."""
    from ..checkpoint import latest_tag, run_entries

    place, found = run_entries(arguments.folder)
    for entry in found:
        say(entry.describe(is_latest=entry.tag == latest_tag(place)))
    return 0


def run_verify(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    """`tokenflex checkpoint verify`."""
    from ..checkpoint import run_entries

    _, found = run_entries(arguments.folder, is_thorough=True)
    for entry in found:
        say(f"{entry.tag}  {'good' if entry.manifest else 'damaged: ' + entry.problem}")
    return int(any(entry.manifest is None for entry in found))


def run_export(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    """`tokenflex checkpoint export`."""
    from ..export import export_checkpoint

    manifest = export_checkpoint(arguments.folder, arguments.to, arguments.average)
    say(f"exported  the model of step {manifest.step} to {arguments.to}")
    return 0
