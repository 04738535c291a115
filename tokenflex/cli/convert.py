"""`tokenflex data convert`: write a data set as shards."""

import argparse
import os
import sys
from collections.abc import Callable

from tqdm import tqdm

from .options import Commands, add_debug, add_limits, add_workers, positive


def add_to(commands: Commands) -> None:
    """Add the command to a parser's sub-commands."""
    command = commands.add_parser(
        "convert",
        help="write a data set as shards",
        description="Write a data set as shards. Done shards are kept: the same command goes on where it was stopped.",
    )
    add = command.add_argument
    add(
        "format",
        choices=("llava", "openai", "huggingface", "webdataset", "csv"),
        help="llava: JSON array (or JSONL) of conversations; openai: JSONL of messages; huggingface: folder with parquet "
        "files; webdataset: plain shards with captions or conversations; csv: a row per record, columns named in the first line",
    )
    add("source", metavar="SOURCE", help="the JSON file, the folder, or the shards (a glob pattern)")
    add("--out", required=True, metavar="DIR", help="folder of the new shards")
    add("--images", metavar="DIR", help="folder that image paths are relative to")
    _add_choices(command)
    add("--samples-per-shard", type=positive, default=1000, metavar="N", help="records per shard (default 1000)")
    add(
        "--caption-prompt",
        default="Describe the image.",
        metavar="TEXT",
        help="question of a record that has a caption only (default: 'Describe the image.')",
    )
    add("--source-name", default="", metavar="NAME", help="name written into every sample as its source")
    add(
        "--tool-turns",
        choices=("skip", "text"),
        default="skip",
        help="records in which functions are called: skip them, or take calls and results as text with their role (default: skip)",
    )
    add(
        "--max-bad-fraction",
        type=float,
        default=1.0,
        metavar="X",
        help="end with status 1 if more than this share was skipped (default 1: never)",
    )
    add_limits(command)
    add_workers(command)
    add_debug(command)
    command.set_defaults(run=run)


def _add_choices(command: argparse.ArgumentParser) -> None:
    """Which part of a Hugging Face folder."""
    for option, what in (
        ("--subset", "configurations, by its README or its folders"),
        ("--split", "splits: train, validation, ..."),
    ):
        command.add_argument(
            option, default="", metavar="NAME", help=f"which of a Hugging Face folder's {what}; or all"
        )


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    from ..data import Limits
    from ..errors import UserError
    from ..prepare.convert import Options, convert, first_skipped

    options = Options(
        limits=Limits.of(arguments),
        caption_prompt=arguments.caption_prompt,
        source_name=arguments.source_name,
        tool_turns=arguments.tool_turns,
        split=arguments.split,
        subset=arguments.subset,
    )
    with tqdm(unit=" records", disable=not sys.stderr.isatty()) as bar:
        tally = convert(
            arguments.format,
            arguments.source,
            arguments.out,
            images=arguments.images,
            samples_per_shard=arguments.samples_per_shard,
            num_workers=arguments.workers,
            options=options,
            progress=bar.update,
        )
    say("\n".join(tally.lines()))
    say(f"shards    {arguments.out}\nskipped   {os.path.join(arguments.out, 'skipped.jsonl')}")
    if not tally.num_good:
        raise UserError(
            f"data convert {arguments.source}: none of {tally.num_samples} records was kept; {first_skipped(arguments.out)}"
        )
    return int(tally.num_skipped > arguments.max_bad_fraction * tally.num_samples)
