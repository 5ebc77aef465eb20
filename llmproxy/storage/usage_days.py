"""What each key has used, by day, model and price: sums that the ledger's file keeps by itself.

A trigger in the file adds a row of the ledger to its day when it comes onto the bill, whoever
closes it: a proxy, also one of an earlier version, a recovery, or the operator. It is part of the
same commit, so a request is in the sums exactly if it is billed, and once.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any

from twisted.enterprise.adbapi import ConnectionPool
from twisted.internet.defer import Deferred, fail
from twisted.internet.defer import TimeoutError as DeferTimeoutError
from twisted.internet.interfaces import IReactorTime
from zope.interface import implementer

from llmproxy.errors import StorageError
from llmproxy.model import BILLED, MAX_COUNT, Kind, Price, Used
from llmproxy.storage import IUsage

#: How long a read may take, and how many may wait for their turn.
READ_TIMEOUT_S = 2.0
MOST_READS = 100
#: SQLite's sum() fails beyond 64 bits, so it sums multiples of this and remainders.
BASE = 10**9

_BILLED = ", ".join(sorted(f"'{state}'" for state in BILLED))

# SQLite makes a float of an integer that is too large: so sums end at the largest one. The key
# begins with the day, so that what is written today lies together.
_MORE = ", ".join(f"{k} = min({k}, {MAX_COUNT} - excluded.{k}) + excluded.{k}" for k in Kind)
TRIGGER = f"""CREATE TRIGGER usage_row AFTER UPDATE OF state ON ledger
WHEN new.state IN ({_BILLED}) AND old.state NOT IN ({_BILLED}) BEGIN
    INSERT INTO usage_day VALUES (substr(coalesce(new.finished, new.opened), 1, 10), new.api_key,
        new.model, coalesce(new.price, 0), 1, {", ".join(f"coalesce(new.{k}, 0)" for k in Kind)})
    ON CONFLICT DO UPDATE SET requests = requests + 1, {_MORE};
END"""
HAS_TRIGGER = "SELECT 1 FROM sqlite_schema WHERE type = 'trigger' AND name = 'usage_row'"
_SUMS = ", ".join(
    f"min(sum({count} / {BASE}), ({MAX_COUNT} - sum({count} % {BASE})) / {BASE}) * {BASE}"
    f" + sum({count} % {BASE})"
    for count in (f"coalesce({kind}, 0)" for kind in Kind)
)
FILL = f"""INSERT INTO usage_day
    SELECT substr(coalesce(finished, opened), 1, 10), api_key, model, coalesce(price, 0), count(*),
        {_SUMS}
    FROM ledger WHERE state IN ({_BILLED}) GROUP BY 1, 2, 3, 4"""
READ = f"""SELECT day, model, requests, {", ".join(f"usage_day.{kind}" for kind in Kind)},
        price.id, currency, {", ".join(f"price.{kind}" for kind in Kind)}
    FROM usage_day LEFT JOIN price ON price.id = usage_day.price
    WHERE day IN (SELECT value FROM json_each(?)) AND api_key = ? ORDER BY 1, 2, price.id"""


def keep_usage(connection: sqlite3.Connection) -> None:
    """Let the file keep the sums from now on, and add up what is in its ledger; once for a file.

    That the trigger is there tells that this is done: no row can be closed between the two.
    """
    if _is_kept(connection):
        return
    connection.execute("BEGIN IMMEDIATE")
    if not _is_kept(connection):
        connection.execute("DELETE FROM usage_day")
        connection.execute(FILL)
        connection.execute(TRIGGER)
    connection.execute("COMMIT")


def _is_kept(connection: sqlite3.Connection) -> bool:
    return connection.execute(HAS_TRIGGER).fetchone() is not None


@implementer(IUsage)
class SQLiteUsage:
    """The sums in a SQLite file, read on a connection of their own: a long read is in nobody's way.

    A key has one read at a time, so that one of them can't keep the others waiting.
    """

    def __init__(self, pool: ConnectionPool, clock: IReactorTime) -> None:
        self._pool = pool
        self._clock = clock
        self._reading: set[str] = set()

    def of(self, key_id: str, since: date, until: date) -> Deferred[Sequence[Used]]:
        """See `IUsage.of`."""
        if key_id in self._reading or len(self._reading) >= MOST_READS:
            return fail(StorageError("another read is not done"))
        self._reading.add(key_id)
        days = [str(since + timedelta(n)) for n in range((until - since).days)]
        read = self._pool.runQuery(READ, (json.dumps(days), key_id))
        read.addBoth(self._done, key_id)
        answer: Deferred[Sequence[Used]] = Deferred()
        read.addCallback(_used).addCallbacks(answer.callback, answer.errback)
        # The read goes on when nobody waits for it any more, and takes its key's turn.
        return answer.addTimeout(READ_TIMEOUT_S, self._clock).addErrback(_failed)

    def _done(self, result: Any, key_id: str) -> Any:
        self._reading.discard(key_id)
        return result


def _used(rows: Sequence[Any]) -> list[Used]:
    return [_from_row(*row) for row in rows]


def _from_row(day: str, model: str, requests: int, *rest: Any) -> Used:
    counts, price = rest[: len(Kind)], rest[len(Kind) :]
    counted = dict(zip(Kind, counts, strict=True))
    return Used(day, model, requests, counted, Price(*price) if price[0] is not None else None)


def _failed(failure: Any) -> Any:
    failure.trap(sqlite3.Error, DeferTimeoutError)
    raise StorageError(f"usage: {failure.value}") from failure.value
