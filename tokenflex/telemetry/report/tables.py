"""Tables of a report: what is exact rather than a curve."""

from collections.abc import Sequence
from html import escape
from typing import Any

from ...checkpoint import latest_tag
from ...layout import RunLayout
from ..names import TEXT
from .charts import number
from .reading import RunRecord


def table(
    heads: Sequence[str], rows: Sequence[Sequence[Any]], num_text: int = 1, title: str = "", marked: int | None = None
) -> str:
    """An HTML table, everything in it escaped; the first `num_text` columns are text; the row `marked` stands out."""

    def cells(values: Sequence[Any], tag: str) -> str:
        kinds = [' class="t"' if place < num_text else "" for place in range(len(values))]
        return "".join(f"<{tag}{kind}>{escape(str(value))}</{tag}>" for kind, value in zip(kinds, values))

    lines = "".join(
        f"<tr{' class=best' if place == marked else ''}>{cells(row, 'td')}</tr>" for place, row in enumerate(rows)
    )
    head = f"<p class='lead'>{escape(title)}</p>" if title else ""
    return f'{head}<div class="panel"><table><tr>{cells(heads, "th")}</tr>{lines}</table></div>'


def accuracy_table(run: RunRecord, name: str) -> str:
    """Exact match at the end of the run, tasks by counts."""
    if not run.accuracy:
        return ""
    accuracy, trained = run.accuracy["accuracy"], run.accuracy.get("trained") or []
    questions = run.accuracy.get("num_questions") or {}
    rows = {task: row for task, row in accuracy.items() if isinstance(row, dict)}
    counts = list(dict.fromkeys(count for row in rows.values() for count in row))
    heads = ["task", "questions", *(f"{count}{'' if _is_in(count, trained) else ' (untrained)'}" for count in counts)]
    lines = [
        [task, questions.get(task, "-"), *(_percent(row.get(count)) for count in counts)] for task, row in rows.items()
    ]
    return table(heads, lines, title=f"{name}: exact match of the exported model in %, by visual tokens per image")


def validation_table(run: RunRecord, name: str) -> str:
    """The best validation, tasks by counts."""
    scored = [record for record in run.validations if isinstance(record.get("loss_per_task"), dict)]
    if not scored:
        return ""
    best = min(scored, key=lambda record: record["loss"])
    counts = list(dict.fromkeys(count for row in best["loss_per_task"].values() for count in row))
    heads = ["task", *("without images" if count == TEXT else f"{count} tokens" for count in counts)]
    rows = [
        [task, *(f"{row[count]:.4f}" if count in row else "" for count in counts)]
        for task, row in best["loss_per_task"].items()
    ]
    per_count = best.get("loss_per_count") or {}
    rows.append(["all", *(f"{per_count[count]:.4f}" if count in per_count else "" for count in counts)])
    title = f"{name}: loss on held-out samples at step {best['step']}, the best of {len(scored)} validations"
    return table(heads, rows, title=title, marked=len(rows) - 1)


def checkpoint_table(run: RunRecord, name: str) -> str:
    """What is in the folder of checkpoints, the best marked."""
    if not run.checkpoints:
        return ""
    stalls = {event.get("step"): event for event in run.events if event.get("event") == "saved"}
    latest = latest_tag(RunLayout(run.folder).checkpoints)
    rows: list[list[Any]] = []
    scores: list[tuple[float, int]] = []
    for entry in run.checkpoints:
        m = entry.manifest
        if m is None:
            rows.append([entry.tag, f"damaged: {entry.problem}", "", "", "", "", ""])
            continue
        saved = stalls.get(m.step, {})
        seconds, stall = saved.get("seconds"), saved.get("stall_s")
        score = "-" if m.score is None else f"{m.score:.4f}"
        rows.append(
            [
                f"{entry.tag}{' (latest)' if entry.tag == latest else ''}",
                m.time,
                f"{number(m.num_bytes)}B",
                m.num_ranks,
                "-" if seconds is None else f"{seconds:.2f} s",
                "-" if stall is None else f"{1000 * stall:.1f} ms",
                score,
            ]
        )
        scores += [] if m.score is None else [(m.score, len(rows) - 1)]
    is_validated = bool((run.settings.get("evaluate") or {}).get("every"))
    heads = [
        "checkpoint",
        "written",
        "size",
        "ranks",
        "took",
        "steps waited",
        f"{'validation' if is_validated else 'mean'} loss",
    ]
    best = min(scores)[1] if scores else None
    return table(heads, rows, num_text=2, title=f"{name}: {len(rows)} kept, the best in bold", marked=best)


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}" if isinstance(value, (int, float)) else ""


def _is_in(count: str, trained: Sequence[Any]) -> bool:
    return count in [str(number) for number in trained]
