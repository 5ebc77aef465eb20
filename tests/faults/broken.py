"""The proxy with a planted fault: the experiments must notice it.

    python broken.py FAULT -c config.toml      the process
    plant(FAULT)                               in this one

bill-after-release: the client gets the end of its answer, and then the bill is committed (20 ms
  later, so that not hundreds of kills are needed to see it).
bill-at-the-end: no row is written before the request is sent, only one at its end.
bill-again: a bill that is repeated gets a new identity.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import deferLater

from llmproxy.exchange import Exchange
from llmproxy.model import Entry, Settlement
from llmproxy.storage import journal


def bill_after_release() -> None:
    async def serve(self: Any) -> None:
        account = await self._authenticate()
        order = await self._admit()
        entry = self._entry(account, order)
        await self._open(entry)
        ending = await self._send(entry, order)
        self._release(ending)
        await deferLater(self._services.clock, 0.02)
        await self._settle(entry, ending)

    Exchange._serve = serve  # type: ignore[method-assign]


def bill_at_the_end() -> None:
    def opened(self: Any, entry: Entry) -> Deferred[None]:
        return succeed(None)

    def settle(self: Any, entry: Entry, settlement: Settlement) -> Deferred[None]:
        row = journal.Opening(entry, self._owners.me, 0.0)

        def write(connection: Any) -> None:
            row.write(connection)
            journal.close_row(connection, entry, settlement, delivered=True)

        return self.writer.write(write)

    journal.SQLiteLedger.open = opened  # type: ignore[method-assign]
    journal.SQLiteLedger.settle = settle  # type: ignore[method-assign]


def bill_again() -> None:
    def settle(self: Any, entry: Entry, settlement: Settlement) -> Deferred[None]:
        def write(connection: Any) -> None:
            journal.close_row(connection, entry, settlement, delivered=True)
            for event in journal.events(entry, settlement):
                row = ("now", "key", event.product + "#2", event.quantity, event.rid)
                connection.execute(journal.ADD_EVENT, row)

        return self.writer.write(write)

    journal.SQLiteLedger.settle = settle  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    "bill-after-release": bill_after_release,
    "bill-at-the-end": bill_at_the_end,
    "bill-again": bill_again,
}


def plant(fault: str) -> None:
    """From now on this process's proxies have the fault."""
    FAULTS[fault]()


if __name__ == "__main__":
    from llmproxy.__main__ import main

    plant(sys.argv[1])
    main(sys.argv[2:])
