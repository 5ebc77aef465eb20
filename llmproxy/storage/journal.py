"""The ledger in SQLite: rows, and commits in groups.

What arrives while one commit runs is the next commit; there is no timer in between:

    open ---\\                    /--> open's Deferred fires
    settle ---> queue -> commit ---> settle's Deferred fires
    mark ---/      ^       |
                   +-------+ a failed commit is unknown: repeat it until it is there

Every operation can be repeated: a row has an identity, and so has each event. Therefore a failed
or timed-out commit needs no knowledge of whether it took effect.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from twisted.enterprise import adbapi
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy.errors import StorageError
from llmproxy.model import (
    Account,
    Counts,
    Entry,
    Event,
    Kind,
    Outcome,
    Settlement,
    State,
    events,
    utcnow,
)
from llmproxy.storage import ILedger, IOutbox
from llmproxy.storage.owners import Owners
from llmproxy.storage.sqlite import from_text, to_text

#: How long an `open` may wait for its commit before the request is refused.
OPEN_TIMEOUT_S = 2.0
#: How often is looked whether one has waited too long.
SWEEP_S = OPEN_TIMEOUT_S / 8
#: A longer backlog is counted no further: commits have to wait meanwhile.
COUNTED_BACKLOG = 100_000
#: The pause before a failed commit is repeated: doubled each time, up to the second number.
RETRY_S = (0.05, 1.0)

# Not `OR IGNORE`, which would pass over a row with a NULL where none may be as if it were there.
OPEN_ROW = """INSERT INTO ledger
    (rid, state, owner, opened, api_key, user_id, path, model, device)
    VALUES (?, 'open', ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (rid) DO NOTHING"""
# `orphan` may still become better known: another process may have taken us for dead.
CLOSE_ROW = """UPDATE ledger SET state = ?, outcome = ?, status = ?, finished = ?, raw = ?,
    prompt = ?, completion = ?, embedding = ?, transcription = ?, delivered = ?
    WHERE rid = ? AND state IN ('open', 'orphan')"""
CHECKPOINT_ROW = """UPDATE ledger SET
    prompt = ?, completion = ?, embedding = ?, transcription = ? WHERE rid = ? AND state = 'open'"""
ADD_EVENT = """INSERT OR IGNORE INTO event_oneoff (created, api_key, product, quantity, rid)
    VALUES (?, ?, ?, ?, ?)"""
# `<> 'settled'` says nothing new, but without it SQLite does not see that its index will do.
OPEN_OWNERS = """SELECT DISTINCT owner FROM ledger
    WHERE state = 'open' AND state <> 'settled'"""
OPEN_ROWS = """SELECT rid, opened, api_key, user_id, path, model, device,
    prompt, completion, embedding, transcription FROM ledger
    WHERE state = 'open' AND state <> 'settled' AND owner = ?"""
UNDELIVERED = """SELECT rid, finished, api_key, user_id, path, model, device,
    prompt, completion, embedding, transcription FROM ledger
    WHERE delivered = 0 AND state IN ('settled', 'estimated') ORDER BY finished, rid LIMIT ?"""
BACKLOG = """SELECT count(*), min(finished) FROM (SELECT finished FROM ledger
    WHERE delivered = 0 AND state IN ('settled', 'estimated') ORDER BY finished, rid LIMIT ?)"""


Counter = dict[State, int]


class Operation:
    """One thing to do inside a commit; it is done again when the commit's fate is unknown.

    `error`: why this one can never be written (a fault of ours); the others are not held up.
    """

    def __init__(self, write: Callable[[sqlite3.Connection], None], what: str = "") -> None:
        self.done: Deferred[None] = Deferred()
        self.write = write
        self.what = what
        self.error: Exception | None = None

    def apply(self, connection: sqlite3.Connection) -> None:
        """Do it, in the writer's thread."""
        self.error = None
        try:
            self.write(connection)
        except Exception as error:
            if _is_trouble(error):
                raise
            self.error = error

    def finish(self) -> None:
        """Tell the waiter."""
        if self.done.called:
            return
        if self.error is not None:
            self.done.errback(self.error)
        else:
            self.done.callback(None)


def _is_trouble(error: Exception) -> bool:
    """The store's trouble, not the operation's: locked, full, broken, or out of memory."""
    passing = (sqlite3.OperationalError, sqlite3.InternalError, MemoryError)
    return isinstance(error, passing) or type(error) is sqlite3.DatabaseError


class Opening(Operation):
    """The opening of a row; given up when it takes too long."""

    def __init__(self, entry: Entry, owner: str, deadline: float) -> None:
        super().__init__(self._open)
        self.entry = entry
        self.deadline = deadline
        self.abandoned = False
        self.tried = False
        self._owner = owner

    def _open(self, connection: sqlite3.Connection) -> None:
        self.tried = True
        entry, account = self.entry, self.entry.account
        connection.execute(
            OPEN_ROW,
            (
                entry.rid,
                self._owner,
                to_text(entry.opened),
                account.key_id,
                account.user_id,
                entry.path,
                entry.model,
                entry.device,
            ),
        )

    def give_up(self) -> None:
        """Nobody waits any more; if the row is there, or may be, it must be closed."""
        self.abandoned = True
        self.done.errback(StorageError("the ledger did not write in time"))


class GroupCommit:
    """The writer: runs operations in commits, in order, and repeats a commit that failed.

    States: idle (`_batch` is empty); committing (a thread works on `_batch`); waiting (the last
    commit failed and is repeated soon). `failing` tells that the last commit failed; it goes on
    until a commit has really written something, whether or not anybody waits for one.
    """

    log = Logger()

    def __init__(
        self,
        pool: adbapi.ConnectionPool,
        clock: IReactorTime,
        on_commit: Callable[[float, int], None] = lambda seconds, operations: None,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._on_commit = on_commit
        self._queue: list[Operation] = []
        self._batch: list[Operation] = []
        self._retry_s = RETRY_S[0]
        self._sweeper: IDelayedCall | None = None
        self._retry: IDelayedCall | None = None
        self._idle: list[Deferred[None]] = []
        self._stopped = False
        self._failing_since: float | None = None

    @property
    def failing(self) -> bool:
        """The last commit failed."""
        return self._failing_since is not None

    @property
    def hopeless(self) -> bool:
        """Commits have failed for so long that an opening need not wait for the next one."""
        since = self._failing_since
        return since is not None and self._clock.seconds() - since >= OPEN_TIMEOUT_S

    @property
    def pending(self) -> int:
        """How many operations wait for their commit."""
        return len(self._queue) + len(self._batch)

    def add(self, operation: Operation) -> Deferred[None]:
        """Put an operation into the next commit; its Deferred fires once it is durable."""
        self._queue.append(operation)
        if not self._batch:
            self._commit()
        return operation.done

    def write(self, write: Callable[[sqlite3.Connection], None], what: str = "") -> Deferred[None]:
        """The same for a plain function; `what` tells of it if it can't be written in the end."""
        return self.add(Operation(write, what))

    def when_idle(self) -> Deferred[None]:
        """Fires when all that was added is durable."""
        if not self.pending:
            return succeed(None)
        waiter: Deferred[None] = Deferred()
        self._idle.append(waiter)
        return waiter

    def stop(self) -> None:
        """Try no more, and say what is lost with us: the numbers of rows that stay open."""
        self._stopped = True
        for operation in [*self._batch, *self._queue]:
            if operation.what:
                self.log.error("ledger: not written: {what}", what=operation.what)
        self._stop_sweeping()
        if self._retry is not None and self._retry.active():
            self._retry.cancel()

    def _commit(self) -> None:
        if self._stopped:
            return
        self._batch, self._queue = _without_abandoned(self._batch + self._queue), []
        if not self._batch:
            self._stop_sweeping()
            self._tell_idle()
            return
        if self._sweeper is None:
            self._sweeper = self._clock.callLater(SWEEP_S, self._sweep)
        started = time.monotonic()
        running = self._pool.runWithConnection(_apply_all, self._batch)
        running.addCallbacks(self._committed, self._failed, callbackArgs=(started,))
        running.addErrback(lambda failure: self.log.failure("ledger writer", failure))

    def _committed(self, _: object, started: float) -> None:
        done, self._batch = self._batch, []
        self._on_commit(time.monotonic() - started, len(done))
        if self.failing:
            self._failing_since, self._retry_s = None, RETRY_S[0]
            self.log.info("ledger: writing again")
        self._queue = [_closing(op.entry) for op in done if _abandoned(op)] + self._queue
        self._commit()  # the next commit runs in its thread while the waiters of this one go on
        for operation in done:
            operation.finish()

    def _failed(self, failure: Failure) -> None:
        """Whether it took effect is unknown, so it is repeated until it surely has."""
        if self._stopped:
            return
        if not self.failing:
            self._failing_since = self._clock.seconds()
            # It stays when all others have given up: who is told to go elsewhere while we fail
            # would never find out that we don't any more.
            self._queue.append(Operation(_touch))
            self.log.error("ledger: commit failed, repeating: {error}", error=failure.value)
        self._retry = self._clock.callLater(self._retry_s, self._commit)
        self._retry_s = min(2 * self._retry_s, RETRY_S[1])

    def _sweep(self) -> None:
        """Give up openings that have waited too long."""
        self._sweeper = self._clock.callLater(SWEEP_S, self._sweep)
        soon = self._clock.seconds() + SWEEP_S
        for op in [*self._batch, *self._queue]:
            if isinstance(op, Opening) and not op.abandoned and op.deadline < soon:
                op.give_up()

    def _stop_sweeping(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def _tell_idle(self) -> None:
        waiters, self._idle = self._idle, []
        for waiter in waiters:
            waiter.callback(None)


def _apply_all(connection: sqlite3.Connection, batch: Sequence[Operation]) -> None:
    """One commit. Runs in the writer's thread."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        for operation in batch:
            operation.apply(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _touch(connection: sqlite3.Connection) -> None:
    """Write something that changes nothing: it fails where the disk is full or read-only."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    connection.execute(f"PRAGMA user_version = {int(version)}")


def _abandoned(operation: Operation) -> TypeGuard[Opening]:
    return isinstance(operation, Opening) and operation.abandoned


def _without_abandoned(batch: Sequence[Operation]) -> list[Operation]:
    """Drop openings that nobody waits for; those that were tried may be there: close them."""
    return [
        _closing(op.entry) if _abandoned(op) else op
        for op in batch
        if not _abandoned(op) or op.tried
    ]


def _closing(entry: Entry) -> Operation:
    """Close the row, if it is there, of a request that was given up before it was sent."""
    settlement = Settlement(
        state=State.SETTLED, outcome=Outcome.REFUSED, counts={}, finished=entry.opened
    )

    return Operation(lambda connection: close_row(connection, entry, settlement, delivered=True))


def close_row(
    connection: sqlite3.Connection, entry: Entry, settlement: Settlement, *, delivered: bool
) -> None:
    """Close an open row and, if `delivered` (the bill is in this file), add its events."""
    due = events(entry, settlement)
    changed = connection.execute(
        CLOSE_ROW,
        (
            settlement.state,
            settlement.outcome,
            settlement.status,
            to_text(settlement.finished),
            settlement.raw,
            *_columns(settlement.counts),
            delivered or (not due and settlement.state is State.SETTLED),
            entry.rid,
        ),
    ).rowcount
    if changed and delivered:
        add_events(connection, due)


def add_events(connection: sqlite3.Connection, due: Sequence[Event]) -> None:
    """Put events on the bill in this file; those that are there already stay as they are."""
    connection.executemany(
        ADD_EVENT,
        [(to_text(e.created), e.account.key_id, e.product, e.quantity, e.rid) for e in due],
    )


def _columns(counts: Counts) -> list[int | None]:
    return [counts.get(kind) for kind in Kind]


def _entry(row: Sequence[Any]) -> tuple[Entry, Counts]:
    """An entry and its counts, from a row of OPEN_ROWS or UNDELIVERED."""
    rid, moment, key_id, user_id, path, model, device, *numbers = row
    entry = Entry(
        rid=rid,
        opened=from_text(moment),
        account=Account(key_id=key_id, user_id=user_id),
        path=path,
        model=model,
        device=device,
    )
    counted = {k: n for k, n in zip(Kind, numbers, strict=True) if n is not None}
    return entry, counted


@implementer(ILedger, IOutbox)
class SQLiteLedger:
    """The ledger's rows in a SQLite file.

    `bills_here`: the file is the store of the bills too, so events are written in the same
    transaction. Otherwise the rows are an outbox, and `notify` is called when one is ready.
    """

    log = Logger()

    def __init__(
        self,
        pool: adbapi.ConnectionPool,
        clock: IReactorTime,
        owners: Owners,
        *,
        bills_here: bool,
        on_commit: Callable[[float, int], None] = lambda seconds, operations: None,
    ) -> None:
        self.writer = GroupCommit(pool, clock, on_commit)
        self._clock = clock
        self._owners = owners
        self._bills_here = bills_here
        self.notify: Callable[[], None] = lambda: None

    def open(self, entry: Entry) -> Deferred[None]:
        """See `ILedger.open`."""
        if self.writer.hopeless:
            # Nothing is kept of it: an outage of hours must not fill the memory.
            return fail(StorageError("the ledger can't be written"))
        deadline = self._clock.seconds() + OPEN_TIMEOUT_S
        return self.writer.add(Opening(entry, self._owners.me, deadline))

    def checkpoint(self, running: Mapping[str, Counts]) -> Deferred[None]:
        """See `ILedger.checkpoint`."""
        rows = [(*_columns(counts), rid) for rid, counts in running.items()]
        return self.writer.write(lambda connection: _many(connection, CHECKPOINT_ROW, rows))

    def settle(self, entry: Entry, settlement: Settlement) -> Deferred[None]:
        """See `ILedger.settle`."""

        def close(connection: sqlite3.Connection) -> None:
            close_row(connection, entry, settlement, delivered=self._bills_here)

        counted = ", ".join(f"{kind} {count}" for kind, count in settlement.counts.items())
        what = f"{entry.rid} {settlement.state}: {counted or 'nothing'}"
        settled = self.writer.write(close, what)
        if not self._bills_here:
            settled.addCallback(lambda _: self.notify())
        return settled

    def recover(self) -> Deferred[Counter]:
        """Close the rows that dead processes left open; the result counts them by state."""
        found: Counter = {}

        def recover(connection: sqlite3.Connection) -> None:
            found.clear()
            for owner in _open_owners(connection):
                if self._owners.is_dead(owner):
                    self._close_all(connection, owner, found)

        return self.writer.write(recover).addCallback(lambda _: found)

    def _close_all(self, connection: sqlite3.Connection, owner: str, found: Counter) -> None:
        for row in connection.execute(OPEN_ROWS, (owner,)).fetchall():
            entry, counts = _entry(row)
            state = State.ESTIMATED if counts else State.ORPHAN
            settlement = Settlement(state=state, outcome=None, counts=counts, finished=utcnow())
            close_row(connection, entry, settlement, delivered=self._bills_here)
            found[state] = found.get(state, 0) + 1

    def undelivered(self, limit: int) -> Deferred[Sequence[Event]]:
        """See `IOutbox.undelivered`."""
        found: list[Event] = []

        def read(connection: sqlite3.Connection) -> None:
            found.clear()
            for row in connection.execute(UNDELIVERED, (limit,)).fetchall():
                entry, counts = _entry(row)
                found.extend(events(entry, _as_settled(entry, counts)))

        return self.writer.write(read).addCallback(lambda _: found)

    def mark_delivered(self, rids: Sequence[str]) -> Deferred[None]:
        """See `IOutbox.mark_delivered`."""
        rows = [(rid,) for rid in rids]
        statement = "UPDATE ledger SET delivered = 1 WHERE rid = ?"
        return self.writer.write(lambda connection: _many(connection, statement, rows))

    def backlog(self) -> Deferred[tuple[int, float]]:
        """See `IOutbox.backlog`."""
        found: list[tuple[int, float]] = []

        def read(connection: sqlite3.Connection) -> None:
            rows, oldest = connection.execute(BACKLOG, (COUNTED_BACKLOG,)).fetchone()
            age = self._clock.seconds() - from_text(oldest).timestamp() if oldest else 0.0
            found[:] = [(rows, max(age, 0.0))]

        return self.writer.write(read).addCallback(lambda _: found[0])


def _many(connection: sqlite3.Connection, statement: str, rows: Sequence[Any]) -> None:
    connection.executemany(statement, rows)


def _open_owners(connection: sqlite3.Connection) -> list[str]:
    return [owner for (owner,) in connection.execute(OPEN_OWNERS)]


def _as_settled(entry: Entry, counts: Counts) -> Settlement:
    """An outbox row as a settlement; its entry carries the time of its end."""
    return Settlement(
        state=State.SETTLED, outcome=Outcome.COMPLETE, counts=counts, finished=entry.opened
    )
