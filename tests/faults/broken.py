"""The proxy with a planted fault: the experiments must notice it.

    python broken.py FAULT -c config.toml      the process
    plant(FAULT, monkeypatch.setattr)          in this one

bill-after-release: the client gets the end of its answer, and then the bill is committed (20 ms
  later, so that not hundreds of kills are needed to see it).
bill-at-the-end: no row is written before the request is sent, only one at its end.
bill-again: a bill that is repeated gets a new identity.
synchronous-normal: a commit waits for no fsync.
drop-on-disconnect: who leaves gets no bill.
running-count-on-disconnect: who leaves is billed for the events that it was sent.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import deferLater

from llmproxy import billing
from llmproxy.exchange import Exchange
from llmproxy.forward import Ending, Forward
from llmproxy.model import Entry, Kind, Outcome, Settlement, events, utcnow
from llmproxy.storage import journal, rows, sqlite

SetAttribute = Callable[[Any, str, Any], object]


def bill_after_release(set_attribute: SetAttribute) -> None:
    async def serve(self: Any) -> None:
        account = await self._authenticate()
        self._admitted = await self._admission.admit(account)
        model = self._admitted.model
        entry = self._entry(account, model.backend)
        await self._open(entry)
        ending = await self._send(entry, model)
        self._release(ending)
        await deferLater(self._services.clock, 0.02)
        await self._settle(entry, ending)

    set_attribute(Exchange, "_serve", serve)


def bill_at_the_end(set_attribute: SetAttribute) -> None:
    def opened(self: Any, entry: Entry) -> Deferred[None]:
        return succeed(None)

    def settle(self: Any, entry: Entry, settlement: Settlement) -> Deferred[None]:
        def write(connection: Any) -> None:
            rows.CHANGE.write(connection, [rows.opening(entry, self._owners.me)])
            rows.CHANGE.write(connection, [rows.closing(entry.rid, settlement, bills_here=True)])

        written: Deferred[None] = self.writer.write(write)
        return written

    set_attribute(journal.SQLiteLedger, "open", opened)
    set_attribute(journal.SQLiteLedger, "settle", settle)


def bill_again(set_attribute: SetAttribute) -> None:
    def settle(self: Any, entry: Entry, settlement: Settlement) -> Deferred[None]:
        def write(connection: Any) -> None:
            rows.CHANGE.write(connection, [rows.closing(entry.rid, settlement, bills_here=True)])
            for event in events(entry, settlement):
                row = ("now", "key", event.product + "#2", event.quantity, event.rid)
                connection.execute(rows.ADD_EVENT, row)

        written: Deferred[None] = self.writer.write(write)
        return written

    set_attribute(journal.SQLiteLedger, "settle", settle)


def synchronous_normal(set_attribute: SetAttribute) -> None:
    def configure(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    set_attribute(sqlite, "configure", configure)


def drop_on_disconnect(set_attribute: SetAttribute) -> None:
    settle = Exchange._settle

    async def settle_unless_gone(self: Any, entry: Entry, ending: Ending) -> Settlement:
        if ending.outcome is not Outcome.CLIENT_GONE:
            return await settle(self, entry, ending)
        return billing.settlement(ending.outcome, ending.reading, utcnow(), ending.status)

    set_attribute(Exchange, "_settle", settle_unless_gone)


def running_count_on_disconnect(set_attribute: SetAttribute) -> None:
    run = Forward.run

    async def run_and_forget(self: Any) -> Ending:
        ending = await run(self)
        if ending.outcome is not Outcome.CLIENT_GONE:
            return ending
        counts = {**ending.reading.counts, Kind.COMPLETION: self._order.meter.content_events}
        return replace(ending, reading=ending.reading._replace(counts=counts))

    set_attribute(Forward, "run", run_and_forget)


FAULTS: dict[str, Callable[[SetAttribute], None]] = {
    "bill-after-release": bill_after_release,
    "bill-at-the-end": bill_at_the_end,
    "bill-again": bill_again,
    "synchronous-normal": synchronous_normal,
    "drop-on-disconnect": drop_on_disconnect,
    "running-count-on-disconnect": running_count_on_disconnect,
}


def plant(fault: str, set_attribute: SetAttribute = setattr) -> None:
    """From now on this process's proxies have the fault."""
    FAULTS[fault](set_attribute)


if __name__ == "__main__":
    from llmproxy.__main__ import main

    plant(sys.argv[1])
    main(sys.argv[2:])
