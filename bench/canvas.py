"""SVG pictures of panels, two in a row, drawn with nothing but text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 880, 640
PANEL_WIDTH, PANEL_HEIGHT = 340, 190
LEFT, TOP = 70, 92
STEP_X, STEP_Y = 440, 285
FONT = "font-family='system-ui, sans-serif'"

Point = tuple[float, float]


def picture(parts: Sequence[str], height: int = HEIGHT) -> str:
    """The whole of it."""
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}' "
            f"viewBox='0 0 {WIDTH} {height}'>",
            f"<rect width='{WIDTH}' height='{height}' fill='#ffffff'/>",
            *parts,
            "</svg>\n",
        ]
    )


def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 12) -> str:
    """Words at a place; `anchor`: start, middle or end."""
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='{size}' {FONT} "
        f"fill='#1f2328'>{escape(words)}</text>"
    )


def frame(column: int, row: int, title: str) -> tuple[float, float, list[str]]:
    """A panel's corner at the top left, and its title and axes."""
    x, y = LEFT + column * STEP_X, TOP + row * STEP_Y
    return (
        x,
        y,
        [
            text(x, y - 14, title, "start", 14),
            f"<path d='M{x} {y}v{PANEL_HEIGHT}h{PANEL_WIDTH}' fill='none' stroke='#57606a'/>",
        ],
    )


def line(points: Sequence[Point], colour: str, dots: bool = True) -> list[str]:
    """A line through places on the picture, with a dot at each."""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    parts = [f"<path d='M{path}' fill='none' stroke='{colour}' stroke-width='2'/>"]
    if dots:
        parts += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'/>" for x, y in points]
    return parts


def ruler(x: float, y: float, words: str) -> list[str]:
    """A line across the panel at one height, with its value at the left."""
    return [
        f"<path d='M{x} {y:.1f}h{PANEL_WIDTH}' stroke='#d0d7de'/>",
        text(x - 6, y + 4, words, "end", 11),
    ]


def linear(
    column: int, row: int, title: str, below: str, series: Mapping[str, Sequence[Point]]
) -> str:
    """Lines by their colour over one axis, both axes linear and from zero."""
    x, y, parts = frame(column, row, title)
    points = [point for line in series.values() for point in line]
    along = max((point[0] for point in points), default=0) or 1
    up = 1.15 * max((point[1] for point in points), default=0) or 1
    for part in (0.25, 0.5, 0.75, 1.0):
        parts += ruler(x, y + PANEL_HEIGHT * (1 - part), f"{up * part:,.4g}")
        parts.append(text(x + PANEL_WIDTH * part, y + PANEL_HEIGHT + 18, f"{along * part:,.0f}"))
    parts.append(text(x + PANEL_WIDTH / 2, y + PANEL_HEIGHT + 36, below))
    for colour, values in series.items():
        places = [
            (x + PANEL_WIDTH * done / along, y + PANEL_HEIGHT * (1 - value / up))
            for done, value in values
        ]
        if places:
            parts += line(places, colour, dots=False)
    return "\n".join(parts)
