"""A clock for timeouts of which there are many at once, of few lengths, and which rarely come.

Each length has a queue: what was started first is due first. So one call of the reactor's stands
for a whole queue, and a timeout that is started and cancelled costs little more than an entry in a
dictionary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from twisted.internet.error import AlreadyCalled, AlreadyCancelled
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from zope.interface import implementer


@implementer(IReactorTime)
class Timeouts:
    """An `IReactorTime` on another one. What is due at one moment comes in the order of its start,
    within one length."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._queues: dict[float, _Queue] = {}
        #: See `IReactorTime.seconds`; asked for each chunk, so the way to it is short.
        self.seconds: Callable[[], float] = clock.seconds

    def callLater(
        self, delay: float, callable: Callable[..., Any], *args: object, **kw: object
    ) -> Timeout:
        """See `IReactorTime.callLater`."""
        queue = self._queues.get(delay)
        if queue is None:
            queue = self._queues[delay] = _Queue(self._clock, delay, self._queues)
        timeout = Timeout(queue, self.seconds() + delay, callable, args, kw)
        queue.start(timeout)
        return timeout

    def getDelayedCalls(self) -> list[Timeout]:
        """See `IReactorTime.getDelayedCalls`."""
        return [timeout for queue in self._queues.values() for timeout in queue.waiting]

    def close(self) -> None:
        """Give the reactor's calls back; what waits is not called any more."""
        for queue in self._queues.values():
            queue.close()
        self._queues.clear()


@implementer(IDelayedCall)
class Timeout:
    """States: waiting; called; cancelled."""

    __slots__ = ("_args", "_call", "_cancelled", "_kw", "_queue", "due")

    def __init__(
        self,
        queue: _Queue,
        due: float,
        call: Callable[..., Any],
        args: tuple[object, ...],
        kw: dict[str, object],
    ) -> None:
        self.due = due
        self._queue = queue
        self._call, self._args, self._kw = call, args, kw
        self._cancelled = False

    def active(self) -> bool:
        """See `IDelayedCall.active`."""
        return self in self._queue.waiting

    def cancel(self) -> None:
        """See `IDelayedCall.cancel`."""
        try:
            del self._queue.waiting[self]
        except KeyError:
            raise (AlreadyCancelled if self._cancelled else AlreadyCalled) from None
        self._cancelled = True

    def getTime(self) -> float:
        """See `IDelayedCall.getTime`."""
        return self.due

    def reset(self, secondsFromNow: float) -> None:
        """See `IDelayedCall.reset`; only to its own length."""
        if secondsFromNow != self._queue.length:
            raise ValueError("a timeout keeps its length")
        self._queue.restart(self)

    def delay(self, secondsLater: float) -> None:
        """See `IDelayedCall.delay`: not possible here, as it would leave the order."""
        raise NotImplementedError("a timeout can only be reset")

    def fire(self) -> None:
        """It is due."""
        self._call(*self._args, **self._kw)


class _Queue:
    """All timeouts of one length, the first one due first."""

    def __init__(self, clock: IReactorTime, length: float, queues: dict[float, _Queue]) -> None:
        self.length = length
        self._queues = queues
        self.waiting: OrderedDict[Timeout, None] = OrderedDict()
        self._clock = clock
        self._alarm: IDelayedCall | None = None

    def start(self, timeout: Timeout) -> None:
        """It is the last one due of those that wait."""
        self.waiting[timeout] = None
        if self._alarm is None:
            self._alarm = self._clock.callLater(self.length, self._ring)

    def restart(self, timeout: Timeout) -> None:
        """From now on, anew. Raises AlreadyCalled when it waits no more."""
        if timeout not in self.waiting:
            raise AlreadyCalled
        timeout.due = self._clock.seconds() + self.length
        self.waiting.move_to_end(timeout)

    def _ring(self) -> None:
        """The first one is due, or was, when the alarm was set."""
        self._alarm = None
        now = self._clock.seconds()
        try:
            while self.waiting and (first := next(iter(self.waiting))).due <= now:
                del self.waiting[first]
                first.fire()
        finally:
            if not self.waiting:  # some lengths are there but once
                self._queues.pop(self.length, None)
            elif self._alarm is None:
                left = next(iter(self.waiting)).due - now
                self._alarm = self._clock.callLater(max(0.0, left), self._ring)

    def close(self) -> None:
        """Nothing is called any more."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = None
        self.waiting.clear()
