"""The SQLite file: its schema, its connections, and the keys in it."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, date, datetime
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from twisted.enterprise import adbapi
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy.errors import StorageError
from llmproxy.expiry import expiry_time
from llmproxy.model import BUDGETS, MAX_BUDGET, NO_LIMITS, Account, OwnLimits
from llmproxy.storage import IAccounts
from llmproxy.storage.usage_days import keep_usage

#: How long a statement waits for another process's lock before it fails and is tried again.
BUSY_TIMEOUT_S = 1.0
#: How long a start tries to get at a file that others keep locked, and how often.
PREPARE_TIMEOUT_S = 3.0
PREPARE_RETRY_S = 0.02

FIND_KEY = f"""SELECT id, expires,
    (SELECT json_group_array(model) FROM key_model WHERE key_model.api_key = api_key.id),
    {", ".join(OwnLimits._fields)}
    FROM api_key LEFT JOIN key_limit ON key_limit.api_key = api_key.id
    WHERE secret = ? AND type = 'LLM'"""


#: As schema.sql has it.
BUDGET_COLUMN = f"""INTEGER CHECK ({{0}} IS NULL OR typeof({{0}}) = 'integer'
    AND {{0}} BETWEEN 0 AND {MAX_BUDGET})"""

# Not in schema.sql: an earlier version's ledger has the columns only after it.
HELD_ROWS = """CREATE INDEX IF NOT EXISTS ledger_held ON ledger(api_key)
    WHERE state = 'open' AND held_tokens IS NOT NULL"""

_TWO = [f"{each:02d}" for each in range(60)]

# Python 3.11's sqlite3 looks for a way to adapt each None as if it were an object of ours, which
# takes longer than to bind any other parameter. This is one, in C.
_ADAPTED: dict[None, None] = {None: None}
sqlite3.register_adapter(type(None), _ADAPTED.get)

NEW_JOURNAL = """INSERT INTO journal
    SELECT lower(hex(randomblob(8))), 0 WHERE NOT EXISTS (SELECT 1 FROM journal)"""


def configure(connection: sqlite3.Connection) -> None:
    """Make commits durable: WAL, with an fsync for each (https://www.sqlite.org/pragma.html).

    synchronous=NORMAL would lose the last commits when the power fails.
    """
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def migrate(connection: sqlite3.Connection) -> None:
    """Make the schema, or bring an earlier llmproxy's database up to it; nothing is lost."""
    configure(connection)
    try:
        connection.executescript(files("llmproxy").joinpath("schema.sql").read_text())
    except sqlite3.IntegrityError:
        _accept_old_duplicates(connection)
        connection.executescript(files("llmproxy").joinpath("schema.sql").read_text())
    for column in ("price", "held_tokens", "held_cost"):
        _add_column(connection, "ledger", column, "INTEGER")
    for column in BUDGETS:
        _add_column(connection, "key_limit", column, BUDGET_COLUMN.format(column))
    connection.execute(HELD_ROWS)
    if connection.execute("SELECT 1 FROM journal").fetchone() is None:  # else nothing is written
        connection.execute(NEW_JOURNAL)
    keep_usage(connection)


def _add_column(connection: sqlite3.Connection, table: str, column: str, kind: str) -> None:
    """Add what an earlier version's table lacks, once, whoever else is about to."""
    if _has_column(connection, table, column):
        return
    connection.execute("BEGIN IMMEDIATE")
    if not _has_column(connection, table, column):
        connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
    connection.execute("COMMIT")


def _has_column(connection: sqlite3.Connection, table: str, column: str) -> bool:
    return any(name == column for _, name, *_ in connection.execute(f"PRAGMA table_info({table})"))


def _accept_old_duplicates(connection: sqlite3.Connection) -> None:
    """The earlier llmproxy could bill twice; keep such rows as they are, and allow no new ones."""
    (last,) = connection.execute("SELECT max(id) FROM event_oneoff").fetchone()
    connection.execute(
        "CREATE UNIQUE INDEX IF NOT EXISTS event_oneoff_identity ON event_oneoff(rid, product) "
        f"WHERE id > {int(last)}"
    )


def connect(path: Path | str) -> sqlite3.Connection:
    """A connection with explicit transactions, for one thread at a time."""
    return sqlite3.connect(
        path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )


def make_file(path: Path) -> None:
    """Make an empty file for a database where there is none, closed to all but its user and group.

    SQLite's own would be open to whom the umask lets read. Its -wal and -shm get the same mode.
    """
    with contextlib.suppress(OSError):  # if it is there; else SQLite says why it can't be
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o660))


def prepare(path: Path) -> None:
    """Make and migrate the file. Raises StorageError with the file's name; blocks, so: at start."""
    deadline = time.monotonic() + PREPARE_TIMEOUT_S
    make_file(path)
    while True:
        try:
            _migrate_file(path)
            return
        except sqlite3.Error as error:
            # Of processes that start on one new file, all but one may be told so at once: SQLite
            # does not wait for a lock where it suspects a deadlock.
            if not _is_busy(error) or time.monotonic() > deadline:
                raise StorageError(f"database {path}: {error}") from error
            time.sleep(PREPARE_RETRY_S)


def journal_id(path: Path) -> str:
    """The name of a prepared file, by which other proxies know it for ever: 16 hex digits.

    Raises StorageError; blocks, so: at start.
    """
    connection = connect(path)
    try:
        name: str = connection.execute("SELECT id FROM journal").fetchone()[0]
    except sqlite3.Error as error:
        raise StorageError(f"database {path}: {error}") from error
    finally:
        connection.close()
    return name


def _migrate_file(path: Path) -> None:
    connection = connect(path)
    try:
        migrate(connection)
    finally:
        connection.close()


def _is_busy(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF == sqlite3.SQLITE_BUSY


class OneThreadPool(adbapi.ConnectionPool):
    """A pool of one thread, which takes its jobs from a queue of its own.

    adbapi hands each job through Twisted's thread pool, which costs as much as a small commit does
    without its fsync. Here one such job does all others, until the pool is closed.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, cp_min=1, cp_max=1, **options)
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._serving = False

    def runWithConnection(self, func: Any, *args: Any, **kw: Any) -> Any:
        """See the base class."""
        job = _Job(lambda connection: func(connection, *args, **kw))
        self._jobs.put(job)
        if not self._serving:
            self._serving = True
            super().runWithConnection(self._serve).addErrback(self._not_served)
        return job.done

    def runInteraction(self, interaction: Any, *args: Any, **kw: Any) -> Any:
        """See the base class."""
        return self.runWithConnection(lambda _: self._runInteraction(interaction, *args, **kw))

    def _serve(self, connection: Any) -> None:
        """Do jobs as they come. Runs in the thread."""
        while (job := self._jobs.get()) is not None:
            self._reactor.callFromThread(job.done.callback, job.result(connection))

    def _not_served(self, failure: Failure) -> None:
        """There is no connection: what waits fails, and the next job tries to get one."""
        self._serving = False
        waiting = [self._jobs.get() for _ in range(self._jobs.qsize())]
        for job in waiting:  # whoever is told may add the next one
            if job is not None:
                job.done.errback(failure)

    def finalClose(self) -> None:
        """See the base class, which waits for the thread to end."""
        self._jobs.put(None)
        super().finalClose()


class _Job:
    """What the thread has to do, and who waits for it."""

    __slots__ = ("_act", "done")

    def __init__(self, act: Callable[[Any], Any]) -> None:
        self.done: Deferred[Any] = Deferred()
        self._act = act

    def result(self, connection: Any) -> Any:
        """Do it. The result can be a Failure; then nothing is left of a transaction."""
        try:
            return self._act(connection)
        except BaseException:
            failure = Failure()
            connection.rollback()
            return failure


def make_pool(
    path: Path,
    reactor: Any,
    install: Callable[[sqlite3.Connection], None] = lambda connection: None,
) -> adbapi.ConnectionPool:
    """One thread with one connection to the file; SQLite has one writer anyway.

    `install`: what else a connection needs when it is opened.
    """

    def opened(connection: sqlite3.Connection) -> None:
        configure(connection)
        install(connection)

    return OneThreadPool(
        "sqlite3",
        str(path),
        timeout=BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
        cp_openfun=opened,
        cp_reactor=reactor,
        cp_name=f"sqlite {path}",
    )


@implementer(IAccounts)
class SQLiteAccounts:
    """Keys in the table `api_key`. One without an `id` can't be billed, and is none."""

    log = Logger()

    def __init__(self, pool: adbapi.ConnectionPool) -> None:
        self._pool = pool

    def find(self, secret_hash: str, now: datetime) -> Deferred[Account | None]:
        """See `IAccounts.find`. Dates are compared as time: many spellings are legal."""
        return Deferred.fromCoroutine(self._find(secret_hash, now))

    async def _find(self, secret_hash: str, now: datetime) -> Account | None:
        try:
            rows = await self._pool.runQuery(FIND_KEY, (secret_hash,))
        except sqlite3.Error as error:
            raise StorageError(f"key look-up: {error}") from error
        for key_id, expires, models, *limits in rows:
            if key_id is None:
                self.log.warn("keys: one has no id in api_key, and is refused")
                continue
            valid_until = expiry_time(expires)
            if valid_until is None or valid_until > now:
                named = frozenset(json.loads(models))
                own = OwnLimits(*limits)
                return Account(
                    key_id=key_id,
                    expires=valid_until,
                    models=named or None,
                    limits=None if own == NO_LIMITS else own,
                )
        return None


def to_text(moment: datetime) -> str:
    """How times are stored: ISO 8601 in UTC, so that text order is time order."""
    if moment.tzinfo is not UTC:
        moment = moment.astimezone(UTC)
    # As `isoformat` has it, in a third of its time.
    day, hour, minute = _day(moment.toordinal()), _TWO[moment.hour], _TWO[moment.minute]
    micro = str(1_000_000 + moment.microsecond)[1:]
    return f"{day}T{hour}:{minute}:{_TWO[moment.second]}.{micro}+00:00"


@lru_cache(8)
def _day(ordinal: int) -> str:
    return date.fromordinal(ordinal).isoformat()


def from_text(text: str) -> datetime:
    """The inverse of `to_text`."""
    return datetime.fromisoformat(text)
