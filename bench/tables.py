"""Tables in Markdown that read well as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def number(value: float | None) -> str:
    """Three digits that count, or more; a dash for what was not measured."""
    if value is None:
        return "-"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The first `left` columns are words, the others numbers."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            word.ljust(width) if i < left else word.rjust(width)
            for i, (word, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    rule = "|".join(
        "-" * (width + 1) + ("-" if i < left else ":") for i, width in enumerate(widths)
    )
    return "\n".join([line(head), f"|{rule}|", *map(line, rows)])


def put_into(page: Path, text: str, name: str = "results") -> None:
    """Put the text between the marks of that name in a page of the documentation."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found_begin, rest = page.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise SystemExit(f"{page.name}: the marks for the {name} are not there")
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")
