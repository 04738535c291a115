"""Small plots as SVG text: the page needs no library, no script and no network to show them."""

from collections import Counter
from collections.abc import Callable
from html import escape

import numpy as np
from numpy.typing import ArrayLike

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 200, 46, 34, 24


def histogram(values: ArrayLike, title: str, unit: str, num_bins: int = 28, is_log: bool = False) -> str:
    """Bars of how many samples have which value; whole numbers of a small range get a bar each."""
    values = np.asarray(values, dtype=np.float64)
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if is_log and low > 0 and high > 20 * low:
        edges = np.geomspace(low, high * 1.0001, num_bins + 1)
        ticks = [low, float(np.sqrt(low * high)), high]
    elif high - low < num_bins and np.equal(values, values.round()).all():
        edges = np.arange(low - 0.5, high + 1.0, 1.0)
        ticks = np.arange(low, high + 1, max(1, int((high - low) // 6 + 1))).tolist()
    else:
        is_log = False
        edges = np.linspace(low, high if high > low else low + 1, num_bins + 1)
        ticks = np.linspace(low, high, 5).tolist()
    is_log = is_log and edges[0] > 0 and len(ticks) == 3
    counts, _ = np.histogram(values, edges)
    at = _scale(edges[0], edges[-1], is_log)
    top = max(1, int(counts.max(initial=0)))
    bars = []
    for count, left, right in zip(counts, edges[:-1], edges[1:]):
        x, right_x = at(left), at(right)
        y = _y(count / top)
        name = f"{count} samples: {_number(max(left, low))} to {_number(min(right, high))} {unit}"
        bars.append(
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{max(right_x - x - 1, 0.8):.1f}" height="{_y(0) - y:.1f}">'
            f"<title>{escape(name)}</title></rect>"
        )
    marks = [
        f'<text class="tick" x="{at(tick):.1f}" y="{HEIGHT - 18}" text-anchor="middle">{_number(tick)}</text>'
        for tick in ticks
    ]
    middle = f"median {_number(float(np.median(values)))}, largest {_number(high)}" if len(values) else "none"
    return _figure(title, f"{unit} ({middle})", top, "".join(bars + marks))


def scatter(points: ArrayLike, title: str) -> str:
    """Image sizes: a dot per size, width against height, both on the same logarithmic scale."""
    points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    if not len(points):
        return ""
    low, high = max(float(points.min()), 1.0) / 1.3, float(points.max()) * 1.3
    places, counts = np.unique(points, axis=0, return_counts=True)
    across, up = _scale(low, high, True), lambda y: _y(np.log(max(y, 1.0) / low) / np.log(high / low))
    dots = "".join(
        f'<circle class="dot" cx="{across(x):.1f}" cy="{up(y):.1f}" r="{min(2 + np.log2(count), 9):.1f}">'
        f"<title>{count} of {int(x)} x {int(y)} pixels</title></circle>"
        for (x, y), count in zip(places[:3000], counts)
    )
    decades = [10.0**power * step for power in range(7) for step in (1, 3) if low <= 10.0**power * step <= high]
    decades = decades[:: max(1, len(decades) // 5)]
    ticks = "".join(
        f'<text class="tick" x="{across(tick):.1f}" y="{HEIGHT - 18}" text-anchor="middle">{_number(tick)}</text>'
        f'<text class="tick" x="{LEFT - 5}" y="{up(tick) + 3:.1f}" text-anchor="end">{_number(tick)}</text>'
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        for tick in decades
    )
    return _figure(title, f"width in pixels ({len(points)} images)", 0, ticks + dots, "height")


def bars(counter: Counter[str], title: str, unit: str, most: int = 12) -> str:
    """One bar per name, largest first."""
    rows = counter.most_common(most)
    rest = sum(counter.values()) - sum(number for _, number in rows)
    rows += [("others", rest)] if rest else []
    top = max((number for _, number in rows), default=1)
    lines = []
    for name, number in rows:
        share = 100 * number / top
        lines.append(
            f'<div class="row"><span class="name">{escape(str(name))}</span><span class="track"><span class="fill" '
            f'style="width:{share:.1f}%"></span></span><span class="value">{number}</span></div>'
        )
    return f'<figure><figcaption>{escape(title)}</figcaption>{"".join(lines)}<div class="axis">{escape(unit)}</div></figure>'


def _scale(low: float, high: float, is_log: bool) -> Callable[[float], float]:
    place = (lambda x: np.log(max(x, 1e-9))) if is_log else float
    begin, span = place(low), max(place(high) - place(low), 1e-9)
    return lambda x: LEFT + (WIDTH - LEFT - 12) * (place(x) - begin) / span


def _y(share: float) -> float:
    return TOP + (HEIGHT - BOTTOM - TOP) * (1 - share)


def _figure(title: str, axis: str, top: int, inner: str, unit: str = "samples") -> str:
    lines = (
        ""
        if not top
        else "".join(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{_y(share):.1f}" y2="{_y(share):.1f}"/>'
            f'<text class="tick" x="{LEFT - 5}" y="{_y(share) + 3:.1f}" text-anchor="end">{_number(top * share)}</text>'
            for share in (0, 0.5, 1)
        )
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{lines}{inner}<text class="tick" x="{LEFT}" y="{HEIGHT - 3}">{escape(axis)}</text>'
        f'<text class="tick" x="4" y="{TOP - 13}">{escape(unit)}</text></svg></figure>'
    )


def _number(value: float) -> str:
    value = float(value)
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    return f"{value:,.0f}" if abs(value) >= 10 or value == round(value) else f"{value:.1f}"
