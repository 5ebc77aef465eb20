"""Moves events from the local journal to the store that holds the bill, for ever.

    idle -> batch read -> batch stored -> rows marked -> (next batch, at once)
      ^         |              |              |
      |       empty         failed         failed  -> wait, longer each time -> the same batch
      +---------+

A crash between "stored" and "marked" repeats the batch, which the sink knows by its identity. At no
time more than one batch is in memory; what waits is on disk.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from llmproxy.errors import StorageError
from llmproxy.storage import IEventSink, IOutbox

BATCH_ROWS = 500
POLL_S = 5.0
RETRY_S, RETRY_MAX_S = 0.5, 10.0
FLUSH_S = 5.0


class Delivery(Service):
    """The service that empties an outbox into a sink, in order and one batch at a time.

    `poll_s`: how often it looks for rows of which nobody told it.

    For metrics: `delivered_total` (events), `failures_total` (batches), `backlog_rows` and
    `backlog_age_s` (of the oldest row), the last two at most `POLL_S` old.
    """

    log = Logger()

    def __init__(
        self,
        outbox: IOutbox,
        sink: IEventSink,
        clock: IReactorTime,
        *,
        poll_s: float = POLL_S,
        jitter: Callable[[], float] = lambda: random.uniform(0.5, 1.0),
    ) -> None:
        self.delivered_total = 0
        self.failures_total = 0
        self.backlog_rows = 0
        self.backlog_age_s = 0.0
        self._outbox = outbox
        self._sink = sink
        self._clock = clock
        self._poll_s = poll_s
        self._jitter = jitter
        self._failing = False
        self._stopping = False
        self._notified = False
        self._measured_at = -POLL_S
        self._nap: _Nap | None = None
        self._loop: Deferred[None] = succeed(None)

    def startService(self) -> None:
        """Begin with whatever an earlier process has left."""
        super().startService()
        self._stopping = False
        self._loop = Deferred.fromCoroutine(self._run())

    def stopService(self) -> Deferred[None]:
        """Try once more to deliver what waits, for at most `FLUSH_S`; the rest stays on disk."""
        super().stopService()
        self._stopping = True
        if self._nap is not None:
            self._nap.end()
        stopped, self._loop = self._loop, succeed(None)
        deadline = self._clock.callLater(FLUSH_S, stopped.cancel)
        return stopped.addErrback(self._stopped_late).addBoth(self._end_deadline, deadline)

    def notify(self) -> None:
        """A row was settled: deliver it now, unless deliveries fail and their turn comes later."""
        self._notified = True
        if self._nap is not None and self._nap.light:
            self._nap.end()

    async def _run(self) -> None:
        retry_s = RETRY_S
        while True:
            last = self._stopping
            self._notified = False
            try:
                moved = await self._move_batch()
            except CancelledError:
                raise
            except Exception as error:  # whatever it is: the rows are still there
                await self._failed(error)
                if last:
                    return
                await self._sleep(retry_s * self._jitter(), light=False)
                retry_s = min(retry_s * 2, RETRY_MAX_S)
                continue
            retry_s = RETRY_S
            await self._succeeded()
            if moved:
                continue
            if last:
                return
            if not self._notified:
                await self._sleep(self._poll_s, light=True)

    async def _move_batch(self) -> bool:
        """Deliver the oldest rows; False if there was none."""
        events = await self._outbox.undelivered(BATCH_ROWS)
        if not events:
            return False
        await self._sink.deliver(events)
        await self._outbox.mark_delivered(list(dict.fromkeys(event.rid for event in events)))
        self.delivered_total += len(events)
        return True

    async def _failed(self, error: Exception) -> None:
        self.failures_total += 1
        await self._measure()
        if not isinstance(error, StorageError):
            self.log.failure("Delivery: an error that is not the store's", Failure(error))
        if self._failing:
            return
        self._failing = True
        self.log.warn(
            "Delivery fails, {rows} requests wait in the journal: {reason}",
            rows=self.backlog_rows,
            reason=str(error),
        )

    async def _succeeded(self) -> None:
        if self._failing or self._clock.seconds() - self._measured_at >= POLL_S:
            await self._measure()
        if self._failing:
            self._failing = False
            self.log.info("Delivery works again, {rows} requests wait", rows=self.backlog_rows)

    async def _measure(self) -> None:
        self._measured_at = self._clock.seconds()
        try:
            self.backlog_rows, self.backlog_age_s = await self._outbox.backlog()
        except CancelledError:
            raise
        except Exception as error:  # a measure must not stop the delivery
            self.log.debug("Delivery: the backlog is not known: {reason}", reason=str(error))

    async def _sleep(self, seconds: float, *, light: bool) -> None:
        if self._stopping:
            return
        self._nap = _Nap(self._clock, seconds, light=light)
        try:
            await self._nap.over
        finally:
            self._nap = None

    def _stopped_late(self, failure: Failure) -> None:
        if not isinstance(failure.value, CancelledError):
            self.log.failure("Delivery ended by an error", failure)
            return
        self.log.info("Delivery stops with {rows} requests in the journal", rows=self.backlog_rows)

    @staticmethod
    def _end_deadline(result: Any, deadline: IDelayedCall) -> Any:
        if deadline.active():
            deadline.cancel()
        return result


class _Nap:
    """A pause that can be ended early. `light`: news from the ledger may end it."""

    def __init__(self, clock: IReactorTime, seconds: float, *, light: bool) -> None:
        self.light = light
        self.over: Deferred[None] = Deferred(lambda _: self._call.cancel())
        self._call = clock.callLater(seconds, self._wake)

    def end(self) -> None:
        """Wake up now."""
        if self._call.active():
            self._call.cancel()
            self._wake()

    def _wake(self) -> None:
        self.over.callback(None)
