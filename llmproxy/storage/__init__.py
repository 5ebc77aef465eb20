"""What the proxy needs of its stores. `memory`, `sqlite` and `mongo` implement it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime

from twisted.internet.defer import Deferred
from zope.interface import Interface

from llmproxy.model import (
    Account,
    Attempt,
    Counts,
    Entry,
    Event,
    Price,
    Settlement,
    Share,
    Spending,
    Used,
)


class IAccounts(Interface):
    """Where keys are looked up."""

    def find(secret_hash: str, now: datetime) -> Deferred[Account | None]:
        """The account of the key with this hash (64 hex digits) that is valid at `now`.

        None: there is no such key. Fails with `StorageError` when that can't be known.
        """


class ILedger(Interface):
    """One row per request that is sent to a backend."""

    def know(prices: Iterable[Price]) -> Deferred[None]:
        """Write down prices that the entries of rows will have. To be called before `open`."""

    def open(entry: Entry) -> Deferred[None]:
        """Write the row, durably. Fails with `StorageError` when that could not be made sure.

        A row whose opening failed is closed with no charge as soon as the store allows it.
        """

    def checkpoint(running: Mapping[str, Counts]) -> Deferred[None]:
        """Write the running counts of open rows, by request id: what a crash leaves behind."""

    def note(attempt: Attempt) -> Deferred[None]:
        """Write down who was asked for a row. Nobody needs to wait for it."""

    def settle(entry: Entry, settlement: Settlement) -> Deferred[None]:
        """Close the row and put its events on the bill, durably, in one transaction.

        Never fails: it is retried until it is there. Settling again changes nothing.
        """


class IUsage(Interface):
    """What keys have used, in sums of what is on the bill."""

    def of(key_id: str, since: date, until: date) -> Deferred[Sequence[Used]]:
        """What a key has used from `since` to the day before `until`, by day, model and price.

        Fails with `StorageError` when that can't be known now: also while another read for the
        same key has not ended.
        """


class ISpending(Interface):
    """What keys with a budget have used: on the bill, and by requests in flight; by all proxies."""

    def of(key_id: str, running: Mapping[str, Counts]) -> Deferred[Spending]:
        """Write the running counts of this process's open rows of a key, and say what it has used.

        Fails with `StorageError` when that can't be known now.
        """


class IShares(Interface):
    """What all processes share of the rates of keys."""

    def change(key_id: str, change: Callable[[Share], Share]) -> Deferred[Share]:
        """Put what `change` makes of a key's share in its place, in one transaction; the result.

        `change` is pure, and may be called again. A key that has none has `Share()`. Fails with
        `StorageError`, and then the effect is unknown.
        """


class IEventSink(Interface):
    """Where the events of closed rows are delivered, when that is not the ledger's own store."""

    def deliver(events: Sequence[Event]) -> Deferred[None]:
        """Store all `events`; one that is there already is success.

        Fails with `StorageError` when it is not sure that all are stored; the caller repeats.
        """


class IOutbox(Interface):
    """The closed rows whose events still have to reach the sink; kept by the local journal."""

    def undelivered(limit: int) -> Deferred[Sequence[Event]]:
        """The events of the first `limit` rows that are settled or estimated and not delivered.

        Rows that finished first come first, and all events of a row come together. Rows that put
        nothing on the bill never show up and take none of the `limit`. Fails with `StorageError`.
        """

    def mark_delivered(rids: Sequence[str]) -> Deferred[None]:
        """Note, durably, that the events of these rows are stored. Fails with `StorageError`."""

    def backlog() -> Deferred[tuple[int, float]]:
        """How many rows wait, and how many seconds ago the oldest one finished (0.0: none waits).

        The number can have a bound, beyond which it says only that there are so many or more.

        Fails with `StorageError`.
        """
