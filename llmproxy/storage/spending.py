"""What keys with a budget have used, read from the ledger's file: its bill, and its open rows.

A row counts with what its requests have been given so far until it is closed, and from that very
commit on with what is on its bill. So each request is in the sums once, whoever closes its row.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import date
from typing import NamedTuple

from twisted.internet.defer import Deferred, fail
from zope.interface import implementer

from llmproxy.errors import StorageError
from llmproxy.model import MAX_COUNT, Amount, Counts, Spending, utcnow
from llmproxy.prices import PICO
from llmproxy.storage import ISpending, rows
from llmproxy.storage.journal import GroupCommit

#: How long sums of past days are believed: an operator may put an old row on the bill.
PAST_FRESH_S = 60.0
#: Of how many keys they are kept.
MOST_KEYS = 10_000

# total() is a float, which can't overflow, and exact up to 2**53.
_TOKENS = "{0}.prompt + {0}.completion + {0}.embedding"
_COST = " + ".join(
    f"{{0}}.{kind} * price.{kind}"
    for kind in ("prompt", "completion", "embedding", "transcription")
)
_OF_DAYS = f"""SELECT total({_TOKENS.format("usage_day")}), total({_COST.format("usage_day")})
    FROM usage_day LEFT JOIN price ON price.id = usage_day.price AND currency = :currency
    WHERE api_key = :key AND """
_BEFORE = _OF_DAYS + "day < :today"
_THIS_MONTH = _OF_DAYS + "day >= :month AND day < :today"
_TODAY = _OF_DAYS + "day = :today"
_IN_FLIGHT = f"""WITH used AS (
        SELECT rid, held_tokens, held_cost * {PICO} AS held, price,
            coalesce(prompt, 0) AS prompt, coalesce(completion, 0) AS completion,
            coalesce(embedding, 0) AS embedding, coalesce(transcription, 0) AS transcription
        FROM ledger WHERE state = 'open' AND held_tokens IS NOT NULL AND api_key = :key),
    flight AS (
        SELECT held_tokens, held, {_TOKENS.format("used")} AS tokens,
            coalesce({_COST.format("used")}, 0) AS cost
        FROM used LEFT JOIN price ON price.id = used.price AND currency = :currency)
    SELECT total(tokens), total(cost),
        total(max(held_tokens - tokens, 0)), total(max(held - cost, 0)) FROM flight"""


class _Past(NamedTuple):
    """What was used before `today`, in its month and ever; believed `until`."""

    today: date
    until: float
    month: Amount
    ever: Amount


@implementer(ISpending)
class SQLiteSpending:
    """See `ISpending`, for those who use one file. It reads in the ledger's own writer: what was
    committed before is in it. `currency`: the one that costs are in."""

    def __init__(
        self,
        writer: GroupCommit,
        currency: Callable[[], str],
        *,
        today: Callable[[], date] = lambda: utcnow().date(),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._writer = writer
        self._currency = currency
        self._today = today
        self._monotonic = monotonic
        self._past: OrderedDict[str, _Past] = OrderedDict()  # touched in the writer's thread only

    def of(self, key_id: str, running: Mapping[str, Counts]) -> Deferred[Spending]:
        """See `ISpending.of`."""
        if self._writer.hopeless:
            # Nothing is kept of it: an outage of hours must not fill the memory.
            return fail(StorageError("the ledger can't be written"))
        noted = [rows.checkpoint(rid, counts) for rid, counts in running.items()]
        found: list[Spending] = []

        def read(connection: sqlite3.Connection) -> None:
            rows.CHECKPOINT.write(connection, noted)
            found[:] = [self._read(connection, key_id)]

        return self._writer.write(read).addCallback(lambda _: found[0])

    def _read(self, connection: sqlite3.Connection, key_id: str) -> Spending:
        today = self._today()
        which = {
            "key": key_id,
            "currency": self._currency(),
            "today": str(today),
            "month": str(today.replace(day=1)),
        }
        past = self._before(connection, key_id, today, which)
        tokens, cost, *held = connection.execute(_IN_FLIGHT, which).fetchone()
        now = _sum(_amount(tokens, cost), _select(connection, _TODAY, which))
        connection.execute("UPDATE journal SET readings = readings + 1")
        (number,) = connection.execute("SELECT readings FROM journal").fetchone()
        return Spending(
            today, now, _sum(past.month, now), _sum(past.ever, now), _amount(*held), number
        )

    def _before(
        self, connection: sqlite3.Connection, key_id: str, today: date, which: Mapping[str, str]
    ) -> _Past:
        past, now = self._past.get(key_id), self._monotonic()
        if past is None or past.today != today or past.until < now:
            month = _select(connection, _THIS_MONTH, which)
            ever = _select(connection, _BEFORE, which)
            self._past[key_id] = past = _Past(today, now + PAST_FRESH_S, month, ever)
        self._past.move_to_end(key_id)
        if len(self._past) > MOST_KEYS:
            self._past.popitem(last=False)
        return past


def _select(connection: sqlite3.Connection, query: str, which: Mapping[str, str]) -> Amount:
    return _amount(*connection.execute(query, which).fetchone())


def _amount(tokens: float, pico: float) -> Amount:
    """An amount of what SQLite has added up."""
    return Amount(_whole(tokens), _whole(pico / PICO))


def _whole(number: float) -> int:
    return min(math.ceil(number), MAX_COUNT)


def _sum(one: Amount, other: Amount) -> Amount:
    return Amount(min(one.tokens + other.tokens, MAX_COUNT), min(one.cost + other.cost, MAX_COUNT))
