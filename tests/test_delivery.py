"""Delivery from the local journal: order, retries, stopping. Fake time, in-memory stores."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from housekeeping import FlushLoggedErrors
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher
from zope.interface import implementer
from zope.interface.verify import verifyObject

from llmproxy.delivery import BATCH_ROWS, FLUSH_S, POLL_S, RETRY_MAX_S, Delivery
from llmproxy.errors import StorageError
from llmproxy.model import Account, Event
from llmproxy.storage import IEventSink, IOutbox

FINISHED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def row(number: int) -> tuple[Event, ...]:
    """The two events of one request."""
    return tuple(
        Event(
            rid=f"r{number}",
            created=FINISHED,
            account=Account("key", "user"),
            product=f"model/gpu/{kind}",
            quantity=number,
        )
        for kind in ("prompt", "completion")
    )


@implementer(IOutbox)
class FakeOutbox:
    """Rows in memory, in the order in which they finished."""

    def __init__(self, clock: Clock) -> None:
        self.rows: dict[str, tuple[Event, ...]] = {}
        self.limits: list[int] = []
        self.error: Exception | None = None
        self.mark_error: Exception | None = None
        self.slow_backlog: Deferred[tuple[int, float]] | None = None
        self._clock = clock

    def add(self, *numbers: int) -> None:
        self.rows.update({f"r{number}": row(number) for number in numbers})

    def undelivered(self, limit: int) -> Deferred[Sequence[Event]]:
        self.limits.append(limit)
        if self.error is not None:
            return fail(self.error)
        return succeed([event for events in list(self.rows.values())[:limit] for event in events])

    def mark_delivered(self, rids: Sequence[str]) -> Deferred[None]:
        if self.mark_error is not None:
            return fail(self.mark_error)
        for rid in rids:
            del self.rows[rid]
        return succeed(None)

    def backlog(self) -> Deferred[tuple[int, float]]:
        if self.slow_backlog is not None:
            return self.slow_backlog
        return succeed((len(self.rows), self._clock.seconds() if self.rows else 0.0))


@implementer(IEventSink)
class FakeSink:
    """Keeps what is delivered; fails while `error` is set; answers when told if `manual`."""

    def __init__(self) -> None:
        self.batches: list[list[Event]] = []
        self.error: Exception | None = None
        self.manual = False
        self.pending: list[Deferred[None]] = []

    def deliver(self, events: Sequence[Event]) -> Deferred[None]:
        self.batches.append(list(events))
        if self.manual:
            self.pending.append(Deferred())
            return self.pending[-1]
        return fail(self.error) if self.error is not None else succeed(None)


class Bench:
    """A delivery between fakes."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.outbox = FakeOutbox(self.clock)
        self.sink = FakeSink()
        self.delivery = Delivery(self.outbox, self.sink, self.clock, jitter=lambda: 1.0)

    def tries_within(self, seconds: float) -> int:
        """How many batches the sink sees while the clock goes on in small steps."""
        before = len(self.sink.batches)
        self.clock.pump([0.25] * int(seconds * 4))
        return len(self.sink.batches) - before


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def logged():
    """The texts logged by deliveries, as they come."""
    events: list[str] = []

    @implementer(ILogObserver)
    def observe(event: LogEvent) -> None:
        if event.get("log_namespace", "").startswith("llmproxy.delivery"):
            events.append(event["log_format"].format(**event))

    globalLogPublisher.addObserver(observe)
    yield events
    globalLogPublisher.removeObserver(observe)


def test_fakes_are_what_the_interfaces_say(bench: Bench) -> None:
    assert verifyObject(IOutbox, bench.outbox)
    assert verifyObject(IEventSink, bench.sink)


def test_what_an_earlier_process_left_is_delivered_at_the_start(bench: Bench) -> None:
    bench.outbox.add(1, 2)
    bench.delivery.startService()
    assert bench.sink.batches == [[*row(1), *row(2)]]
    assert bench.outbox.rows == {}
    assert bench.delivery.delivered_total == 4
    bench.delivery.stopService()


def test_notify_delivers_at_once(bench: Bench) -> None:
    bench.delivery.startService()
    bench.outbox.add(1)
    bench.delivery.notify()
    assert bench.sink.batches == [list(row(1))]
    bench.delivery.stopService()


def test_rows_that_nobody_told_of_are_found_by_the_poll(bench: Bench) -> None:
    bench.delivery.startService()
    bench.outbox.add(1)
    bench.clock.advance(POLL_S - 0.1)
    assert bench.sink.batches == []
    bench.clock.advance(0.2)
    assert bench.sink.batches == [list(row(1))]
    bench.delivery.stopService()


def test_the_next_batch_waits_until_the_first_is_stored_and_marked(bench: Bench) -> None:
    bench.sink.manual = True
    bench.outbox.add(*range(BATCH_ROWS + 1))
    bench.delivery.startService()
    bench.delivery.notify()
    assert [len(batch) for batch in bench.sink.batches] == [2 * BATCH_ROWS]
    bench.sink.pending[0].callback(None)
    assert [len(batch) for batch in bench.sink.batches] == [2 * BATCH_ROWS, 2]
    assert bench.outbox.limits == [BATCH_ROWS, BATCH_ROWS]
    bench.sink.pending[1].callback(None)
    bench.delivery.stopService()


def test_a_row_that_settles_during_a_batch_is_not_left_to_the_poll(bench: Bench) -> None:
    bench.sink.manual = True
    bench.outbox.add(1)
    bench.delivery.startService()
    bench.outbox.add(2)
    bench.delivery.notify()
    bench.sink.pending[0].callback(None)
    assert [batch[0].rid for batch in bench.sink.batches] == ["r1", "r2"]
    bench.sink.pending[1].callback(None)
    bench.delivery.stopService()


def test_a_row_that_settles_right_after_the_journal_was_empty_is_not_left_to_the_poll(
    bench: Bench,
) -> None:
    bench.outbox.slow_backlog = Deferred()
    bench.delivery.startService()
    bench.outbox.add(1)
    bench.delivery.notify()
    assert bench.sink.batches == []
    bench.outbox.slow_backlog.callback((0, 0.0))
    assert bench.sink.batches == [list(row(1))]
    bench.delivery.stopService()


def test_a_failed_batch_is_repeated_as_it_was(bench: Bench) -> None:
    bench.sink.error = StorageError("down")
    bench.outbox.add(1, 2)
    bench.delivery.startService()
    assert bench.delivery.failures_total == 1
    assert len(bench.outbox.rows) == 2
    bench.sink.error = None
    bench.clock.advance(0.5)
    assert bench.sink.batches[0] == bench.sink.batches[1]
    assert bench.outbox.rows == {}
    bench.delivery.stopService()


def test_a_batch_that_could_not_be_marked_is_delivered_again(bench: Bench) -> None:
    bench.outbox.mark_error = StorageError("disk full")
    bench.outbox.add(1)
    bench.delivery.startService()
    bench.outbox.mark_error = None
    bench.clock.advance(0.5)
    assert bench.sink.batches == [list(row(1)), list(row(1))]
    assert bench.delivery.delivered_total == 2
    bench.delivery.stopService()


def test_the_pauses_double_up_to_the_bound(bench: Bench) -> None:
    bench.sink.error = StorageError("down")
    bench.outbox.add(1)
    bench.delivery.startService()
    moments = []
    for _ in range(200):
        seen = len(bench.sink.batches)
        bench.clock.advance(0.25)
        if len(bench.sink.batches) > seen:
            moments.append(bench.clock.seconds())
    pauses = [later - earlier for earlier, later in zip([0.0, *moments], moments, strict=False)]
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, RETRY_MAX_S, RETRY_MAX_S, RETRY_MAX_S]
    bench.delivery.stopService()


def test_success_makes_the_pauses_short_again(bench: Bench) -> None:
    bench.sink.error = StorageError("down")
    bench.outbox.add(1)
    bench.delivery.startService()
    bench.tries_within(20)
    bench.sink.error = None
    bench.tries_within(RETRY_MAX_S)
    assert bench.outbox.rows == {}
    bench.sink.error = StorageError("down again")
    bench.outbox.add(2)
    bench.delivery.notify()
    assert bench.tries_within(0.5) == 1
    bench.delivery.stopService()


def test_news_in_an_outage_do_not_hammer_the_store(bench: Bench) -> None:
    bench.sink.error = StorageError("down")
    bench.outbox.add(1)
    bench.delivery.startService()
    for number in range(2, 100):
        bench.outbox.add(number)
        bench.delivery.notify()
    assert len(bench.sink.batches) == 1
    bench.delivery.stopService()


def test_a_journal_that_cannot_be_read_is_asked_again(bench: Bench) -> None:
    bench.outbox.error = StorageError("locked")
    bench.outbox.add(1)
    bench.delivery.startService()
    assert bench.sink.batches == []
    bench.outbox.error = None
    bench.clock.advance(0.5)
    assert bench.sink.batches == [list(row(1))]
    bench.delivery.stopService()


def test_a_bug_in_a_store_does_not_end_the_delivery(
    bench: Bench, flush_logged_errors: FlushLoggedErrors
) -> None:
    bench.sink.error = ZeroDivisionError()
    bench.outbox.add(1)
    bench.delivery.startService()
    assert len(flush_logged_errors(ZeroDivisionError)) == 1
    bench.sink.error = None
    bench.clock.advance(0.5)
    assert bench.outbox.rows == {}
    bench.delivery.stopService()


def test_an_outage_is_two_log_lines(bench: Bench, logged: list[str]) -> None:
    bench.sink.error = StorageError("no primary")
    bench.outbox.add(1, 2)
    bench.delivery.startService()
    bench.tries_within(30)
    bench.sink.error = None
    bench.tries_within(RETRY_MAX_S)
    assert logged == [
        "Delivery fails, 2 requests wait in the journal: no primary",
        "Delivery works again, 0 requests wait",
    ]
    bench.delivery.stopService()


def test_the_backlog_is_measured_while_deliveries_fail(bench: Bench) -> None:
    bench.sink.error = StorageError("down")
    bench.outbox.add(1, 2, 3)
    bench.delivery.startService()
    bench.tries_within(4)
    assert (bench.delivery.backlog_rows, bench.delivery.backlog_age_s) == (3, 3.5)
    bench.sink.error = None
    bench.tries_within(RETRY_MAX_S)
    assert (bench.delivery.backlog_rows, bench.delivery.backlog_age_s) == (0, 0.0)
    bench.delivery.stopService()


def test_stopping_delivers_what_settled_last(bench: Bench) -> None:
    bench.delivery.startService()
    bench.outbox.add(1)
    stopped: list[None] = []
    bench.delivery.stopService().addCallback(stopped.append)
    assert bench.sink.batches == [list(row(1))]
    assert stopped == [None]
    assert bench.clock.getDelayedCalls() == []


def test_stopping_in_an_outage_tries_once_and_keeps_the_rows(bench: Bench) -> None:
    bench.sink.error = StorageError("down")
    bench.outbox.add(1)
    bench.delivery.startService()
    stopped: list[None] = []
    bench.delivery.stopService().addCallback(stopped.append)
    assert len(bench.sink.batches) == 2
    assert stopped == [None]
    assert list(bench.outbox.rows) == ["r1"]
    assert bench.clock.getDelayedCalls() == []


def test_stopping_does_not_wait_for_a_store_that_hangs(bench: Bench) -> None:
    bench.sink.manual = True
    bench.outbox.add(1)
    bench.delivery.startService()
    stopped: list[None] = []
    bench.delivery.stopService().addCallback(stopped.append)
    bench.clock.advance(FLUSH_S - 0.1)
    assert stopped == []
    bench.clock.advance(0.2)
    assert stopped == [None]
    assert list(bench.outbox.rows) == ["r1"]


def test_a_stopped_delivery_can_be_started_again(bench: Bench) -> None:
    bench.delivery.startService()
    bench.delivery.stopService()
    bench.outbox.add(1)
    bench.delivery.notify()
    bench.clock.advance(POLL_S)
    assert bench.sink.batches == []
    bench.delivery.startService()
    assert bench.sink.batches == [list(row(1))]
    bench.delivery.stopService()
