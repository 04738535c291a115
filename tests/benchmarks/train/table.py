"""The record of `make bench-train` as the table of docs/speed.md."""

import statistics

BEGIN, END = "<!-- begin: make bench-train -->", "<!-- end: make bench-train -->"


def table(record):
    """Medians and ratios as Markdown; a line that says so where nothing was measured."""
    if not record:
        return "Not measured."
    machine = record["machine"]
    lines = [
        f"{machine['device']}, {machine['threads']} threads, {record['date']}; medians of {record['turns']} turns, in useful tokens per second.",
        "", "| model | lengths | arm | tokens/s | lowest to highest | ours is faster by |", "|---|---|---|---:|---:|---:|",
    ]  # fmt: skip
    for row in record["rows"]:
        base = statistics.median(row["arms"]["ours"]["tokens_per_s"])
        for name, found in row["arms"].items():
            speeds = found["tokens_per_s"]
            if name.endswith("padded"):
                name += f" ({row['useful_share_padded']:.0%} of its tokens are useful)"
            ratio = "" if name == "ours" else f"{base / statistics.median(speeds):.2f}"
            lines.append(
                f"| {row['model']} | {row['workload']} | {name} | {statistics.median(speeds):,.0f} | {min(speeds):,.0f} to {max(speeds):,.0f} | {ratio} |"
            )
    return "\n".join([*lines, *(f"\nLeft out: {name}." for name in record["left_out"])])


def written(page, record):
    """The page with the record's table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(record)}\n{END}{after}"
