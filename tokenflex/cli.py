"""The command `tokenflex`: the single-process tools. What runs under a launcher is in `launch/`."""

import argparse
import sys

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
    add_plan_command(commands)
    return top


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
