"""`tokenflex simulate`: how a run's steps scale over ranks, by its plan, a cost model and a network."""

import argparse
import json
from collections.abc import Callable

from .options import (
    Commands,
    add_debug,
    add_ds_config,
    add_gpu,
    add_lengths,
    add_recipe,
    gpu_of,
    lengths_of,
    listed,
)

RANKS = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]


def add_to(commands: Commands) -> None:
    """Add the command to a parser's sub-commands."""
    command = commands.add_parser(
        "simulate",
        help="how a recipe's steps scale over ranks",
        description="Plan the recipe's samples for each number of ranks and say what a step would take and on what: vision, language, "
        "waiting, communication, data. A cost model over the real plan; no step is run.",
    )
    add_recipe(command)
    add_ds_config(command)
    add_gpu(command)
    add_lengths(command)
    add = command.add_argument
    add("--ranks", type=listed(int), default=RANKS, metavar="N,N", help="numbers of ranks (default 8,16,...,4096)")
    add(
        "--network",
        default="ib400",
        metavar="NAME",
        help="ib400, ib200, ib100, eth100, pcie, or a YAML file (default ib400)",
    )
    add(
        "--mfu",
        type=float,
        default=0.5,
        metavar="X",
        help="share of its peak that a GPU reaches while it computes (default 0.5)",
    )
    add(
        "--costs",
        metavar="FILE",
        help="measured seconds instead, as JSON: tile, visual_token, token, pair, learned_token, ...",
    )
    add("--json", metavar="FILE", help="write the figures")
    add("--plot", metavar="FILE", help="draw them, as .svg or .png")
    add_debug(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    from ..config import load_config
    from ..corpus import resolve_embedded
    from ..estimate.network import network_named
    from ..estimate.scaling import check_ranks, describe, plot, simulate
    from ..estimate.settings import load_costs, samples_of, setting_of
    from ..files import write_whole
    from ..parallel import load_ds_config

    config = load_config(arguments.config, arguments.set)
    ds_config, network, gpu = load_ds_config(arguments.ds_config), network_named(arguments.network), gpu_of(arguments)
    check_ranks(arguments.ranks)
    costs = load_costs(arguments.costs) if arguments.costs else None
    config = resolve_embedded(config, say, with_data=False, with_weights=False)
    lengths = samples_of(config, lengths_of(arguments))
    setting = setting_of(config, ds_config, network, gpu, arguments.mfu, costs)
    scales = simulate(config, lengths, setting, arguments.ranks)
    what = f"{config.name} on {gpu.name}" if costs is None else f"{config.name} at measured costs"
    say(describe(scales, setting, what))
    if arguments.json:
        write_whole(arguments.json, json.dumps([scale.as_dict() for scale in scales], indent=1) + "\n")
    if arguments.plot:
        plot(scales, arguments.plot, what)
    return 0
