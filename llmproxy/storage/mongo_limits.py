"""What several proxies share about keys with limits: the collection `llmproxy.limits`.

A document for each key; its `_id` is the key's id as text. Of two parts each is independent of the
other. `spent` has a field for each journal, with what this has of the key: sums, which are the same
however often they are put there. `share`, and `version` with it, is what all processes have in
common; who changes it says which version was seen, and begins again where another one is there.
"""

from __future__ import annotations

import random
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from datetime import date, timedelta
from typing import Any, NamedTuple

from bson import Int64
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from zope.interface import implementer

from llmproxy.errors import StorageError
from llmproxy.model import MAX_COUNT, Amount, Claim, Share, Spending
from llmproxy.storage import IShares
from llmproxy.storage.mongo_pool import MongoPool
from llmproxy.storage.mongo_wire import Document, describe

LIMITS = ("llmproxy", "limits")
ROLE = "limitsWriter"

TIMEOUT_S = 1.0
#: What requests in flight may still take counts for as long as their journal is heard of.
SILENCE = timedelta(seconds=60)
#: How often a new document is tried, when others make it in the same moment.
TRIES = 5
#: Of how many keys it is remembered what was there last.
MOST_KEYS = 10_000
#: How long a process leaves a share to others after a change of its own, at most.
LONGEST_PAUSE_S = 0.1

_UNAUTHORIZED = 13
_DUPLICATE_KEY = 11000


class KeyDocuments:
    """The documents of `llmproxy.limits`."""

    def __init__(self, pool: MongoPool, clock: IReactorTime) -> None:
        self._pool = pool
        self.clock = clock

    async def update(self, key_id: str, values: Mapping[str, Any], deadline: float) -> Document:
        """Set fields of a key's document, which is made if it is missing, to these expressions.

        Returns the whole document. The update may be carried out twice. Raises StorageError, by
        `deadline` (of `clock`) at the latest; then it is not known whether it was carried out.
        """
        database, collection = LIMITS
        command: Document = {
            "findAndModify": collection,
            "query": {"_id": key_id},
            "update": [{"$set": dict(values)}],
            "upsert": True,
            "new": True,
            # Nobody waits for the other members. If the last writes are lost with a primary, sums
            # are put there again with the next update, and slices of a moment are given out twice.
            "writeConcern": {"w": 1},
        }
        for _ in range(TRIES):
            left_s = max(deadline - self.clock.seconds(), 0.001)
            command["maxTimeMS"] = int(left_s * 1000)
            reply = await self._pool.ask(database, command, timeout_s=left_s)
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


def _not_ours(part: str) -> StorageError:
    return StorageError(f"{'.'.join(LIMITS)}: `{part}` of a key is not as we make it")


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
        deadline = self._documents.clock.seconds() + TIMEOUT_S
        document = await self._documents.update(key_id, values, deadline)
        try:
            return _sum(document["spent"], journal, mine)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise _not_ours("spent") from error


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


class _Seen(NamedTuple):
    """A key's share as it was, and its version; 0: there was none. `pause_until`: when its next
    change may begin."""

    version: int = 0
    share: Share = Share()
    pause_until: float = 0.0


@implementer(IShares)
class MongoShares:
    """See `IShares`."""

    def __init__(self, documents: KeyDocuments) -> None:
        self._documents = documents
        self._seen: OrderedDict[str, _Seen] = OrderedDict()

    def change(self, key_id: str, change: Callable[[Share], Share]) -> Deferred[Share]:
        """See `IShares.change`; answers or fails within a second.

        After a failure it is not known whether the change was made. So what was given back in it
        is gone for whoever did so, and what was taken in it is not there: the key has a slice less
        until its buckets have filled up again, and never one too much.
        """
        return Deferred.fromCoroutine(self._change(key_id, change))

    async def _change(self, key_id: str, change: Callable[[Share], Share]) -> Share:
        clock = self._documents.clock
        deadline = clock.seconds() + TIMEOUT_S
        await self._pause(key_id)
        began, seen = clock.seconds(), self._seen.get(key_id, _Seen())
        while clock.seconds() < deadline:
            # Not counted: where a primary's last writes were lost, or a document was removed, two
            # different shares would have the same number.
            new = _Seen(secrets.randbits(62) + 1, change(seen.share))
            found = await self._swap(key_id, seen.version, new, deadline)
            # Who was first has the newest version first, and would be first for ever.
            pause_s = min(random.uniform(0, 2) * (clock.seconds() - began), LONGEST_PAUSE_S)
            self._remember(key_id, found._replace(pause_until=clock.seconds() + pause_s))
            if found.version == new.version:  # also if it was carried out twice
                return new.share
            seen = found
        raise StorageError(f"{'.'.join(LIMITS)}: too many change the share of one key at once")

    async def _pause(self, key_id: str) -> None:
        seen, now = self._seen.get(key_id), self._documents.clock.seconds()
        if seen is not None and seen.pause_until > now:
            await deferLater(self._documents.clock, seen.pause_until - now)

    async def _swap(self, key_id: str, version: int, new: _Seen, deadline: float) -> _Seen:
        """Put the new one in the place of that version; what is there then, in either case."""
        as_seen = {"$eq": [{"$ifNull": ["$version", 0]}, version]}
        values = {
            "version": {"$cond": [as_seen, Int64(new.version), "$version"]},
            "share": {"$cond": [as_seen, {"$literal": _share_document(new.share)}, "$share"]},
        }
        document = await self._documents.update(key_id, values, deadline)
        try:
            if "version" not in document:
                return _Seen()
            return _Seen(int(document["version"]), _share(document["share"]))
        except (LookupError, TypeError, ValueError) as error:
            raise _not_ours("share") from error

    def _remember(self, key_id: str, seen: _Seen) -> None:
        self._seen[key_id] = seen
        self._seen.move_to_end(key_id)
        if len(self._seen) > MOST_KEYS:
            self._seen.popitem(last=False)


def _share_document(share: Share) -> Document:
    # A process's id may have dots in it, which a field's name must not.
    claims = [[name, Int64(claim.slots), claim.until] for name, claim in share.claims.items()]
    return {
        "requests_full_at": share.requests_full_at,
        "tokens_full_at": share.tokens_full_at,
        "claims": claims,
    }


def _share(document: Mapping[str, Any]) -> Share:
    """Raises LookupError, TypeError, ValueError."""
    return Share(
        float(document["requests_full_at"]),
        float(document["tokens_full_at"]),
        {name: Claim(int(slots), float(until)) for name, slots, until in document["claims"]},
    )
