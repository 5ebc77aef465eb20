"""Reading a backend's answer: with back-pressure, a limit to silence, and one ending."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss


class BodyEnd(enum.Enum):
    """How the reading of a body ended."""

    WHOLE = "whole"  # as long as it said it would be
    UNFRAMED = "unframed"  # closed by the backend, at an end or not
    BROKEN = "broken"  # cut short
    STALLED = "stalled"  # silent for too long
    STOPPED = "stopped"  # by us


class BodyReader:
    """An `IProtocol`. Hands a backend's body to `sink`, piece by piece, each with the time at which
    it came, as `clock` has it; `ended` fires exactly once.

    States: reading; paused (by the client's slowness, or held by us, when the silence is not the
    backend's fault); over.
    """

    __slots__ = (
        "_at_silence",
        "_clock",
        "_heard_at",
        "_held",
        "_over",
        "_paused",
        "_seconds",
        "_silence_s",
        "_sink",
        "_timer",
        "ended",
        "transport",
    )

    def __init__(
        self, sink: Callable[[bytes, float], None], clock: IReactorTime, silence_s: float
    ) -> None:
        self.ended: Deferred[BodyEnd] = Deferred()
        self.transport: IPushProducer | None = None
        self._sink = sink
        self._clock = clock
        self._seconds = clock.seconds
        self._silence_s = silence_s
        self._timer: IDelayedCall | None = None
        self._heard_at = 0.0
        self._at_silence = BodyEnd.STALLED
        self._over = False
        self._paused = self._held = False

    def makeConnection(self, transport: Any) -> None:
        """The body begins."""
        self.transport = transport
        self._listen()

    def dataReceived(self, data: bytes) -> None:
        """A piece of it."""
        if self._over:  # bytes can still arrive after stopProducing
            return
        # Python 3.11 looks for methods first where an attribute is called.
        seconds, sink = self._seconds, self._sink
        self._heard_at = now = seconds()
        sink(data, now)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """It ended."""
        if reason.check(ResponseDone):
            self._finish(BodyEnd.WHOLE)
        else:
            self._finish(BodyEnd.UNFRAMED if reason.check(PotentialDataLoss) else BodyEnd.BROKEN)

    def stop(self, end: BodyEnd = BodyEnd.STOPPED) -> None:
        """Close the backend's connection, and be done."""
        if not self._over:
            self._finish(end)
            if self.transport is not None:  # the body may not have begun
                self.transport.stopProducing()

    def finish_within(self, seconds: float) -> None:
        """All that matters has come: wait no longer than this for the rest, even if it drips."""
        if self._at_silence is BodyEnd.WHOLE:
            return
        self._silence_s = seconds
        self._at_silence = BodyEnd.WHOLE
        if self._timer is not None:
            self._cancel_timer()
            self._listen()

    def pauseProducing(self) -> None:
        """The client is slower: hold the backend up."""
        self._paused = True
        self._pause()

    def resumeProducing(self) -> None:
        """The client has caught up."""
        self._paused = False
        self._resume()

    def hold(self) -> None:
        """Read nothing until `release`, whatever the client's speed."""
        self._held = True
        self._pause()

    def release(self) -> None:
        """Go on, at the client's speed."""
        self._held = False
        self._resume()

    def _pause(self) -> None:
        if not self._over and self.transport is not None:
            self._cancel_timer()
            self.transport.pauseProducing()

    def _resume(self) -> None:
        if not self._over and self.transport is not None and not (self._paused or self._held):
            self._listen()
            self.transport.resumeProducing()

    def _listen(self) -> None:
        if self._timer is None and not self._over:
            self._heard_at = self._clock.seconds()
            self._timer = self._clock.callLater(self._silence_s, self._silent)

    def _silent(self) -> None:
        """Time has passed, in silence or not: a timer is not set anew with each piece."""
        self._timer = None
        left = self._heard_at + self._silence_s - self._clock.seconds()
        if left > 0 and self._at_silence is BodyEnd.STALLED:
            self._timer = self._clock.callLater(left, self._silent)
        else:
            self.stop(self._at_silence)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _finish(self, end: BodyEnd) -> None:
        if not self._over:
            self._over = True
            self._cancel_timer()
            self.ended.callback(end)
