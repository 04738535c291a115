"""Curves as SVG with their labels in HTML: lines keep their width and text its size however wide the page is.

The values that a pointer shows are in an attribute of each chart, as JSON; the page's one script reads them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 1000.0, 240.0
MAX_POINTS = 800
"""Points of a curve; longer ones show the mean of as many stretches."""
MARGIN = 0.06
NUM_COLORS = 10


@dataclass(frozen=True)
class Series:
    """A curve: points (x, y) in order, with a color number; dashed for the second of two runs."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int
    is_dashed: bool = False


def line_chart(title: str, series: Sequence[Series], unit: str = "", note: str = "", is_from_zero: bool = False) -> str:
    """Curves over steps; nothing where none of them has a point."""
    drawn = [one for one in map(_thinned, series) if one.points]
    if not drawn:
        return ""
    low_x, high_x = _range([x for one in drawn for x, _ in one.points])
    low, high = _range([y for one in drawn for _, y in one.points])
    low = min(low, 0.0) if is_from_zero else low
    margin = MARGIN * (high - low) or abs(high) * MARGIN or 1.0
    low, high = (low if is_from_zero and low == 0 else low - margin), high + margin
    ticks = _ticks(low, high)

    def at(x: float, y: float) -> str:
        return f"{WIDTH * (x - low_x) / ((high_x - low_x) or 1):.1f},{HEIGHT * (high - y) / (high - low):.1f}"

    lines = "".join(
        f'<line class="gridline" x1="0" x2="{WIDTH:.0f}" y1="{HEIGHT * (high - tick) / (high - low):.1f}" '
        f'y2="{HEIGHT * (high - tick) / (high - low):.1f}"/>'
        for tick in ticks
    )
    for one in drawn:
        points = [*one.points, *one.points] if len(one.points) == 1 else one.points
        path = " ".join(at(x, y) for x, y in points)
        dash = " dashed" if one.is_dashed else ""
        lines += f'<polyline class="curve c{one.color % NUM_COLORS}{dash}" points="{path}"/>'
    labels = "".join(
        f'<span class="ylabel" style="top:{100 * (high - tick) / (high - low):.2f}%">{number(tick)}</span>'
        for tick in ticks
    )
    values = {
        "x": [low_x, high_x],
        "series": [
            {"name": one.name, "color": one.color % NUM_COLORS, "dashed": one.is_dashed, "points": _short(one.points)}
            for one in drawn
        ],
        "unit": unit,
    }
    return (
        f"<figure><figcaption>{escape(title)}{f'<small>{escape(unit)}</small>' if unit else ''}</figcaption>{_legend(drawn)}"
        f'<div class="chart" data-chart="{escape(json.dumps(values), quote=True)}"><div class="ylabels">{labels}</div>'
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" preserveAspectRatio="none" role="img" aria-label="{escape(title, quote=True)}">'
        f'{lines}</svg><div class="cursor"></div><div class="tip"></div></div>'
        f'<div class="xlabels"><span>{number(low_x)}</span><span>step</span><span>{number(high_x)}</span></div>'
        f"{f'<p class=note>{escape(note)}</p>' if note else ''}</figure>"
    )


def share_bar(title: str, rows: Mapping[str, Mapping[str, float]], unit: str = "s") -> str:
    """One bar per row (a run), cut in shares by name; nothing without rows."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    color = {name: position % NUM_COLORS for position, name in enumerate(names)}
    bars = ""
    for row, parts in rows.items():
        total = sum(parts.values()) or 1.0
        pieces = "".join(
            f'<span class="piece b{color[name]}" style="width:{100 * value / total:.2f}%" '
            f'title="{escape(f"{name}: {100 * value / total:.1f} %, {number(value)} {unit}", quote=True)}"></span>'
            for name, value in parts.items()
            if value > 0
        )
        label = f'<div class="barname">{escape(row)}</div>' if len(rows) > 1 else ""
        bars += f'{label}<div class="bar">{pieces}</div>'
    shares = "".join(
        f'<li><i class="b{color[name]}"></i>{escape(name)} '
        + " / ".join(f"{100 * parts.get(name, 0) / (sum(parts.values()) or 1):.1f} %" for parts in rows.values())
        + "</li>"
        for name in names
    )
    return (
        f'<figure class="wide"><figcaption>{escape(title)}</figcaption>{bars}<ul class="legend">{shares}</ul></figure>'
    )


def number(value: float) -> str:
    """A number as short as it can be read."""
    size = abs(value)
    if value == 0:
        return "0"
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    if size >= 100 or float(value).is_integer():
        return f"{value:.0f}"
    return f"{value:.3g}" if size >= 0.001 else f"{value:.1e}"


def _legend(series: Sequence[Series]) -> str:
    items = "".join(
        f'<li><i class="b{one.color % NUM_COLORS}{" hollow" if one.is_dashed else ""}"></i>{escape(one.name)}</li>'
        for one in series
    )
    return f'<ul class="legend">{items}</ul>' if len(series) > 1 else ""


def _thinned(one: Series) -> Series:
    """The finite points of a curve; of a long one the means of stretches."""
    points = [(float(x), float(y)) for x, y in one.points if math.isfinite(x) and math.isfinite(y)]
    if len(points) > MAX_POINTS:
        bounds = [round(place * len(points) / MAX_POINTS) for place in range(MAX_POINTS + 1)]
        parts = [points[low:high] for low, high in zip(bounds, bounds[1:])]
        points = [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]
    return Series(one.name, points, one.color, one.is_dashed)


def _short(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, float(f"{y:.5g}")) for x, y in points]


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """About `wanted` round numbers within a range."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step)
    return [place * step for place in range(first, math.floor(high / step) + 1)]
