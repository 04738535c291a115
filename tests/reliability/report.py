"""Writes the table of docs/reliability.md from docs/results/reliability.json: `make test-reliability` runs it last."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def table(report):
    """One row per law: what was done and what came of it, as Markdown."""
    lines = ["| what | figures |", "|---|---|"]
    for name, figures in sorted(report.items()):
        said = (f"{key.replace('_', ' ')} {value}" for key, value in figures.items())
        lines.append(f"| {name} | {', '.join(said)} |")
    return "\n".join(lines)


def main():
    path = ROOT / "docs" / "reliability.md"
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    report = json.loads((ROOT / "docs" / "results" / "reliability.json").read_text())
    path.write_text(f"{before}{BEGIN}\n{table(report)}\n{END}{after}")


if __name__ == "__main__":
    main()
