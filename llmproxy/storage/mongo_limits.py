"""What several proxies share about keys with limits: the collection `llmproxy.limits`.

A document for each key; its `_id` is the key's id as text. Its part `spent` has a field for each
journal, with what this has of the key: sums, which are the same however often they are put there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date, timedelta
from typing import Any

from bson import Int64
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from llmproxy.errors import StorageError
from llmproxy.model import MAX_COUNT, Amount, Spending
from llmproxy.storage.mongo_pool import MongoPool
from llmproxy.storage.mongo_wire import Document, describe

LIMITS = ("llmproxy", "limits")
ROLE = "limitsWriter"

TIMEOUT_S = 1.0
#: What requests in flight may still take counts for as long as their journal is heard of.
SILENCE = timedelta(seconds=60)
#: How often a new document is tried, when others make it in the same moment.
TRIES = 5

_UNAUTHORIZED = 13
_DUPLICATE_KEY = 11000


class KeyDocuments:
    """The documents of `llmproxy.limits`."""

    def __init__(self, pool: MongoPool, reactor: IReactorTime) -> None:
        self._pool = pool
        self._reactor = reactor

    def deadline(self) -> float:
        """When what begins now has to be done."""
        return self._reactor.seconds() + TIMEOUT_S

    async def update(self, key_id: str, values: Mapping[str, Any], deadline: float) -> Document:
        """Set fields of a key's document, which is made if it is missing, to these expressions.

        Returns the whole document. The update may be carried out twice, and if this fails, it is
        not known whether it was. Raises StorageError.
        """
        database, collection = LIMITS
        command: Document = {
            "findAndModify": collection,
            "query": {"_id": key_id},
            "update": [{"$set": dict(values)}],
            "upsert": True,
            "new": True,
            # Nobody waits for the other members: what is lost with a primary is put there again
            # with the next update, and one that is cut off has to be outlived in any case.
            "writeConcern": {"w": 1},
        }
        for _ in range(TRIES):
            left = max(deadline - self._reactor.seconds(), 0.001)
            command["maxTimeMS"] = max(int(left * 1000), 1)
            reply = await self._pool.ask(database, command, timeout_s=left)
            if reply.get("code") != _DUPLICATE_KEY:
                break
        return _document(reply)


def _document(reply: Mapping[str, Any]) -> Document:
    where = ".".join(LIMITS)
    if reply.get("code") == _UNAUTHORIZED:
        raise StorageError(
            f"MongoDB does not let us find, insert and update in {where}: the user needs the role"
            f" {ROLE!r} of the database {LIMITS[0]!r}"
        )
    if not reply.get("ok") or not isinstance(reply.get("value"), dict):
        raise StorageError(f"update in {where}: {describe(reply)}")
    value: Document = reply["value"]
    return value


class MongoSpending:
    """What the keys with a budget have used at all proxies, each of which has a journal."""

    def __init__(self, documents: KeyDocuments) -> None:
        self._documents = documents

    def exchange(self, key_id: str, journal: str, mine: Spending) -> Deferred[Spending]:
        """Publish what `journal` (16 hex digits) has of a key; returns the sum of all journals.

        Fails with `StorageError`, within a second.
        """
        return Deferred.fromCoroutine(self._exchange(key_id, journal, mine))

    async def _exchange(self, key_id: str, journal: str, mine: Spending) -> Spending:
        field = f"spent.{journal}"
        published = {"$mergeObjects": [{"$literal": _totals(mine)}, {"at": "$$NOW"}]}
        # Of two processes with one journal the one that has read first may be the last to publish.
        # A higher number that nobody renews is from before the file was put back from a backup.
        replaces = {
            "$or": [
                {"$gte": [Int64(mine.number), {"$ifNull": [f"${field}.number", Int64(-1)]}]},
                {"$lt": [f"${field}.at", {"$subtract": ["$$NOW", _milliseconds(SILENCE)]}]},
            ]
        }
        values = {field: {"$cond": [replaces, published, f"${field}"]}}
        document = await self._documents.update(key_id, values, self._documents.deadline())
        try:
            return _sum(document["spent"], journal, mine)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            where = ".".join(LIMITS)
            raise StorageError(f"{where}: `spent` of a key is not as we make it") from error


def _milliseconds(time: timedelta) -> int:
    return time // timedelta(milliseconds=1)


def _month(today: date) -> str:
    return str(today)[:7]


def _totals(mine: Spending) -> Document:
    return {
        "number": Int64(mine.number),
        "day": [str(mine.today), *_longs(mine.day)],
        "month": [_month(mine.today), *_longs(mine.month)],
        "ever": _longs(mine.ever),
        "held": _longs(mine.held),
    }


def _longs(amount: Amount) -> list[Int64]:
    return [Int64(amount.tokens), Int64(amount.cost)]


def _sum(spent: Mapping[str, Any], journal: str, mine: Spending) -> Spending:
    """All journals' totals for `mine.today`. Raises LookupError, TypeError, ValueError,
    AttributeError."""
    today, month = str(mine.today), _month(mine.today)
    heard_of = spent[journal]["at"] - SILENCE
    journals = spent.values()
    return mine._replace(
        day=_add(each["day"][1:] for each in journals if each["day"][0] == today),
        month=_add(each["month"][1:] for each in journals if each["month"][0] == month),
        ever=_add(each["ever"] for each in journals),
        held=_add(each["held"] for each in journals if each["at"] >= heard_of),
    )


def _add(pairs: Iterable[Iterable[int]]) -> Amount:
    tokens = cost = 0
    for more_tokens, more_cost in pairs:
        tokens, cost = min(tokens + more_tokens, MAX_COUNT), min(cost + more_cost, MAX_COUNT)
    return Amount(tokens, cost)
