"""Many timeouts of few lengths: each comes at its time, and they share the clock's calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.error import AlreadyCalled, AlreadyCancelled
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import Clock
from zope.interface.verify import verifyObject

from llmproxy.timeouts import Timeouts


@pytest.fixture
def timeouts(clock: Clock) -> Timeouts:
    return Timeouts(clock)


def test_it_is_a_clock_and_gives_calls(timeouts: Timeouts) -> None:
    verifyObject(IReactorTime, timeouts)
    verifyObject(IDelayedCall, timeouts.callLater(1, print))


def test_a_timeout_comes_at_its_time_and_once(timeouts: Timeouts, clock: Clock) -> None:
    came: list[tuple[object, ...]] = []
    timeout = timeouts.callLater(5, lambda *args, **kw: came.append((*args, *kw.items())), 1, a=2)
    assert timeout.getTime() == 5
    clock.advance(4.9)
    assert (came, timeout.active()) == ([], True)
    clock.advance(0.1)
    assert (came, timeout.active()) == ([(1, ("a", 2))], False)
    clock.advance(100)
    assert len(came) == 1
    assert clock.getDelayedCalls() == []


def test_a_cancelled_timeout_never_comes(timeouts: Timeouts, clock: Clock) -> None:
    came: list[int] = []
    first, second = (timeouts.callLater(5, came.append, n) for n in (1, 2))
    first.cancel()
    clock.advance(5)
    assert came == [2]
    with pytest.raises(AlreadyCancelled):
        first.cancel()
    with pytest.raises(AlreadyCalled):
        second.cancel()


def test_a_reset_timeout_begins_anew(timeouts: Timeouts, clock: Clock) -> None:
    came: list[float] = []
    timeout = timeouts.callLater(5, lambda: came.append(clock.seconds()))
    other = timeouts.callLater(5, lambda: came.append(-clock.seconds()))
    clock.advance(3)
    timeout.reset(5)
    clock.pump([0.5] * 20)
    assert came == [-5, 8]
    with pytest.raises(AlreadyCalled):
        timeout.reset(5)
    assert not other.active()


def test_a_timeout_keeps_its_length(timeouts: Timeouts) -> None:
    timeout = timeouts.callLater(5, print)
    with pytest.raises(ValueError, match="length"):
        timeout.reset(6)
    with pytest.raises(NotImplementedError):
        timeout.delay(1)
    timeouts.close()


def test_all_of_one_length_share_one_call_of_the_clock(timeouts: Timeouts, clock: Clock) -> None:
    for _ in range(1000):
        timeouts.callLater(5, print).cancel()
        timeouts.callLater(7, print)
    assert len(clock.getDelayedCalls()) == 2
    assert len(timeouts.getDelayedCalls()) == 1000
    timeouts.close()
    assert clock.getDelayedCalls() == []
    assert timeouts.getDelayedCalls() == []


def test_one_that_fails_does_not_keep_the_others_from_coming(
    timeouts: Timeouts, clock: Clock
) -> None:
    came: list[int] = []

    def fail() -> None:
        raise RuntimeError

    timeouts.callLater(5, fail)
    timeouts.callLater(5, came.append, 1)
    with pytest.raises(RuntimeError):
        clock.advance(5)
    clock.advance(0)
    assert came == [1]


def test_a_deferred_can_be_given_one(timeouts: Timeouts, clock: Clock) -> None:
    failures: list[object] = []
    waiting: Deferred[None] = Deferred()
    waiting.addTimeout(3, timeouts).addErrback(failures.append)
    clock.advance(3)
    assert len(failures) == 1


def test_what_comes_may_start_and_cancel_others(timeouts: Timeouts, clock: Clock) -> None:
    came: list[str] = []

    def act() -> None:
        came.append("act")
        victim.cancel()
        timeouts.callLater(5.0, came.append, "next")

    timeouts.callLater(5.0, act)
    victim = timeouts.callLater(5.0, came.append, "victim")
    clock.advance(5)
    clock.advance(5)
    assert came == ["act", "next"]


Step = tuple[str, int, float]
LENGTHS = (0.5, 2.0, 60.0)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["start", "cancel", "reset", "advance"]),
            st.integers(0, 5),
            st.sampled_from(LENGTHS),
        ),
        max_size=60,
    )
)
def test_it_does_what_the_clock_itself_would_have_done(steps: list[Step]) -> None:
    told = [_run(steps, lambda clock: clock), _run(steps, Timeouts)]
    assert told[0] == told[1]


def _run(steps: list[Step], wrap: Callable[[Clock], IReactorTime]) -> list[list[int]]:
    """Which timeouts came within each step."""
    clock = Clock()
    timeouts, came, told = wrap(clock), list[int](), list[list[int]]()
    started: list[tuple[IDelayedCall, float]] = []
    for kind, which, length in steps:
        came.clear()
        if kind == "start":
            started.append((timeouts.callLater(length, came.append, len(started)), length))
        elif kind == "advance":
            clock.pump([length / 2] * which)
        elif started:
            timeout, own = started[which % len(started)]
            if timeout.active():
                timeout.cancel() if kind == "cancel" else timeout.reset(own)
        told.append(sorted(came))
    return told
