"""Tables, plots and the page of a study, from its record alone."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..plots import new_figure
from .arms import FLEXIBLE, Arm
from .record import Record
from .statistics import Difference, Verdict, paired_difference, verdicts
from .times import times_table

NOT_JUDGED = ("text", "word")
"""Tasks that are no part of a mean: one shows no image, the other is not learned at this size (see the protocol)."""
READING = ("dense", "row")
"""Tasks that need many tokens, apart from the rest."""
WORDS: dict[Verdict, str] = {
    "better": "better",
    "worse": "worse",
    "non-inferior": "not below by more than 1 point",
    "inconclusive": "inconclusive",
}


@dataclass(frozen=True)
class Findings:
    """A record read by arm: what every table and plot starts from.

    arms: those that are whole, the flexible one first. runs: {arm: names of its runs}. problems: what is left out.
    """

    record: Record
    arms: list[Arm]
    runs: dict[str, list[str]]
    seeds: list[int]
    problems: list[str]

    @staticmethod
    def of(record: Record, arms: Sequence[Arm], seeds: Sequence[int]) -> "Findings":
        """The findings over `arms` that have a usable run of every seed.

        Raises:
            UserError: the flexible arm has not.
        """
        runs, problems = record.usable(list(seeds), [arm.name for arm in arms])
        if FLEXIBLE not in runs:
            raise UserError(f"study: the arm {FLEXIBLE} is not whole ({'; '.join(problems)}); run it first")
        return Findings(record, [arm for arm in arms if arm.name in runs], runs, list(seeds), problems)

    @staticmethod
    def together(parts: Sequence["Findings"]) -> "Findings":
        """Several records of the same questions as one of all their seeds: the arms that are whole in each.

        A pair is still of one record, so it shares its pretrained parts; what is drawn anew in an interval are runs of all records.

        Raises:
            UserError: they were asked different questions.
        """
        digests = [part.record.questions["digest"] for part in parts]
        if len(set(digests)) > 1:
            raise UserError(f"study: records of different questions ({', '.join(digests)}) have nothing in common")
        arms = [arm for arm in parts[0].arms if all(arm.name in part.runs for part in parts)]
        named = {f"{number}/{name}": run for number, part in enumerate(parts) for name, run in part.record.runs.items()}
        runs = {
            arm.name: [f"{number}/{name}" for number, part in enumerate(parts) for name in part.runs[arm.name]]
            for arm in arms
        }
        record = Record(parts[0].record.protocol, parts[0].record.questions, named)
        return Findings(record, arms, runs, list(range(len(runs[FLEXIBLE]))), [])

    def answers(self, arm: str, count: int) -> np.ndarray:
        """[S, Q] bool: by seed, which questions an arm answered at a count."""
        return np.stack([self.record.right(name, count) for name in self.runs[arm]])

    @property
    def tasks(self) -> np.ndarray:
        """[Q] the task of each question."""
        return np.array(self.record.questions["tasks"])

    @property
    def is_asked(self) -> np.ndarray:
        """[Q] bool: questions that are judged."""
        return ~np.isin(self.tasks, NOT_JUDGED)

    def accuracy(self, arm: str, count: int, chosen: np.ndarray | None = None) -> np.ndarray:
        """[S] mean over tasks of the share of (chosen) questions that are answered."""
        chosen = self.is_asked if chosen is None else chosen
        answers, tasks = self.answers(arm, count)[:, chosen], self.tasks[chosen]
        return np.stack([answers[:, tasks == task].mean(1) for task in np.unique(tasks)]).mean(0)

    def difference(self, ours: str, our_count: int, theirs: str, their_count: int) -> Difference:
        """One arm at a count against another at a count, over the questions that are judged."""
        chosen, keys = self.is_asked, np.array(self.record.questions["keys"])
        pair = self.answers(ours, our_count)[:, chosen], self.answers(theirs, their_count)[:, chosen]
        return paired_difference(*pair, self.tasks[chosen], keys[chosen])

    def mean(self, arm: str, what: str) -> float:
        """Mean over an arm's runs of one of their figures."""
        return float(np.mean([self.record.runs[name][what] for name in self.runs[arm]]))

    def specialists(self, equal: str) -> list[Arm]:
        """The arms trained at one count, of a protocol."""
        return [arm for arm in self.arms if arm.specialist and arm.equal == equal]


def verdict_table(findings: Findings) -> str:
    """The flexible arm against each specialist at that count, under both protocols; Holm over the counts of each."""
    rows = ["| equal | count | flexible | specialist | difference [95 %] | verdict |", "|---|---:|---:|---:|---:|---|"]
    return "\n".join([*rows, *_against_specialists(findings, FLEXIBLE)])


def others_verdict_table(findings: Findings) -> str:
    """The other arms that serve every count against each specialist at that count, with the tokens that they took of its."""
    rows = [
        "| arm | tokens / flexible | specialist at equal | count | arm | specialist | difference [95 %] | verdict |",
        "|---|---:|---|---:|---:|---:|---:|---|",
    ]
    for arm in _others(findings):
        share = findings.mean(arm.name, "tokens") / findings.mean(FLEXIBLE, "tokens")
        rows += [f"| {arm.title} | {share:.2f} {row}" for row in _against_specialists(findings, arm.name)]
    return "\n".join(rows)


def _against_specialists(findings: Findings, name: str) -> list[str]:
    """Rows of an arm against each specialist; none without seeds to compare."""
    rows = []
    for equal in ("samples", "tokens") if len(findings.seeds) > 1 else ():
        specialists = findings.specialists(equal)
        counts = [arm.specialist or 0 for arm in specialists]
        found = [findings.difference(name, n, arm.name, n) for n, arm in zip(counts, specialists)]
        for count, arm, difference, verdict in zip(counts, specialists, found, verdicts(found)):
            ours, theirs = findings.accuracy(name, count).mean(), findings.accuracy(arm.name, count).mean()
            rows.append(
                f"| {equal} | {count} | {100 * ours:.1f} | {100 * theirs:.1f} | {_interval(difference)} | {WORDS[verdict]} |"
            )
    return rows


def _others(findings: Findings) -> list[Arm]:
    """The arms that serve every count of the specialists, but for the flexible one."""
    trained = {arm.specialist for arm in findings.specialists("samples")}
    return [arm for arm in findings.arms if not arm.specialist and arm.name != FLEXIBLE and trained <= set(arm.counts)]


def accuracy_table(findings: Findings) -> str:
    """Every arm at every count it was asked at: mean over seeds, and the range over seeds."""
    counts = sorted({count for arm in findings.arms for count in arm.counts})
    rows = [f"| arm | {' | '.join(map(str, counts))} |", "|---|" + "---:|" * len(counts)]
    for arm in findings.arms:
        cells = [_range(findings.accuracy(arm.name, count)) if count in arm.counts else "" for count in counts]
        rows.append(f"| {arm.title} | {' | '.join(cells)} |")
    return "\n".join(rows)


def others_table(findings: Findings) -> str:
    """Arms that are no specialists against the flexible one, at each count that it was trained at."""
    trained = [arm.specialist or 0 for arm in findings.specialists("samples")]
    others = [arm for arm in findings.arms if not arm.specialist and arm.name != FLEXIBLE]
    rows = ["| arm | count | difference to flexible [95 %] | verdict |", "|---|---:|---:|---|"]
    for arm in others if len(findings.seeds) > 1 else []:
        pairs = [(count, count) for count in trained if count in arm.counts]
        found = [findings.difference(arm.name, own, FLEXIBLE, count) for own, count in pairs]
        for (_, count), difference, verdict in zip(pairs, found, verdicts(found)):
            rows.append(f"| {arm.title} | {count} | {_interval(difference)} | {WORDS[verdict]} |")
    return "\n".join(rows)


def cost_table(findings: Findings) -> str:
    """What each arm took in training: means over seeds, and ratios to the specialist of the largest count."""
    specialists = findings.specialists("samples")
    largest = max(specialists, key=lambda arm: arm.specialist or 0) if specialists else findings.arms[0]
    heads = [
        "arm",
        "steps",
        "samples",
        "tokens",
        "visual tokens",
        "time",
        f"tokens / {largest.title}",
        "time / the same",
    ]
    rows = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for arm in findings.arms:
        steps, samples, tokens, visual, seconds = (
            findings.mean(arm.name, what) for what in ("num_steps", "samples", "tokens", "visual_tokens", "seconds")
        )
        shares = tokens / findings.mean(largest.name, "tokens"), seconds / findings.mean(largest.name, "seconds")
        cells = [f"{steps:,.0f}", f"{samples:,.0f}", f"{tokens / 1e6:.2f}M", f"{visual / 1e6:.2f}M", f"{seconds:.0f} s"]
        rows.append(f"| {' | '.join([arm.title, *cells, *(f'{share:.2f}' for share in shares)])} |")
    return "\n".join(rows)


def hard_table(findings: Findings) -> str:
    """Questions that a scaled-down image of the same count gets wrong in most seeds, apart from the others (VTC-Bench)."""
    small = {arm.counts[0]: arm for arm in findings.arms if arm.name.startswith("small-image-")}
    rows = [
        "| count | hard questions | flexible on them | specialist on them | flexible on the others |",
        "|---:|---:|---:|---:|---:|",
    ]
    for arm in findings.specialists("samples"):
        count = arm.specialist or 0
        if count not in small:
            continue
        is_hard = findings.is_asked & (findings.answers(small[count].name, count).mean(0) < 0.5)
        on_hard = [100 * findings.accuracy(name, count, is_hard).mean() for name in (FLEXIBLE, arm.name)]
        rest = 100 * findings.accuracy(FLEXIBLE, count, findings.is_asked & ~is_hard).mean()
        share = is_hard.sum() / findings.is_asked.sum()
        rows.append(f"| {count} | {100 * share:.0f} % | {on_hard[0]:.1f} | {on_hard[1]:.1f} | {rest:.1f} |")
    return "\n".join(rows)


def reading_table(findings: Findings) -> str:
    """Reading of dense grids apart from the rest, the flexible arm and the specialist of each count."""
    is_reading = findings.is_asked & np.isin(findings.tasks, READING)
    heads = ["count", "reading: flexible", "reading: specialist", "the rest: flexible", "the rest: specialist"]
    rows = [f"| {' | '.join(heads)} |", "|---:" * len(heads) + "|"]
    for arm in findings.specialists("samples"):
        count = arm.specialist or 0
        cells = [
            f"{100 * findings.accuracy(name, count, chosen).mean():.1f}"
            for chosen in (is_reading, findings.is_asked & ~is_reading)
            for name in (FLEXIBLE, arm.name)
        ]
        rows.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(rows)


def plateau_table(findings: Findings) -> str:
    """Loss at half time and at the end by arm, worst seed each; nobody is left out for it."""
    blind = findings.mean("no-image", "final_loss") if "no-image" in findings.runs else None
    rows = [
        "| arm | loss at half time, worst seed | loss at the end, worst seed | left the plateau |",
        "|---|---:|---:|---|",
    ]
    for arm in findings.arms:
        half, end = (
            max(findings.record.runs[name][what] for name in findings.runs[arm.name])
            for what in ("half_time_loss", "final_loss")
        )
        has_left = (
            "" if blind is None or arm.without_images else ("yes" if half < 0.95 * blind else "**not at half time**")
        )
        rows.append(f"| {arm.title} | {half:.3f} | {end:.3f} | {has_left} |")
    return "\n".join(rows)


TABLES: dict[str, Callable[[Findings], str]] = {
    "verdicts": verdict_table,
    "accuracy": accuracy_table,
    "others": others_table,
    "others-verdicts": others_verdict_table,
    "reading": reading_table,
    "hard": hard_table,
    "cost": cost_table,
    "times": lambda findings: times_table(findings.record.times),
    "plateau": plateau_table,
}
"""The tables of the page by the name that stands in its comment."""


def filled(page: str, findings: Findings, stem: str) -> str:
    """A page with what stands between `<!-- table: STEM/NAME -->` and `<!-- end -->` replaced by that table of the findings.

    Tables of other records than `stem`'s stay.

    Raises:
        UserError: the page names a table that there is none of.
    """

    def table(match: re.Match) -> str:
        if match[1] not in TABLES:
            raise UserError(f"page: wants the table {match[1]!r}; known are {', '.join(TABLES)}")
        return f"<!-- table: {stem}/{match[1]} -->\n{TABLES[match[1]](findings)}\n<!-- end -->"

    return re.sub(rf"<!-- table: {re.escape(stem)}/([\w-]+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def plot_accuracy(findings: Findings, path: Path) -> None:
    """Accuracy against visual tokens: the flexible arm with the range of its seeds, specialists at and off their count."""
    figure, axes = _figure()
    shown = [arm for arm in findings.arms if arm.name == FLEXIBLE or (arm.specialist and arm.equal == "samples")]
    for number, arm in enumerate(shown):
        counts = sorted(arm.counts)
        values = 100 * np.stack([findings.accuracy(arm.name, count) for count in counts])
        is_ours = arm.name == FLEXIBLE
        style = {"color": f"C{number}", "linewidth": 2.4 if is_ours else 1.2, "linestyle": "-" if is_ours else "--"}
        axes.plot(counts, values.mean(1), label=arm.title, **style)
        axes.fill_between(counts, values.min(1), values.max(1), color=f"C{number}", alpha=0.15, linewidth=0)
        if arm.specialist in counts:
            axes.plot(
                arm.specialist, values.mean(1)[counts.index(arm.specialist)], "o", color=f"C{number}", markersize=7
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(shown[0].counts), [str(count) for count in sorted(shown[0].counts)])
    axes.set_xlabel("visual tokens per image (dot: the specialist's own count; band: range over seeds)")
    axes.set_ylabel("exact match over tasks, %")
    axes.legend(frameon=False)
    figure.savefig(path)


def plot_differences(findings: Findings, path: Path) -> None:
    """The flexible arm minus each specialist at its count, with 95 % intervals, under both protocols."""
    figure, axes = _figure()
    places = []
    for shift, equal in ((-0.12, "samples"), (0.12, "tokens")):
        specialists = findings.specialists(equal)
        found = [
            findings.difference(FLEXIBLE, arm.specialist or 0, arm.name, arm.specialist or 0) for arm in specialists
        ]
        mean, low, high = (100 * np.array([getattr(d, name) for d in found]) for name in ("mean", "low", "high"))
        places = [arm.specialist for arm in specialists]
        at = np.arange(len(found)) + shift
        axes.errorbar(at, mean, [mean - low, high - mean], fmt="o", capsize=4, label=f"equal {equal}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axhline(-1, color="gray", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(places)), [str(place) for place in places])
    axes.set_xlabel("visual tokens per image, of the specialist and of the question")
    axes.set_ylabel("flexible - specialist, points (95 %)")
    axes.legend(frameon=False)
    figure.savefig(path)


def plot_cost(findings: Findings, path: Path) -> None:
    """Time against tokens of training, one mark per arm."""
    figure, axes = _figure()
    for number, arm in enumerate(findings.arms):
        tokens, seconds = findings.mean(arm.name, "tokens") / 1e6, findings.mean(arm.name, "seconds")
        axes.plot(tokens, seconds, "o", color=f"C{number % 10}")
        axes.annotate(arm.name, (tokens, seconds), textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.set_xlabel("tokens of training, millions")
    axes.set_ylabel("time of training, s")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    figure.savefig(path)


PLOTS = {"accuracy": plot_accuracy, "differences": plot_differences, "cost": plot_cost}
"""The plots of a record by what their files are called behind its name."""


def _figure():
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _interval(difference: Difference) -> str:
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def _range(values: np.ndarray) -> str:
    mean = f"{100 * values.mean():.1f}"
    return mean if len(values) == 1 else f"{mean} ({100 * values.min():.1f} to {100 * values.max():.1f})"
