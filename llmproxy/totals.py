"""What several processes say about themselves, added up to what is true of all of them together.

A cell is a list of numbers: one for a counter or a gauge; the buckets and then the sum of a
histogram. Counters and histograms of a process that has ended stay in the total, so they never
fall; its gauges go with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

Numbers = Sequence[float]
#: The cells of each metric: by its name, and then by its label values.
Cells = Mapping[str, Mapping[tuple[str, ...], Numbers]]
#: What holds (or not), and texts that are only shown; as `/readyz` has them.
Checks = Mapping[str, bool | str]

#: Gauges that are not added up: a limit on each process is nearest for the one that has most.
GAUGES: Mapping[str, Callable[[float, float], float]] = {
    "process_open_fds": max,
    "process_max_fds": min,
    "process_start_time_seconds": min,
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The metrics of one process at one moment. `counts` only grow, `gauges` do as they like."""

    counts: Cells = field(default_factory=dict)
    gauges: Cells = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON can carry it; a number that is none (NaN) becomes null."""
        return {"counts": _listed(self.counts), "gauges": _listed(self.gauges)}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Snapshot:
        """The inverse."""
        return cls(_mapped(given["counts"]), _mapped(given["gauges"]))


def _listed(cells: Cells) -> dict[str, list[Any]]:
    return {
        name: [
            [labels, [None if math.isnan(n) else n for n in found]] for labels, found in of.items()
        ]
        for name, of in cells.items()
    }


def _mapped(given: Mapping[str, Sequence[Any]]) -> Cells:
    return {
        name: {
            tuple(labels): [math.nan if n is None else n for n in numbers]
            for labels, numbers in cells
        }
        for name, cells in given.items()
    }


def summed(snapshots: Iterable[Snapshot]) -> Snapshot:
    """All of them together: sums, but for the gauges in `GAUGES`."""
    counts: dict[str, dict[tuple[str, ...], Numbers]] = {}
    gauges: dict[str, dict[tuple[str, ...], Numbers]] = {}
    for snapshot in snapshots:
        _join(counts, snapshot.counts)
        _join(gauges, snapshot.gauges)
    return Snapshot(counts, gauges)


def _join(total: dict[str, dict[tuple[str, ...], Numbers]], cells: Cells) -> None:
    for name, of in cells.items():
        join = GAUGES.get(name, _plus)
        mine = total.setdefault(name, {})
        for labels, numbers in of.items():
            before = mine.get(labels)
            mine[labels] = numbers if before is None else _joined(before, numbers, join)


def _plus(one: float, other: float) -> float:
    return one + other


def _joined(one: Numbers, other: Numbers, join: Callable[[float, float], float]) -> Numbers:
    return [join(a, b) for a, b in zip_longest(one, other, fillvalue=0.0)]


class Totals:
    """The latest snapshot of each living process, and what the dead have counted."""

    def __init__(self) -> None:
        self._living: dict[Hashable, Snapshot] = {}
        self._ended = Snapshot()

    def update(self, process: Hashable, snapshot: Snapshot) -> None:
        """What this process says now; it takes the place of what it said before."""
        self._living[process] = snapshot

    def retire(self, process: Hashable) -> None:
        """It has ended: its counts stay, its gauges go."""
        last = self._living.pop(process, Snapshot())
        self._ended = summed([self._ended, Snapshot(counts=last.counts)])

    def now(self, *more: Snapshot) -> Snapshot:
        """The total, with `more` in it."""
        return summed([self._ended, *self._living.values(), *more])


def joined_checks(each: Sequence[Checks]) -> dict[str, bool | str]:
    """What holds for all: a condition that fails for one has failed; of texts, one that is not
    `ok` is shown.
    """
    joined: dict[str, bool | str] = {}
    for checks in each:
        for name, value in checks.items():
            before = joined.get(name)
            if isinstance(value, bool):
                joined[name] = value and before is not False
            elif before in (None, "ok"):
                joined[name] = value
    return joined
