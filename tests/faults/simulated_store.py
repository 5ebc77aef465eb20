"""The stores of a history: the real SQLite, but later, and not always well; and where bills go."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from simulated_network import SimReactor, World
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy.errors import StorageError
from llmproxy.model import Event
from llmproxy.storage import IEventSink
from llmproxy.storage.rows import install
from llmproxy.storage.sqlite import connect, migrate


class FaultyConnection:
    """A connection on which the `at`th statement fails; with `late`, the commit does, too late."""

    def __init__(self, connection: sqlite3.Connection, at: int, late: bool) -> None:
        self._connection, self._at, self._late = connection, at, late

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction

    def execute(self, statement: str, *parameters: Any) -> Any:
        if self._late:
            result = self._connection.execute(statement, *parameters)
            if statement == "COMMIT":
                raise sqlite3.OperationalError("disk I/O error")
            return result
        self._count(statement)
        return self._connection.execute(statement, *parameters)

    def executemany(self, statement: str, rows: Any) -> Any:
        self._count(statement)
        return self._connection.executemany(statement, rows)

    def _count(self, statement: str) -> None:
        self._at -= 1
        if self._at == 0 and statement != "ROLLBACK":
            raise sqlite3.OperationalError("disk I/O error")


class SimPool:
    """One database thread: runs what it is given in order, later, and not always well."""

    def __init__(self, world: World, reactor: SimReactor, store: Store) -> None:
        self._world, self._reactor, self._store = world, reactor, store
        self._jobs: deque[tuple[Callable[[Any], Any], Deferred[Any]]] = deque()
        self._running: Callable[[Any], Any] | None = None

    def runWithConnection(self, work: Callable[..., Any], *args: Any) -> Deferred[Any]:
        return self._add(lambda connection: work(connection, *args))

    def runQuery(self, statement: str, parameters: Sequence[Any]) -> Deferred[Any]:
        return self._add(lambda connection: connection.execute(statement, parameters).fetchall())

    def _add(self, work: Callable[[Any], Any]) -> Deferred[Any]:
        done: Deferred[Any] = Deferred()
        self._jobs.append((work, done))
        if len(self._jobs) == 1:
            self._start()
        return done

    def _start(self) -> None:
        self._running = self._jobs[0][0]
        self._world.callLater(self._store.delay(), self._apply)

    def _apply(self) -> None:
        work, self._running = self._running, None
        if self._reactor.dead or work is None:
            return
        try:
            result = work(self._store.connection_now())
        except Exception:
            result = Failure()
            self._world.say(f"store: {result.value}")
            self._store.failures += 1
        self._world.callLater(self._store.delay(), self._report, result)

    def _report(self, result: Any) -> None:
        if self._reactor.dead:
            return
        _, done = self._jobs.popleft()
        if self._jobs:
            self._start()
        done.callback(result)

    def crash(self) -> None:
        """The process dies, perhaps in the middle of a commit, perhaps just after it."""
        work, self._running = self._running, None
        if work is not None and self._world.rng.random() < 0.5:
            with contextlib.suppress(Exception):
                work(self._store.connection_now())


class Store:
    """The database of a history, and its troubles."""

    def __init__(self, world: World, after_schema: str = "") -> None:
        rng = world.rng
        self._world = world
        self.connection = connect(":memory:")
        migrate(self.connection)
        install(self.connection)
        if after_schema:
            self.connection.executescript(after_schema)
        self._rate = rng.choice((0.0, 0.0, 0.0, 0.1, 0.4))
        begins = world.seconds() + rng.uniform(0, 2)
        self._down = (begins, begins + (rng.uniform(0, 6) if rng.random() < 0.15 else 0))
        self._slow = rng.choice((0.0, 0.0001, 0.01, 0.1))
        self.failures = 0

    def add_key(self, key: str, expires: str | None = None) -> None:
        secret = hashlib.sha256(key.encode()).hexdigest()
        self.connection.execute(
            "INSERT INTO api_key (id, secret, type, expires) VALUES (?, ?, 'LLM', ?)",
            (key, secret, expires),
        )

    def delay(self) -> float:
        rng = self._world.rng
        if self._rate and rng.random() < 0.03:
            return rng.uniform(0.5, 3)
        return rng.random() * self._slow

    def connection_now(self) -> Any:
        """The connection, well or not."""
        rng = self._world.rng
        down = self._down[0] <= self._world.seconds() < self._down[1]
        if down or rng.random() < self._rate:
            kind = rng.choice(("locked", "midway", "late"))
            at = 1 if kind == "locked" else rng.randint(2, 5)
            return FaultyConnection(self.connection, at, kind == "late")
        return self.connection

    def rows(self) -> list[dict[str, Any]]:
        cursor = self.connection.execute("SELECT * FROM ledger ORDER BY rid")
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def row_of(self, number: int) -> dict[str, Any] | None:
        found = [row for row in self.rows() if row["api_key"] == f"key-{number}"]
        return found[0] if found else None


@implementer(IEventSink)
class Sink:
    """Where events are delivered; it may be slow, fail, fail half-way, or fail too late."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rate = world.rng.choice((0.0, 0.2, 0.5))
        self.events: list[Event] = []
        self.keyed = True

    def deliver(self, events: Sequence[Event]) -> Deferred[None]:
        done: Deferred[None] = Deferred()
        self._world.callLater(self._world.latency(), self._store, list(events), done)
        return done

    def _store(self, events: list[Event], done: Deferred[None]) -> None:
        rng = self._world.rng
        failed = rng.random() < self._rate
        kept = events[: rng.randint(0, len(events))] if failed else events
        there = {(event.rid, event.product) for event in self.events}
        self.events += [e for e in kept if not self.keyed or (e.rid, e.product) not in there]
        result: Any = Failure(StorageError("no answer")) if failed else None
        self._world.callLater(self._world.latency(), self._answer, done, result)

    def _answer(self, done: Deferred[None], result: Any) -> None:
        if not done.called:
            done.callback(result)
