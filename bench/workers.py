"""What a second worker brings, on two cores that the clients and the backend use too.

    a core of its own   one worker on one core, all else on the other
    1 worker            one worker and all else on both cores
    2 workers           two of them and all else on both cores

At R requests a second clients and backend take a share of the two cores; what is left over, divided
by the CPU time that a request costs one worker on a core of its own, is the most that there can be.
The speed-up on two whole cores is twice the part of it that two workers reach.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from measurements import Closed
from sessions import Bench, Figures, Places
from tables import number, table
from targets import Missing, Target, llmproxy

CORES = 2
ALONE, ONE, TWO = "a core of its own", "1 worker", "2 workers"
CONNECTIONS = 256
FULL, QUICK = Closed(CONNECTIONS, 2.0, 6.0), Closed(CONNECTIONS, 1.0, 3.0)
MICRO = 1e6


def measure(bench: Bench, what: Closed, sessions: int) -> dict[str, Figures]:
    """The figures of each case that could be measured, medians over the sessions."""
    cases: dict[str, tuple[Target, Places]] = {
        ALONE: (llmproxy(), bench.apart),
        ONE: (llmproxy(), bench.shared),
        TWO: (llmproxy(workers=2), bench.shared),
    }
    runs: dict[str, list[Figures]] = {}
    for _ in range(sessions):
        for name, (target, places) in list(cases.items()):
            try:
                with bench.session(target, places) as session:
                    figures = session.measure(what)
                    figures["processes"] = len(session.running.pids())
            except Missing as why:
                print(f"{name}: skipped. {why}")
                del cases[name]
                continue
            runs.setdefault(name, []).append(figures)
            print(f"{name}: {figures['per_s']:.0f}/s, {figures['cpu_us']:.0f} us each", flush=True)
    return compare(runs)


def compare(runs: Mapping[str, Sequence[Figures]]) -> dict[str, Figures]:
    """Medians of each case; with what could be reached, and the speed-up on two whole cores."""
    found = {name: _medians(sessions) for name, sessions in runs.items()}
    for figures in found.values():
        others_pct = figures["load_cpu_pct"] + figures["backend_cpu_pct"]
        figures["others_us"] = others_pct / 100 * MICRO / figures["per_s"]
    for name in (ONE, TWO):
        if name in found and ALONE in found:
            figures = found[name]
            others_cores = figures["others_us"] * figures["per_s"] / MICRO
            possible = (CORES - others_cores) * MICRO / found[ALONE]["cpu_us"]
            figures["possible_per_s"] = possible
            figures["speedup"] = CORES * figures["per_s"] / possible
    return found


def _medians(sessions: Sequence[Figures]) -> Figures:
    return {what: statistics.median(one[what] for one in sessions) for what in sessions[0]}


def text(found: Mapping[str, Figures]) -> str:
    """As a table, with a column for each case."""
    rows = [
        ("requests/s", "per_s"),
        ("CPU µs per request, all processes of the proxy", "cpu_us"),
        ("CPU µs per request, clients and server", "others_us"),
        ("cores used by the proxy, %", "target_cpu_pct"),
        ("of that by its busiest process, %", "busiest_cpu_pct"),
        ("processes of the proxy", "processes"),
        ("cores used by what has nothing to do with it, %", "others_pct"),
        ("latency p50, ms", "p50"),
        ("latency p99, ms", "p99"),
        ("requests/s that two cores could do at most", "possible_per_s"),
        ("speed-up on two whole cores", "speedup"),
    ]
    scale = {"p50": 1e-3, "p99": 1e-3}
    cells = [
        [title, *(_cell(figures.get(what), scale.get(what, 1.0)) for figures in found.values())]
        for title, what in rows
    ]
    head = f"Workers, with {CONNECTIONS} connections:"
    return f"{head}\n\n{table(['', *found], cells)}"


def _cell(value: float | None, scale: float) -> str:
    return number(None if value is None else value * scale)
