"""`tokenflex demo`: a page to try an exported model on, at two numbers of visual tokens side by side."""

import argparse
from collections.abc import Callable

from ..layout import DONE
from .options import Commands, add_debug
from .serve import add_serve_limits, serve_limits


def add_to(commands: Commands) -> None:
    """Add the command to a parser's sub-commands."""
    command = commands.add_parser(
        "demo",
        help="a page to try an exported model on",
        description="A page on this machine: an image, a question, and the answers at two numbers of visual tokens side by side, "
        "with what each token sees.",
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="folder that training exported (runs/NAME/model)")
    add("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    add("--port", type=int, default=8000, metavar="N", help="port; 0 takes a free one (default 8000)")
    add_serve_limits(command)
    add_debug(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Serve until a signal ends it; returns the exit status."""
    from ..serve import serve

    serve(arguments.model, serve_limits(arguments), host=arguments.host, port=arguments.port, has_page=True, say=say)
    return DONE
