"""One commit at a time among the processes that share a database.

SQLite has a lock of its own for that, and it is what protects the file. But who waits for it sleeps
for 1 to 100 ms, looks, and sleeps again; while others commit without a pause it may sleep past
every gap. Here the kernel wakes who waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path


class Turnstile:
    """A lock file: `with turnstile:` waits for one's turn, as long as it takes.

    The kernel ends the turn of a process that dies. Each process opens the file for itself, since
    a lock excludes nobody who has inherited it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = -1

    def open(self) -> None:
        """Raises OSError. Before this, nobody is waited for."""
        self._lock = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600)

    def close(self) -> None:
        """Give the turn back, if it is ours."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> None:
        # Without a turn it is only slower: SQLite's own lock is still there.
        with contextlib.suppress(OSError, ValueError):
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError, ValueError):
            fcntl.flock(self._lock, fcntl.LOCK_UN)
