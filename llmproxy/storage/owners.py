"""Which processes live: one locked file per process, beside the database that they share.

A row of the ledger names the process that opened it. The kernel drops the lock when that process
ends, however it ends, so a lock that can be had belongs to the dead.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path


class Owners:
    """The folder of lock files `DATABASE-owners/`, and our own lock in it.

    A name that begins with a dot is no process's.
    """

    def __init__(self, database: Path) -> None:
        self.folder = database.with_name(database.name + "-owners")
        self._lock: int | None = None
        self.me = uuid.uuid4().hex

    def join(self) -> None:
        """Take our lock. Raises OSError."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        unlocked = self.folder / f".{self.me}"  # nobody may take us for dead in between
        self._lock = os.open(unlocked, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlocked.rename(self.folder / self.me)

    def leave(self) -> None:
        """Give our lock back; from now on our open rows, if any, are anybody's to close."""
        if self._lock is not None:
            (self.folder / self.me).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def is_dead(self, owner: str) -> bool:
        """True if no living process on this machine is `owner`."""
        if owner == self.me:
            return False
        try:
            lock = os.open(self.folder / owner, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(lock)
        return True

    def bury(self, owner: str) -> None:
        """Remove the file of a dead process."""
        (self.folder / owner).unlink(missing_ok=True)

    def bury_dead(self) -> None:
        """Remove the files of all dead processes, those without open rows too."""
        for file in self.folder.iterdir():
            if not file.name.startswith(".") and self.is_dead(file.name):
                self.bury(file.name)
