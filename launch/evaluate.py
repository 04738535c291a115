#!/usr/bin/env python3
"""Evaluate an exported model on a run's evaluation shards, on all ranks of the launcher.

deepspeed launch/evaluate.py --config recipe.yaml
python launch/evaluate.py --model DIR evaluate.num_visual_tokens=[64,100,256]
"""

import argparse
import sys
from pathlib import Path

from tokenflex.config import load_config
from tokenflex.launching import add_check, entry_point, print_check

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override any value of the configuration"
    )
    parser.add_argument("--config", default=str(QUICKSTART), help="recipe in YAML (default: the quick start)")
    parser.add_argument("--model", help="exported model folder (default: the run's own)")
    parser.add_argument("--local_rank", type=int, help="set by launchers; the environment is what counts")
    add_check(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_intermixed_args(argv)


def main(arguments, say):
    config = load_config(arguments.config, arguments.overrides)
    if arguments.check:
        return print_check(config)
    from tokenflex import parallel

    parallel.quiet_libraries()
    from tokenflex.evaluate import evaluate_run

    launch = parallel.join()
    say.is_main = launch.rank == 0
    device = parallel.start_process_group(launch)
    say(f"world     {parallel.check_world(launch, device)}")
    evaluate_run(config, launch, say, arguments.model)
    return 0


if __name__ == "__main__":
    sys.exit(entry_point(main, parse(sys.argv[1:]), is_job=True))
