"""The results as one SVG picture: four panels, drawn with nothing but text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from report import KIB_PER_MIB, Result

COLOURS = {
    "direct": "#8a8f98",
    "llmproxy": "#c2410c",
    "nginx": "#15803d",
    "sglang-router": "#1d4ed8",
    "litellm": "#7e22ce",
}
WIDTH, HEIGHT = 880, 640
PANEL_WIDTH, PANEL_HEIGHT = 340, 190
LEFT, TOP = 70, 92
STEP_X, STEP_Y = 440, 285
FONT = "font-family='system-ui, sans-serif'"

Point = tuple[float, float]


def draw(result: Result) -> str:
    """The whole picture."""
    proxies = [name for name in result.runs if name != "direct"]
    panels = [
        _bars(0, 0, "CPU µs per request, 32 connections", result, proxies, ["closed-32"], [""]),
        _bars(
            1,
            0,
            "CPU µs per streamed chunk",
            result,
            proxies,
            ["streams-100x50", "streams-1000x20"],
            ["100 x 50/s", "1,000 x 20/s"],
        ),
        _lines(0, 1, "gap between chunks, p99, ms (4 chunks/s)", result, "gap_p99", 1e-3),
        _lines(1, 1, "memory, MiB", result, "rss_kib", 1 / KIB_PER_MIB),
    ]
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{HEIGHT}' "
            f"viewBox='0 0 {WIDTH} {HEIGHT}'>",
            f"<rect width='{WIDTH}' height='{HEIGHT}' fill='#ffffff'/>",
            _legend(list(result.runs)),
            *panels,
            "</svg>\n",
        ]
    )


def _text(x: float, y: float, words: str, anchor: str = "middle", size: int = 12) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='{size}' {FONT} "
        f"fill='#1f2328'>{escape(words)}</text>"
    )


def _legend(names: Sequence[str]) -> str:
    parts, x = [], LEFT
    for name in names:
        parts.append(f"<rect x='{x}' y='22' width='12' height='12' fill='{COLOURS[name]}'/>")
        parts.append(_text(x + 18, 33, name, "start", 13))
        x += 45 + 8 * len(name)
    return "\n".join(parts)


def _frame(column: int, row: int, title: str) -> tuple[float, float, list[str]]:
    x, y = LEFT + column * STEP_X, TOP + row * STEP_Y
    return (
        x,
        y,
        [
            _text(x, y - 14, title, "start", 14),
            f"<path d='M{x} {y}v{PANEL_HEIGHT}h{PANEL_WIDTH}' fill='none' stroke='#57606a'/>",
        ],
    )


def _bars(
    column: int,
    row: int,
    title: str,
    result: Result,
    names: Sequence[str],
    measurements: Sequence[str],
    labels: Sequence[str],
) -> str:
    """Bars from zero, a group for each measurement, a bar for each proxy."""
    x, y, parts = _frame(column, row, title)
    values = {(name, m): result.figure(name, m, "cpu_us") for name in names for m in measurements}
    most = max((value for value in values.values() if value), default=1.0)
    group = PANEL_WIDTH / len(measurements)
    width = min(60.0, 0.8 * group / max(1, len(names)))
    for i, (measurement, label) in enumerate(zip(measurements, labels, strict=True)):
        left = x + i * group + (group - width * len(names)) / 2
        parts.append(_text(x + (i + 0.5) * group, y + PANEL_HEIGHT + 18, label))
        for j, name in enumerate(names):
            value = values[name, measurement]
            if value is None:
                continue
            height = (PANEL_HEIGHT - 16) * value / most
            at = left + j * width
            parts.append(
                f"<rect x='{at + 2:.1f}' y='{y + PANEL_HEIGHT - height:.1f}' "
                f"width='{width - 4:.1f}' height='{height:.1f}' fill='{COLOURS[name]}'/>"
            )
            top = y + PANEL_HEIGHT - height - 4
            parts.append(_text(at + width / 2, top, f"{value:,.0f}", size=11))
    return "\n".join(parts)


def _lines(column: int, row: int, title: str, result: Result, what: str, scale: float) -> str:
    """Lines over the number of streams, both axes logarithmic."""
    x, y, parts = _frame(column, row, title)
    series: dict[str, list[Point]] = {}
    for name in result.runs:
        if name == "direct" and what == "rss_kib":
            continue
        for count in result.streams():
            value = result.figure(name, f"streams-{count}x4", what)
            if value:
                series.setdefault(name, []).append((count, value * scale))
    points = [point for line in series.values() for point in line]
    if not points:
        return "\n".join(parts)
    low = 10 ** math.floor(math.log10(min(value for _, value in points)))
    high = 10 ** math.ceil(math.log10(max(value for _, value in points)) + 1e-9)
    first, last = min(count for count, _ in points), max(count for count, _ in points)

    def place(point: Point) -> Point:
        along = math.log(point[0] / first) / (math.log(last / first) or 1)
        up = math.log(point[1] / low) / math.log(high / low)
        return x + 10 + along * (PANEL_WIDTH - 20), y + PANEL_HEIGHT * (1 - up)

    for count in result.streams():
        parts.append(_text(place((count, low))[0], y + PANEL_HEIGHT + 18, f"{count:,}"))
    parts.append(_text(x + PANEL_WIDTH / 2, y + PANEL_HEIGHT + 36, "concurrent streams"))
    tick = float(low)
    while tick <= high * 1.001:
        at = place((first, tick))[1]
        parts.append(f"<path d='M{x} {at:.1f}h{PANEL_WIDTH}' stroke='#d0d7de'/>")
        parts.append(_text(x - 6, at + 4, f"{tick:,g}", "end", 11))
        tick *= 10
    for name, line in series.items():
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in map(place, line))
        colour = COLOURS[name]
        parts.append(f"<path d='M{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        parts += [
            f"<circle cx='{px:.1f}' cy='{py:.1f}' r='3' fill='{colour}'/>"
            for px, py in map(place, line)
        ]
    return "\n".join(parts)
