"""Faults to plant into the proxy: each is a mistake that somebody could make in good faith.

The simulation is worth something only if it finds each of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import simulation
from twisted.internet.defer import Deferred, succeed
from twisted.python.failure import Failure

from llmproxy import billing
from llmproxy.auth import Authenticator
from llmproxy.billing import NOTHING
from llmproxy.checkpoints import Checkpoints
from llmproxy.delivery import Delivery
from llmproxy.errors import StorageError
from llmproxy.exchange import Exchange
from llmproxy.forward import Ending, Forward
from llmproxy.meter import StreamMeter, _Chat
from llmproxy.model import Account, Counts, Entry, Kind, Outcome, Settlement, utcnow
from llmproxy.storage import journal, rows
from llmproxy.storage.journal import GroupCommit, Opening, SQLiteLedger
from llmproxy.usage import Report

Plant = Callable[[], AbstractContextManager[Any]]


def bill_after_release() -> AbstractContextManager[Any]:
    """The client has its answer before the bill is written."""
    settle, release = Exchange._settle, Exchange._release

    async def released_first(self: Exchange, entry: Entry, ending: Ending) -> None:
        release(self, ending)
        await settle(self, entry, ending)

    return mock.patch.multiple(Exchange, _settle=released_first, _release=lambda self, ending: None)


def end_of_a_stream_not_held_back() -> AbstractContextManager[Any]:
    """The last event of a stream is passed on as it comes."""

    def hold(self: StreamMeter, piece: bytes) -> None:
        self._held.append(piece)

    def feed(self: StreamMeter, data: bytes) -> bytes:
        shown = original(self, data)
        held = b"".join(self._held)
        self._held.clear()
        return shown + held

    original = StreamMeter.feed
    return mock.patch.multiple(StreamMeter, _hold=hold, feed=feed)


def new_id_on_retry() -> AbstractContextManager[Any]:
    """A repeated commit writes the row under another id."""
    original = GroupCommit._failed

    def failed(self: GroupCommit, failure: Failure) -> None:
        for operation in self._batch:
            if isinstance(operation, Opening):
                what, rid, *others = operation.row
                operation.row = (what, f"{rid}-again", *others)
        original(self, failure)

    return mock.patch.object(GroupCommit, "_failed", failed)


def no_settlement_when_the_client_left() -> AbstractContextManager[Any]:
    """Nobody waits for the answer, so nobody bills it."""
    original = Exchange._settle

    async def settle(self: Exchange, entry: Entry, ending: Ending) -> Settlement:
        if not self._down.gone:
            return await original(self, entry, ending)
        return billing.settlement(ending.outcome, ending.reading, utcnow(), ending.status)

    return mock.patch.object(Exchange, "_settle", settle)


def no_row_before_the_request() -> AbstractContextManager[Any]:
    """The row is written without waiting for its commit."""
    original = SQLiteLedger.open

    def open_later(self: SQLiteLedger, entry: Entry) -> Deferred[None]:
        original(self, entry).addErrback(lambda failure: None)
        return succeed(None)

    return mock.patch.object(SQLiteLedger, "open", open_later)


@contextlib.contextmanager
def events_without_identity() -> Iterator[None]:
    """A settlement that is repeated puts its events on the bill again."""

    lines = "".join(
        f"""INSERT INTO event_oneoff (created, api_key, product, quantity, rid)
        SELECT finished, api_key, model || '/' || device || '/{kind}', {kind}, rid
        FROM ledger WHERE rid = new.p0 AND {kind} IS NOT NULL AND delivered;"""
        for kind in Kind
    )
    trigger = f"""CREATE TEMP TRIGGER bill_again INSTEAD OF INSERT ON change
        WHEN new.what = {rows.CLOSE} AND new.p1 IN ('settled', 'estimated') BEGIN {lines} END;"""
    with mock.patch.object(rows, "BILL_TRIGGER", trigger):
        simulation.SCHEMA_HOOK[0] = "DROP INDEX event_oneoff_identity;"
        try:
            yield
        finally:
            simulation.SCHEMA_HOOK[0] = ""


def failed_commit_dropped() -> AbstractContextManager[Any]:
    """A commit that reported failure is taken not to have happened."""

    def failed(self: GroupCommit, failure: Failure) -> None:
        lost, self._batch = self._batch, []
        self._commit()
        for operation in lost:
            operation.error = StorageError("the commit failed")
            operation.done.addErrback(lambda failure: failure.trap(StorageError) and None)
            operation.finish()

    return mock.patch.object(GroupCommit, "_failed", failed)


def end_released_when_the_commit_fails() -> AbstractContextManager[Any]:
    """A commit that fails is repeated, but nobody waits for it."""
    original = GroupCommit._failed

    def failed(self: GroupCommit, failure: Failure) -> None:
        original(self, failure)
        for operation in self._batch:
            operation.finish()

    return mock.patch.object(GroupCommit, "_failed", failed)


@contextlib.contextmanager
def late_checkpoint_overwrites() -> Iterator[None]:
    """A checkpoint is written when its row is settled already."""
    original = SQLiteLedger.checkpoint
    trigger = rows.CHECKPOINT_TRIGGER.replace("AND state = 'open'", "")

    def late(self: SQLiteLedger, running: Mapping[str, Counts]) -> Deferred[None]:
        self._clock.callLater(0.5, original, self, running)
        return succeed(None)

    with (
        mock.patch.object(SQLiteLedger, "checkpoint", late),
        mock.patch.object(rows, "CHECKPOINT_TRIGGER", trigger),
    ):
        yield


def running_count_goes_down() -> AbstractContextManager[Any]:
    """The last running count wins, even if it is lower."""

    def take(self: _Chat, report: Report, choices: object) -> None:
        if report.raw is not None:
            self._absurd(report.raw)
            return
        self._running[0] = report.counts[Kind.COMPLETION]
        self._valid(report.counts, exact=True)

    return mock.patch.object(_Chat, "_take_running", take)


def recovery_takes_the_living() -> AbstractContextManager[Any]:
    """Every row that is not our own is taken for a dead process's."""
    return mock.patch.object(simulation.SimOwners, "is_dead", lambda self, owner: owner != self.me)


def recovery_forgotten() -> AbstractContextManager[Any]:
    """What a dead process left open stays open."""

    def recover(self: SQLiteLedger) -> Deferred[journal.Counter]:
        return succeed({})

    return mock.patch.object(SQLiteLedger, "recover", recover)


def delivered_before_it_is_stored() -> AbstractContextManager[Any]:
    """Rows are marked first, then their events are sent."""

    async def move(self: Delivery) -> bool:
        waiting = await self._outbox.undelivered(500)
        if not waiting:
            return False
        await self._outbox.mark_delivered([event.rid for event in waiting])
        await self._sink.deliver(waiting)
        return True

    return mock.patch.object(Delivery, "_move_batch", move)


def anybody_enters_while_the_store_is_down() -> AbstractContextManager[Any]:
    """A key that can't be checked is let in."""
    original = Authenticator.authenticate

    async def authenticate(self: Authenticator, key: bytes, peer: Any = None) -> Account:
        try:
            return await original(self, key, peer)
        except Exception:
            if self.store_is_up:
                raise
            return Account(key.decode())

    return mock.patch.object(Authenticator, "authenticate", authenticate)


def cut_stream_ends_cleanly() -> AbstractContextManager[Any]:
    """An answer that broke off is finished as if it were whole."""
    original = Forward._cut_short

    def cut_short(self: Forward, end: Any, reading: Any) -> Ending:
        ending = original(self, end, reading)
        return replace(ending, last=b"") if self._down.started else ending

    return mock.patch.object(Forward, "_cut_short", cut_short)


def whole_answer_for_nothing_when_the_client_left() -> AbstractContextManager[Any]:
    """An answer that the client did not wait for is settled as free of charge."""
    original = Exchange._settle

    async def settle(self: Exchange, entry: Entry, ending: Ending) -> None:
        if ending.outcome is Outcome.CLIENT_GONE:
            ending = replace(ending, reading=NOTHING)
        await original(self, entry, ending)

    return mock.patch.object(Exchange, "_settle", settle)


def backend_not_told_that_the_client_left() -> AbstractContextManager[Any]:
    """An answer is read on to its end where it should be cancelled."""

    def client_left(self: Forward) -> None:
        if self._reader is not None:
            self._reader.resumeProducing()

    return mock.patch.object(Forward, "_client_left", client_left)


def usage_shown_unasked() -> AbstractContextManager[Any]:
    """The client gets the usage chunk that it did not ask for."""
    original = StreamMeter.__init__

    def init(self: StreamMeter, *args: Any, **options: Any) -> None:
        original(self, *args, **options | {"show_usage": True})

    return mock.patch.object(StreamMeter, "__init__", init)


def checkpoints_never_forgotten() -> AbstractContextManager[Any]:
    """Streams that have ended stay in the list of those that are checkpointed."""

    def forget(self: Checkpoints, rid: str) -> None:
        """It stays."""

    return mock.patch.object(Checkpoints, "forget", forget)


PLANTS: Sequence[Plant] = (
    bill_after_release,
    end_of_a_stream_not_held_back,
    new_id_on_retry,
    no_settlement_when_the_client_left,
    no_row_before_the_request,
    events_without_identity,
    failed_commit_dropped,
    end_released_when_the_commit_fails,
    late_checkpoint_overwrites,
    running_count_goes_down,
    recovery_takes_the_living,
    recovery_forgotten,
    delivered_before_it_is_stored,
    anybody_enters_while_the_store_is_down,
    cut_stream_ends_cleanly,
    whole_answer_for_nothing_when_the_client_left,
    backend_not_told_that_the_client_left,
    usage_shown_unasked,
    checkpoints_never_forgotten,
)
