#!/usr/bin/env python3
"""Train a TokenFLEX model: pack, train under ZeRO, export, evaluate, with a router if asked. Starts under deepspeed, torchrun, srun or mpirun.

deepspeed launch/train.py --ds_config configs/zero3.json
deepspeed launch/train.py --ds_config configs/zero3.json --config recipe.yaml train.num_steps=200
"""

import argparse
import sys
import time
from collections.abc import Sequence

from tokenflex.cli.launching import Say, entry_point, print_check
from tokenflex.cli.options import QUICKSTART, launch_parser, listed, steps
from tokenflex.config import describe, load_config
from tokenflex.corpus import resolve_embedded
from tokenflex.layout import DONE, REQUEUE, RunLayout
from tokenflex.telemetry.stages import stage


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = launch_parser(__doc__, "configuration keys, with the defaults that a recipe overrides:\n\n" + describe())
    parser.add_argument(
        "--ds_config",
        "--deepspeed_config",
        default=str(QUICKSTART.parent / "zero3.json"),
        help="DeepSpeed JSON (ZeRO stage, offload, communication)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="begin anew, removing the run's checkpoints; default is to resume"
    )
    parser.add_argument(
        "--accept-new-data",
        action="store_true",
        help="go on with shards that have changed since the run's checkpoints: from the next epoch, which has all of the new ones",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run the plan's fullest packs through a step, say what memory they took beside the estimate, and write nothing",
    )
    parser.add_argument(
        "--profile",
        type=steps,
        metavar="STEPS",
        help="profile these steps, 5-7 or 5, as metrics.jsonl counts them: a trace and the memory, into the run's profile/",
    )
    parser.add_argument(
        "--profile-ranks", type=listed(int), default=[0], metavar="R,R", help="ranks that are profiled (default 0)"
    )
    return parser.parse_intermixed_args(argv)


def main(arguments: argparse.Namespace, say: Say) -> int:
    """Train, and evaluate what came of it; returns the exit status."""
    from tokenflex import parallel

    recipe = load_config(arguments.config, arguments.overrides)
    ds_config = parallel.load_ds_config(arguments.ds_config)
    if arguments.check:
        return print_check(recipe)
    begin = time.monotonic()
    parallel.quiet_libraries()
    from tokenflex.estimate.room import check_room
    from tokenflex.evaluate import evaluate_run
    from tokenflex.router import give_router
    from tokenflex.train.profiling import ProfilePlan
    from tokenflex.train.run import grad_accum_steps, run_training

    launch = parallel.join()
    say.is_main = launch.rank == 0
    say(f"import    libraries: {time.monotonic() - begin:.1f} s")
    grad_accum_steps(
        recipe, launch.num_ranks
    )  # ranks that cannot share the packs are told before they wait for each other
    has_int8 = "int8" in (recipe.model.text_frozen_dtype, recipe.model.vision_frozen_dtype)
    is_compiled = recipe.train.compile != "off"
    parallel.check_zero(ds_config, launch.num_ranks, is_compiled=is_compiled, has_int8=has_int8)
    config = resolve_embedded(recipe, say)
    with stage("join", "the other ranks", say):
        ranks = parallel.join_ranks(launch)
    say(f"world     {parallel.check_world(ranks)}")
    check_room(config, ds_config, ranks, say)
    if arguments.dry_run:
        from tokenflex.estimate.dry_run import dry_run

        say(dry_run(recipe, config, ds_config, ranks, say=say))
        return DONE
    profiled: ProfilePlan | None = None
    if arguments.profile:
        first, last = arguments.profile
        profiled = ProfilePlan(first, last, tuple(arguments.profile_ranks))
    options = {"fresh": arguments.fresh, "accept_new_data": arguments.accept_new_data, "profiled": profiled, "say": say}
    if not run_training(recipe, config, ds_config, ranks, **options):
        say(f"stopped   and saved in {RunLayout.of(config).checkpoints}; the same command goes on from there")
        return REQUEUE
    if config.evaluate.router_samples:
        ranks.on_main(lambda: give_router(config, say))
    if config.evaluate.at_end and config.data.evaluation:
        evaluate_run(config, ranks, say)
    return DONE


if __name__ == "__main__":
    sys.exit(entry_point(main, parse(sys.argv[1:]), is_job=True))
