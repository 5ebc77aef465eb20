"""What load.c can be asked to measure, and what of it a run of the benchmark asks for."""

from __future__ import annotations

from dataclasses import dataclass

GROWTH_RATE = 4
GROWTH = (10, 100, 1000, 5000)
QUICK_GROWTH = (10, 1000, 5000)


@dataclass(frozen=True)
class Closed:
    """A closed loop: `warm_s` seconds that don't count, then `window_s` that do."""

    connections: int
    warm_s: float
    window_s: float

    @property
    def key(self) -> str:
        return f"closed-{self.connections}"

    @property
    def size(self) -> tuple[int, float]:
        return 0, self.connections

    @property
    def seconds(self) -> float:
        return self.warm_s + self.window_s

    def words(self, port: int) -> list[object]:
        """For the command line of load.c."""
        return ["closed", port, self.connections, self.warm_s, self.window_s, "-"]


@dataclass(frozen=True)
class Streams:
    """Open streams: they begin within `ramp_s` seconds; measured is the window after that."""

    streams: int
    rate: float
    ramp_s: float
    window_s: float

    @property
    def key(self) -> str:
        return f"streams-{self.streams}x{self.rate:g}"

    @property
    def size(self) -> tuple[int, float]:
        return self.streams, self.rate

    @property
    def seconds(self) -> float:
        return 1.6 * self.ramp_s + self.window_s + 1.2

    @property
    def setting(self) -> str:
        """What the backend is told before."""
        return f"rate={self.rate}"

    def words(self, port: int) -> list[object]:
        return ["streams", port, self.streams, self.ramp_s, self.window_s, self.rate]


@dataclass(frozen=True)
class Count:
    """A closed loop of `count` requests in all: streams of `chunks` chunks; 0: whole answers."""

    connections: int
    count: int
    chunks: int = 0
    rate: float = 50

    @property
    def setting(self) -> str:
        return f"rate={self.rate}"

    def words(self, port: int) -> list[object]:
        return ["count", port, self.connections, self.count, self.chunks, "-"]


@dataclass(frozen=True)
class Slow:
    """Streams that are sent at full speed, and of which nothing is read for `hold_s` seconds but a
    byte a second. Then they are read to their end."""

    streams: int
    ramp_s: float
    hold_s: float
    chunks: int

    @property
    def setting(self) -> str:
        # The backend's own kernel buffers shall not take half of the stream.
        return "rate=0&buffer=16384"

    def words(self, port: int) -> list[object]:
        return ["slow", port, self.streams, self.ramp_s, self.hold_s, self.chunks]


Measurement = Closed | Streams
AnyMeasurement = Measurement | Count | Slow


@dataclass(frozen=True)
class Plan:
    """What is measured in a session, how often, and what only in the first `growth_sessions`."""

    sessions: int
    always: tuple[Measurement, ...]
    growth: tuple[Streams, ...]
    growth_sessions: int

    @property
    def seconds(self) -> float:
        """For one target, without starting and stopping it."""
        always = self.sessions * sum(one.seconds for one in self.always)
        return always + self.growth_sessions * sum(one.seconds for one in self.growth)


def streams(count: int, rate: float, begin_per_s: float, window_s: float) -> Streams:
    """Streams that begin at a rate which leaves room for those that have begun."""
    return Streams(count, rate, max(0.5, count / begin_per_s), window_s)


QUICK = Plan(
    sessions=1,
    always=(
        Closed(32, 0.7, 2.0),
        Closed(1, 0.3, 1.5),
        streams(100, 50, 500, 2.0),
        streams(1000, 20, 500, 2.0),
    ),
    growth=tuple(streams(count, GROWTH_RATE, 600, 2.0) for count in QUICK_GROWTH),
    growth_sessions=1,
)
FULL = Plan(
    sessions=3,
    always=(
        Closed(32, 2.0, 6.0),
        Closed(1, 1.0, 4.0),
        streams(100, 50, 250, 6.0),
        streams(1000, 20, 250, 6.0),
    ),
    growth=tuple(streams(count, GROWTH_RATE, 250, 6.0) for count in GROWTH),
    growth_sessions=2,
)
