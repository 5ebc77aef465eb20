"""Opening and closing the stores that the configuration names.

SQLite: one file for keys, ledger and bills. MongoDB: keys and bills there, the ledger in a local
SQLite journal, from which a delivery moves the bills.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.enterprise.adbapi import ConnectionPool
from twisted.internet.defer import TimeoutError as DeferTimeoutError
from twisted.logger import Logger

from llmproxy.config import Config
from llmproxy.delivery import POLL_S, Delivery
from llmproxy.errors import StorageError
from llmproxy.model import State
from llmproxy.storage import IAccounts, IShares, ISpending, IUsage
from llmproxy.storage.journal import SQLiteLedger
from llmproxy.storage.owners import Owners
from llmproxy.storage.rows import install
from llmproxy.storage.shared_spending import SharedSpending
from llmproxy.storage.shares import SQLiteShares
from llmproxy.storage.spending import SQLiteSpending
from llmproxy.storage.sqlite import SQLiteAccounts, journal_id, make_pool, prepare
from llmproxy.storage.turnstile import Turnstile
from llmproxy.storage.usage_days import SQLiteUsage

if TYPE_CHECKING:
    from llmproxy.storage import mongo

#: How often one process looks for bills of others that write the same journal.
SHARED_POLL_S = 0.5
#: How long a stop waits for the last commits; what is not written then is found at the next start.
LAST_COMMITS_S = 10.0


def database_of(config: Config) -> Path:
    """The SQLite file that holds the ledger."""
    return config.db.sqlite_path or config.ledger.path


def prepare_database(config: Config) -> None:
    """Make and migrate it. Raises StorageError; blocks, so: at start."""
    prepare(database_of(config))


class Stores:
    """`accounts`, `ledger`, `usage`, `spending` and `shares`, from `open` to `close`.

    `currency`: the one of the prices in force.

    `prepared`: `prepare_database` has been called. `delivers`: with MongoDB, this is the process
    that delivers the bills, of which it looks for those of others every `poll_s`.
    """

    log = Logger()

    accounts: IAccounts
    ledger: SQLiteLedger
    usage: IUsage
    spending: ISpending
    shares: IShares

    def __init__(
        self,
        config: Config,
        reactor: Any,
        *,
        prepared: bool = False,
        delivers: bool = True,
        poll_s: float = POLL_S,
    ) -> None:
        self._config = config
        self._reactor = reactor
        self._prepared, self._delivers, self._poll_s = prepared, delivers, poll_s
        self._path = database_of(config)
        self._owners = Owners(self._path)
        self._turnstile = Turnstile(self._owners.folder / ".turnstile")
        self._pools: list[ConnectionPool] = []
        self._mongo: mongo.MongoStore | None = None
        self._shared_spending: SharedSpending | None = None
        self.delivery: Delivery | None = None
        self.currency = config.prices.currency

    async def open(self, on_commit: Callable[[float, int], None]) -> Mapping[State, int]:
        """Make what is missing, and `recover`.

        Raises ConfigError, StorageError.
        """
        if not self._prepared:
            prepare(self._path)
        try:
            self._owners.join()
            self._turnstile.open()
        except OSError as error:
            raise StorageError(f"database {self._path}: {error.strerror}") from error
        self.ledger = SQLiteLedger(
            self._pool(install),
            self._reactor,
            self._owners,
            bills_here=not self._config.db.is_mongodb,
            on_commit=on_commit,
            turnstile=self._turnstile,
        )
        self.usage = SQLiteUsage(self._pool(), self._reactor)
        self.spending = SQLiteSpending(self.ledger.writer, lambda: self.currency)
        self.shares = SQLiteShares(self.ledger.writer)
        if self._config.db.is_mongodb:
            await self._open_mongo()
        else:
            self.accounts = SQLiteAccounts(self._pool())
        return await self.recover()

    async def recover(self) -> Mapping[State, int]:
        """Close what dead processes left open: so many, by state."""
        recovered = await self.ledger.recover()
        self._owners.bury_dead()
        for state, count in recovered.items():
            self.log.warn(
                "ledger: {count} rows of an ended process are now {state}",
                count=count,
                state=str(state),
            )
        return recovered

    async def _open_mongo(self) -> None:
        from llmproxy.storage import mongo  # it takes the global reactor when it is imported

        self._mongo = mongo.connect(self._config.db.uri, self._reactor)
        await self._mongo.start()
        self.accounts = self._mongo.accounts
        self.spending = self._shared_spending = SharedSpending(
            self.spending, journal_id(self._path), self._mongo.spending.exchange, self._reactor
        )
        self._shared_spending.startService()
        self.shares = self._mongo.shares
        if not self._delivers:
            return
        self.delivery = Delivery(
            self.ledger, self._mongo.events, self._reactor, poll_s=self._poll_s
        )
        self.ledger.notify = self.delivery.notify
        self.delivery.startService()

    def _pool(self, *install: Callable[[sqlite3.Connection], None]) -> ConnectionPool:
        pool = make_pool(self._path, self._reactor, *install)
        self._pools.append(pool)
        return pool

    async def close(self) -> None:
        """Wait for the last commits, and close."""
        if hasattr(self, "ledger"):
            try:
                await self.ledger.writer.when_idle().addTimeout(LAST_COMMITS_S, self._reactor)
            except DeferTimeoutError:
                self.log.error(
                    "ledger: {pending} writes were not possible before the end",
                    pending=self.ledger.writer.pending,
                )
        if self._shared_spending is not None:
            await self._shared_spending.stopService()
        if self.delivery is not None:
            await self.delivery.stopService()
        if hasattr(self, "ledger"):
            self.ledger.writer.stop()
        if self._mongo is not None:
            await self._mongo.close()
        for pool in self._pools:
            pool.close()
        self._turnstile.close()
        self._owners.leave()
