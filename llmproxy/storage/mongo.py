"""Accounts and the bill in MongoDB.

Two privileges are needed: `find` on `cgc.api_keys`, `insert` on `billing.events_oneoff`. Those that
`mongo_limits` has to have are used where keys have limits. This module leads to txmongo, which
takes the global reactor when it is imported; so import it only where a MongoDB is configured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from bson import json_util
from bson.datetime_ms import DatetimeMS
from bson.objectid import ObjectId
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

from llmproxy.errors import ConfigError, StorageError
from llmproxy.expiry import UNREADABLE
from llmproxy.model import LARGEST, Account, Event, OwnLimits, utcnow
from llmproxy.storage import IAccounts, IEventSink
from llmproxy.storage.mongo_limits import KeyDocuments, MongoShares, MongoSpending
from llmproxy.storage.mongo_pool import MongoPool
from llmproxy.storage.mongo_uri import KEY, MongoAddress, Resolver, parse, resolve, system_resolver
from llmproxy.storage.mongo_wire import Document, describe

FIND_TIMEOUT_S = 2.0
INSERT_TIMEOUT_S = 10.0
START_TIMEOUT_S = 5.0

KEYS = ("cgc", "api_keys")
EVENTS = ("billing", "events_oneoff")

_UNAUTHORIZED = 13
_DUPLICATE_KEY = 11000

_TAG = "ejson:"


def key_filter(secret_hash: str, now: datetime) -> Document:
    """The query for a key that is valid at `now`; `secret_hash` is 64 hex digits."""
    return {
        "access_level": "LLM",
        "secret": secret_hash,
        "$or": [{"date_expiry": {"$gt": now}}, {"date_expiry": None}],
    }


def event_id(event: Event) -> ObjectId:
    """The `_id` of an event's document: the same, however often the event is delivered.

    Seconds of `created` (4 bytes, big endian), then the first 8 bytes of
    SHA-256("REQUEST_ID/TYPE"), where TYPE is the last part of the product.
    """
    seconds = int(event.created.timestamp()) & 0xFFFFFFFF
    kind = event.product.rpartition("/")[2]
    digest = hashlib.sha256(f"{event.rid}/{kind}".encode()).digest()
    return ObjectId(seconds.to_bytes(4, "big") + digest[:8])


def event_document(event: Event) -> Document:
    """The document of one event in `billing.events_oneoff`."""
    return {
        "_id": event_id(event),
        "date_created": event.created,
        "user_id": bson_value(event.account.user_id),
        "api_key_id": event.account.key_id,
        "product": event.product,
        "quantity": event.quantity,
        "request_id": event.rid,
    }


def text_value(value: Any) -> str | None:
    """A BSON value as text that `bson_value` turns back into the same value of the same type.

    Strings stay as they are, null is None, everything else becomes canonical Extended JSON behind
    a tag. So an account's user id can lie in the journal, which knows only text.
    """
    if value is None or (isinstance(value, str) and not value.startswith(_TAG)):
        return value
    return _TAG + json_util.dumps(value, json_options=json_util.CANONICAL_JSON_OPTIONS)


def bson_value(text: str | None) -> Any:
    """The value that `text_value` made `text` of."""
    if text is None or not text.startswith(_TAG):
        return text
    try:
        tagged = text.removeprefix(_TAG)
        return json_util.loads(tagged, json_options=json_util.CANONICAL_JSON_OPTIONS)
    except (ValueError, TypeError):
        return text


def _end(date_expiry: Any) -> datetime | None:
    """When a key that is valid now ends; what Python has no date for is thousands of years away.

    The query finds an array too, if one of its members would do. That is no date: `UNREADABLE`.
    """
    if date_expiry is None or isinstance(date_expiry, DatetimeMS):
        return None
    return date_expiry if isinstance(date_expiry, datetime) else UNREADABLE


def _models(models: Any) -> frozenset[str] | None:
    """The models that a key is limited to; what is no list of texts opens none."""
    if models is None:
        return None
    listed = models if isinstance(models, list) else []
    return frozenset(each for each in listed if isinstance(each, str))


def _own_limits(limits: Any) -> OwnLimits | None:
    """A key's own limits. Raises ValueError: what is meant as a limit must not be passed over."""
    if limits is None:
        return None
    if not isinstance(limits, dict) or not limits.keys() <= set(OwnLimits._fields):
        raise ValueError(limits)
    return OwnLimits(**{name: _limit(name, value) for name, value in limits.items()})


def _limit(name: str, value: Any) -> int | None:
    if value is None:
        return None
    # Some of MongoDB's shells make doubles of all numbers.
    is_whole = (
        isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
    )
    if not is_whole or not 0 <= value <= getattr(LARGEST, name):
        raise ValueError(value)
    return int(value)


@implementer(IAccounts)
class MongoAccounts:
    """Keys in `cgc.api_keys`."""

    log = Logger()

    def __init__(self, pool: MongoPool) -> None:
        self._pool = pool

    def find(self, secret_hash: str, now: datetime) -> Deferred[Account | None]:
        """See `IAccounts`; answers or fails within 2 s."""
        return Deferred.fromCoroutine(self._find(secret_hash, now))

    async def _find(self, secret_hash: str, now: datetime) -> Account | None:
        reply = await self.query(secret_hash, now)
        if not reply.get("ok"):
            raise StorageError(f"find in {'.'.join(KEYS)}: {describe(reply)}")
        try:
            found = reply["cursor"]["firstBatch"]
            if found == []:
                return None
            key = found[0]
            user_id, expires = text_value(key.get("user_id")), _end(key.get("date_expiry"))
            if expires is not None and expires <= now:
                return None
            key_id = str(key["_id"])
            try:
                limits = _own_limits(key.get("limits"))
            except ValueError:
                self.log.warn(
                    "keys: {key_id} has limits that are none, and is refused", key_id=key_id
                )
                return None
            return Account(key_id, user_id, expires, _models(key.get("models")), limits)
        except (LookupError, TypeError, AttributeError) as error:
            raise StorageError(f"find in {'.'.join(KEYS)}: a reply without a result") from error

    async def query(self, secret_hash: str, now: datetime) -> Document:
        """The server's own reply to the query, errors too."""
        database, collection = KEYS
        command: Document = {
            "find": collection,
            "filter": key_filter(secret_hash, now),
            "projection": {"user_id": 1, "date_expiry": 1, "models": 1, "limits": 1},
            "limit": 1,
            "singleBatch": True,
            "maxTimeMS": int(FIND_TIMEOUT_S * 1000),
        }
        if self._pool.read_concern is not None:
            command["readConcern"] = {"level": self._pool.read_concern}
        return await self._pool.ask(database, command, timeout_s=FIND_TIMEOUT_S)


@implementer(IEventSink)
class MongoEvents:
    """The bill in `billing.events_oneoff`."""

    def __init__(self, pool: MongoPool) -> None:
        self._pool = pool

    def deliver(self, events: Sequence[Event]) -> Deferred[None]:
        """See `IEventSink`; answers or fails within 10 s."""
        return Deferred.fromCoroutine(self._deliver(events))

    async def _deliver(self, events: Sequence[Event]) -> None:
        if events:
            raise_unless_stored(await self.insert([event_document(event) for event in events]))

    async def insert(self, documents: Sequence[Document]) -> Document:
        """The server's own reply to an unordered insert, errors too."""
        database, collection = EVENTS
        command = {"insert": collection, "ordered": False}
        return await self._pool.write(database, command, documents, timeout_s=INSERT_TIMEOUT_S)


def raise_unless_stored(reply: Mapping[str, Any]) -> None:
    """Raise `StorageError` unless an insert's reply says that all documents are there to stay.

    A duplicate `_id` is a document that an earlier try has stored. It counts only together with the
    write concern, for which the server waits in that case too: what an earlier try wrote may not
    have reached the majority.
    """
    where = ".".join(EVENTS)
    if not reply.get("ok"):
        raise StorageError(f"insert into {where}: {describe(reply)}")
    if concern := reply.get("writeConcernError"):
        raise StorageError(f"insert into {where}: write concern: {describe(concern)}")
    for error in reply.get("writeErrors", ()):
        # An operator's own unique index is no proof that this very document is there.
        if error.get("code") != _DUPLICATE_KEY or error.get("keyPattern", {"_id": 1}) != {"_id": 1}:
            raise StorageError(f"insert into {where}: {describe(error)}")


class MongoStore:
    """The stores of one deployment, `accounts`, `events`, `spending` and `shares`, from `start()`
    to `close()`."""

    def __init__(
        self, reactor: IReactorTime, address: MongoAddress, resolver: Resolver | None = None
    ) -> None:
        self._reactor = reactor
        self._address = address
        self._resolver = resolver
        self.pool = MongoPool(reactor, address)
        self.accounts = MongoAccounts(self.pool)
        self.events = MongoEvents(self.pool)
        documents = KeyDocuments(self.pool, reactor)
        self.spending = MongoSpending(documents)
        self.shares = MongoShares(documents)

    @property
    def connected(self) -> bool:
        """Whether the primary can be reached now."""
        return self.pool.connected

    def start(self, timeout_s: float = START_TIMEOUT_S) -> Deferred[None]:
        """Connect, and make sure that both privileges are there; writes nothing. Those for limits
        are not tried: whether any key will have some is not known.

        Fails with `ConfigError` where the server refuses us, with `StorageError` where it does not
        answer in time; everything is closed then. Later outages are waited out.
        """
        return Deferred.fromCoroutine(self._start(timeout_s))

    def close(self) -> Deferred[None]:
        """Close the connections; fires when they are gone."""
        return Deferred.fromCoroutine(self.pool.close())

    async def _start(self, timeout_s: float) -> None:
        try:
            await self._resolve()
            await self.pool.start(timeout_s)
            await self._try_privileges()
        except BaseException:
            await self.pool.close()
            raise

    async def _resolve(self) -> None:
        if self._address.srv_name is not None:
            resolver = self._resolver or system_resolver(self._reactor)
            self._address = await resolve(self._address, resolver)
            self.pool.set_address(self._address)

    async def _try_privileges(self) -> None:
        reply = await self.accounts.query("0" * 64, utcnow())
        _check_privilege(reply, "find", KEYS, "apiKeysReader")
        # The server checks the privilege before the document, and stores none with such an _id.
        reply = await self.events.insert([{"_id": []}])
        _check_privilege(reply, "insert", EVENTS, "completionBillingWriter")


def _check_privilege(
    reply: Mapping[str, Any], action: str, where: tuple[str, str], role: str
) -> None:
    if reply.get("code") == _UNAUTHORIZED:
        raise ConfigError(
            f"{KEY}: MongoDB does not let us {action} in {'.'.join(where)}: the user needs the role"
            f" {role!r} of the database {where[0]!r}"
        )
    if not reply.get("ok"):
        raise StorageError(f"{action} in {'.'.join(where)}: {describe(reply)}")


def connect(uri: str, reactor: IReactorTime, resolver: Resolver | None = None) -> MongoStore:
    """The store that a connection string names; `start()` it before use.

    `reactor` makes the connections and tells the time; `resolver` answers SRV and TXT questions
    (None: the system's name servers, asked by `twisted.names`). Raises `ConfigError`.
    """
    return MongoStore(reactor, parse(uri), resolver)
