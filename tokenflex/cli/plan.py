"""The command `tokenflex plan`: what packing a corpus for a cluster would give, from lengths or from an index."""

import argparse
from collections.abc import Callable
from pathlib import Path

from .options import Commands, add_debug, listed, positive


def add_to(commands: Commands) -> None:
    """Add the command to a parser's sub-commands."""
    text = "Plan an epoch for a cluster from the lengths of its samples, and say how full and how even its packs are."
    command = commands.add_parser("plan", help="simulate packing for a cluster", description=text)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--lengths", metavar="FILE", help=".npz with the int arrays text and tiles, one entry per sample"
    )
    source.add_argument("--index", metavar="DIR", help="index of shards, as launch/index.py writes it beside them")
    add = command.add_argument
    add("--capacity", type=positive, default=8192, metavar="N", help="tokens per pack (default 8192)")
    add("--max-tiles", type=positive, default=48, metavar="N", help="images or tiles per pack at most (default 48)")
    add("--ranks", type=positive, default=8, metavar="N", help="packs that run side by side (default 8)")
    add("--counts", type=listed(int), default=[64, 144, 256], metavar="N,N", help="visual tokens (64,144,256)")
    add(
        "--probabilities",
        type=listed(float),
        default=[0.2, 0.3, 0.5],
        metavar="P,P",
        help="of each count (0.2,0.3,0.5)",
    )
    add("--mixed-counts", action="store_true", help="packs of any counts, instead of one count per micro-step")
    add("--over-long", choices=["drop", "error", "truncate"], default="drop", help="what does not fit (default drop)")
    add("--window-rows", type=positive, default=16, metavar="N", help="micro-steps planned together (default 16)")
    add("--seed", type=int, default=0, metavar="N", help="of order and draws (default 0)")
    add("--epoch", type=int, default=0, metavar="N", help="which epoch (default 0)")
    add("--out", metavar="FILE", help="write the plan: arrays sample and pack (emitted order) and count (per sample)")
    add("--json", metavar="FILE", help="write the figures")
    add("--plots", metavar="DIR", help="draw the fill of packs and the cost per micro-step")
    add_debug(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    from ..plan import Lengths, simulate
    from ..plan.table import load_table

    lengths: Lengths
    if arguments.lengths:
        lengths = load_table(arguments.lengths)
    else:
        from ..data.index import open_index

        lengths = open_index(arguments.index)
    planner = simulate.make_planner(lengths, arguments)
    result, figures, dropped = simulate.simulate(planner, arguments.epoch, arguments.out)
    say(simulate.describe(result, planner))
    for reason, ids in dropped.ids.items():
        shown = ", ".join(str(sample) for sample in ids[:10])
        say(f"{reason:12s} samples {shown}" + (", ..." if dropped.numbers[reason] > 10 else ""))
    if arguments.json:
        simulate.write_json(result, arguments.json)
    if arguments.plots:
        simulate.plot(figures, Path(arguments.plots))
    return 0
