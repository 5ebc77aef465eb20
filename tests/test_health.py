"""Tests of the health checks: on a fake clock with a scripted fetch, and once over real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import error
from twisted.internet import reactor as _reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Protocol, ServerFactory
from twisted.internet.task import Clock
from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent, globalLogPublisher
from twisted.python.failure import Failure
from twisted.web.client import Agent, ResponseNeverReceived
from zope.interface import implementer

from llmproxy.health import Health, HealthChecks, agent_fetch, judge, reason_of

# The global reactor has no type of its own: it is whichever was installed.
reactor: Any = _reactor


@dataclass(frozen=True)
class Server:
    """All that a check needs of a backend."""

    name: str
    url: str = "http://h"
    token: str | None = None


class Fetches:
    """The fetch of a test: keeps who was asked, until the test answers."""

    def __init__(self) -> None:
        self.open: dict[str, Deferred[int]] = {}
        self.asked: list[Server] = []
        self.cancelled: list[str] = []

    async def __call__(self, backend: Server) -> int:
        self.asked.append(backend)
        self.open[backend.name] = Deferred(lambda _: self.cancelled.append(backend.name))
        return await self.open[backend.name]

    def answer(self, name: str, result: int | Exception) -> None:
        if isinstance(result, Exception):
            self.open.pop(name).errback(Failure(result))
        else:
            self.open.pop(name).callback(result)

    def names(self) -> list[str]:
        found = [backend.name for backend in self.asked]
        self.asked.clear()
        return found


class Bench:
    """Health checks of some servers, running on a clock of their own."""

    def __init__(self, *servers: Server) -> None:
        self.clock, self.fetches = Clock(), Fetches()
        self.reports: list[tuple[str, bool | None]] = []
        self.checks: HealthChecks[Server] = HealthChecks(
            servers,
            self.fetches,
            self.clock,
            lambda name, url, up: self.reports.append((name, up)),
        )
        self.checks.startService()

    @property
    def states(self) -> dict[str, str]:
        return {name: str(state) for name, state in self.checks.states.items()}


@implementer(ILogObserver)
class Events(list[LogEvent]):
    """What the module logs while this is open, as it comes."""

    def __call__(self, event: LogEvent) -> None:
        if event["log_namespace"] == "llmproxy.health":
            self.append(event)

    def lines(self) -> list[tuple[LogLevel, str]]:
        return [(event["log_level"], formatEvent(event)) for event in self]


@pytest.fixture
def logged() -> Iterator[Events]:
    events = Events()
    globalLogPublisher.addObserver(events)
    yield events
    globalLogPublisher.removeObserver(events)


A, B = Server("a", "http://a"), Server("b", "http://b")


def test_all_are_asked_at_start_and_at_once():
    bench = Bench(A, B)
    assert bench.fetches.names() == ["a", "b"]
    assert bench.states == {"a": "unknown", "b": "unknown"}


def test_nobody_is_asked_before_the_start():
    fetches = Fetches()
    HealthChecks([A], fetches, Clock())
    assert fetches.names() == []


def test_all_are_asked_again_after_the_interval():
    bench = Bench(A, B)
    bench.fetches.names()
    bench.fetches.answer("a", 200)
    bench.fetches.answer("b", 200)
    bench.clock.advance(14.9)
    assert bench.fetches.names() == []
    bench.clock.advance(0.2)
    assert bench.fetches.names() == ["a", "b"]


@pytest.mark.parametrize("status", [200, 204, 307, 400, 401, 403, 404, 405, 429])
def test_a_server_that_answers_is_up(status):
    assert judge(status) == (Health.UP, f"status {status}")


@pytest.mark.parametrize("status", [500, 502, 503, 599])
def test_a_server_that_answers_with_an_error_of_its_own_is_down(status):
    assert judge(status) == (Health.DOWN, f"status {status}")


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (error.ConnectionRefusedError(), "connection refused"),
        (error.DNSLookupError("secret.host"), "host name not found"),
        (error.TimeoutError(), "no connection in time"),
        (ResponseNeverReceived([Failure(error.ConnectionLost())]), "connection lost"),
        (ValueError("http://user:secret@h"), "ValueError"),
    ],
)
def test_the_reason_is_a_few_words_without_a_secret(raised, reason):
    assert reason_of(raised) == reason


def test_a_result_is_kept_and_reported_for_its_backend():
    bench = Bench(A, B)
    bench.fetches.answer("a", 200)
    bench.fetches.answer("b", error.ConnectionRefusedError())
    assert bench.states == {"a": "up", "b": "down"}
    assert bench.reports == [("a", True), ("b", False)]


def test_no_answer_in_time_is_down_and_the_request_is_given_up(logged):
    bench = Bench(A)
    bench.clock.advance(4.9)
    assert bench.states == {"a": "unknown"}
    bench.clock.advance(0.2)
    assert bench.states == {"a": "down"}
    assert bench.fetches.cancelled == ["a"]
    assert logged.lines() == [(LogLevel.warn, f"backend a at {A.url} is down: no answer in time")]


def test_a_timeout_that_the_agent_wraps_is_still_one(logged):
    async def fetch(backend: Server) -> int:
        try:
            return await Deferred[int]()
        except CancelledError:
            raise ResponseNeverReceived([Failure()]) from None

    clock = Clock()
    HealthChecks([A], fetch, clock).startService()
    clock.advance(5)
    assert [event["reason"] for event in logged] == ["no answer in time"]


def test_each_change_is_one_line_and_no_change_is_none(logged):
    bench = Bench(A)
    for result in (200, 200, 503, error.ConnectionRefusedError(), 200):
        bench.fetches.answer("a", result)
        bench.clock.advance(15)
    assert logged.lines() == [
        (LogLevel.info, f"backend a at {A.url} is up: status 200"),
        (LogLevel.warn, f"backend a at {A.url} is down: status 503"),
        (LogLevel.info, f"backend a at {A.url} is up: status 200"),
    ]


def test_one_backend_that_hangs_delays_no_other():
    bench = Bench(A, B)
    bench.fetches.answer("b", 200)
    assert bench.states == {"a": "unknown", "b": "up"}


def test_a_backend_whose_check_has_not_ended_is_not_asked_again():
    asked: list[str] = []

    async def stubborn(backend: Server) -> int:
        asked.append(backend.name)
        while True:
            try:
                await Deferred[None]()
            except CancelledError:
                continue

    clock = Clock()
    checks = HealthChecks([A], stubborn, clock)
    checks.startService()
    clock.pump([5, 10, 15, 15])
    assert asked == ["a"]


def test_a_fetch_that_breaks_at_once_stops_no_later_check():
    bench = Bench()
    asked: list[str] = []

    def broken(backend: Server) -> Deferred[int]:
        asked.append(backend.name)
        raise RuntimeError

    checks = HealthChecks([A, B], broken, bench.clock)
    checks.startService()
    bench.clock.advance(15)
    assert asked == ["a", "b", "a", "b"]
    assert set(checks.states.values()) == {Health.DOWN}


def test_a_report_that_breaks_is_logged_and_stops_no_later_check(flush_logged_errors):
    asked: list[str] = []

    async def fetch(backend: Server) -> int:
        asked.append(backend.name)
        return 200

    def report(name: str, url: str, up: bool | None) -> None:
        raise RuntimeError

    clock = Clock()
    checks = HealthChecks([A], fetch, clock, report)
    checks.startService()
    clock.advance(15)
    assert asked == ["a", "a"]
    assert len(flush_logged_errors(RuntimeError)) == 2


def test_after_the_stop_nothing_is_asked_kept_or_left_behind(logged):
    bench = Bench(A, B)
    bench.fetches.answer("a", 200)
    bench.checks.stopService()
    assert bench.fetches.cancelled == ["b"]
    assert bench.states == {"a": "up", "b": "unknown"}
    assert bench.clock.getDelayedCalls() == []
    assert len(logged) == 1


def test_it_starts_again_after_a_stop():
    bench = Bench(A)
    bench.checks.stopService()
    bench.fetches.names()
    bench.checks.startService()
    assert bench.fetches.names() == ["a"]


def test_a_reload_keeps_the_states_of_those_that_stay():
    bench = Bench(A, B)
    bench.fetches.answer("a", 200)
    bench.fetches.answer("b", 200)
    bench.fetches.names()
    changed = Server("a", A.url, token="new")
    bench.checks.update([changed, Server("b", "http://elsewhere"), Server("c")])
    assert bench.states == {"a": "up", "b": "unknown", "c": "unknown"}
    assert bench.fetches.names() == ["b", "c"]
    assert bench.reports[2:] == [("b", None)]
    bench.clock.advance(15)
    assert changed in bench.fetches.asked


def test_a_backend_that_a_reload_takes_away_is_given_up_and_forgotten(logged):
    bench = Bench(A, B)
    bench.checks.update([B])
    assert bench.states == {"b": "unknown"}
    assert bench.fetches.cancelled == ["a"]
    assert bench.reports == [("a", None)]
    assert logged.lines() == []


def test_a_late_answer_of_the_old_server_does_not_count_for_the_new_one():
    class Late(Fetches):
        async def __call__(self, backend: Server) -> int:
            self.open[backend.url] = Deferred()
            try:
                return await self.open[backend.url]
            except CancelledError:
                return 200

    bench, fetches = Bench(), Late()
    checks = HealthChecks([Server("a", "old")], fetches, bench.clock)
    checks.startService()
    checks.update([Server("a", "new")])
    assert checks.states == {"a": Health.UNKNOWN}
    fetches.answer("new", 503)
    assert checks.states == {"a": Health.DOWN}


def test_a_reload_before_the_start_asks_nobody():
    fetches = Fetches()
    checks = HealthChecks([A], fetches, Clock())
    checks.update([A, B])
    assert fetches.names() == []


class Canned(ServerFactory):
    """An HTTP server with one answer."""

    def __init__(self, answer: bytes) -> None:
        self.answer, self.requests = answer, list[bytes]()

    def buildProtocol(self, addr: IAddress | None) -> Protocol:
        protocol = CannedProtocol()
        protocol.canned = self
        return protocol


class CannedProtocol(Protocol):
    canned: Canned

    def dataReceived(self, data: bytes) -> None:
        self.canned.requests.append(data)
        assert self.transport is not None
        self.transport.write(self.canned.answer)


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", 200),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 99\r\n\r\nhalf of it", 404),
        (b"HTTP/1.1 503 Unavailable\r\n\r\nwithout an end", 503),
    ],
)
async def test_an_agent_asks_for_health_and_closes_the_connection(answer, status):
    canned = Canned(answer)
    port = reactor.listenTCP(0, canned, interface="127.0.0.1")
    server = Server("a", f"http://127.0.0.1:{port.getHost().port}/base", token="hidden")
    try:
        assert await agent_fetch(lambda backend: Agent(reactor))(server) == status
    finally:
        await port.stopListening()
    (request,) = canned.requests
    assert request.startswith(b"GET /base/health HTTP/1.1\r\n")
    assert b"hidden" not in request


def test_each_server_of_a_backend_is_asked_for_itself():
    one, two = Server("a", "http://one"), Server("a", "http://two")
    bench = Bench(one, two, B)
    assert bench.fetches.names() == ["a", "a", "b"]
    assert bench.states == {
        "a at http://one": "unknown",
        "a at http://two": "unknown",
        "b": "unknown",
    }
    assert bench.checks.down == set()
    bench.clock.advance(5)
    assert bench.checks.down == {("a", "http://one"), ("a", "http://two"), ("b", B.url)}
    bench.checks.update([two])
    assert bench.states == {"a": "down"}
    assert bench.checks.down == {("a", "http://two")}
