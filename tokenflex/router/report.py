"""The table of a router beside other ways to choose counts, and its plot."""

from os import PathLike
from typing import Any

from ..plots import new_figure
from .policies import accuracy_at

NAMES = {
    "always": "always {setting:g}",
    "router": "router, effort {setting:g}",
    "random": "random in the shares of effort {setting:g}",
    "cascade": "cascade, up while below {setting:g}",
    "oracle": "oracle (knows the answers)",
}


def policy_table(record: dict[str, Any]) -> str:
    """A Markdown table: every count, the router at every effort (bold: its default), and what random and the cascade get for as many tokens.

    The record is that of `router.json`; under teacher forcing there is no cascade.
    """
    rows, default = record["rows"], record["default_effort"]
    drawn = [policy for policy in ("random", "cascade") if any(row["policy"] == policy for row in rows)]
    heads = ["policy", "exact match, %", "of the largest's, % (95 % interval)", "visual tokens", "of the largest's, %"]
    heads += [f"{policy}, %" for policy in drawn]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in rows:
        if row["policy"] not in ("always", "router", "oracle"):
            continue
        name = NAMES[row["policy"]].format(setting=row["setting"])
        name = f"**{name}**" if row["policy"] == "router" and row["setting"] == default else name
        kept = f"{100 * row['kept']:.1f} ({100 * row['kept_low']:.1f} to {100 * row['kept_high']:.1f})"
        others = [f"{100 * accuracy_at(rows, policy, row['token_share']):.1f}" for policy in drawn]
        others = others if row["policy"] == "router" else [""] * len(drawn)
        cells = [f"{100 * row['accuracy']:.1f}", kept, f"{row['tokens']:.1f}", f"{100 * row['token_share']:.0f}"]
        lines.append(f"| {' | '.join([name, *cells, *others])} |")
    return "\n".join(lines)


def plot_policies(record: dict[str, Any], path: str | PathLike) -> None:
    """Draw accuracy over mean visual tokens of a question to a PNG: router, random, cascade, each count, the oracle."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    styles = {
        "router": ("C0", "o-", "router, by effort"),
        "random": ("C7", "--", "random, in the router's shares"),
        "cascade": ("C1", "s-", "cascade, all its tries counted"),
        "always": ("black", "D", "one count always"),
        "oracle": ("C2", "*", "oracle (knows the answers)"),
    }
    for policy, (color, style, label) in styles.items():
        points = sorted((row["tokens"], 100 * row["accuracy"]) for row in record["rows"] if row["policy"] == policy)
        if points:
            axes.plot(*zip(*points), style, color=color, label=label, markersize=9 if policy == "oracle" else 5)
    axes.axhline(99 * record["rows"][len(record["counts"]) - 1]["accuracy"], color="C3", linewidth=0.8, linestyle=":")
    axes.set_xlabel("visual tokens of a question, mean (dotted: 99 % of the largest count's accuracy)")
    axes.set_ylabel("exact match, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path)
