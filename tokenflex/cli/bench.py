"""`tokenflex bench`: what a visual token costs at inference."""

import argparse
from collections.abc import Callable

from ..layout import DONE
from .options import Commands, add_debug, listed, positive


def add_to(commands: Commands) -> None:
    """Add the command to a parser's sub-commands."""
    command = commands.add_parser(
        "bench",
        help="time an exported model by count and batch size",
        description="Time an exported model by visual-token count and batch size: medians of shuffled rounds on noise images.",
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="exported model folder, such as runs/NAME/model")
    add("--counts", type=listed(positive), metavar="N,N", help="visual-token counts (default: the trained ones)")
    add("--batch-sizes", type=listed(positive), default=[1, 16], metavar="B,B", help="default 1,16")
    add(
        "--cache",
        choices=("dynamic", "static", "both"),
        default="dynamic",
        help="the key-value cache: one that grows (default), or one of one size, over which the step is compiled",
    )
    add(
        "--prompt", default="Describe the image.", metavar="TEXT", help="what is asked (default: 'Describe the image.')"
    )
    add("--new-tokens", type=positive, default=32, metavar="N", help="length of every answer (default 32)")
    add("--rounds", type=positive, default=5, metavar="N", help="shuffled rounds after a warm-up (default 5)")
    add("--out", metavar="DIR", help="write bench.json and bench.png there")
    add_debug(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Time, print, write; returns the exit status."""
    from ..infer import bench

    cases = bench.bench(
        arguments.model,
        bench.Workload(
            counts=arguments.counts or bench.trained_counts(arguments.model),
            batch_sizes=arguments.batch_sizes,
            caches=("dynamic", "static") if arguments.cache == "both" else (arguments.cache,),
            prompt=arguments.prompt,
            new_tokens=arguments.new_tokens,
            rounds=arguments.rounds,
        ),
        say,
    )
    say("\n" + bench.table(cases))
    if arguments.out:
        for path in bench.write(cases, arguments.out):
            say(f"wrote     {path}")
    return DONE
