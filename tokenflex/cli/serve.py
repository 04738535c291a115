"""`tokenflex serve`: an exported model behind an OpenAI-compatible endpoint."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from .options import Commands, add_debug, positive

if TYPE_CHECKING:
    from ..serve import ServeLimits


def add_to(commands: Commands) -> None:
    """Add the command to a parser's sub-commands."""
    text = "Serve an exported model over OpenAI's chat API; `num_visual_tokens`, or a total, may stand in each request."
    command = commands.add_parser("serve", help="serve an exported model over OpenAI's API", description=text)
    add = command.add_argument
    add("model", metavar="MODEL", help="folder that training exported (runs/NAME/model)")
    add("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    add("--port", type=int, default=8000, metavar="N", help="port; 0 takes a free one (default 8000)")
    add("--name", default="", help="what requests call the model (default: the folder's name)")
    add(
        "--allow-urls",
        action="append",
        default=[],
        metavar="HOST",
        help="let requests name images and videos on this host, which the server fetches; * is any host (default: none)",
    )
    add_serve_limits(command)
    add_debug(command)
    command.set_defaults(run=run)


def add_serve_limits(command: argparse.ArgumentParser) -> None:
    """An option for each of `ServeLimits`."""
    for option, default, what in (
        ("--max-body-bytes", 32 * 2**20, "bytes of a request"),
        ("--max-images", 16, "images and videos of a request"),
        ("--max-image-pixels", 50_000_000, "pixels of an image"),
        ("--max-frames", 32, "frames of all videos of a request"),
        ("--max-frame-pixels", 10_000_000, "pixels of a frame"),
        ("--max-decode-seconds", 10, "seconds of decoding the videos of a request"),
        ("--max-prompt-tokens", 16_384, "tokens of a prompt, visual ones included"),
        ("--max-new-tokens", 1024, "tokens of an answer"),
        ("--max-seconds", 120, "seconds from a request to its last token"),
        ("--max-waiting", 32, "requests that wait"),
        ("--max-cache-bytes", 2**30, "bytes of caches kept for conversations' next turns"),
    ):
        text = f"{what} at most (default {default})"
        command.add_argument(option, type=positive, default=default, metavar="N", help=text)


def serve_limits(arguments: argparse.Namespace) -> "ServeLimits":
    """What the arguments say of them."""
    from ..serve import ServeLimits

    return ServeLimits(
        max_body_bytes=arguments.max_body_bytes,
        max_images=arguments.max_images,
        max_image_pixels=arguments.max_image_pixels,
        max_frames=arguments.max_frames,
        max_frame_pixels=arguments.max_frame_pixels,
        max_decode_seconds=arguments.max_decode_seconds,
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_new_tokens=arguments.max_new_tokens,
        max_seconds=arguments.max_seconds,
        max_waiting=arguments.max_waiting,
        max_cache_bytes=arguments.max_cache_bytes,
    )


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    from ..serve import serve

    serve(
        arguments.model,
        serve_limits(arguments),
        host=arguments.host,
        port=arguments.port,
        name=arguments.name,
        hosts=arguments.allow_urls,
        say=say,
    )
    return 0
