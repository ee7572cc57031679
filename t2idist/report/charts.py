"""Draw line charts as inline SVG; the script of the page only adds the values under the pointer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 30
MAX_POINTS = 240
_SCATTER_MARGIN = 24
LOG_RATIO = 60.0
"""The axis is logarithmic if the largest value is more than this many times the smallest."""


@dataclass(frozen=True)
class Series:
    """One line of a chart, with its points in order of x."""

    name: str
    """Shown in the legend."""
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Chart:
    """A chart as HTML."""

    html: str
    values: dict[str, Any]
    """The points that the script of the page shows under the pointer."""


def format_short(value: float) -> str:
    """Format a number in three significant digits, with k for thousands and M for millions."""
    size = abs(value)
    if size >= 999_500:
        return f"{value / 1e6:.3g}M"
    if size >= 10_000:
        return f"{value / 1e3:.3g}k"
    if size >= 100 or value == round(value):
        return f"{value:.0f}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.1e}"


def draw_chart(title: str, series: Sequence[Series], index: int, note: str = "") -> Chart:
    """Draw all `series` over images seen. `index` is the position of the chart on the page."""
    thinned = [_thinned(s) for s in series if s.x]
    values = [y for s in thinned for y in s.y]
    log = _needs_log_axis(values)
    smoothed = [_smoothed(s) for s in thinned]
    y_ticks = _log_ticks(min(values), max(values)) if log else _ticks(min(0.0, min(values)), max(values))
    last_x = max(s.x[-1] for s in thinned)
    x_ticks = [t for t in _ticks(0.0, last_x) if t <= last_x * 1.0001]
    low, high = y_ticks[0], y_ticks[-1]

    def position(x: float, y: float) -> tuple[float, float]:
        share = (math.log10(y / low) / math.log10(high / low)) if log else (y - low) / (high - low)
        left = LEFT + (WIDTH - LEFT - RIGHT) * x / (last_x or 1.0)
        return round(left, 1), round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)

    lines = []
    for i, (raw, smooth) in enumerate(zip(thinned, smoothed, strict=True)):
        if smooth is not raw:
            lines.append(_path([position(x, y) for x, y in zip(raw.x, raw.y, strict=True)], i, "raw"))
        lines.append(_path([position(x, y) for x, y in zip(smooth.x, smooth.y, strict=True)], i, "line"))
        lines.append(f'<circle class="dot s{i % 8}" r="3.5" hidden></circle>')
    legend = "".join(
        f'<li class="s{i % 8}"><i></i>{escape(s.name)} <b>{format_short(s.y[-1])}</b></li>'
        for i, s in enumerate(smoothed)
    )
    notes = ", ".join(part for part in ("log scale" if log else "", note) if part)
    html = (
        f'<figure class="chart" data-chart="{index}"><figcaption>{escape(title)}'
        f"{f' <small>{escape(notes)}</small>' if notes else ''}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over images seen">'
        f"{_axes(x_ticks, y_ticks, position)}{''.join(lines)}"
        f'<line class="pointer" y1="{TOP}" y2="{HEIGHT - BOTTOM}" hidden></line></svg>'
        f'<ul class="legend">{legend}</ul><div class="tip" hidden></div></figure>'
    )
    points = [
        {
            "name": s.name,
            "x": list(s.x),
            "y": [float(f"{y:.5g}") for y in s.y],
            "at": [position(x, y) for x, y in zip(s.x, s.y, strict=True)],
        }
        for s in smoothed
    ]
    return Chart(html, {"width": WIDTH, "series": points})


def draw_scatter(title: str, points: Sequence[tuple[str, float, str]], *, log: bool, best: str) -> str:
    """Draw a value of each point against its setting, as HTML.

    Args:
        points: setting as text, value, name of the point.
        log: the axis of the settings is logarithmic.
        best: name of the point that is filled.
    """
    try:
        places = [math.log10(float(x)) if log else float(x) for x, _, _ in points]
        labels = {place: x for place, (x, _, _) in zip(places, points, strict=True)}
        ticks = {t: format_short(10**t if log else t) for t in _ticks(min(places), max(places))}
    except ValueError:  # settings that are not numbers stand side by side
        names = list(dict.fromkeys(x for x, _, _ in points))
        places = [float(names.index(x)) for x, _, _ in points]
        labels = {float(i): name for i, name in enumerate(names)}
        ticks = labels
    if len(set(places)) <= 4:
        ticks = labels
    left_end, right_end = min(*ticks, *places), max(*ticks, *places)
    y_ticks = _ticks(min(y for _, y, _ in points), max(y for _, y, _ in points))
    width = WIDTH - LEFT - RIGHT - 2 * _SCATTER_MARGIN

    def position(x: float, y: float) -> tuple[float, float]:
        share = (x - left_end) / (right_end - left_end) if right_end > left_end else 0.5
        height = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(LEFT + _SCATTER_MARGIN + width * share, 1), round(
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * height, 1
        )

    marks = []
    for place, (x, y, name) in zip(places, points, strict=True):
        cx, cy = position(place, y)
        fill = "best" if name == best else "other"
        tip = escape(f"{name}: {x}, {format_short(y)}")
        marks.append(f'<circle class="mark {fill} s0" cx="{cx}" cy="{cy}" r="5"><title>{tip}</title></circle>')
    names_below = "".join(
        f'<text x="{position(t, y_ticks[0])[0]}" y="{HEIGHT - 10}" text-anchor="middle">{escape(text)}</text>'
        for t, text in ticks.items()
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{" <small>log scale</small>" if log else ""}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="values by {escape(title)}">'
        f"{_axes([], y_ticks, position)}{names_below}{''.join(marks)}</svg></figure>"
    )


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float], position: Callable[..., tuple[float, float]]) -> str:
    parts = []
    for tick in y_ticks:
        _, y = position(0.0, tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"></line>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{format_short(tick)}</text>')
    for tick in x_ticks:
        x, _ = position(tick, y_ticks[0])
        anchor = "end" if x > WIDTH - RIGHT - 16 else "middle"
        parts.append(f'<text x="{x}" y="{HEIGHT - 10}" text-anchor="{anchor}">{format_short(tick)}</text>')
    return "".join(parts)


def _path(points: Sequence[tuple[float, float]], index: int, kind: str) -> str:
    if len(points) == 1:
        x, y = points[0]
        return f'<circle class="{kind} point s{index % 8}" cx="{x}" cy="{y}" r="3"></circle>'
    steps = " ".join(f"{x} {y}" for x, y in points)
    return f'<path class="{kind} s{index % 8}" d="M{steps}"></path>'


def _thinned(series: Series) -> Series:
    """Reduce to at most MAX_POINTS points, each the mean of a bucket."""
    n = len(series.x)
    if n <= MAX_POINTS:
        return series
    edges = [round(i * n / MAX_POINTS) for i in range(MAX_POINTS + 1)]

    def means(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sum(values[a:b]) / (b - a) for a, b in pairwise(edges))

    return Series(series.name, means(series.x), means(series.y))


def _smoothed(series: Series) -> Series:
    """Take a centred moving average over a fifteenth of the points; short series are returned unchanged."""
    n = len(series.y)
    radius = n // 30
    if radius < 1:
        return series
    windows = [series.y[max(0, i - radius) : i + radius + 1] for i in range(n)]
    return Series(series.name, series.x, tuple(sum(w) / len(w) for w in windows))


def _needs_log_axis(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > LOG_RATIO


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers that enclose [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = -(-(last - first) // 6)
    return [10.0**p for p in range(first, last + step, step)]
