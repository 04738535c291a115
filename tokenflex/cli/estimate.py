"""`tokenflex estimate`: parameters, memory, FLOPs, time and checkpoints of a recipe, before anything is loaded."""

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
    non_negative,
    positive,
)


def add_to(commands: Commands) -> None:
    """Add the command to a parser's sub-commands."""
    command = commands.add_parser(
        "estimate",
        help="memory, FLOPs and time of a recipe on so many GPUs",
        description="Say what a recipe needs: parameters, memory per GPU by cause, FLOPs, time, checkpoints. Loads no weight and needs "
        "no GPU; parts that are hub names must have their config.json at hand (in the cache, or in a folder named instead).",
    )
    add_recipe(command)
    add_ds_config(command)
    add_gpu(command)
    add_lengths(command)
    add = command.add_argument
    add("--gpus", type=positive, default=8, metavar="N", help="GPUs in all (default 8)")
    add(
        "--precision",
        choices=("bf16", "fp32"),
        default="bf16",
        help="of the weights (default bf16, which a run takes on GPUs)",
    )
    add("--mfu", type=float, default=0.35, metavar="X", help="share of the GPU's peak that is assumed (default 0.35)")
    add(
        "--write-gb-s",
        type=float,
        default=2.0,
        metavar="X",
        help="to the checkpoints' disk, all ranks together (default 2)",
    )
    add("--reserved-gb", type=float, default=3.0, metavar="X", help="of a GPU for CUDA, NCCL and gaps (default 3)")
    add(
        "--text-tokens",
        type=positive,
        metavar="N",
        help="assume samples of so many text tokens, whatever data there are",
    )
    add("--tiles", type=non_negative, metavar="N", help="and of so many tiles each (default 1)")
    add("--json", action="store_true", help="print it as JSON")
    add_debug(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    from ..config import load_config
    from ..corpus import resolve_embedded
    from ..estimate import AssumedSamples, Assumptions, describe, estimate, workload_of
    from ..parallel import load_ds_config

    config = load_config(arguments.config, arguments.set)
    ds_config = load_ds_config(arguments.ds_config)
    gpu = gpu_of(arguments)
    config = resolve_embedded(config, say, with_data=False, with_weights=False)
    given = {"text_tokens": arguments.text_tokens, "tiles": arguments.tiles}
    given = {name: value for name, value in given.items() if value is not None}
    workload = workload_of(config, lengths_of(arguments), AssumedSamples(**given) if given else None)
    found = estimate(
        config,
        ds_config,
        workload,
        num_gpus=arguments.gpus,
        gpu=gpu,
        precision=arguments.precision,
        assumptions=Assumptions(mfu=arguments.mfu, write_gb_s=arguments.write_gb_s, reserved_gb=arguments.reserved_gb),
    )
    say(json.dumps(found.as_dict(), indent=1) if arguments.json else describe(found))
    return 0
