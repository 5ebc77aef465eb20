"""Running counts of the streams in flight, written about once a second in one commit.

They are what a crash in mid-stream leaves behind: a number, marked as estimated.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.application.service import Service
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from llmproxy.model import Counts
from llmproxy.storage import ILedger

INTERVAL_S = 1.0


class Checkpoints(Service):
    """Asks each stream for its counts, and writes those that have changed."""

    log = Logger()

    def __init__(self, ledger: ILedger, clock: IReactorTime) -> None:
        self._ledger = ledger
        self._streams: dict[str, Callable[[], Counts]] = {}
        self._written: dict[str, Counts] = {}
        self._writing = False
        self._loop = LoopingCall(self._write)
        self._loop.clock = clock

    def follow(self, rid: str, counts: Callable[[], Counts]) -> None:
        """From now on, note what `counts` says of this row."""
        self._streams[rid] = counts

    def forget(self, rid: str) -> None:
        """The row is about to be settled."""
        self._streams.pop(rid, None)
        self._written.pop(rid, None)

    def startService(self) -> None:
        """Begin."""
        super().startService()
        self._loop.start(INTERVAL_S, now=False).addErrback(
            lambda failure: self.log.failure("checkpoints", failure)
        )

    def stopService(self) -> None:
        """End; what is in flight is settled, not noted."""
        super().stopService()
        if self._loop.running:
            self._loop.stop()

    def _write(self) -> None:
        if self._writing:  # the store is slow: the next round has newer numbers anyway
            return
        changed, written = {}, self._written
        for rid, counts in self._streams.items():
            now = counts()
            if now != written.get(rid) and any(now.values()):
                changed[rid] = written[rid] = dict(now)
        if changed:
            self._writing = True
            self._ledger.checkpoint(changed).addBoth(self._done)

    def _done(self, result: object) -> None:
        self._writing = False
        if isinstance(result, Failure):
            self._written.clear()  # nobody knows what is there
