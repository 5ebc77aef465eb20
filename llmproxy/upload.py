"""The client's request body as it arrives: never on disk, never more in memory than was asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as DeferTimeoutError
from twisted.internet.interfaces import IReactorTime

from llmproxy.errors import BodyTooLarge, RequestTimeout

#: How much may wait here before the client is held up.
HIGH_WATER = 64 * 1024


class ClientGone(Exception):
    """The client left before its request was whole."""


class Upload:
    """A request body: pulled by `read` or `next`, pushed by the HTTP channel.

    length: from Content-Length, None if chunked.
    """

    def __init__(
        self,
        length: int | None,
        clock: IReactorTime,
        *,
        pause: Callable[[], None],
        resume: Callable[[], None],
        invite: Callable[[], None],
    ) -> None:
        self.length = length
        self.whole = False
        self._clock = clock
        self._pause, self._resume, self._invite = pause, resume, invite
        self._chunks: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._paused = False
        self._gone = False
        self._discarding = False
        self._waiter: Deferred[None] | None = None
        self._on_whole: Callable[[], None] = lambda: None

    async def read(self, limit: int, timeout_s: float) -> bytes:
        """The whole body, up to `limit` bytes. Raises BodyTooLarge, RequestTimeout, ClientGone."""
        self.refuse_over(limit)
        parts: list[bytes] = []
        size = 0
        while (chunk := await self.next(timeout_s)) is not None:
            size += len(chunk)
            if size > limit:
                raise too_large(limit)
            parts.append(chunk)
        return b"".join(parts)

    def refuse_over(self, limit: int) -> None:
        """Raises BodyTooLarge if the announced length is over `limit`, before a byte is read."""
        if self.length is not None and self.length > limit:
            raise too_large(limit)

    async def next(self, timeout_s: float) -> bytes | None:
        """The next part of the body, None at its end. Raises RequestTimeout, ClientGone."""
        self._invite()
        if not self._chunks and not self.whole and not self._gone:
            await self._arrival(timeout_s)
        if self._chunks:
            chunk = self._chunks.popleft()
            self._waiting_bytes -= len(chunk)
            if self._paused and self._waiting_bytes < HIGH_WATER:
                self._paused = False
                self._resume()
            return chunk
        if self._gone:
            raise ClientGone
        return None

    async def _arrival(self, timeout_s: float) -> None:
        self._waiter = Deferred()
        try:
            await self._waiter.addTimeout(timeout_s, self._clock)
        except DeferTimeoutError:
            raise RequestTimeout("The request's body did not arrive in time.") from None
        finally:
            self._waiter = None

    def discard(self, on_whole: Callable[[], None]) -> None:
        """Nobody wants the rest: drop it as it comes, and tell when it has come."""
        self._discarding = True
        self._chunks.clear()
        self._on_whole = on_whole
        if self._paused:
            self._paused = False
            self._resume()

    def received(self, data: bytes) -> None:
        """From the channel: a part of the body."""
        if self._discarding:
            return
        self._chunks.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= HIGH_WATER:
            self._paused = True
            self._pause()  # each time: the transport may have gone on for reasons of its own
        self._wake()

    def ended(self) -> None:
        """From the channel: the body is whole."""
        self.whole = True
        self._wake()
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
