"""Processes that write one SQLite file take turns, each waiting in the kernel for the one before.

SQLite itself waits by looking again after longer and longer sleeps: with several busy writers the
disk is idle meanwhile, and one of them may find it locked again and again until it gives up.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from twisted.enterprise.adbapi import ConnectionPool

T = TypeVar("T")


class Turns:
    """The turn is a lock on a file beside the database; a process that ends gives it back."""

    def __init__(self, database: Path) -> None:
        self._path = database.with_name(database.name + "-owners") / ".turn"
        self._lock: int | None = None

    def join(self) -> None:
        """Open the file; its folder is there. Raises OSError."""
        self._lock = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)

    def leave(self) -> None:
        """Take no turn any more."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def around(self, pool: ConnectionPool) -> ConnectionPool:
        """The pool, which from now on does `runWithConnection` in turn."""
        told: Any = pool
        run = told.runWithConnection
        told.runWithConnection = lambda do, *args: run(self._in_turn, do, *args)
        return pool

    def _in_turn(self, connection: Any, do: Callable[..., T], *args: Any) -> T:
        lock = self._lock
        if lock is None:
            return do(connection, *args)
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return do(connection, *args)
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)
