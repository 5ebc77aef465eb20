"""The client's request body as it arrives: never on disk, never more in memory than was asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as DeferTimeoutError
from twisted.internet.interfaces import IReactorTime

from llmproxy.errors import BodyTooLarge, RequestTimeout

#: How much may wait here before the client is held up.
HIGH_WATER = 64 * 1024
#: A body has this time, and on top as long as it takes at this rate, in bytes a second: who drips
#: it is not waited for, though never silent.
BODY_S, MIN_RATE = 60.0, 1024


class ClientGone(Exception):
    """The client left before its request was whole."""


class Flow(Protocol):
    """What an upload asks of its connection."""

    def hold_up(self, hold: bool) -> None:
        """Stop reading, or go on."""

    def invite_body(self) -> None:
        """Somebody wants the body: tell a client that waits for it. Called again and again."""


class Upload:
    """A request body: pulled by `read` or `next`, pushed by the HTTP channel.

    length: from Content-Length, None if chunked.
    """

    __slots__ = (
        "_began",
        "_chunks",
        "_clock",
        "_discarding",
        "_flow",
        "_gone",
        "_on_whole",
        "_paused",
        "_taken_bytes",
        "_waiter",
        "_waiting_bytes",
        "length",
        "whole",
    )

    def __init__(self, length: int | None, clock: IReactorTime, flow: Flow) -> None:
        self.length = length
        self.whole = False
        self._clock = clock
        self._flow = flow
        self._chunks: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._taken_bytes = 0
        self._began: float | None = None
        self._paused = False
        self._gone = False
        self._discarding = False
        self._waiter: Deferred[None] | None = None
        self._on_whole: Callable[[], None] | None = None

    def at_once(self, limit: int) -> bytes | None:
        """The whole body, if it is here already; it can be taken once. Raises BodyTooLarge."""
        if not self.whole or self._paused or self._taken_bytes:
            return None
        if self._waiting_bytes > limit:
            raise too_large(limit)
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._taken_bytes, self._waiting_bytes = self._waiting_bytes, 0
        return body

    async def read(self, limit: int, timeout_s: float) -> bytes:
        """The whole body, up to `limit` bytes. Raises BodyTooLarge, RequestTimeout, ClientGone."""
        self.refuse_over(limit)
        body = bytearray()  # parts of a few bytes each would take many times their size
        while (chunk := await self.next(timeout_s)) is not None:
            body += chunk
            if len(body) > limit:
                raise too_large(limit)
        return bytes(body)

    def refuse_over(self, limit: int) -> None:
        """Raises BodyTooLarge if the announced length is over `limit`, before a byte is read."""
        if self.length is not None and self.length > limit:
            raise too_large(limit)

    async def next(self, timeout_s: float) -> bytes | None:
        """The next part of the body, None at its end. Raises RequestTimeout, ClientGone."""
        if not self.whole:
            self._flow.invite_body()
        if not self._chunks and not self.whole and not self._gone:
            await self._arrival(timeout_s)
        if self._chunks:
            chunk = self._chunks.popleft()
            self._waiting_bytes -= len(chunk)
            self._taken_bytes += len(chunk)
            if self._paused and self._waiting_bytes < HIGH_WATER:
                self._paused = False
                self._flow.hold_up(False)
            return chunk
        if self._gone:
            raise ClientGone
        return None

    async def _arrival(self, timeout_s: float) -> None:
        self._refuse_dripping()
        self._waiter = Deferred()
        try:
            await self._waiter.addTimeout(timeout_s, self._clock)
        except DeferTimeoutError:
            raise _too_slow() from None
        finally:
            self._waiter = None

    def _refuse_dripping(self) -> None:
        now = self._clock.seconds()
        if self._began is None:
            self._began = now
        elif now - self._began > BODY_S + self._taken_bytes / MIN_RATE:
            raise _too_slow()

    def discard(self, on_whole: Callable[[], None]) -> None:
        """Nobody wants the rest: drop it as it comes, and tell when it has come."""
        self._discarding = True
        self._chunks.clear()
        self._on_whole = on_whole
        if self._paused:
            self._paused = False
            self._flow.hold_up(False)

    def received(self, data: bytes) -> None:
        """From the channel: a part of the body."""
        if self._discarding:
            return
        self._chunks.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= HIGH_WATER:
            self._paused = True
            self._flow.hold_up(True)  # each time: the transport may have gone on
        self._wake()

    def ended(self) -> None:
        """From the channel: the body is whole."""
        self.whole = True
        self._wake()
        if self._on_whole is not None:
            self._on_whole()

    def lost(self) -> None:
        """From the channel: the client is gone."""
        self._gone = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.called:
            self._waiter.callback(None)


def too_large(limit: int) -> BodyTooLarge:
    """The refusal of a body over `limit` bytes."""
    return BodyTooLarge(f"The request's body is over the limit of {limit} bytes.")


def _too_slow() -> RequestTimeout:
    return RequestTimeout("The request's body did not arrive in time.")
