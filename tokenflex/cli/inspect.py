"""`tokenflex data inspect`: write a page with samples, masks, costs and statistics."""

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from tqdm import tqdm

from .options import Commands, add_debug, add_limits, positive

if TYPE_CHECKING:
    from ..model import TokenFlexProcessor


def add_to(commands: Commands) -> None:
    """Add the command to a parser's sub-commands."""
    command = commands.add_parser(
        "inspect",
        help="write a page with samples, masks, costs and statistics",
        description="Write an HTML page with samples, their masks and costs, and statistics. It needs no network.",
    )
    add = command.add_argument
    add("shards", nargs="+", metavar="SHARDS", help="tar files, folders of them, or glob patterns")
    add("--out", default="inspect.html", metavar="FILE", help="the page (default inspect.html)")
    add("--config", metavar="FILE", help="recipe whose tokenizer, template, tiling and counts are shown")
    add("--set", action="append", default=[], metavar="section.key=value", help="override a value of the recipe")
    add("--samples", type=positive, default=24, metavar="N", help="samples shown (default 24)")
    add("--max-samples", type=positive, default=5000, metavar="N", help="samples counted (default 5000)")
    add("--seed", type=int, default=0, metavar="N", help="which samples are shown (default 0)")
    add_limits(command)
    add_debug(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    from ..data import Limits, find_shards
    from ..prepare.inspect import survey_shards, write_page

    shards = find_shards(arguments.shards, what="data inspect")
    processor, counts = _recipe(arguments, say) if arguments.config or arguments.set else (None, ())
    with tqdm(unit=" samples", disable=not sys.stderr.isatty()) as bar:
        survey = survey_shards(
            shards,
            processor,
            Limits.of(arguments),
            num_shown=arguments.samples,
            max_samples=arguments.max_samples,
            seed=arguments.seed,
            progress=bar.update,
        )
    write_page(arguments.out, survey, shards, processor, counts)
    say("\n".join(survey.tally.lines()))
    if survey.num_held > survey.tally.num_samples:
        say(
            f"counted   the first of each shard, {survey.tally.num_samples} of {survey.num_held} samples; --max-samples counts more"
        )
    say(f"page      {arguments.out}")
    return 0


def _recipe(arguments: argparse.Namespace, say: Callable[[str], None]) -> "tuple[TokenFlexProcessor, list[int]]":
    """The processor and the visual-token counts of a recipe."""
    from ..config import load_config
    from ..corpus import resolve_embedded
    from ..model import build_processor

    config = resolve_embedded(load_config(arguments.config, arguments.set), say, with_data=False)
    return build_processor(config.model, config.budget), sorted(config.budget.num_visual_tokens)
