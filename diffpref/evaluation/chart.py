"""Inline SVG: line charts and interval bars without a plotting library. Colours come from CSS classes of the page."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Point = tuple[float, float]  # (step, value)

NUM_SERIES_STYLES = 6
"""Line styles s0 .. s5 that the page's style sheet defines; further series start again."""

_WIDTH, _HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 16, 10, 40
_MAX_POINTS = 300
_BAR_WIDTH, _BAR_HEIGHT = 240, 22


@dataclass(frozen=True)
class _Frame:
    """The plotted ranges, both of positive length, and where they lie in the picture."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, step: float) -> float:
        return _LEFT + (step - self.x_low) / (self.x_high - self.x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (_HEIGHT - _TOP - _BOTTOM)


def line_chart(series: Mapping[str, Sequence[Point]], x_label: str = "step") -> str:
    """An SVG chart of named lines, ticks on both axes, below a legend that states each line's last value.

    Points that are not finite interrupt their line. A line of more than 300 points is drawn as means of neighbours.
    """
    lines = {name: thinned(points, _MAX_POINTS) for name, points in series.items()}
    drawn = [point for points in lines.values() for run in finite_runs(points) for point in run]
    if not drawn:
        return '<p class="muted">No values were recorded.</p>'
    steps, values = [x for x, _ in drawn], [y for _, y in drawn]
    y_ticks = nice_ticks(min(values), max(values))
    x_low, x_high = min(steps), max(steps)
    x_ticks = [tick for tick in nice_ticks(x_low, x_high) if x_low <= tick <= x_high] or [x_low]
    frame = _Frame(x_low, x_high if x_high > x_low else x_low + 1.0, y_ticks[0], y_ticks[-1])
    label = html.escape(f"{', '.join(series)} over {x_label}")
    return "".join(
        [
            _legend(series),
            f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">',
            *_axes(frame, x_ticks, y_ticks, x_label),
            *_polylines(frame, lines),
            "</svg>",
        ]
    )


def picture_file(series: Mapping[str, Sequence[Point]], x_label: str, title: str) -> str:
    """The chart as the text of an SVG file of its own, with a title and the colours of the light scheme."""
    chart = line_chart(series, x_label)
    drawing = chart[chart.index('<svg class="chart"') :].partition(">")[2]
    colours = ("#1f5fd0", "#c8641b", "#6b7686", "#0f8a74", "#9a4fb3", "#a88a10")
    style = "".join(f".s{i} {{ stroke: {colour}; }}" for i, colour in enumerate(colours))
    style += ".series { fill: none; stroke-width: 2; } .grid { stroke: #dfe3e9; } .axis { stroke: #5d6675; } text { fill: #5d6675; }"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -30 {_WIDTH} {_HEIGHT + 30}" width="{2 * _WIDTH}" '
        f'font-family="sans-serif" font-size="12"><style>{style}</style>'
        f'<rect y="-30" width="{_WIDTH}" height="{_HEIGHT + 30}" fill="#fff"/>'
        f'<text x="{_LEFT}" y="-10" font-size="14">{html.escape(title)}</text>{drawing}'
    )


def interval_bar(value: float, low: float, high: float, style: str = "", reference: float = 0.5) -> str:
    """A horizontal bar on a scale of 0 to 1, from the reference line to `value`, with a whisker from low to high.

    `style` is a CSS class of the bar. A whisker that is not finite is left out; a value that is not gives an empty scale.
    """
    parts = [f'<svg class="bar {style}" viewBox="0 0 {_BAR_WIDTH} {_BAR_HEIGHT}" aria-hidden="true">']
    middle = _BAR_HEIGHT / 2
    parts.append(f'<rect class="track" x="0" y="{middle - 6}" width="{_BAR_WIDTH}" height="12" rx="2"/>')
    if math.isfinite(value):
        start, end = sorted((reference * _BAR_WIDTH, min(max(value, 0.0), 1.0) * _BAR_WIDTH))
        parts.append(f'<rect class="fill" x="{start:.1f}" y="{middle - 6}" width="{end - start:.1f}" height="12"/>')
    if math.isfinite(value) and math.isfinite(low) and math.isfinite(high):
        left, right = (min(max(end, 0.0), 1.0) * (_BAR_WIDTH - 2) + 1 for end in (low, high))
        caps = "".join(f"M{x:.1f} {middle - 4}V{middle + 4}" for x in (left, right))
        parts.append(f'<path class="whisker" d="M{left:.1f} {middle}H{right:.1f}{caps}"/>')
    line = reference * _BAR_WIDTH
    parts.append(f'<line class="reference" x1="{line:.1f}" x2="{line:.1f}" y1="0" y2="{_BAR_HEIGHT}"/></svg>')
    return "".join(parts)


def nice_ticks(low: float, high: float, num_intervals: int = 5) -> list[float]:
    """Round numbers (steps of 1, 2 or 5 times a power of ten) that enclose [low, high]; at least two, ascending."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-12):
        margin = 0.1 * abs(low) or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / num_intervals
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels of equal decimals, just enough to tell the ticks apart."""
    largest = max(abs(tick) for tick in ticks)
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=largest or 1.0)
    if largest >= 1e6 or 0 < step < 1e-5:
        return [f"{tick:.3g}" for tick in ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick + 0.0:.{decimals}f}" for tick in ticks]


def thinned(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` points: each the mean of a block of neighbours when there are more, else the points themselves."""
    if len(points) <= limit:
        return list(points)
    edges = [round(index * len(points) / limit) for index in range(limit + 1)]
    blocks = [points[start:end] for start, end in itertools.pairwise(edges)]
    return [(sum(x for x, _ in block) / len(block), sum(y for _, y in block) / len(block)) for block in blocks]


def finite_runs(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Maximal stretches of neighbouring points whose step and value are finite."""
    run: list[Point] = []
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            run.append((float(x), float(y)))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _axes(frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str) -> Iterator[str]:
    right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for tick, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        y = frame.y(tick)
        yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    for tick, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = frame.x(tick)
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 5}"/>'
        yield f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{label}</text>'
    yield f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{floor}" y2="{floor}"/>'
    yield f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">{html.escape(x_label)}</text>'


def _polylines(frame: _Frame, lines: Mapping[str, Sequence[Point]]) -> Iterator[str]:
    for index, points in enumerate(lines.values()):
        style = f"s{index % NUM_SERIES_STYLES}"
        for run in finite_runs(points):
            if len(run) == 1:  # a line of one point would be invisible
                yield f'<circle class="series {style}" cx="{frame.x(run[0][0]):.1f}" cy="{frame.y(run[0][1]):.1f}" r="2"/>'
            else:
                path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in run)
                yield f'<polyline class="series {style}" points="{path}"/>'


def _legend(series: Mapping[str, Sequence[Point]]) -> str:
    entries = []
    for index, (name, points) in enumerate(series.items()):
        finite = [y for run in finite_runs(points) for _, y in run]
        last = f' <span class="muted">last {finite[-1]:.3g}</span>' if finite else ""
        key = (
            f'<svg class="key" viewBox="0 0 22 8" aria-hidden="true"><path class="series s{index % NUM_SERIES_STYLES}" d="M0 4H22"/></svg>'
        )
        entries.append(f"<li>{key}{html.escape(name)}{last}</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'
