"""From what a run of the benchmark found to tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import goals
import slow
import workers
from result import ADDED_P50, KIB_PER_MIB, Cell, Result, added, medians, plain
from tables import number, table

RIVALS = ("nginx", "sglang-router", "litellm", "llmproxy-twisted", "llmproxy-uvloop")
#: Of the core that clients, server and driver share, in percent: above that it may be the limit.
BUSY_PCT = 90
#: Of one core, in the median measurement: above that nothing is as it should be.
NOISE_PCT = 20

RATIOS: tuple[tuple[str, Cell], ...] = (
    ("requests/s, 32 connections", plain("closed-32", "per_s")),
    ("CPU per request", plain("closed-32", "cpu_us")),
    ("latency added at 1 connection, p50", ADDED_P50),
    ("CPU per chunk, 100 x 50/s", plain("streams-100x50", "cpu_us")),
    ("CPU per chunk, 1,000 x 20/s", plain("streams-1000x20", "cpu_us")),
)


def text(result: Result) -> str:
    """All results, in Markdown that reads well as plain text."""
    names = list(result.runs)
    rivals = [name for name in RIVALS if name in names]
    parts = [_about(result)]
    if "llmproxy" in names:
        parts += ["Goals:", goals.text(goals.goals(result))]
    if names:
        parts += [_table(_rows(result), result, names), *_warnings(result)]
    if "llmproxy" in names and rivals:
        parts += [
            "llmproxy as a multiple of the others, in this run:",
            table(["", *rivals], _ratio_rows(result, rivals)),
        ]
    if result.streams():
        parts.append("Growth, with 4 chunks/s in each stream:")
        parts.append(_table(_growth_rows(result), result, names))
    if result.slow:
        parts.append(slow.text(result.slow))
    if result.workers:
        parts.append(workers.text(result.workers))
    return "\n\n".join(parts) + "\n"


def brief(figures: Mapping[str, float]) -> str:
    """One measurement in one line."""
    words = [f"{figures['per_s']:9.0f}/s", f"{figures['cpu_us']:8.1f} us CPU each"]
    if "ttft_p50" in figures:
        words.append(f"first {_ms(figures['ttft_p50'])} p99 {_ms(figures['ttft_p99'])} ms")
        words.append(f"gap {_ms(figures['gap_p50'])} p99 {_ms(figures['gap_p99'])} ms")
        if figures["together_pct"] >= 1:
            words.append(f"{figures['together_pct']:.0f} % together")
    else:
        words.append(f"p50 {_ms(figures['p50'])} p99 {_ms(figures['p99'])} ms")
    words.append(f"{figures['rss_kib'] / KIB_PER_MIB:.0f} MiB")
    words.append(f"cores {figures['target_cpu_pct']:.0f} + {_other_core(figures):.0f} %")
    for trouble in ("lost", "refused", "wrong", "reconnects"):
        if figures[trouble]:
            words.append(f"{trouble.upper()} {figures[trouble]:.0f}")
    return ", ".join(words)


def _ms(us: float) -> str:
    return f"{us / 1000:.2f}" if us < 99_500 else f"{us / 1000:.0f}"


def _other_core(figures: Mapping[str, float]) -> float:
    return figures["backend_cpu_pct"] + figures["load_cpu_pct"]


def _about(result: Result) -> str:
    about = result.about
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    busy = ", ".join(f"{percent:.0f} %" for percent in result.busy_before.values())
    sessions = max((len(sessions) for sessions in result.runs.values()), default=1)
    foreign = _each(result, "others_pct")
    noise = ""
    if foreign:
        noise = (
            f" While it ran, other processes took {statistics.median(foreign):.0f} % of a core"
            f" (median of the measurements), at most {max(foreign):.0f} %."
        )
    return (
        f"{'Quick' if result.quick else 'Full'} run, {sessions} session(s) of each target, medians."
        f" {about['cpu']}, {about['cores']} cores, {about['system']}, Python {about['python']},"
        f" {about['disk']} that takes {about['disk_sync_us']:.0f} µs to make 4 KiB durable."
        f" {versions}. Before the run the cores were {busy} busy with something else.{noise}"
    )


def _each(result: Result, what: str) -> list[float]:
    return [
        figures[what]
        for sessions in result.runs.values()
        for session in sessions
        for figures in session.values()
        if what in figures
    ]


def _warnings(result: Result) -> list[str]:
    """Where it may be the measuring that was measured. `direct` is always at its limit."""
    found = [
        f"{name} in {measurement} ({_other_core(figures):.0f} %)"
        for name in result.runs
        if name != "direct"
        for measurement, figures in medians(result.runs, name).items()
        if "load_cpu_pct" in figures and _other_core(figures) > BUSY_PCT
    ]
    warnings = []
    if found:
        warnings.append(
            f"WARNING: clients and server used more than {BUSY_PCT} % of their core, so that the"
            f" proxy may have been faster than they: {', '.join(found)}. CPU per request and per"
            " chunk are not touched by that."
        )
    together = [
        f"{name} in {measurement} ({figures['together_pct']:.0f} %)"
        for name in result.runs
        for measurement, figures in medians(result.runs, name).items()
        if goals.late(figures.get("together_pct"))
    ]
    if together:
        warnings.append(
            "WARNING: the proxy was late, so that many chunks came together, which costs less CPU"
            f" per chunk than passing on each in its time: {', '.join(together)}."
        )
    foreign = _each(result, "others_pct")
    if foreign and statistics.median(foreign) > NOISE_PCT:
        warnings.append(
            "WARNING: other processes took so much of the machine that no figure is right but"
            " those of memory."
        )
    return warnings


def _table(rows: list[tuple[str, Cell]], result: Result, names: list[str]) -> str:
    cells = [[title, *(number(cell(result, name)) for name in names)] for title, cell in rows]
    return table(["", *names], cells)


def _rows(result: Result) -> list[tuple[str, Cell]]:
    rows: list[tuple[str, Cell]] = [
        ("requests/s, 32 connections", plain("closed-32", "per_s")),
        ("CPU µs per request", plain("closed-32", "cpu_us")),
        ("proxy's core used, 32 connections, %", plain("closed-32", "target_cpu_pct")),
        ("clients' and server's core used, %", _shared_core("closed-32")),
        ("latency added at 1 connection, p50, ms", ADDED_P50),
        ("latency added at 1 connection, p99, ms", added("closed-1", "p99", 1e-3)),
    ]
    for key, name in (("streams-100x50", "100 x 50/s"), ("streams-1000x20", "1,000 x 20/s")):
        rows += [
            (f"CPU µs per chunk, {name}", plain(key, "cpu_us")),
            (f"chunks/s, {name}", plain(key, "per_s")),
            (f"time to first token, {name}, p50, ms", plain(key, "ttft_p50", 1e-3)),
            (f"time to first token, {name}, p99, ms", plain(key, "ttft_p99", 1e-3)),
            (f"gap between chunks, {name}, p50, ms", plain(key, "gap_p50", 1e-3)),
            (f"gap between chunks, {name}, p99, ms", plain(key, "gap_p99", 1e-3)),
        ]
    rows.append(("memory idle, MiB", plain("idle", "rss_kib", 1 / KIB_PER_MIB)))
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
        ("chunks that came with the one before, %", "together_pct", 1.0),
        ("time to first token p50, ms", "ttft_p50", 1e-3),
        ("time to first token p99, ms", "ttft_p99", 1e-3),
        ("memory, MiB", "rss_kib", 1 / KIB_PER_MIB),
        ("streams lost", "lost", 1.0),
    ):
        rows += [
            (f"{title}: {count:,} streams", plain(f"streams-{count}x4", what, scale))
            for count in result.streams()
        ]
    return rows


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


def _shared_core(measurement: str) -> Cell:
    def cell(result: Result, name: str) -> float | None:
        figures = medians(result.runs, name).get(measurement)
        return _other_core(figures) if figures else None

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
