"""The ledger in SQLite: rows, and commits in groups.

What arrives while one commit runs is the next commit, and so is what the reactor's round brings in
which it could begin; there is no timer in between:

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from twisted.enterprise import adbapi
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy.errors import StorageError
from llmproxy.model import (
    Account,
    Attempt,
    Counts,
    Entry,
    Event,
    Kind,
    Outcome,
    Price,
    Settlement,
    State,
    events,
    utcnow,
)
from llmproxy.storage import ILedger, IOutbox, rows
from llmproxy.storage.owners import Owners
from llmproxy.storage.sqlite import from_text
from llmproxy.story import Wait

#: How long an `open` may wait for its commit before the request is refused.
OPEN_TIMEOUT_S = 2.0
#: How often is looked whether one has waited too long.
SWEEP_S = OPEN_TIMEOUT_S / 8
#: A longer backlog is counted no further: commits have to wait meanwhile.
COUNTED_BACKLOG = 100_000
#: The pause before a failed commit is repeated: doubled each time, up to the second number.
RETRY_S = (0.05, 1.0)

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


@dataclass(slots=True, eq=False, repr=False)
class Operation:
    """One thing to do inside a commit; it is done again when the commit's fate is unknown.

    `error`: why this one can never be written (a fault of ours); the others are not held up.
    `abandoned`: nobody waits for it any more.
    """

    done: Wait[None] = field(default_factory=Wait, init=False)
    error: Exception | None = field(default=None, init=False)
    abandoned: bool = field(default=False, init=False)

    def write(self, connection: sqlite3.Connection) -> None:
        """What there is to do."""
        raise NotImplementedError

    def lost(self) -> str:
        """What the log has to keep of it if it can't be written before the end."""
        return ""

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


@dataclass(slots=True, eq=False, repr=False)
class Call(Operation):
    """A function, which stands alone."""

    function: Callable[[sqlite3.Connection], None]

    def write(self, connection: sqlite3.Connection) -> None:
        self.function(connection)


class Apart(Call):
    """One that has nothing to do with rows, so that it may go before those that were added first:
    what is written of many rows at once is not parted by it."""

    __slots__ = ()


@dataclass(slots=True, eq=False, repr=False)
class RowOperation(Operation):
    """One that writes `row`, in one statement with those that come before and after it."""

    row: rows.Row

    def write(self, connection: sqlite3.Connection) -> None:
        rows.CHANGE.write(connection, [self.row])


@dataclass(slots=True, eq=False, repr=False)
class Opening(RowOperation):
    """The opening of a row; given up when it takes too long."""

    deadline: float

    def give_up(self) -> None:
        """Nobody waits any more; if the row is there, or may be, it must be closed."""
        self.abandoned = True
        self.done.errback(StorageError("the ledger did not write in time"))


class Closing(RowOperation):
    """The closing of a row; the lines of its bill, if they are in this file, go with it."""

    __slots__ = ()


class Settling(Closing):
    """The closing of a row whose request was sent."""

    __slots__ = ()

    def lost(self) -> str:
        return rows.describe_closing(self.row)


class Noting(RowOperation):
    """An attempt."""

    __slots__ = ()


class GroupCommit:
    """The writer: runs operations in commits, in order, and repeats a commit that failed.

    States: idle; waiting (a commit begins at the end of the reactor's round, or later if the last
    one failed); committing (a thread works on `_batch`, which it takes from `_queue` once it can
    write). `failing` tells that the last commit failed, or hangs; it goes on until a commit has
    really written something, whether or not anybody waits for one.
    """

    log = Logger()

    def __init__(
        self,
        pool: adbapi.ConnectionPool,
        clock: IReactorTime,
        on_commit: Callable[[float, int], None] = lambda seconds, operations: None,
        turnstile: AbstractContextManager[None] | None = None,
    ) -> None:
        self._pool = pool
        self._turnstile = turnstile or nullcontext()
        self._clock = clock
        self._on_commit = on_commit
        self._queue: list[Operation] = []
        self._batch: list[Operation] = []
        self._committing = False
        self._next: IDelayedCall | None = None  # the beginning of a commit
        self._retry_s = RETRY_S[0]
        self._sweeper: IDelayedCall | None = None
        self._waiters: list[Deferred[None]] = []
        self._stopped = False
        self._began = 0.0
        self._hanging = False
        self._failing_since: float | None = None

    @property
    def failing(self) -> bool:
        """The last commit failed, or takes too long."""
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
        if self._is_idle:
            self._commit_within(0.0)
        return operation.done

    def write(self, write: Callable[[sqlite3.Connection], None]) -> Deferred[None]:
        """The same for a plain function."""
        return self.add(Call(write))

    def when_idle(self) -> Deferred[None]:
        """Fires when all that was added is durable."""
        if not self.pending:
            return succeed(None)
        waiter: Deferred[None] = Deferred()
        self._waiters.append(waiter)
        return waiter

    def stop(self) -> None:
        """Try no more, and say what is lost with us: the numbers of rows that stay open."""
        self._stopped = True
        for operation in self._waiting():
            if what := operation.lost():
                self.log.error("ledger: not written: {what}", what=what)
        for call in (self._sweeper, self._next):
            if call is not None:
                call.cancel()
        self._sweeper = self._next = None

    @property
    def _is_idle(self) -> bool:
        return self._next is None and not self._committing

    def _commit_within(self, seconds: float) -> None:
        """Begin the next commit once all has been served that is ready by then.

        What that brings is in it too: a commit costs as much as ten operations do in one.
        """
        self._later(seconds, self._commit)

    def _later(self, seconds: float, act: Callable[..., None], *args: Any) -> None:
        if not self._stopped:
            self._next = self._clock.callLater(seconds, act, *args)

    def _commit(self) -> None:
        self._next = None
        if self._sweeper is None:
            self._sweeper = self._clock.callLater(SWEEP_S, self._sweep)
        self._committing = True
        self._began = self._clock.seconds()
        started = time.monotonic()
        running = self._pool.runWithConnection(_commit, self._take, self._turnstile)
        running.addCallbacks(self._committed, self._failed, callbackArgs=(started,))
        running.addErrback(lambda failure: self.log.failure("ledger writer", failure))

    def _waiting(self) -> list[Operation]:
        """All that is not durable yet, the newest first. None is missed while `_take` moves it."""
        return list(dict.fromkeys([*self._queue, *self._batch]))

    def _take(self) -> Sequence[Operation]:
        """What the next commit writes. Called in the writer's thread, while the queue grows."""
        new = self._queue[:]  # the same list all the time: the reactor's thread appends to it
        again = [_closing(op) if op.abandoned else op for op in self._batch]
        self._batch = again + [op for op in new if not op.abandoned]
        del self._queue[: len(new)]
        return self._batch

    def _committed(self, _: object, started: float) -> None:
        done, self._batch = self._batch, []
        self._committing = self._hanging = False
        if done:
            self._on_commit(time.monotonic() - started, len(done))
            self._works_again()
        self._queue[:0] = [_closing(op) for op in done if op.abandoned]
        if self._queue:
            # What a thread has called comes before what is ready in this round: so it is the
            # next one's call.
            self._later(0.0, self._commit_within, 0.0)
        for operation in done:
            operation.finish()
        if not self.pending:
            self._tell_idle()

    def _works_again(self) -> None:
        if self._failing_since is not None:
            self._failing_since, self._retry_s = None, RETRY_S[0]
            self.log.info("ledger: writing again")

    def _failed(self, failure: Failure) -> None:
        """Whether it took effect is unknown, so it is repeated until it surely has."""
        if self._stopped:
            return
        if self._hanging or not self.failing:
            self.log.error("ledger: commit failed, repeating: {error}", error=failure.value)
        self._committing = self._hanging = False
        self._begin_failing(self._clock.seconds())
        self._commit_within(self._retry_s)
        self._retry_s = min(2 * self._retry_s, RETRY_S[1])

    def _begin_failing(self, since: float) -> None:
        if self.failing:
            return
        self._failing_since = since
        # It stays when all others have given up: who is told to go elsewhere while we fail
        # would never find out that we don't any more.
        self._queue.append(Call(_touch))

    def _sweep(self) -> None:
        """Give up openings that have waited too long, and see whether the commit hangs."""
        self._sweeper = None
        if self._is_idle:
            return
        self._sweeper = self._clock.callLater(SWEEP_S, self._sweep)
        now = self._clock.seconds()
        for op in self._waiting():
            if isinstance(op, Opening) and not op.abandoned and op.deadline < now + SWEEP_S:
                op.give_up()
        if self._committing and not self.failing and now - self._began >= OPEN_TIMEOUT_S:
            # Nothing bounds the wait for another process's turn, or for a disk.
            self._hanging = True
            self._begin_failing(self._began)
            self.log.error(
                "ledger: a commit takes longer than {seconds:.0f} s", seconds=OPEN_TIMEOUT_S
            )

    def _tell_idle(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.callback(None)


def _commit(
    connection: sqlite3.Connection,
    take: Callable[[], Sequence[Operation]],
    turnstile: AbstractContextManager[None],
) -> None:
    """One commit, of what `take` gives when its turn has come. Runs in the writer's thread."""
    with turnstile:
        batch = take()
        if batch:
            _write(connection, batch)


def _write(connection: sqlite3.Connection, batch: Sequence[Operation]) -> None:
    """All of `batch`, with the effect that it has one by one in its order; or nothing."""
    if _is_written_at_once(connection, batch):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        _apply(connection, batch)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _is_written_at_once(connection: sqlite3.Connection, batch: Sequence[Operation]) -> bool:
    """Write rows in one statement, which is a transaction by itself, if they are nothing else.

    While others wait for their turn, the interpreter's lock is waited for once.
    """
    changes = [op for op in batch if isinstance(op, RowOperation)]
    if len(changes) < len(batch) or len(batch) > rows.MOST_ROWS:
        return False
    try:
        rows.CHANGE.write(connection, [op.row for op in changes])
    except Exception as error:
        if _is_trouble(error):
            raise
        return False  # one of them can't be written, and so none was
    _no_error(changes)
    return True


def _apply(connection: sqlite3.Connection, batch: Sequence[Operation]) -> None:
    changes: list[RowOperation] = []
    for operation in batch:
        if isinstance(operation, RowOperation):
            changes.append(operation)
        elif isinstance(operation, Apart):
            operation.apply(connection)
        else:
            _apply_rows(connection, changes)
            changes.clear()
            operation.apply(connection)
    _apply_rows(connection, changes)


def _apply_rows(connection: sqlite3.Connection, operations: Sequence[RowOperation]) -> None:
    """Do them at once; if one of them can't be written, one by one."""
    try:
        rows.CHANGE.write(connection, [op.row for op in operations])
    except Exception as error:
        if _is_trouble(error):
            raise
        for operation in operations:
            operation.apply(connection)
    else:
        _no_error(operations)


def _no_error(operations: Iterable[Operation]) -> None:
    for operation in operations:
        operation.error = None


def _touch(connection: sqlite3.Connection) -> None:
    """Write something that changes nothing: it fails where the disk is full or read-only."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    connection.execute(f"PRAGMA user_version = {int(version)}")


def _closing(opening: Operation) -> Closing:
    """Close the row, if it is there, of a request that was given up before it was sent."""
    assert isinstance(opening, Opening)
    return Closing(rows.closing_for_nothing(opening.row))


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
        turnstile: AbstractContextManager[None] | None = None,
    ) -> None:
        self.writer = GroupCommit(pool, clock, on_commit, turnstile)
        self._clock = clock
        self._owners = owners
        self._bills_here = bills_here
        self.notify: Callable[[], None] = lambda: None

    def know(self, prices: Iterable[Price]) -> Deferred[None]:
        """See `ILedger.know`. Operations are written in their order."""
        known = list(prices)
        return self.writer.write(lambda connection: rows.add_prices(connection, known))

    def open(self, entry: Entry) -> Deferred[None]:
        """See `ILedger.open`."""
        if self.writer.hopeless:
            # Nothing is kept of it: an outage of hours must not fill the memory.
            return fail(StorageError("the ledger can't be written"))
        deadline = self._clock.seconds() + OPEN_TIMEOUT_S
        return self.writer.add(Opening(rows.opening(entry, self._owners.me), deadline))

    def checkpoint(self, running: Mapping[str, Counts]) -> Deferred[None]:
        """See `ILedger.checkpoint`."""
        noted = [rows.checkpoint(rid, counts) for rid, counts in running.items()]
        return self.writer.write(lambda connection: rows.CHECKPOINT.write(connection, noted))

    def note(self, attempt: Attempt) -> Deferred[None]:
        """See `ILedger.note`."""
        return self.writer.add(Noting(rows.attempt(attempt)))

    def settle(self, entry: Entry, settlement: Settlement) -> Deferred[None]:
        """See `ILedger.settle`."""
        row = rows.closing(entry.rid, settlement, bills_here=self._bills_here)
        settled = self.writer.add(Settling(row))
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
        found_rows = connection.execute(OPEN_ROWS, (owner,)).fetchall()
        closings = []
        for row in found_rows:
            entry, counts = _entry(row)
            state = State.ESTIMATED if counts else State.ORPHAN
            settlement = Settlement(state=state, outcome=None, counts=counts, finished=utcnow())
            closings.append(rows.closing(entry.rid, settlement, bills_here=self._bills_here))
            found[state] = found.get(state, 0) + 1
        rows.CHANGE.write(connection, closings)

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
        marked = [(rid,) for rid in rids]
        return self.writer.write(lambda connection: rows.MARK_DELIVERED.write(connection, marked))

    def backlog(self) -> Deferred[tuple[int, float]]:
        """See `IOutbox.backlog`."""
        found: list[tuple[int, float]] = []

        def read(connection: sqlite3.Connection) -> None:
            waiting, oldest = connection.execute(BACKLOG, (COUNTED_BACKLOG,)).fetchone()
            age_s = (utcnow() - from_text(oldest)).total_seconds() if oldest else 0.0
            found[:] = [(waiting, max(age_s, 0.0))]

        return self.writer.write(read).addCallback(lambda _: found[0])


def _open_owners(connection: sqlite3.Connection) -> list[str]:
    return [owner for (owner,) in connection.execute(OPEN_OWNERS)]


def _as_settled(entry: Entry, counts: Counts) -> Settlement:
    """An outbox row as a settlement; its entry carries the time of its end."""
    return Settlement(
        state=State.SETTLED, outcome=Outcome.COMPLETE, counts=counts, finished=entry.opened
    )
