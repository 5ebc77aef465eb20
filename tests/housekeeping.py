"""What trial checks after each test, for pytest: a test that leaves something behind fails.

- a failure or a critical event was logged, and the test did not claim it by `flush_logged_errors`;
- a delayed call is pending, or a socket, pipe or port is open in the reactor;
- a Deferred was dropped with a failure that nobody handled (it is logged when it is collected, so
  the garbage is collected here, within the test that made it).

What was there before the test is not its own: fixtures of a wider scope may keep connections open.
The reactor's thread pool may keep its threads.

An asynchronous test that hangs is cancelled a little before pytest-timeout would interrupt it, as
that ends the reactor, and with it every test that follows.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as _reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionAborted
from twisted.internet.task import Clock, deferLater
from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent, globalLogPublisher
from twisted.python.failure import Failure
from zope.interface import implementer, provider

# The global reactor has no type of its own: it is whichever was installed.
reactor: Any = _reactor

GRACE_S = 1.0
"""How long a test's closed connections may take to leave the reactor."""
STEP_S = 0.005

FlushLoggedErrors = Callable[..., list[Failure]]


@implementer(ILogObserver)
class LoggedErrors:
    """A log observer that keeps the failures, and the critical events that have none."""

    def __init__(self) -> None:
        self._events: list[LogEvent] = []

    def __call__(self, event: LogEvent) -> None:
        # "Unhandled error in Deferred" comes as two events; the second one has the failure.
        headline = event.get("isError") and "log_failure" not in event
        if "log_failure" in event or (event["log_level"] is LogLevel.critical and not headline):
            self._events.append(event)

    def flush(self, *types: type[BaseException]) -> list[Failure]:
        """Forget the failures of the given types (or of any, without a type) and return them."""
        flushed: list[LogEvent] = []
        kept: list[LogEvent] = []
        for event in self._events:
            failure = event.get("log_failure")
            claimed = failure is not None and (not types or failure.check(*types))
            (flushed if claimed else kept).append(event)
        self._events = kept
        return [event["log_failure"] for event in flushed]

    def described(self) -> list[str]:
        """One text for each event that is left."""
        return [f"logged error: {_described_event(event)}" for event in self._events]


def _described_event(event: LogEvent) -> str:
    failure = event.get("log_failure")
    trace = f"\n{failure.getTraceback()}" if failure is not None else ""
    return f"{formatEvent(event)}{trace}"


def _delayed_calls() -> set[Any]:
    return set(reactor.getDelayedCalls())


def _selectables() -> set[Any]:
    found = {*reactor.getReaders(), *reactor.getWriters()}
    # The reactor's own: the waker, and the pipe that SIGCHLD writes to.
    return found - reactor._internalReaders


class Leftovers:
    """What is in the reactor now and was not when this was made."""

    def __init__(self) -> None:
        self._calls, self._selectables = _delayed_calls(), _selectables()

    def calls(self) -> set[Any]:
        """The delayed calls that are pending."""
        return _delayed_calls() - self._calls

    def selectables(self) -> set[Any]:
        """The sockets, pipes and ports that are open."""
        return _selectables() - self._selectables

    def settle(self) -> None:
        """Run the reactor while something is left, up to `GRACE_S`."""
        for _ in range(int(GRACE_S / STEP_S)):
            if not (self.calls() or self.selectables()):
                return
            pytest_twisted.blockon(deferLater(reactor, STEP_S))

    def described(self) -> list[str]:
        """One text for each thing that is left."""
        calls = [f"pending delayed call: {call}" for call in self.calls()]
        return calls + [f"open in the reactor: {found!r}" for found in self.selectables()]

    def remove(self) -> None:
        """Take away what is left, so that the next test starts clean."""
        for call in self.calls():
            call.cancel()
        for found in self.selectables():
            reactor.removeReader(found)
            reactor.removeWriter(found)
            found.connectionLost(Failure(ConnectionAborted()))


def pytest_collection_finish() -> None:
    """Make the collections that follow cheap: what has been imported is never garbage."""
    gc.collect()
    gc.freeze()


def _limit_s(item: pytest.Function) -> float:
    marker = item.get_closest_marker("timeout")
    timeout = float(marker.args[0] if marker else item.config.getini("timeout"))
    return max(timeout - 5, timeout / 2)


Test = Callable[..., Coroutine[Deferred[Any], Any, None]]


def _bounded(test: Test, limit_s: float) -> Test:
    @functools.wraps(test)
    async def bounded(**fixtures: object) -> None:
        story: Deferred[None] = Deferred.fromCoroutine(test(**fixtures))
        timer = reactor.callLater(limit_s, story.cancel)
        try:
            await story
        except CancelledError as cancelled:
            if timer.active():
                raise
            raise TimeoutError(f"the test was not done after {limit_s} s") from cancelled
        finally:
            if timer.active():
                timer.cancel()

    return bounded


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Bound the test in time, if it is one of pytest-twisted's coroutines."""
    test = pyfuncitem.obj
    is_coroutine = getattr(test, "_pytest_twisted_mark", None) == "async_test"
    # pytest-twisted reaches into a test of hypothesis, so that one stays as it is.
    if is_coroutine and not hasattr(test, "hypothesis"):
        pyfuncitem.obj = _bounded(test, _limit_s(pyfuncitem))


@pytest.fixture(autouse=True)
def logged_errors() -> Iterator[LoggedErrors]:
    """Housekeeping: fails the test for what it leaves behind; is what it logged so far."""
    gc.collect()  # the garbage of a wider fixture's end is not this test's
    logged, leftovers = LoggedErrors(), Leftovers()
    globalLogPublisher.addObserver(logged)
    yield logged
    leftovers.settle()
    gc.collect()
    gc.freeze()  # what is still used need not be looked through after each of thousands of tests
    globalLogPublisher.removeObserver(logged)
    found = logged.described() + leftovers.described()
    leftovers.remove()
    if found:
        pytest.fail("\n".join(found), pytrace=False)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """All that is logged in the test: each event's text, and every field of it."""
    lines: list[str] = []

    @provider(ILogObserver)
    def observe(event: LogEvent) -> None:
        lines.append(f"{formatEvent(event)} {event!r}")

    globalLogPublisher.addObserver(observe)
    yield lines
    globalLogPublisher.removeObserver(observe)


@pytest.fixture
def flush_logged_errors(logged_errors: LoggedErrors) -> FlushLoggedErrors:
    """`flush_logged_errors(*types)` returns the failures logged so far, and claims them.

    Garbage is collected first, so that the failures of dropped Deferreds are among them.
    """

    def flush(*types: type[BaseException]) -> list[Failure]:
        gc.collect()
        return logged_errors.flush(*types)

    return flush


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still until it is told to advance."""
    return Clock()
