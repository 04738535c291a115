"""The command `tokenflex`: the single-process tools. What runs under a launcher is in `launch/`."""

import argparse
import sys

from .cli_data import add_data_commands
from .cli_plan import add_plan_command
from .launching import entry_point


def parser():
    top = argparse.ArgumentParser(
        prog="tokenflex", description="Vision-language models with any number of visual tokens."
    )
    top.set_defaults(debug=False)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser(
        "generate", help="ask an exported model about images", description="Ask an exported model about images."
    )
    generate.add_argument(
        "--model", required=True, metavar="DIR", help="folder that training exported (runs/NAME/model)"
    )
    generate.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="image file; may be given several times"
    )
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    generate.add_argument(
        "--num-visual-tokens",
        metavar="N",
        help="visual tokens per image: 144, 8x12 (rows x columns), or a list with one per image: 64,256 (default: the model's largest trained count)",
    )
    generate.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="length of the answer at most (default 64)"
    )
    generate.add_argument("--debug", action="store_true", help="show the traceback of an error")
    generate.set_defaults(run=_generate)
    add_data_commands(commands)
    _add_checkpoint(commands)
    add_plan_command(commands)
    return top


def _add_checkpoint(commands):
    checkpoint = commands.add_parser("checkpoint", help="list, verify or export a run's checkpoints")
    actions = checkpoint.add_subparsers(required=True, metavar="ACTION")
    for name, run, text in (
        ("ls", _list_checkpoints, "list a run's checkpoints: step, size, ranks, loss, what is wrong"),
        ("verify", _verify_checkpoints, "read every byte and compare checksums; status 1 if any is damaged"),
        ("export", _export_checkpoint, "write a checkpoint's model as a transformers folder"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("folder", metavar="DIR", help="a run's folder (runs/NAME); for export also one checkpoint")
        action.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name == "export":
            action.add_argument("--to", required=True, metavar="DIR", help="folder to write the model to")
        action.set_defaults(run=run)


def _entries(folder, is_thorough):
    from pathlib import Path

    from .checkpoint import entries, latest_tag
    from .errors import UserError

    place = Path(folder) / "checkpoints" if (Path(folder) / "checkpoints").is_dir() else Path(folder)
    found = entries(place, is_thorough)
    if not found:
        raise UserError(f"{folder}: no checkpoint there; give a run's folder, for example runs/quickstart")
    return found, latest_tag(place)


def _list_checkpoints(arguments, say):
    found, latest = _entries(arguments.folder, is_thorough=False)
    for entry in found:
        if entry.manifest is None:
            say(f"{entry.tag}  damaged: {entry.problem}")
            continue
        m = entry.manifest
        score = "" if m.score is None else f"  mean loss {m.score:.4f}"
        mark = "  latest" if entry.tag == latest else ""
        say(f"{entry.tag}  {m.time}  {m.num_bytes / 1e6:.1f} MB  {m.num_ranks} ranks{score}{mark}")
    return 0


def _verify_checkpoints(arguments, say):
    found, _ = _entries(arguments.folder, is_thorough=True)
    for entry in found:
        say(f"{entry.tag}  {'good' if entry.manifest else 'damaged: ' + entry.problem}")
    return int(any(entry.manifest is None for entry in found))


def _export_checkpoint(arguments, say):
    from .export import export_checkpoint

    manifest = export_checkpoint(arguments.folder, arguments.to)
    say(f"exported  the model of step {manifest.step} to {arguments.to}")
    return 0


def _generate(arguments, say):
    from .infer import Generator, parse_num_visual_tokens

    counts = None if arguments.num_visual_tokens is None else parse_num_visual_tokens(arguments.num_visual_tokens)
    generator = Generator(arguments.model)
    say(generator(arguments.prompt, arguments.image, counts, arguments.max_new_tokens))
    return 0


def main(argv=None):
    arguments = parser().parse_args(argv)
    return entry_point(arguments.run, arguments)


if __name__ == "__main__":
    sys.exit(main())
