"""The page of a run, or of two side by side: one HTML file that needs nothing else.

Whatever comes from the run's files is escaped, and the page's policy lets it run its own script only and reach no network.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from os import PathLike
from typing import Any

from ...config import RunConfig
from ...errors import UserError
from ...files import write_whole
from ..names import TEXT
from .assets import POLICY, SCRIPT, STYLE
from .charts import Series, line_chart, number, share_bar
from .incidents import incidents
from .reading import Record, RunRecord, flattened
from .tables import accuracy_table, checkpoint_table, table, validation_table


def write_page(path: str | PathLike, runs: Sequence[RunRecord]) -> None:
    """Write `render_page` to a file, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_whole(path, render_page(runs))
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}; name a file that can be written") from None


def render_page(runs: Sequence[RunRecord]) -> str:
    """The HTML of one run or two."""
    names = _names(runs)
    title = " and ".join(names)
    sections = [
        ("", _cards(runs, names)),
        ("Loss", _grid(_loss_charts(runs, names))),
        ("Accuracy", _pair(accuracy_table, runs, names)),
        ("Validation", _pair(validation_table, runs, names)),
        ("Speed, and where time went", _grid(_speed_charts(runs, names))),
        ("Packs and ranks", _grid(_balance_charts(runs, names))),
        ("Optimisation", _grid(_optimizer_charts(runs, names))),
        ("Skipped steps and bad samples", "".join(incidents(run, name) for run, name in zip(runs, names))),
        ("Checkpoints", _pair(checkpoint_table, runs, names)),
        ("Versions", _versions(runs, names)),
        ("The recipe as run", _recipes(runs, names)),
    ]
    body = "".join(f"{f'<h2>{name}</h2>' if name else ''}{content}" for name, content in sections if content)
    places = "<br>".join(escape(str(run.folder)) for run in runs)
    unread = sum(run.unread for run in runs)
    note = (
        f"<p class='lead bad'>{unread} lines of the runs' files could not be read and are left out.</p>"
        if unread
        else ""
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style></head>'
        f"<body><main><h1>{escape(title)}</h1><p class='lead'>{places}</p>{note}{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Names that tell the runs apart."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _pair(made: Callable[[RunRecord, str], str], runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """A table of each run beside the other's."""
    tables = [text for run, name in zip(runs, names) if (text := made(run, name))]
    return f'<div class="pair">{"".join(f"<div>{text}</div>" for text in tables)}</div>' if tables else ""


def _grid(figures: Iterable[str]) -> str:
    shown = "".join(figures)
    return f'<div class="grid">{shown}</div>' if shown else ""


def _points(records: Sequence[Record], *path: str) -> list[tuple[float, float]]:
    """(step, figure) of every record that has the figure at a path of keys."""
    points = []
    for record in records:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            points.append((record["step"], value))
    return points


def _curves(
    runs: Sequence[RunRecord], names: Sequence[str], paths: Mapping[str, tuple[str, ...]], of: str = "metrics"
) -> list[Series]:
    """A curve per run and figure: {its name: its path of keys}; the second run's are dashed."""
    return [
        Series(f"{label}, {name}" if len(runs) > 1 else label, _points(getattr(run, of), *path), color, position > 0)
        for position, (run, name) in enumerate(zip(runs, names))
        for color, (label, path) in enumerate(paths.items())
    ]


def _per_count(runs: Sequence[RunRecord], key: str) -> dict[str, tuple[str, ...]]:
    """Paths of a figure at every count that any run has."""
    counts = list(dict.fromkeys(count for run in runs for count in run.counts))
    counts.sort(key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0))
    return {"without images" if count == TEXT else f"{count} tokens": (key, count) for count in counts}


def _loss_charts(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[str]:
    whole = _curves(runs, names, {"training": ("loss",)})
    validated = _curves(runs, names, {"validation": ("loss",)}, "validations")
    yield line_chart("Loss", [*whole, *(Series(s.name, s.points, 1, s.is_dashed) for s in validated if s.points)])
    per_count = _per_count(runs, "loss_per_count")
    yield line_chart("Training loss per visual-token count", _curves(runs, names, per_count))
    yield line_chart("Validation loss per visual-token count", _curves(runs, names, per_count, "validations"))
    yield line_chart("Answers that are right, per visual-token count", _answers(runs, names), "%", is_from_zero=True)
    parts = sorted({part for run in runs for record in run.metrics for part in record.get("loss_parts") or {}})
    yield line_chart("Parts of the loss", _curves(runs, names, {part: ("loss_parts", part) for part in parts}))


def _answers(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Series]:
    """Mean over tasks of what validations found answered right, by count."""
    per_count = _per_count(runs, "")
    found = []
    for position, (run, name) in enumerate(zip(runs, names)):
        for color, (label, (_, count)) in enumerate(per_count.items()):
            points = []
            for record in run.validations:
                accuracy = record.get("accuracy") or {}
                shares = [row[count] for row in accuracy.values() if count in row]
                points += [(record["step"], 100 * sum(shares) / len(shares))] if shares else []
            found.append(Series(f"{label}, {name}" if len(runs) > 1 else label, points, color, position > 0))
    return found


def _speed_charts(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[str]:
    yield share_bar("Where the time of a step went", _phases(runs, names))
    yield line_chart("Throughput", _curves(runs, names, {"tokens": ("tokens_per_s",)}), "tokens/s", is_from_zero=True)
    yield line_chart("Model FLOPs", _curves(runs, names, {"model": ("flops_per_s",)}), "FLOPs/s", is_from_zero=True)
    yield line_chart("Utilisation (MFU)", _curves(runs, names, {"MFU": ("mfu",)}), "of the peak", is_from_zero=True)
    names_of = list(dict.fromkeys(key for run in runs for r in run.metrics for key in r.get("seconds_per_step") or {}))
    used = [
        key for key in names_of if any(y > 0 for run in runs for _, y in _points(run.metrics, "seconds_per_step", key))
    ]
    paths = {key.replace("_", " "): ("seconds_per_step", key) for key in used}
    yield line_chart("Seconds per step, by phase", _curves(runs, names, paths), "s", is_from_zero=True)


def _phases(runs: Sequence[RunRecord], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """{run: {phase: seconds over the run, mean over ranks}}."""
    rows: dict[str, dict[str, float]] = {}
    for run, name in zip(runs, names):
        parts: dict[str, float] = {}
        before = 0.0
        for record in run.metrics:
            steps, before = max(record["step"] - before, 0), record["step"]
            for phase, seconds in (record.get("seconds_per_step") or {}).items():
                parts[phase] = parts.get(phase, 0.0) + (seconds or 0.0) * steps
        rows[name] = {phase.replace("_", " "): seconds for phase, seconds in parts.items() if seconds > 0}
    return rows if any(rows.values()) else {}


def _balance_charts(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[str]:
    shares = {"fill": ("fill",), "vision balance": ("balance", "vision"), "language balance": ("balance", "language")}
    note = "Fill: share of the packs' tokens that is used. Balance: work of the average rank as a share of the fullest one's."
    yield line_chart("Fill, and balance over ranks", _curves(runs, names, shares), note=note)
    work = {"slowest rank": ("work_s", "max"), "mean": ("work_s", "mean")}
    yield line_chart(
        "Seconds per step that ranks fetch and compute", _curves(runs, names, work), "s", _slowest(runs, names), True
    )
    memory = {"fullest rank": ("memory_gb", "max"), "mean": ("memory_gb", "mean")}
    yield line_chart("Memory", _curves(runs, names, memory), "GB", is_from_zero=True)
    yield line_chart(
        "Images per visual-token count", _curves(runs, names, _per_count(runs, "images_per_count")), "per interval"
    )
    yield line_chart(
        "Tokens per visual-token count", _curves(runs, names, _per_count(runs, "tokens_per_count")), "per interval"
    )


def _slowest(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Which rank was slowest how often, and by how much."""
    said = []
    for run, name in zip(runs, names):
        works = [record["work_s"] for record in run.metrics if isinstance(record.get("work_s"), Mapping)]
        ranks = [work.get("rank") for work in works]
        if len(set(ranks)) > 1 or any(work["max"] > 1.001 * work["mean"] for work in works):
            often = max(set(ranks), key=ranks.count)
            excess = sum(work["max"] / work["mean"] - 1 for work in works if work.get("mean")) / len(works)
            said.append(
                f"{name}: rank {often} was slowest in {ranks.count(often)} of {len(ranks)} lines; the slowest takes "
                f"{100 * excess:.1f} % longer than the mean."
            )
    return " ".join(said)


def _optimizer_charts(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[str]:
    yield line_chart("Gradient norm before clipping", _curves(runs, names, {"norm": ("grad_norm",)}), is_from_zero=True)
    series = []
    for position, (run, name) in enumerate(zip(runs, names)):
        rates = [(record["step"], record["learning_rates"]) for record in run.metrics if record.get("learning_rates")]
        columns = list(dict.fromkeys(zip(*(values for _, values in rates))))  # groups of one rate are one curve
        for color, column in enumerate(columns):
            points = list(zip((step for step, _ in rates), column))
            label = f"{number(max(column))} at most"
            series.append(Series(f"{label}, {name}" if len(runs) > 1 else label, points, color, position > 0))
    yield line_chart("Learning rates", series, is_from_zero=True)


def _cards(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    facts: dict[str, list[str]] = {}
    for run in runs:
        for label, value in _facts(run):
            facts.setdefault(label, []).append(value)
    heads = f"<p class='lead'>Above: {escape(names[0])}; below: {escape(names[1])}.</p>" if len(runs) > 1 else ""
    cards = "".join(
        f'<div class="card">{"".join(f"<b>{escape(value)}</b>" for value in values)}<span>{escape(label)}</span></div>'
        for label, values in facts.items()
    )
    return f'{heads}<div class="cards">{cards}</div>'


def _facts(run: RunRecord) -> Iterator[tuple[str, str]]:
    metrics, last = run.metrics, (run.metrics[-1] if run.metrics else {})
    wanted = (run.settings.get("train") or {}).get("num_steps")
    yield "steps", f"{last.get('step', 0)} of {wanted}"
    losses = _points(metrics, "loss")
    yield "last training loss", number(losses[-1][1]) if losses else "-"
    best = min(((loss, step) for step, loss in _points(run.validations, "loss")), default=None)
    yield "best validation loss", f"{best[0]:.4f} at step {best[1]:.0f}" if best else "-"
    yield "tokens trained on", number(sum(value for _, value in _points(metrics, "num_tokens")))
    seconds = sum(value for _, value in _points(metrics, "seconds"))
    yield "time of these steps", _duration(seconds)
    rates = sorted(value for _, value in _points(metrics, "tokens_per_s"))
    yield "tokens per second, median", number(rates[len(rates) // 2]) if rates else "-"
    used = sorted(value for _, value in _points(metrics, "mfu"))
    yield "MFU, median", f"{100 * used[len(used) // 2]:.1f} %" if used else "-"
    yield "skipped steps", str(last.get("num_skipped_steps", 0))
    yield "bad samples met", str(len(run.bad_samples))
    good = [entry for entry in run.checkpoints if entry.manifest]
    yield "ranks", str(good[-1].manifest.num_ranks) if good and good[-1].manifest else "-"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def _versions(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    packages = list(dict.fromkeys(name for run in runs for name in run.versions))
    rows = [[package, *(run.versions.get(package, "-") for run in runs)] for package in packages]
    return table(["package", *(names if len(runs) > 1 else ["version"])], rows, num_text=1) if rows else ""


def _recipes(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    parts = []
    if len(runs) > 1:
        first, second = (flattened(run.settings) for run in runs[:2])
        keys = [key for key in dict.fromkeys([*first, *second]) if first.get(key) != second.get(key)]
        rows = [[key, first.get(key, "-"), second.get(key, "-")] for key in keys]
        parts.append(table(["differs", *names], rows, num_text=3))
    defaults = flattened(RunConfig().model_dump(mode="json"))
    for run, name in zip(runs, names):
        own = flattened(run.settings)
        rows = [[key, value, defaults.get(key, "-")] for key, value in own.items() if defaults.get(key) != value]
        is_open = "" if len(runs) > 1 else " open"
        chosen = table(["key", "value", "default"], rows, num_text=3)
        whole = f'<details><summary>config.yaml, whole</summary><div class="panel"><pre>{escape(run.recipe)}</pre></div></details>'
        parts.append(
            f"<details{is_open}><summary>{escape(name)}: what is not the default</summary>{chosen}</details>{whole}"
        )
    return "".join(parts)
