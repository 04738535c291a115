"""The accuracy table and its plot."""

from os import PathLike
from typing import TypedDict

from ..plots import new_figure


class AutoRecord(TypedDict):
    """What a router came to at an effort, by task: answers that are right, visual tokens and images of all questions together."""

    effort: float
    right: dict[str, int]
    visual_tokens: dict[str, int]
    images: dict[str, int]


class _MayHaveAuto(TypedDict, total=False):
    auto: AutoRecord


class AccuracyRecord(_MayHaveAuto):
    """Of accuracy.json what table and plot show: accuracy {task: {count: share}}, num_questions {task: number}, the trained
    counts, and what the model's router came to, if it has one."""

    accuracy: dict[str, dict[str, float]]
    num_questions: dict[str, int]
    trained: list[int]


class EvaluationRecord(AccuracyRecord):
    """All that accuracy.json holds."""

    num_bad_samples: int


def accuracy_table(record: AccuracyRecord) -> str:
    """A Markdown table of accuracies in percent, tasks by visual-token counts; trained counts are bold.

    With a router there are its accuracy, the visual tokens per image that it took, and a last line of all questions together.
    """
    counts = list(next(iter(record["accuracy"].values())))
    heads = [f"**{count}**" if int(count) in record["trained"] else count for count in counts]
    heads += ["auto", "tokens of auto"] if record.get("auto") else []
    lines = [f"| task (questions) | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name, tasks in _lines(record).items():
        number = sum(record["num_questions"][task] for task in tasks)
        cells = [f"{100 * _accuracy(record, tasks, count):.1f}" for count in counts]
        if record.get("auto"):
            tokens, right = _auto(record, tasks)
            cells += [f"{100 * right:.1f}", "" if tokens is None else f"{tokens:.1f}"]
        lines.append(f"| {name} ({number}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_accuracy(record: AccuracyRecord, path: str | PathLike) -> None:
    """Draw accuracy over the mean number of visual tokens, one line per task, to a PNG; trained counts are filled marks.

    With a router a star stands where it comes to, and a black line is all questions together.
    """
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    counts = [int(count) for count in next(iter(record["accuracy"].values()))]
    for number, (name, tasks) in enumerate(_lines(record).items()):
        values = [100 * _accuracy(record, tasks, str(count)) for count in counts]
        color = f"C{number % 10}" if name in record["accuracy"] else "black"
        axes.plot(counts, values, color=color, linewidth=1.8, linestyle="-" if number < 10 else "--", label=name)
        for count, value in zip(counts, values):
            is_trained = count in record["trained"]
            axes.plot(count, value, "o", color=color, markerfacecolor=color if is_trained else "white", markersize=6)
        if record.get("auto"):
            tokens, right = _auto(record, tasks)
            if tokens is not None:
                axes.plot(tokens, 100 * right, "*", color=color, markersize=15, markeredgecolor="white")
    axes.set_xticks(counts)
    star = ", star: auto" if record.get("auto") else ""
    axes.set_xlabel(f"visual tokens per image, mean (filled: trained, hollow: never seen in training{star})")
    axes.set_ylabel("exact match, %")
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path)


def _lines(record):
    """{name: tasks} of the table's lines and the plot's: each task, and with a router all that have images."""
    lines = {task: [task] for task in record["accuracy"]}
    seen = [task for task in lines if record.get("auto") and record["auto"]["images"][task]]
    return {**lines, "all with images": seen} if len(seen) > 1 else lines


def _accuracy(record, tasks, count):
    """Share of the tasks' questions that are right at a count."""
    numbers = [record["num_questions"][task] for task in tasks]
    return sum(record["accuracy"][task][count] * number for task, number in zip(tasks, numbers)) / sum(numbers)


def _auto(record, tasks):
    """(mean visual tokens per image, or None without images; share that is right) of the router."""
    right, tokens, images = (sum(record["auto"][key][t] for t in tasks) for key in ("right", "visual_tokens", "images"))
    return tokens / images if images else None, right / sum(record["num_questions"][task] for task in tasks)
