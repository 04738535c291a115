"""The command `tokenflex plan`: what packing a corpus for a cluster would give, from lengths or from an index."""

from pathlib import Path

from .errors import UserError


def add_plan_command(commands):
    """Add `plan` to the subcommands of `tokenflex`."""
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
    add("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run_plan)


def positive(text):
    """A whole number above zero; argparse says so otherwise."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def listed(kind):
    """A converter of `1,2,3` to a list of `kind`."""

    def numbers(text):
        return [kind(part) for part in text.split(",")]

    return numbers


def run_plan(arguments, say):
    from .data.plan import simulate
    from .data.plan.table import load_table

    if arguments.lengths:
        lengths = load_table(arguments.lengths)
    else:
        from .data.index import open_index

        lengths = open_index(arguments.index)
    planner = simulate.make_planner(lengths, arguments)
    result, figures, left_out = simulate.simulate(planner, arguments.epoch, arguments.out)
    say(simulate.describe(result, planner))
    for reason, ids in left_out.ids.items():
        shown = ", ".join(str(sample) for sample in ids[:10])
        say(f"{reason:12s} samples {shown}" + (", ..." if left_out.numbers[reason] > 10 else ""))
    if arguments.json:
        try:
            simulate.write_json(result, arguments.json)
        except OSError as error:
            raise UserError(f"--json {arguments.json}: {error.strerror}; wanted a file that can be written") from None
    if arguments.plots:
        simulate.plot(figures, Path(arguments.plots))
    return 0
