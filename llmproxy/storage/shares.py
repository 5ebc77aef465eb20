"""What processes on one SQLite file share of the rates of keys: a row for each key."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable

from twisted.internet.defer import Deferred, fail
from zope.interface import implementer

from llmproxy.errors import StorageError
from llmproxy.model import Claim, Share
from llmproxy.storage import IShares
from llmproxy.storage.journal import Apart, GroupCommit

_READ = "SELECT requests_full_at, tokens_full_at, claims FROM key_share WHERE api_key = ?"
_WRITE = "INSERT OR REPLACE INTO key_share VALUES (?, ?, ?, ?)"


@implementer(IShares)
class SQLiteShares:
    """See `IShares`. The ledger's own writer makes the changes: those that wait while one commit
    runs are in the next one."""

    def __init__(self, writer: GroupCommit) -> None:
        self._writer = writer

    def change(self, key_id: str, change: Callable[[Share], Share]) -> Deferred[Share]:
        """See `IShares.change`."""
        if self._writer.hopeless:
            # Nothing is kept of it: an outage of hours must not fill the memory.
            return fail(StorageError("the ledger can't be written"))
        changed: list[Share] = []

        def write(connection: sqlite3.Connection) -> None:
            changed[:] = [change(_read(connection, key_id))]
            _write(connection, key_id, changed[0])

        return self._writer.add(Apart(write)).addCallback(lambda _: changed[0])


def _read(connection: sqlite3.Connection, key_id: str) -> Share:
    row = connection.execute(_READ, (key_id,)).fetchone()
    if row is None:
        return Share()
    requests_full_at, tokens_full_at, claims = row
    return Share(
        requests_full_at,
        tokens_full_at,
        {who: Claim(slots, until) for who, (slots, until) in json.loads(claims).items()},
    )


def _write(connection: sqlite3.Connection, key_id: str, share: Share) -> None:
    row = (key_id, share.requests_full_at, share.tokens_full_at, json.dumps(dict(share.claims)))
    connection.execute(_WRITE, row)
