"""The accuracy table and its plot."""

from os import PathLike
from typing import TypedDict

from ..plots import new_figure


class AccuracyRecord(TypedDict):
    """Of accuracy.json what table and plot show: accuracy {task: {count: share}}, num_questions {task: number}, the trained
    counts."""

    accuracy: dict[str, dict[str, float]]
    num_questions: dict[str, int]
    trained: list[int]


class EvaluationRecord(AccuracyRecord):
    """All that accuracy.json holds."""

    num_bad_samples: int


def accuracy_table(record: AccuracyRecord) -> str:
    """A Markdown table of accuracies in percent, tasks by visual-token counts; trained counts are bold."""
    counts = list(next(iter(record["accuracy"].values())))
    heads = [f"**{count}**" if int(count) in record["trained"] else count for count in counts]
    lines = [f"| task (questions) | {' | '.join(heads)} |", "|---|" + "---:|" * len(counts)]
    for task, row in record["accuracy"].items():
        cells = " | ".join(f"{100 * row[count]:.1f}" for count in counts)
        lines.append(f"| {task} ({record['num_questions'][task]}) | {cells} |")
    return "\n".join(lines)


def plot_accuracy(record: AccuracyRecord, path: str | PathLike) -> None:
    """Draw accuracy over the number of visual tokens, one line per task, to a PNG; trained counts are filled marks."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    counts = [int(count) for count in next(iter(record["accuracy"].values()))]
    for number, (task, row) in enumerate(record["accuracy"].items()):
        values = [100 * row[str(count)] for count in counts]
        color = f"C{number % 10}"
        axes.plot(counts, values, color=color, linewidth=1.8, linestyle="-" if number < 10 else "--", label=task)
        for count, value in zip(counts, values):
            is_trained = count in record["trained"]
            axes.plot(count, value, "o", color=color, markerfacecolor=color if is_trained else "white", markersize=6)
    axes.set_xticks(counts)
    axes.set_xlabel("visual tokens per image (filled: trained, hollow: never seen in training)")
    axes.set_ylabel("exact match, %")
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path)
