"""Running counts: once a second, what has changed, in one write at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from zope.interface import implementer
from zope.interface.verify import verifyObject

from llmproxy.checkpoints import INTERVAL_S, Checkpoints
from llmproxy.errors import StorageError
from llmproxy.model import Attempt, Counts, Entry, Kind, Price, Settlement
from llmproxy.storage import ILedger


@implementer(ILedger)
class Ledger:
    """Notes what is written. `slow`: writes end when the test says so."""

    def __init__(self) -> None:
        self.written: list[dict[str, Counts]] = []
        self.running: list[Deferred[None]] = []
        self.slow = False

    def note(self, attempt: Attempt) -> Deferred[None]:
        raise NotImplementedError

    def know(self, prices: Iterable[Price]) -> Deferred[None]:
        raise NotImplementedError

    def open(self, entry: Entry) -> Deferred[None]:
        raise NotImplementedError

    def settle(self, entry: Entry, settlement: Settlement) -> Deferred[None]:
        raise NotImplementedError

    def checkpoint(self, running: Mapping[str, Counts]) -> Deferred[None]:
        self.written.append(dict(running))
        done: Deferred[None] = Deferred()
        self.running.append(done)
        if not self.slow:
            done.callback(None)
        return done


class Stream:
    """A stream that has come so far."""

    def __init__(self, **counts: int) -> None:
        self.counts: dict[Kind, int] = {Kind(kind): count for kind, count in counts.items()}

    def __call__(self) -> Counts:
        return self.counts


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def checkpoints(ledger: Ledger, clock: Clock) -> Iterator[Checkpoints]:
    service = Checkpoints(ledger, clock)
    service.startService()
    yield service
    if service.running:
        service.stopService()
    assert clock.getDelayedCalls() == []


def test_the_fake_is_a_ledger(ledger):
    assert verifyObject(ILedger, ledger)


def test_all_streams_are_written_together_after_a_second(checkpoints, ledger, clock):
    checkpoints.follow("a", Stream(completion=1))
    checkpoints.follow("b", Stream(prompt=5, completion=2))
    clock.advance(INTERVAL_S - 0.01)
    assert ledger.written == []
    clock.advance(0.01)
    assert ledger.written == [
        {"a": {Kind.COMPLETION: 1}, "b": {Kind.PROMPT: 5, Kind.COMPLETION: 2}}
    ]


def test_only_what_has_changed_is_written_again(checkpoints, ledger, clock):
    still, moving = Stream(completion=1), Stream(completion=1)
    checkpoints.follow("still", still)
    checkpoints.follow("moving", moving)
    clock.advance(INTERVAL_S)
    moving.counts[Kind.COMPLETION] = 9
    clock.advance(INTERVAL_S)
    clock.advance(INTERVAL_S)
    assert ledger.written[1:] == [{"moving": {Kind.COMPLETION: 9}}]


def test_a_stream_without_a_token_is_not_written(checkpoints, ledger, clock):
    checkpoints.follow("a", Stream())
    checkpoints.follow("b", Stream(prompt=0, completion=0))
    clock.advance(INTERVAL_S)
    assert ledger.written == []


def test_what_was_written_is_the_number_of_that_moment(checkpoints, ledger, clock):
    stream = Stream(completion=1)
    checkpoints.follow("a", stream)
    clock.advance(INTERVAL_S)
    stream.counts[Kind.COMPLETION] = 2
    assert ledger.written == [{"a": {Kind.COMPLETION: 1}}]


def test_writes_never_overlap_and_a_slow_one_is_followed_by_the_newest_number(
    checkpoints, ledger, clock
):
    ledger.slow = True
    stream = Stream(completion=1)
    checkpoints.follow("a", stream)
    clock.advance(INTERVAL_S)
    for count in (2, 3, 4):
        stream.counts[Kind.COMPLETION] = count
        clock.advance(INTERVAL_S)
    assert len(ledger.written) == 1
    ledger.running[0].callback(None)
    clock.advance(INTERVAL_S)
    assert ledger.written[1:] == [{"a": {Kind.COMPLETION: 4}}]


def test_a_failed_write_is_not_the_last_one(checkpoints, ledger, clock):
    ledger.slow = True
    stream = Stream(completion=1)
    checkpoints.follow("a", stream)
    clock.advance(INTERVAL_S)
    ledger.running[0].errback(StorageError("disk full"))
    clock.advance(INTERVAL_S)
    assert ledger.written[1:] == [{"a": {Kind.COMPLETION: 1}}]


def test_a_stream_that_is_forgotten_is_asked_no_more(checkpoints, ledger, clock):
    def ask() -> Any:
        raise AssertionError("it was forgotten")

    checkpoints.follow("a", ask)
    checkpoints.forget("a")
    checkpoints.forget("never followed")
    clock.advance(INTERVAL_S)
    assert ledger.written == []


def test_nothing_is_kept_of_a_stream_that_is_forgotten(checkpoints, ledger, clock):
    checkpoints.follow("a", Stream(completion=1))
    clock.advance(INTERVAL_S)
    checkpoints.forget("a")
    checkpoints.follow("a", Stream(completion=1))
    clock.advance(INTERVAL_S)
    assert len(ledger.written) == 2


def test_nothing_is_written_after_a_stop(checkpoints, ledger, clock):
    checkpoints.follow("a", Stream(completion=1))
    checkpoints.stopService()
    clock.advance(10 * INTERVAL_S)
    assert ledger.written == []
    assert clock.getDelayedCalls() == []
