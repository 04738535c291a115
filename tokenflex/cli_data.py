"""`tokenflex data ...`: bring data in, look at it, find what is wrong with it."""

import os
import sys

from tqdm import tqdm

from .errors import UserError


def add_data_commands(commands):
    """Add `data` with its own commands to a parser's sub-commands."""
    data = commands.add_parser("data", help="convert, validate or inspect data", description="Bring in and check data.")
    inner = data.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(inner)
    _add_validate(inner)
    _add_inspect(inner)


def _add_convert(commands):
    convert = commands.add_parser(
        "convert",
        help="write a data set as shards",
        description="Write a data set as shards. Done shards are kept: the same command goes on where it was stopped.",
    )
    convert.add_argument(
        "format",
        choices=("llava", "openai", "huggingface", "webdataset"),
        help="llava: JSON array (or JSONL) of conversations; openai: JSONL of messages; huggingface: folder with parquet "
        "files; webdataset: plain shards with captions or conversations",
    )
    convert.add_argument("source", metavar="SOURCE", help="the JSON file, the folder, or the shards (a glob pattern)")
    convert.add_argument("--out", required=True, metavar="DIR", help="folder of the new shards")
    convert.add_argument("--images", metavar="DIR", help="folder that image paths are relative to")
    convert.add_argument(
        "--samples-per-shard", type=_positive, default=1000, metavar="N", help="records per shard (default 1000)"
    )
    convert.add_argument(
        "--caption-prompt",
        default="Describe the image.",
        metavar="TEXT",
        help="question of a record that has a caption only (default: 'Describe the image.')",
    )
    convert.add_argument(
        "--source-name", default="", metavar="NAME", help="name written into every sample as its source"
    )
    convert.add_argument(
        "--max-bad-fraction",
        type=float,
        default=1.0,
        metavar="X",
        help="end with status 1 if more than this share was skipped (default 1: never)",
    )
    _add_common(convert, _run_convert)


def _add_validate(commands):
    validate = commands.add_parser(
        "validate",
        help="find every bad sample of shards",
        description="Read and decode every sample; name shard, key, offset and reason of each bad one. "
        "Ends with status 0 if all are good, 1 if any is bad.",
    )
    validate.add_argument("shards", nargs="+", metavar="SHARDS", help="tar files, folders of them, or glob patterns")
    validate.add_argument(
        "--report", metavar="FILE", help="also write the bad samples as JSON lines, and the counts last"
    )
    _add_common(validate, _run_validate)


def _add_inspect(commands):
    inspect = commands.add_parser(
        "inspect",
        help="write a page with samples, masks, costs and statistics",
        description="Write an HTML page with samples, their masks and costs, and statistics. It needs no network.",
    )
    inspect.add_argument("shards", nargs="+", metavar="SHARDS", help="tar files, folders of them, or glob patterns")
    inspect.add_argument("--out", default="inspect.html", metavar="FILE", help="the page (default inspect.html)")
    inspect.add_argument(
        "--config", metavar="FILE", help="recipe whose tokenizer, template, tiling and counts are shown"
    )
    inspect.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="override a value of the recipe"
    )
    inspect.add_argument("--samples", type=_positive, default=24, metavar="N", help="samples shown (default 24)")
    inspect.add_argument(
        "--max-samples", type=_positive, default=5000, metavar="N", help="samples counted (default 5000)"
    )
    inspect.add_argument("--seed", type=int, default=0, metavar="N", help="which samples are shown (default 0)")
    _add_common(inspect, _run_inspect, has_workers=False)


def _add_common(command, run, has_workers=True):
    command.add_argument(
        "--max-image-pixels",
        type=_positive,
        default=100_000_000,
        metavar="N",
        help="larger images are bad (default 1e8)",
    )
    command.add_argument(
        "--max-member-bytes",
        type=_positive,
        default=64 * 2**20,
        metavar="N",
        help="larger files are bad (default 64 MiB)",
    )
    if has_workers:
        command.add_argument(
            "--workers",
            type=_positive,
            default=os.cpu_count() or 1,
            metavar="N",
            help="processes (default: one per core)",
        )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)


def _run_convert(arguments, say):
    from .data import Limits
    from .data.convert import Options, convert

    options = Options(
        limits=Limits(max_member_bytes=arguments.max_member_bytes, max_image_pixels=arguments.max_image_pixels),
        caption_prompt=arguments.caption_prompt,
        source_name=arguments.source_name,
    )
    with tqdm(unit=" records", disable=not sys.stderr.isatty()) as bar:
        tally = convert(
            arguments.format,
            arguments.source,
            arguments.out,
            images=arguments.images,
            samples_per_shard=arguments.samples_per_shard,
            num_workers=arguments.workers,
            options=options,
            progress=bar.update,
        )
    say("\n".join(tally.lines()))
    say(f"shards    {arguments.out}\nskipped   {os.path.join(arguments.out, 'skipped.jsonl')}")
    return int(tally.num_skipped > arguments.max_bad_fraction * tally.num_samples)


def _run_validate(arguments, say):
    from .data import Limits, find_shards
    from .data.validate import validate, write_report

    limits = Limits(max_member_bytes=arguments.max_member_bytes, max_image_pixels=arguments.max_image_pixels)
    shards = find_shards(arguments.shards, what="data validate")
    with tqdm(unit=" samples", disable=not sys.stderr.isatty()) as bar:
        tally, problems = validate(shards, limits, arguments.workers, progress=bar.update)
    for problem in problems:
        place = f"byte {problem.offset}" if problem.offset >= 0 else "?"
        say(f"{problem.shard}\t{problem.key or '-'}\t{place}\t{problem.reason}\t{problem.detail}")
    say("\n".join(tally.lines()))
    if arguments.report:
        write_report(arguments.report, tally, problems)
    return int(bool(problems))


def _run_inspect(arguments, say):
    from .data import Limits, find_shards
    from .data.inspect import render_page, survey_shards

    limits = Limits(max_member_bytes=arguments.max_member_bytes, max_image_pixels=arguments.max_image_pixels)
    shards = find_shards(arguments.shards, what="data inspect")
    processor, counts = _recipe(arguments, say) if arguments.config or arguments.set else (None, ())
    with tqdm(unit=" samples", disable=not sys.stderr.isatty()) as bar:
        survey = survey_shards(
            shards, processor, arguments.samples, arguments.max_samples, arguments.seed, limits, bar.update
        )
    page = render_page(survey, shards, processor, counts)
    try:
        with open(arguments.out, "w", encoding="utf-8") as file:
            file.write(page)
    except OSError as error:
        raise UserError(f"--out {arguments.out}: {error.strerror}; name a file that can be written") from None
    say("\n".join(survey.tally.lines()))
    say(f"page      {arguments.out}")
    return 0


def _recipe(arguments, say):
    """The processor and the visual-token counts of a recipe."""
    from .config import load_config
    from .data import embedded_corpus
    from .model import build_processor

    config = load_config(arguments.config, arguments.set)
    tokenizer = ""
    if "embedded" in config.data.train and not isinstance(config.model.text, str) and not config.model.tokenizer:
        tokenizer = str(embedded_corpus(config.data, say) / "tokenizer")
    return build_processor(config.model, config.budget, tokenizer), sorted(config.budget.num_visual_tokens)


def _positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_positive.__name__ = "positive number"  # argparse names the type in its message
