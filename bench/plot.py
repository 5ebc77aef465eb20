"""The results as one SVG picture of four panels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from canvas import LEFT, PANEL_HEIGHT, PANEL_WIDTH, Point, frame, line, picture, ruler, text
from result import KIB_PER_MIB, Result

COLOURS = {
    "direct": "#8a8f98",
    "llmproxy": "#c2410c",
    "nginx": "#15803d",
    "sglang-router": "#1d4ed8",
    "litellm": "#7e22ce",
    "llmproxy-twisted": "#d4a017",
    "llmproxy-uvloop": "#be185d",
}
OTHER = "#57606a"


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
    return picture([_legend(list(result.runs)), *panels])


def _colour(name: str) -> str:
    return COLOURS.get(name, OTHER)


def _legend(names: Sequence[str]) -> str:
    parts, x = [], LEFT
    for name in names:
        parts.append(f"<rect x='{x}' y='22' width='12' height='12' fill='{_colour(name)}'/>")
        parts.append(text(x + 18, 33, name, "start", 13))
        x += 45 + 8 * len(name)
    return "\n".join(parts)


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
    x, y, parts = frame(column, row, title)
    values = {(name, m): result.figure(name, m, "cpu_us") for name in names for m in measurements}
    most = max((value for value in values.values() if value), default=1.0)
    group = PANEL_WIDTH / len(measurements)
    width = min(60.0, 0.8 * group / max(1, len(names)))
    for i, (measurement, label) in enumerate(zip(measurements, labels, strict=True)):
        left = x + i * group + (group - width * len(names)) / 2
        parts.append(text(x + (i + 0.5) * group, y + PANEL_HEIGHT + 18, label))
        for j, name in enumerate(names):
            value = values[name, measurement]
            if value is None:
                continue
            height = (PANEL_HEIGHT - 16) * value / most
            at = left + j * width
            parts.append(
                f"<rect x='{at + 2:.1f}' y='{y + PANEL_HEIGHT - height:.1f}' "
                f"width='{width - 4:.1f}' height='{height:.1f}' fill='{_colour(name)}'/>"
            )
            top = y + PANEL_HEIGHT - height - 4
            parts.append(text(at + width / 2, top, f"{value:,.0f}", size=11))
    return "\n".join(parts)


def _lines(column: int, row: int, title: str, result: Result, what: str, scale: float) -> str:
    """Lines over the number of streams, both axes logarithmic."""
    x, y, parts = frame(column, row, title)
    series: dict[str, list[Point]] = {}
    for name in result.runs:
        if name == "direct" and what == "rss_kib":
            continue
        for count in result.streams():
            value = result.figure(name, f"streams-{count}x4", what)
            if value:
                series.setdefault(name, []).append((count, value * scale))
    points = [point for values in series.values() for point in values]
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
        parts.append(text(place((count, low))[0], y + PANEL_HEIGHT + 18, f"{count:,}"))
    parts.append(text(x + PANEL_WIDTH / 2, y + PANEL_HEIGHT + 36, "concurrent streams"))
    tick = float(low)
    while tick <= high * 1.001:
        parts += ruler(x, place((first, tick))[1], f"{tick:,g}")
        tick *= 10
    for name, values in series.items():
        parts += line([place(point) for point in values], _colour(name))
    return "\n".join(parts)
