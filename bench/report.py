"""From the figures of all sessions to medians, ratios and tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: By target, then by session, then by measurement: the figures of load.c.
Runs = dict[str, list[dict[str, dict[str, float]]]]

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
RIVALS = ("nginx", "sglang-router", "litellm")
KIB_PER_MIB = 1024


@dataclass(frozen=True)
class Result:
    """All that one run of the benchmark found."""

    about: dict[str, str | int | float]
    busy_before: dict[str, float]
    versions: dict[str, str]
    quick: bool
    runs: Runs

    def to_json(self) -> str:
        """Everything, with the medians."""
        everything: dict[str, Any] = asdict(self)
        everything["medians"] = {name: medians(self.runs, name) for name in self.runs}
        return json.dumps(everything, indent=1) + "\n"

    def figure(self, name: str, measurement: str, what: str) -> float | None:
        """The median over the sessions; None where it was not measured."""
        values = [
            session[measurement][what]
            for session in self.runs.get(name, ())
            if what in session.get(measurement, ()) and session[measurement].get("count", 1)
        ]
        return statistics.median(values) if values else None

    def streams(self) -> list[int]:
        """How many streams the growth was measured with."""
        keys = {key for sessions in self.runs.values() for one in sessions for key in one}
        found = [key[len("streams-") : -len("x4")] for key in keys if key.endswith("x4")]
        return sorted(int(count) for count in found)


def medians(runs: Runs, name: str) -> dict[str, dict[str, float]]:
    """For each measurement of a target and each figure in it: the median over the sessions."""
    found: dict[str, dict[str, list[float]]] = {}
    for session in runs[name]:
        for measurement, figures in session.items():
            for what, value in figures.items():
                found.setdefault(measurement, {}).setdefault(what, []).append(value)
    return {
        measurement: {what: statistics.median(values) for what, values in figures.items()}
        for measurement, figures in found.items()
    }


def brief(figures: Mapping[str, float]) -> str:
    """One measurement in one line."""
    words = [f"{figures['per_s']:9.0f}/s", f"{figures['cpu_us']:8.1f} us CPU each"]
    if "ttft_p50" in figures:
        words.append(f"first {_ms(figures['ttft_p50'])} p99 {_ms(figures['ttft_p99'])} ms")
        words.append(f"gap {_ms(figures['gap_p50'])} p99 {_ms(figures['gap_p99'])} ms")
    else:
        words.append(f"p50 {_ms(figures['p50'])} p99 {_ms(figures['p99'])} ms")
    words.append(f"{figures['rss_kib'] / KIB_PER_MIB:.0f} MiB")
    for trouble in ("lost", "refused", "wrong", "reconnects"):
        if figures[trouble]:
            words.append(f"{trouble.upper()} {figures[trouble]:.0f}")
    return ", ".join(words)


def _ms(us: float) -> str:
    return f"{us / 1000:.2f}" if us < 99_500 else f"{us / 1000:.0f}"


# -- tables ------------------------------------------------------------------------------------

Cell = Callable[[Result, str], float | None]


def _plain(measurement: str, what: str, scale: float = 1.0) -> Cell:
    def cell(result: Result, name: str) -> float | None:
        value = result.figure(name, measurement, what)
        if name == "direct" and what in ("cpu_us", "rss_kib"):
            return None
        return None if value is None else value * scale

    return cell


def _added(measurement: str, what: str, scale: float) -> Cell:
    """What a proxy adds to the same figure without one, session by session."""

    def cell(result: Result, name: str) -> float | None:
        if name == "direct":
            return None
        pairs = zip(result.runs.get(name, ()), result.runs.get("direct", ()), strict=False)
        added = [
            mine[measurement][what] - bare[measurement][what]
            for mine, bare in pairs
            if measurement in mine and measurement in bare
        ]
        return statistics.median(added) * scale if added else None

    return cell


def _per_stream(count: int) -> Cell:
    def cell(result: Result, name: str) -> float | None:
        loaded = result.figure(name, f"streams-{count}x4", "rss_kib")
        idle = result.figure(name, "idle", "rss_kib")
        return None if loaded is None or idle is None else (loaded - idle) / count

    return cell


def _lost(result: Result, name: str) -> float | None:
    """Streams and answers that did not come whole, over all sessions."""
    troubles = ("lost", "wrong")
    return sum(
        figures.get(trouble, 0.0)
        for session in result.runs.get(name, ())
        for figures in session.values()
        for trouble in troubles
    )


def _rows(result: Result) -> list[tuple[str, Cell]]:
    rows: list[tuple[str, Cell]] = [
        ("requests/s, 32 connections", _plain("closed-32", "per_s")),
        ("CPU µs per request", _plain("closed-32", "cpu_us")),
        ("latency added at 1 connection, p50, ms", _added("closed-1", "p50", 1e-3)),
        ("latency added at 1 connection, p99, ms", _added("closed-1", "p99", 1e-3)),
    ]
    for key, name in (("streams-100x50", "100 x 50/s"), ("streams-1000x20", "1,000 x 20/s")):
        rows += [
            (f"CPU µs per chunk, {name}", _plain(key, "cpu_us")),
            (f"chunks/s, {name}", _plain(key, "per_s")),
            (f"time to first token, {name}, p50, ms", _plain(key, "ttft_p50", 1e-3)),
            (f"time to first token, {name}, p99, ms", _plain(key, "ttft_p99", 1e-3)),
            (f"gap between chunks, {name}, p50, ms", _plain(key, "gap_p50", 1e-3)),
            (f"gap between chunks, {name}, p99, ms", _plain(key, "gap_p99", 1e-3)),
        ]
    rows.append(("memory idle, MiB", _plain("idle", "rss_kib", 1 / KIB_PER_MIB)))
    if counts := result.streams():
        rows.append((f"memory per stream, of {counts[-1]:,}, KiB", _per_stream(counts[-1])))
    rows.append(("answers and streams lost", _lost))
    return rows


def _growth_rows(result: Result) -> list[tuple[str, Cell]]:
    rows: list[tuple[str, Cell]] = []
    for title, what, scale in (
        ("CPU µs per chunk", "cpu_us", 1.0),
        ("core used, %", "target_cpu_pct", 1.0),
        ("gap p50, ms", "gap_p50", 1e-3),
        ("gap p99, ms", "gap_p99", 1e-3),
        ("time to first token p50, ms", "ttft_p50", 1e-3),
        ("time to first token p99, ms", "ttft_p99", 1e-3),
        ("memory, MiB", "rss_kib", 1 / KIB_PER_MIB),
        ("streams lost", "lost", 1.0),
    ):
        rows += [
            (f"{title}: {count:,} streams", _plain(f"streams-{count}x4", what, scale))
            for count in result.streams()
        ]
    return rows


RATIOS: tuple[tuple[str, Cell], ...] = (
    ("requests/s, 32 connections", _plain("closed-32", "per_s")),
    ("CPU per request", _plain("closed-32", "cpu_us")),
    ("latency added at 1 connection, p50", _added("closed-1", "p50", 1e-3)),
    ("CPU per chunk, 100 x 50/s", _plain("streams-100x50", "cpu_us")),
    ("CPU per chunk, 1,000 x 20/s", _plain("streams-1000x20", "cpu_us")),
)


def tables(result: Result) -> str:
    """All results, in Markdown that reads well as plain text."""
    names = list(result.runs)
    parts = [
        _about(result),
        _table(
            ["", *names], [[t, *(_number(c(result, n)) for n in names)] for t, c in _rows(result)]
        ),
    ]
    rivals = [name for name in RIVALS if name in names]
    if "llmproxy" in names and rivals:
        parts.append("llmproxy as a multiple of the others, in this run:")
        parts.append(_table(["", *rivals], _ratio_rows(result, rivals)))
    if result.streams():
        parts.append("Growth, with 4 chunks/s in each stream:")
        rows = [[t, *(_number(c(result, n)) for n in names)] for t, c in _growth_rows(result)]
        parts.append(_table(["", *names], rows))
    return "\n\n".join(parts) + "\n"


def _ratio_rows(result: Result, rivals: list[str]) -> list[list[str]]:
    rows = []
    for title, cell in RATIOS:
        ours = cell(result, "llmproxy")
        words = [title]
        for rival in rivals:
            theirs = cell(result, rival)
            words.append(f"{ours / theirs:.2f}" if ours is not None and theirs else "-")
        rows.append(words)
    return rows


def _about(result: Result) -> str:
    about = result.about
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    busy = ", ".join(f"{percent:.0f} %" for percent in result.busy_before.values())
    sessions = max(len(sessions) for sessions in result.runs.values())
    return (
        f"{'Quick' if result.quick else 'Full'} run, {sessions} session(s) of each target, medians."
        f" {about['cpu']}, {about['cores']} cores, {about['system']}, Python {about['python']},"
        f" {about['disk']} that takes {about['disk_sync_us']:.0f} µs to make 4 KiB durable."
        f" {versions}. Before the run the cores were {busy} busy with something else."
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        first, *rest = row
        cells = [first.ljust(widths[0])]
        cells += [word.rjust(width) for word, width in zip(rest, widths[1:], strict=True)]
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join(
        "-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths)
    )
    return "\n".join([line(head), rule + "|", *map(line, rows)])


def put_into(page: Path, text: str) -> None:
    """Put the results between the marks of a page of the documentation."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page.name}: the marks for the results are not there")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
