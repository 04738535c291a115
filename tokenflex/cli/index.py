"""`tokenflex data index`: list the indexes of shards, one per tokenizer, chat template and tiling, and remove some."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from .options import Commands, add_debug

if TYPE_CHECKING:
    from ..data.index.places import Found


def add_to(commands: Commands) -> None:
    """Add the command to a parser's sub-commands."""
    command = commands.add_parser(
        "index",
        help="list or remove the indexes of shards",
        description="Indexes lie beside their shards (or in the cache), one per tokenizer, chat template and tiling; "
        "launch/index.py and training build them.",
    )
    actions = command.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("ls", help="list them: fingerprint, what they hold, folder")
    removing = actions.add_parser("rm", help="remove some of them; the shards stay")
    for action in (listing, removing):
        action.add_argument("shards", nargs="+", metavar="SHARDS", help="tar files, folders of them, patterns, or URLs")
        action.add_argument("--cache-dir", metavar="DIR", help="where indexes of read-only shards are (data.cache_dir)")
        add_debug(action)
    which = removing.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--fingerprint", action="append", default=[], metavar="F", help="of one, as listed; its beginning is enough"
    )
    which.add_argument("--all", action="store_true", help="all of them")
    listing.set_defaults(run=list_all)
    removing.set_defaults(run=remove)


def list_all(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    """`tokenflex data index ls`."""
    found = _found(arguments)
    say("\n".join(index.describe() for index in found) or "there is none")
    return 0


def remove(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    """`tokenflex data index rm`."""
    from ..data.index import choose_indexes, remove_index

    found = _found(arguments)
    for index in found if arguments.all else choose_indexes(found, arguments.fingerprint):
        remove_index(index.folder)
        say(f"removed   {index.folder}")
    return 0


def _found(arguments: argparse.Namespace) -> "list[Found]":
    from ..config import DataConfig
    from ..data.index import find_indexes
    from ..data.remote import locate_shards

    data = DataConfig(**({"cache_dir": arguments.cache_dir} if arguments.cache_dir else {}))
    return find_indexes(locate_shards(arguments.shards, data, "data index"), data.cache_dir)
