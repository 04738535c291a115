#!/usr/bin/env python3
"""Train a TokenFLEX model: pack, train under ZeRO, export, evaluate. Starts under deepspeed, torchrun, srun or mpirun.

deepspeed launch/train.py --ds_config configs/zero3.json
deepspeed launch/train.py --ds_config configs/zero3.json --config recipe.yaml train.num_steps=200
"""

import argparse
import sys
from pathlib import Path

from tokenflex.config import describe, load_config
from tokenflex.exit_codes import DONE, REQUEUE
from tokenflex.launching import add_check, entry_point, print_check

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="configuration keys, with the defaults that a recipe overrides:\n\n" + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override any value of the configuration"
    )
    parser.add_argument(
        "--ds_config",
        "--deepspeed_config",
        default=str(QUICKSTART.parent / "zero3.json"),
        help="DeepSpeed JSON (ZeRO stage, offload, communication)",
    )
    parser.add_argument("--config", default=str(QUICKSTART), help="recipe in YAML (default: the quick start)")
    parser.add_argument(
        "--fresh", action="store_true", help="begin anew, removing the run's checkpoints; default is to resume"
    )
    parser.add_argument("--local_rank", type=int, help="set by launchers; the environment is what counts")
    add_check(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_intermixed_args(argv)


def main(arguments, say):
    from tokenflex import parallel

    config = load_config(arguments.config, arguments.overrides)
    ds_config = parallel.load_ds_config(arguments.ds_config)
    if arguments.check:
        return print_check(config)
    parallel.quiet_libraries()
    from tokenflex.evaluate import evaluate_run
    from tokenflex.train.run import run_folder, run_training

    launch = parallel.join()
    say.is_main = launch.rank == 0
    if not run_training(config, ds_config, launch, arguments.fresh, say):
        say(f"stopped   and saved in {run_folder(config).checkpoints}; the same command goes on from there")
        return REQUEUE
    if config.evaluate.at_end and config.data.evaluation:
        evaluate_run(config, launch, say)
    return DONE


if __name__ == "__main__":
    sys.exit(entry_point(main, parse(sys.argv[1:]), is_job=True))
