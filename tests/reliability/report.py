"""Writes the table of docs/reliability.md from docs/results/reliability.json: `make test-reliability` runs it last."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

HANG = "found after {found_within_s:.1f} s, the right rank named: {culprit_right}"
ROWS = {
    "crash matrix": (
        "Killed at 16 named points: rank 0, rank 1 or both, with 1 and with 4 micro-steps",
        "{kills} kills, {with_frozen_part} of them with a frozen part, {failures} runs that differ from an unbroken one in any bit; "
        "{seconds:.0f} s",
    ),
    "random kills": (
        "Killed at random times",
        "{kills} kills, {failures} differences; {runs_finished} run finished in {wall_s:.0f} s, unbroken in "
        "{unbroken_run_s:.0f} s: {ettr:.0%} of the time was progress",
    ),
    "ranks 2 -> 4 -> 1 -> 2": (
        "Ranks changed at every restart, 2, 4, 1, 2",
        "{steps} steps, largest difference of a loss {largest_loss_difference:.4f}, frozen weights equal: {frozen_equal}",
    ),
    "damage: flip": ("One bit of a checkpoint flipped", "{found} of {cases} found"),
    "damage: truncate": ("A file of a checkpoint cut short", "{found} of {cases} found"),
    "failing disk": (
        "An error at each write, fsync and rename of a save",
        "{cases} cases, {failures} in which anything but that save was lost",
    ),
    "hang: stopped rank": ("A rank is stopped (SIGSTOP)", HANG),
    "hang: stuck data worker": ("A data worker is stopped", HANG),
    "hang: skipped collective": ("A rank leaves out a collective", HANG),
    "no false alarm": (
        "No hang, on a machine kept busy",
        "{steps:,} steps beside {busy_processes} busy processes, {alarms} alarms; {seconds:.0f} s",
    ),
    "cost of a save": (
        "Cost of a save: {millions:.1f}M parameters with moments, {megabytes:.0f} MB, {ranks} ranks, medians of {rounds}",
        "the loop waits {stall_ms:.1f} ms ({stall_share:.2%} of DeepSpeed's own save, {deepspeed_stall_ms:.0f} ms); the step beside "
        "it takes {step_while_saving_s:.2f} s instead of {step_s:.2f} s; on disk after {total_s:.2f} s",
    ),
    "cost of a load": (
        "Cost of a load, the same",
        "{load_ms:.1f} ms (DeepSpeed {deepspeed_load_ms:.0f} ms), of which {waited_ms:.1f} ms wait for the check of all bytes, "
        "which took {verify_ms:.1f} ms while the model was built",
    ),
}
"""Row of the report -> what was done and what came of it, in words around its figures; in the order of the table."""


def with_units(report):
    """The report with the figures that the words want in other units, and loading as a row of its own."""
    report = {name: dict(figures) for name, figures in report.items()}
    cost = report.get("cost of a save")
    if cost:
        cost.update(millions=cost["parameters"] / 1e6, megabytes=cost["bytes"] / 1e6)
        seconds = {"stall": "stall_s", "deepspeed_stall": "deepspeed_stall_s", "load": "load_s", "verify": "verify_s"}
        seconds.update(waited="verify_waited_s", deepspeed_load="deepspeed_load_s")
        cost.update({f"{name}_ms": 1000 * cost[key] for name, key in seconds.items()})
        report["cost of a load"] = cost
    return {name: {k: _words(v) for k, v in figures.items()} for name, figures in report.items()}


def _words(value):
    return ("no", "yes")[value] if isinstance(value, bool) else value


def table(report):
    """One row per law: what was done and what came of it, as Markdown. A row that has no words here shows its figures."""
    report = with_units(report)
    lines = ["| what was done | what came of it |", "|---|---|"]
    for name in [*(name for name in ROWS if name in report), *(name for name in sorted(report) if name not in ROWS)]:
        plain = (name, ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in report[name].items()))
        lines.append("| " + " | ".join(text.format(**report[name]) for text in ROWS.get(name, plain)) + " |")
    return "\n".join(lines)


def written(page, report):
    """The page with the report's table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(report)}\n{END}{after}"


def main():
    path = ROOT / "docs" / "reliability.md"
    report = json.loads((ROOT / "docs" / "results" / "reliability.json").read_text())
    path.write_text(written(path.read_text(), report))


if __name__ == "__main__":
    main()
