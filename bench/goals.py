"""What llmproxy is meant to reach, as ratios where that is possible, and whether it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from measurements import GROWTH_RATE
from result import ADDED_P50, Result
from tables import number, table

MANY = 5000
GAP_MS = 1000 / GROWTH_RATE
BYTES_PER_KIB = 1024
#: "Close to twice the requests/s" with two workers.
CLOSE_TO_TWICE = 1.8
#: Of the chunks, in percent, in measurements at a rate that the proxy should keep up with.
LATE_PCT = 10
#: The part of the slow streams that the backend can't go on with, at the same time.
HELD_UP = 0.95

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Goal:
    """`found` is what was measured, None if it was not; it is to be at most, or at least, `limit`.
    `what` names the measure, with its unit."""

    what: str
    limit: float
    found: float | None
    at_most: bool = True

    @property
    def reached(self) -> bool | None:
        """None: it was not measured."""
        if self.found is None:
            return None
        return self.found <= self.limit if self.at_most else self.found >= self.limit

    @property
    def row(self) -> tuple[str, str, str, str]:
        """For the table."""
        word = {None: "not measured", True: "reached", False: "MISSED"}[self.reached]
        limit = f"{'<=' if self.at_most else '>='} {number(self.limit)}"
        return self.what, word, limit, number(self.found)


def goals(result: Result) -> list[Goal]:
    """Those of a comparison of proxies."""
    many = f"streams-{MANY}x{GROWTH_RATE}"
    gap = result.figure("llmproxy", many, "gap_p99")
    memory = result.figure("llmproxy", many, "rss_kib")
    added = ADDED_P50(result, "llmproxy")
    chunks = {
        name: None
        if late(result.figure("llmproxy", key, "together_pct"))
        else _ratio(result, key, "cpu_us", "nginx")
        for key, name in (("streams-100x50", "100 x 50/s"), ("streams-1000x20", "1,000 x 20/s"))
    }
    found = [
        Goal(
            "requests/s, as a multiple of sglang-router's",
            1.0,
            _ratio(result, "closed-32", "per_s", "sglang-router"),
            at_most=False,
        ),
        *(
            Goal(f"CPU per chunk, {name}, as a multiple of nginx's", 1.5, ratio)
            for name, ratio in chunks.items()
        ),
        Goal("median latency added at 1 connection, ms", 1.0, added),
        Goal(
            f"gap p99 with {MANY:,} streams of {GROWTH_RATE} chunks/s, ms",
            2 * GAP_MS,
            None if gap is None else gap / 1000,
        ),
        Goal(f"streams lost of {MANY:,}", 0, _troubles(result, many)),
        Goal(
            f"memory with {MANY:,} streams, MB",
            400,
            None if memory is None else memory * BYTES_PER_KIB / 1e6,
        ),
        Goal(
            "memory of a stream whose client does not read, KiB",
            64,
            _slow_kib(result),
        ),
        Goal(
            "requests/s of 2 workers, as a multiple of 1, on two whole cores",
            CLOSE_TO_TWICE,
            result.workers.get("2 workers", {}).get("speedup"),
            at_most=False,
        ),
        Goal("sessions with wrong bills", 0, result.wrong_bills if result.checked else None),
    ]
    return found


def late(together_pct: float | None) -> bool:
    """Whether so many chunks came together, because the proxy was late, that CPU per chunk is not
    that of a chunk any more: larger pieces are cheaper."""
    return together_pct is not None and together_pct > LATE_PCT


def text(goals: list[Goal]) -> str:
    """As a table."""
    head = ("goal", "", "wanted", "measured")
    return table(head, [goal.row for goal in goals], left=2)


def _ratio(result: Result, measurement: str, what: str, rival: str) -> float | None:
    ours = result.figure("llmproxy", measurement, what)
    theirs = result.figure(rival, measurement, what)
    return None if ours is None or not theirs else ours / theirs


def _troubles(result: Result, measurement: str) -> float | None:
    """What did not come whole, in all sessions together."""
    sessions = [one[measurement] for one in result.runs.get("llmproxy", ()) if measurement in one]
    return sum(one["lost"] + one["wrong"] for one in sessions) if sessions else None


def _slow_kib(result: Result) -> float | None:
    """Not measured, if what was sent was too little to hold nearly all of the streams up."""
    figures = result.slow.get("llmproxy")
    if not figures or figures["held"] < HELD_UP * figures["streams"]:
        return None
    return figures["slow_kib"]
