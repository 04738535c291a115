"""`tokenflex generate`: ask an exported model about images."""

import argparse
from collections.abc import Callable

from .options import Commands, add_debug, positive, share


def add_to(commands: Commands) -> None:
    """Add the command to a parser's sub-commands."""
    command = commands.add_parser(
        "generate", help="ask an exported model about images", description="Ask an exported model about images."
    )
    add = command.add_argument
    add("--model", required=True, metavar="DIR", help="folder that training exported (runs/NAME/model)")
    add("--image", action="append", default=[], metavar="FILE", help="image file; may be given several times")
    add(
        "--video",
        action="append",
        default=[],
        metavar="FILE",
        help="video file, asked about as frames; likewise, behind the images",
    )
    add("--prompt", required=True, metavar="TEXT", help="the question")
    add(
        "--num-visual-tokens",
        metavar="N",
        help="visual tokens per image: 144, 8x12 (rows x columns), auto (the model's router chooses), or a list with one per image: 64,256 (default: the model's largest trained count)",
    )
    add(
        "--effort",
        type=share,
        metavar="X",
        help="of auto: from 0 (fewest visual tokens) to 1 (most); default: what training the router found enough",
    )
    add(
        "--total-visual-tokens",
        type=positive,
        metavar="N",
        help="visual tokens of all images together at most, such as 512 (default: what the model was trained at, or no limit)",
    )
    add(
        "--share",
        choices=("even", "size", "router"),
        help="how the images share the total: evenly, by their pixels, or as the model's router chooses (default: as in training)",
    )
    add("--max-new-tokens", type=positive, default=64, metavar="N", help="length of the answer at most (default 64)")
    add_debug(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    from ..infer import Generator, check_auto, parse_num_visual_tokens

    counts = None if arguments.num_visual_tokens is None else parse_num_visual_tokens(arguments.num_visual_tokens)
    if arguments.share == "router" or counts == "auto" or (isinstance(counts, list) and "auto" in counts):
        check_auto(arguments.model)
    generator = Generator(arguments.model)
    say(
        generator(
            arguments.prompt,
            arguments.image,
            counts,
            arguments.max_new_tokens,
            arguments.effort,
            total_visual_tokens=arguments.total_visual_tokens,
            share=arguments.share,
            videos=arguments.video,
        )
    )
    return 0
