"""`tokenflex train-router`: give an exported model a router, which chooses the count of visual tokens by itself."""

import argparse
from collections.abc import Callable
from pathlib import Path

from .options import Commands, add_debug, add_recipe, non_negative, positive


def add_to(commands: Commands) -> None:
    """Add the command to a parser's sub-commands."""
    command = commands.add_parser(
        "train-router",
        help="let an exported model choose its visual tokens by itself",
        description="Train a router on the model's own losses at each of its counts, and add it to the export: then "
        'num_visual_tokens="auto" chooses a count for each image. Nothing else of the model is trained.',
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="folder that training exported (runs/NAME/model)")
    add_recipe(command)
    add("--samples", type=positive, default=4096, metavar="N", help="training conversations with images (default 4096)")
    add("--seed", type=non_negative, default=0, metavar="N", help="of the router's training (default 0)")
    add("--output", metavar="DIR", help="write the export with the router there (default: it replaces MODEL)")
    add(
        "--evaluate",
        metavar="DIR",
        help="then compare the router with other ways to choose; table, JSON and plot go there",
    )
    add("--only-evaluate", action="store_true", help="the model has its router already")
    add(
        "--teacher-forced",
        action="store_true",
        help="compare by whether each token of the wanted answers is the likeliest, which costs a pass per count",
    )
    add_debug(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    from ..config import load_config
    from ..corpus import resolve_embedded
    from ..errors import UserError
    from ..router import FitSettings, evaluate_router, train_router

    if arguments.only_evaluate and not arguments.evaluate:
        raise UserError("--only-evaluate: where to? give --evaluate DIR")
    if arguments.teacher_forced and not arguments.evaluate:
        raise UserError("--teacher-forced is a way to compare: where to? give --evaluate DIR")
    config = resolve_embedded(load_config(arguments.config, arguments.set), say)
    folder = Path(arguments.model)
    if not arguments.only_evaluate:
        settings = FitSettings(seed=arguments.seed)
        target = Path(arguments.output or folder)
        train_router(folder, config, say, settings, arguments.samples, target)
        folder = target
    if arguments.evaluate:
        evaluate_router(folder, config, say, arguments.evaluate, teacher_forced=arguments.teacher_forced)
    return 0
