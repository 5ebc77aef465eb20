"""Stores in memory: for tests and simulations, with the same promises but durability.

A `MemoryStore` is what survives: give the same one to a second `MemoryLedger`, and that is the
next process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from twisted.internet.defer import Deferred, succeed
from zope.interface import implementer

from llmproxy.model import (
    Account,
    Attempt,
    Counts,
    Entry,
    Event,
    Price,
    Settlement,
    Share,
    State,
    events,
    utcnow,
)
from llmproxy.storage import IAccounts, ILedger, IOutbox, IShares


class Living(Protocol):
    """Who we are, and who is no more: see `owners.Owners`."""

    me: str

    def is_dead(self, owner: str) -> bool: ...


@dataclass
class Row:
    """A ledger row. `settlement`: None while it is open."""

    entry: Entry
    owner: str
    running: Counts = field(default_factory=dict)
    settlement: Settlement | None = None
    delivered: bool = False

    @property
    def state(self) -> State:
        """What is known of its bill."""
        return State.OPEN if self.settlement is None else self.settlement.state

    @property
    def waits(self) -> bool:
        """True if its events have still to be delivered."""
        return self.state in (State.SETTLED, State.ESTIMATED) and not self.delivered

    def events(self) -> tuple[Event, ...]:
        """What it puts on the bill."""
        return () if self.settlement is None else events(self.entry, self.settlement)


@dataclass
class MemoryStore:
    """The rows by request id, and the bill by the identity of its events."""

    rows: dict[str, Row] = field(default_factory=dict)
    bill: dict[tuple[str, str], Event] = field(default_factory=dict)
    attempts: dict[tuple[str, int], Attempt] = field(default_factory=dict)

    def add_events(self, due: Iterable[Event]) -> None:
        """Put events on the bill; those that are there already stay as they are."""
        for event in due:
            self.bill.setdefault((event.rid, event.product), event)


@implementer(IAccounts)
class MemoryAccounts:
    """Keys in a dict, by their hash; an account's `expires` ends its key."""

    def __init__(self, accounts: Mapping[str, Account]) -> None:
        self.accounts = dict(accounts)

    def find(self, secret_hash: str, now: datetime) -> Deferred[Account | None]:
        """See `IAccounts.find`."""
        account = self.accounts.get(secret_hash)
        expired = account is not None and account.expires is not None and account.expires <= now
        return succeed(None if expired else account)


@implementer(ILedger, IOutbox)
class MemoryLedger:
    """Rows in a `MemoryStore`. `bills_here`: their events are put on the store's bill too."""

    def __init__(self, store: MemoryStore, owners: Living, *, bills_here: bool) -> None:
        self._store = store
        self._owners = owners
        self._bills_here = bills_here

    def know(self, prices: Iterable[Price]) -> Deferred[None]:
        """See `ILedger.know`. Rows keep their entries, prices and all."""
        return succeed(None)

    def open(self, entry: Entry) -> Deferred[None]:
        """See `ILedger.open`."""
        self._store.rows.setdefault(entry.rid, Row(entry, self._owners.me))
        return succeed(None)

    def checkpoint(self, running: Mapping[str, Counts]) -> Deferred[None]:
        """See `ILedger.checkpoint`."""
        for rid, counts in running.items():
            row = self._store.rows.get(rid)
            if row is not None and row.state is State.OPEN:
                row.running = dict(counts)
        return succeed(None)

    def note(self, attempt: Attempt) -> Deferred[None]:
        """See `ILedger.note`."""
        self._store.attempts[attempt.rid, attempt.number] = attempt
        return succeed(None)

    def settle(self, entry: Entry, settlement: Settlement) -> Deferred[None]:
        """See `ILedger.settle`."""
        row = self._store.rows.get(entry.rid)
        if row is not None and row.state in (State.OPEN, State.ORPHAN):
            self._close(row, settlement)
        return succeed(None)

    def _close(self, row: Row, settlement: Settlement) -> None:
        row.settlement = settlement
        nothing_due = settlement.state is State.SETTLED and not row.events()
        row.delivered = self._bills_here or nothing_due
        if self._bills_here:
            self._store.add_events(row.events())

    def recover(self) -> Deferred[dict[State, int]]:
        """Close the rows that dead processes left open; the result counts them by state."""
        found: dict[State, int] = {}
        for row in self._store.rows.values():
            if row.state is State.OPEN and self._owners.is_dead(row.owner):
                state = State.ESTIMATED if row.running else State.ORPHAN
                closing = Settlement(
                    state=state, outcome=None, counts=row.running, finished=utcnow()
                )
                self._close(row, closing)
                found[state] = found.get(state, 0) + 1
        return succeed(found)

    def undelivered(self, limit: int) -> Deferred[Sequence[Event]]:
        """See `IOutbox.undelivered`."""
        first = self._waiting()[:limit]
        return succeed([event for row in first for event in row.events()])

    def mark_delivered(self, rids: Sequence[str]) -> Deferred[None]:
        """See `IOutbox.mark_delivered`."""
        for rid in rids:
            if rid in self._store.rows:
                self._store.rows[rid].delivered = True
        return succeed(None)

    def backlog(self) -> Deferred[tuple[int, float]]:
        """See `IOutbox.backlog`."""
        waiting = self._waiting()
        if not waiting:
            return succeed((0, 0.0))
        age_s = (utcnow() - _finished(waiting[0])).total_seconds()
        return succeed((len(waiting), max(age_s, 0.0)))

    def _waiting(self) -> list[Row]:
        waiting = [row for row in self._store.rows.values() if row.waits]
        return sorted(waiting, key=lambda row: (_finished(row), row.entry.rid))


def _finished(row: Row) -> datetime:
    return row.entry.opened if row.settlement is None else row.settlement.finished


@implementer(IShares)
class MemoryShares:
    """Shares in a dict."""

    def __init__(self) -> None:
        self.shares: dict[str, Share] = {}

    def change(self, key_id: str, change: Callable[[Share], Share]) -> Deferred[Share]:
        """See `IShares.change`."""
        self.shares[key_id] = share = change(self.shares.get(key_id, Share()))
        return succeed(share)
