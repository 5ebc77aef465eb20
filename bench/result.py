"""All that a run of the benchmark found, and the medians of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

#: By target, then by session, then by measurement: the figures of load.c.
Runs = dict[str, list[dict[str, dict[str, float]]]]

KIB_PER_MIB = 1024


@dataclass(frozen=True)
class Result:
    """All that one run of the benchmark found."""

    about: dict[str, str | int | float]
    busy_before: dict[str, float]
    versions: dict[str, str]
    quick: bool
    runs: Runs
    #: By target, and by case: what slow.py and workers.py found.
    slow: dict[str, dict[str, float]] = field(default_factory=dict)
    workers: dict[str, dict[str, float]] = field(default_factory=dict)
    #: Sessions whose bills were compared with the backend's count, and those where they differed.
    checked: int = 0
    wrong_bills: int = 0

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


# -- one figure of one target, as a table or a goal shows it ------------------------------------

Cell = Callable[[Result, str], float | None]


def plain(measurement: str, what: str, scale: float = 1.0) -> Cell:
    """A figure as it is, but those of a proxy's process where there is no proxy."""

    def cell(result: Result, name: str) -> float | None:
        value = result.figure(name, measurement, what)
        if name == "direct" and what in ("cpu_us", "rss_kib"):
            return None
        return None if value is None else value * scale

    return cell


def added(measurement: str, what: str, scale: float) -> Cell:
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


#: Median latency added at one connection, in ms.
ADDED_P50 = added("closed-1", "p50", 1e-3)
