"""The client's side of one exchange: its answer going out, safe to use after it has hung up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from zope.interface import implementer

if TYPE_CHECKING:
    from llmproxy.site import Request

#: How long a client that was told to go may still take what is buffered for it.
LINGER_S = 10.0


class Producer(Protocol):
    """What `attach` needs: a source of bytes that can be held up."""

    def pauseProducing(self) -> None: ...
    def resumeProducing(self) -> None: ...


@implementer(IPushProducer)
class Downstream:
    """Writes one answer to a client.

    States: fresh; started (headers are out); over (finished, aborted, or the client is `gone`).
    A client that is held up, and has not taken all that waits for it (some 64 KiB) within
    `patience_s`, counts as gone.
    """

    __slots__ = (
        "_clock",
        "_impatience",
        "_on_gone",
        "_over",
        "_patience_s",
        "_producer",
        "_request",
        "gone",
        "started",
        "write",
    )

    def __init__(self, request: Request, clock: IReactorTime, patience_s: float) -> None:
        self.gone = request.lost
        self.started = False
        self._over = request.lost
        self._request = request
        self._clock = clock
        self._patience_s = patience_s
        self._impatience: IDelayedCall | None = None
        self._producer: Producer | None = None
        self._on_gone: Callable[[], None] | None = None
        #: Send a part of the body; the request itself knows whether it is over.
        self.write = request.write
        request.when_lost(self._lost)

    def when_gone(self, act: Callable[[], None] | None) -> None:
        """Call `act` when the client has gone; at once if it has."""
        self._on_gone = act
        if self.gone and act is not None:
            act()

    def start(self, status: int, fields: Iterable[tuple[bytes, bytes]]) -> None:
        """Send the header of an answer whose length is not known."""
        self.started = True
        if not self._over:
            self._request.start(status, fields)

    def answer(self, status: int, fields: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """Send a whole answer."""
        if not self._over:
            self.started = self._over = True
            self.detach()
            self._request.answer(status, fields, body)

    def finish(self, last: bytes = b"") -> None:
        """End the answer, whole, with `last`."""
        if not self._over:
            self._over = True
            self.detach()
            self._request.end(last)

    def abort(self) -> None:
        """End the connection without the end of the answer, so that the client can tell.

        What was written is still sent, unless the client could take the connection's end for the
        answer's (HTTP/1.0).
        """
        if not self._over:
            self._over = True
            self.detach()
            self._request.cut(LINGER_S)

    def attach(self, producer: Producer) -> None:
        """Let the client's speed govern `producer`."""
        if not self._over:
            self._producer = producer
            self._request.attach(self)

    def detach(self) -> None:
        """The producer has nothing more."""
        if self._producer is not None:  # else nobody has held us up
            self._be_patient()
            self._request.detach()
            self._producer = None

    def pauseProducing(self) -> None:
        """The client is slower than the backend."""
        if self._impatience is None:
            self._impatience = self._clock.callLater(self._patience_s, self._give_up)
        if self._producer is not None:
            self._producer.pauseProducing()

    def resumeProducing(self) -> None:
        """The client has caught up."""
        self._be_patient()
        if self._producer is not None:
            self._producer.resumeProducing()

    def stopProducing(self) -> None:
        """The transport is gone; `_lost` does what is to be done."""

    def _be_patient(self) -> None:
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None

    def _give_up(self) -> None:
        self._impatience = None
        self._request.cut(0)

    def _lost(self) -> None:
        self._be_patient()
        self.gone = self._over = True
        if self._on_gone is not None:
            self._on_gone()
