"""A process that writes rows into a ledger without a pause.

    python ledger_writer.py DATABASE SECONDS

It says `ready`, begins at the end of its stdin, and in the end tells its name, its rows and the
longest opening.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, gatherResults

from llmproxy.ids import new_request_id
from llmproxy.model import Account, Entry, Kind, Outcome, Settlement, State
from llmproxy.storage.journal import SQLiteLedger
from llmproxy.storage.owners import Owners
from llmproxy.storage.rows import install
from llmproxy.storage.sqlite import make_pool
from llmproxy.storage.turnstile import Turnstile

# The global reactor has no type of its own: it is whichever was installed.
reactor: Any = _reactor
LOOPS = 4


class Writer:
    """Some loops of requests that do nothing but open and settle."""

    def __init__(self, database: Path, seconds: float) -> None:
        self._seconds = seconds
        self.owners = Owners(database)
        self.owners.join()
        self._turnstile = Turnstile(self.owners.folder / ".turnstile")
        self._turnstile.open()
        self._ledger = SQLiteLedger(
            make_pool(database, reactor, install),
            reactor,
            self.owners,
            bills_here=True,
            turnstile=self._turnstile,
        )
        self.rows = 0
        self.longest_s = 0.0

    async def run(self) -> None:
        """All of it."""
        until = time.monotonic() + self._seconds
        await gatherResults([Deferred.fromCoroutine(self._loop(until)) for _ in range(LOOPS)])

    async def _loop(self, until: float) -> None:
        while (began := time.monotonic()) < until:
            entry = Entry(
                rid=new_request_id(),
                opened=datetime.now(UTC),
                account=Account("key"),
                path="/v1/chat/completions",
                model="chat",
                device="gpu",
            )
            await self._ledger.open(entry)
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            settlement = Settlement(
                state=State.SETTLED,
                outcome=Outcome.COMPLETE,
                counts={Kind.PROMPT: 3, Kind.COMPLETION: 2},
                finished=datetime.now(UTC),
            )
            await self._ledger.settle(entry, settlement)
            self.rows += 1


def main() -> None:
    writer = Writer(Path(sys.argv[1]), float(sys.argv[2]))

    def begin() -> None:
        print("ready", flush=True)
        sys.stdin.read()
        Deferred.fromCoroutine(writer.run()).addBoth(end)

    def end(result: object) -> None:
        told = {"owner": writer.owners.me, "rows": writer.rows, "longest_s": writer.longest_s}
        print(json.dumps(told), flush=True)
        reactor.stop()

    reactor.callWhenRunning(begin)
    reactor.run()


if __name__ == "__main__":
    main()
