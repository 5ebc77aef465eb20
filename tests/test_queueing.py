"""Waiting for a place: how many, how long, and in whose turn."""

from __future__ import annotations

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from llmproxy.errors import TooManyRequests
from llmproxy.queueing import FairQueue


@pytest.fixture
def queue(clock: Clock) -> FairQueue:
    found = FairQueue(clock)
    found.most, found.size, found.timeout_s = 2, 4, 10.0
    return found


def fill(queue: FairQueue) -> None:
    assert queue.enter_at_once()
    assert queue.enter_at_once()


def waits(queue: FairQueue, served: list[str], *names: str) -> list[Deferred[None]]:
    """Requests that wait; a name's first letter is its key."""
    turns = [queue.wait(name[0]) for name in names]
    for turn, name in zip(turns, names, strict=True):
        turn.addCallback(lambda _, name: served.append(name), name)
    return turns


def test_without_a_bound_nobody_waits(clock: Clock) -> None:
    queue = FairQueue(clock)
    assert all(queue.enter_at_once() for _ in range(1000))
    assert queue.served == 1000


def test_so_many_are_served_at_once(queue: FairQueue) -> None:
    fill(queue)
    assert not queue.enter_at_once()
    queue.leave()
    assert queue.enter_at_once()


def test_the_keys_take_turns_and_each_is_served_in_its_order(queue: FairQueue) -> None:
    fill(queue)
    served: list[str] = []
    queue.size = 9
    waits(queue, served, "a1", "a2", "a3", "a4", "b1", "c1", "b2")
    for _ in range(7):
        queue.leave()
    assert served == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]
    assert (queue.served, queue.waiting) == (2, 0)


def test_nobody_goes_before_those_who_wait(queue: FairQueue) -> None:
    fill(queue)
    served: list[str] = []
    waits(queue, served, "a1")
    queue.most = 3
    assert not queue.enter_at_once()
    queue.let_in()
    assert served == ["a1"]


def test_a_full_queue_refuses(queue: FairQueue) -> None:
    fill(queue)
    waits(queue, [], "a1", "a2", "a3", "a4")
    with pytest.raises(TooManyRequests) as caught:
        queue.wait("b")
    assert caught.value.headers["Retry-After"] == "5"
    assert queue.waiting == 4


def test_who_waited_too_long_is_refused_and_takes_no_turn(queue: FairQueue, clock: Clock) -> None:
    fill(queue)
    served: list[str] = []
    errors: list[object] = []
    for turn in waits(queue, served, "a1", "b1"):
        turn.addErrback(lambda failure: errors.append(failure.type))
    clock.advance(9.9)
    queue.leave()
    assert (served, errors) == (["a1"], [])
    clock.advance(0.1)
    assert errors == [TooManyRequests]
    queue.leave()
    assert served == ["a1"]
    assert (queue.served, queue.waiting) == (1, 0)


def test_who_leaves_takes_no_turn(queue: FairQueue, clock: Clock) -> None:
    fill(queue)
    served: list[str] = []
    gone, _ = waits(queue, served, "a1", "a2")
    gone.cancel()
    gone.addErrback(lambda failure: failure.trap(CancelledError))
    queue.leave()
    assert served == ["a2"]
    assert (queue.served, queue.waiting) == (2, 0)
    assert clock.getDelayedCalls() == []
