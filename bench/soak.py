"""Whether memory stays flat over a million requests and a hundred thousand short streams.

One llmproxy takes all of them, in portions; after each one its memory is noted, while the clients
are still connected. What is looked at is a series of samples from the same situation, so that
a leak of a few bytes a request shows, and a spike does not.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import canvas
import targets
from drift import FIFTHS, Drift, Sample, drift
from goals import Goal
from measurements import Count
from result import KIB_PER_MIB
from sessions import Bench, Session
from tables import number, table

REQUESTS, STREAMS = 1_000_000, 100_000
CHUNKS = 5
PORTIONS = 100
SHORTEST = 2 * FIFTHS
WRITE_TIMEOUT_S = 20.0

#: By what was sampled: how much it may grow, at least, and as a part of what it was.
ALLOWED = {"rss_kib": (2048.0, 0.03), "blocks": (2000.0, 0.01)}
TITLES = {"rss_kib": "resident memory, MiB", "blocks": "Python's blocks of memory, thousands"}
SCALES = {"rss_kib": 1 / KIB_PER_MIB, "blocks": 1e-3}

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Phase:
    """`samples`: after each portion, `done` so far, the figures of load.c and those of Python."""

    unit: str
    seconds: float
    samples: Sequence[Figures]

    @property
    def done(self) -> float:
        return self.samples[-1]["done"]

    @property
    def lost(self) -> float:
        return sum(one["lost"] + one["wrong"] for one in self.samples)

    def series(self, what: str) -> list[Sample]:
        return [(one["done"], one[what]) for one in self.samples]

    def drift(self, what: str) -> Drift:
        return drift(self.series(what), *ALLOWED[what])


def run(bench: Bench, folder: Path, requests: int, streams: int) -> list[Phase]:
    """Both phases, in one session of llmproxy."""
    output = folder / "inside.json"
    target = targets.wrapped_llmproxy("watched.py", output)
    target.version = target.prepare()
    whole = Count(32, portion(requests))
    short = Count(100, portion(streams), CHUNKS)
    with bench.session(target) as session:
        return [
            _phase(session, output, "requests", whole, requests),
            _phase(session, output, "streams", short, streams),
        ]


def portion(total: int) -> int:
    """How many of them go into one: a hundredth, but at least ten portions have to be there."""
    return max(1, total // PORTIONS)


def _phase(session: Session, output: Path, unit: str, what: Count, total: int) -> Phase:
    samples: list[Figures] = []
    began = time.monotonic()
    while (done := len(samples) * what.count) < total:
        figures = session.measure(what)
        inside = _look_inside(session, output)
        samples.append({"done": done + what.count, **figures, **inside})
        if len(samples) == 2:
            left_s = (time.monotonic() - began) / 2 * (total / what.count - 2)
            print(f"{total:,} {unit}: about {left_s / 60:.0f} minutes more", flush=True)
        if len(samples) % 10 == 0:
            print("  " + brief(samples[-1], unit), flush=True)
    return Phase(unit, time.monotonic() - began, samples)


def brief(sample: Figures, unit: str) -> str:
    """One sample in one line."""
    return (
        f"{sample['done']:,.0f} {unit}: {sample['rss_kib'] / KIB_PER_MIB:.1f} MiB,"
        f" {sample['blocks']:,.0f} blocks, {sample['per_s']:.0f}/s, {sample['cpu_us']:.0f} us each"
    )


def _look_inside(session: Session, output: Path) -> dict[str, float]:
    """What watched.py writes when it is asked to."""
    assert session.running.pid is not None
    output.unlink(missing_ok=True)
    os.kill(session.running.pid, signal.SIGUSR2)
    deadline = time.monotonic() + WRITE_TIMEOUT_S
    while not output.exists():
        if time.monotonic() > deadline:
            raise SystemExit("the proxy does not tell how it is inside")
        time.sleep(0.005)
    found: dict[str, float] = json.loads(output.read_text())
    return found


# -- what it means -----------------------------------------------------------------------------


def goals(phases: Sequence[Phase], wrong_bills: int) -> list[Goal]:
    """Those of the soak."""
    found = []
    for phase in phases:
        where = f"over {phase.done:,.0f} {phase.unit}"
        for what, title in TITLES.items():
            moved, scale = phase.drift(what), SCALES[what]
            name = f"growth of {title}, {where}"
            found.append(Goal(name, moved.allowed * scale, moved.growth * scale))
        found.append(Goal(f"{phase.unit} lost", 0, phase.lost))
    return [*found, Goal("sessions with wrong bills", 0, wrong_bills)]


def text(about: Mapping[str, object], phases: Sequence[Phase]) -> str:
    """As a table: the second fifth of the samples beside the last."""
    rows = []
    for phase in phases:
        for what, title in TITLES.items():
            moved, scale = phase.drift(what), SCALES[what]
            values = (moved.early, moved.late, moved.growth, moved.allowed, moved.slope)
            words = [number(value * scale) for value in values]
            verdict = "flat" if moved.flat else "GROWS"
            rows.append([f"{phase.done:,.0f} {phase.unit}: {title}", *words, verdict])
        fifth = len(phase.samples) // FIFTHS
        early = sum(one["cpu_us"] for one in phase.samples[fifth : 2 * fifth]) / fifth
        late = sum(one["cpu_us"] for one in phase.samples[-fifth:]) / fifth
        words = [number(value) for value in (early, late, late - early)]
        rows.append([f"{phase.done:,.0f} {phase.unit}: CPU µs each", *words, "-", "-", "-"])
    took = ", ".join(
        f"{phase.done:,.0f} {phase.unit} in {phase.seconds / 60:.1f} minutes" for phase in phases
    )
    head = ["", "2nd fifth", "last fifth", "growth", "allowed", "slope for 100,000", ""]
    return f"{took}. llmproxy {about['version']}, {about['cpu']}, Python {about['python']}.\n\n" + (
        table(head, rows)
    )


def to_json(about: Mapping[str, object], phases: Sequence[Phase], wrong_bills: int) -> str:
    """Every sample."""
    everything = {
        "about": about,
        "wrong_bills": wrong_bills,
        "phases": [asdict(phase) for phase in phases],
        "drifts": {
            phase.unit: {what: _verdict(phase.drift(what)) for what in TITLES} for phase in phases
        },
    }
    return json.dumps(everything, indent=1) + "\n"


def _verdict(moved: Drift) -> dict[str, float]:
    return {**asdict(moved), "growth": moved.growth, "flat": moved.flat}


def draw(phases: Sequence[Phase]) -> str:
    """A column for each phase: memory, and Python's blocks."""
    panels = []
    for column, phase in enumerate(phases):
        for row, (what, title) in enumerate(TITLES.items()):
            points = [(done, value * SCALES[what]) for done, value in phase.series(what)]
            panels.append(canvas.linear(column, row, title, phase.unit, {"#c2410c": points}))
    return canvas.picture(panels)
