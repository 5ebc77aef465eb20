"""Twisted's own HTTP channel in the place of ours, for comparison (`LLMPROXY_HTTP=twisted`).

It parses; the requests that come out of it are the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from twisted.internet.interfaces import IAddress, ITransport
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from twisted.web.http_headers import Headers

from llmproxy import framing
from llmproxy.channel import IDLE_TIMEOUT_S, LINGER_S, Message
from llmproxy.errors import BadRequest, ProxyError
from llmproxy.upload import Upload

if TYPE_CHECKING:
    from llmproxy.downstream import Producer
    from llmproxy.site import Request, Site

_CONTROL = re.compile(rb"[\x00-\x08\n-\x1f\x7f]")


class Parsed:
    """What Twisted's channel takes for a request: it gathers one, and hands its body over."""

    def __init__(self, channel: TwistedChannel) -> None:
        self.requestHeaders = Headers()
        self.responseHeaders = Headers()
        self.request: Request | None = None
        self._channel = channel
        self._upload: Upload | None = None

    def parseCookies(self) -> None:
        """There are none for us."""

    def gotLength(self, length: int | None) -> None:
        """The header is complete: serve the request."""
        channel, message = self._channel, Message()
        message.method, message.target, message.version = channel.request_line()
        sent = self.requestHeaders.getAllRawHeaders()
        message.fields = framing.combined([(n, value) for n, values in sent for value in values])
        self._upload = message.upload = Upload(length, channel.site.clock, channel)
        try:
            framing.check(message.method, message.target, message.version, message.fields)
        except ProxyError as error:
            channel.refuse(error)
            return
        channel.site.room.resting.pop(channel, None)
        self.request = channel.site.new_request(channel, message)
        self.request.process()

    def handleContentChunk(self, data: bytes) -> None:
        """A part of the body."""
        if self._upload is not None:
            self._upload.received(data)

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """The body is whole."""
        if self._upload is not None:
            self._upload.ended()

    def connectionLost(self, reason: Failure) -> None:
        """The client is gone, or was cut off."""
        if self.request is not None:
            self.request.connectionLost()


class TwistedChannel(HTTPChannel):
    """It tells a request's first line early, and leaves `100 Continue` to the request."""

    MAX_LENGTH = framing.MAX_HEADER
    totalHeadersSize = framing.MAX_HEADER
    maxHeaders = framing.MAX_FIELDS

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.source: str | None = None
        channel: Any = self  # these are Twisted's ways to configure it
        channel.requestFactory = lambda *_: Parsed(self)
        channel.callLater = site.clock.callLater
        self.timeOut = int(IDLE_TIMEOUT_S)
        self.send: Callable[[bytes], None] = lambda data: None
        self._retiring = False
        self._gone = False

    def connectionMade(self) -> None:
        """A client came."""
        super().connectionMade()
        self.send = cast(ITransport, self.transport).write
        self.site.joined(self)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """It went."""
        self._gone = True
        self.site.left(self)
        super().connectionLost(reason)

    # -- what the site and the request ask of it ----------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Nothing has been asked that waits for an answer."""
        return not self.requests

    @property
    def keep(self) -> bool:
        """See `IsChannel.keep`."""
        return bool(self.persistent) and not self._retiring

    @property
    def peer(self) -> IAddress:
        """See `IsChannel.peer`."""
        return cast(ITransport, self.transport).getPeer()

    def retire(self) -> None:
        """Close after the answer that is due, or now if none is."""
        self._retiring = True
        self.persistent = False
        if self.is_idle:
            self.close()

    def part(self, idle_s: float) -> None:
        """See `Channel.part`; this one does not wait for a next request."""
        self.retire()

    def done(self) -> None:
        """See `IsChannel.done`."""
        if self._retiring:
            self.persistent = False
        if self.requests:
            self.requestDone(self.requests[0])
        if self.is_idle and not self._gone:
            self.site.room.resting[self] = None

    def close(self, linger_s: float = LINGER_S) -> None:
        """See `IsChannel.close`."""
        if self._abortingCall is None and not self._gone:
            self._abortingCall = self.callLater(linger_s, self.forceAbortClient)
        super().loseConnection()

    def loseConnection(self) -> None:
        """Twisted's own decisions to close, too."""
        self.close()

    def abort(self) -> None:
        """See `IsChannel.abort`."""
        self.forceAbortClient()

    def forceAbortClient(self) -> None:
        """Cut the client off now."""
        if self._abortingCall is not None and self._abortingCall.active():
            self._abortingCall.cancel()
        super().forceAbortClient()

    def attach(self, producer: Producer) -> None:
        """See `IsChannel.attach`."""
        self.registerProducer(producer, True)

    def detach(self) -> None:
        """See `IsChannel.detach`."""
        self.unregisterProducer()

    def hold_up(self, hold: bool) -> None:
        """See `Flow.hold_up`."""
        if hold:
            self.setTimeout(None)  # the silence is ours
            self._networkProducer.pauseProducing()
        else:
            if not self._handlingRequest:
                self.setTimeout(int(IDLE_TIMEOUT_S))
            self._networkProducer.resumeProducing()

    def invite_body(self) -> None:
        """See `Flow.invite_body`."""
        parsed = cast(Any, self.requests[0]) if self.requests else None
        request = parsed.request if parsed is not None else None
        if request is not None and request.fields.pop(b"expect", b"") and not request.started:
            super()._send100Continue()

    # -- what Twisted's channel asks of itself --------------------------------------------------

    def request_line(self) -> tuple[bytes, bytes, bytes]:
        """Method, target and version of the request whose header has just come."""
        return self._command, self._path, self._version

    def checkPersistence(self, request: Any, version: bytes) -> bool:
        """Whether the connection outlives this request, as Twisted asks once it has its header."""
        kept: bool = not self._retiring and super().checkPersistence(request, version)
        return kept

    def allContentReceived(self) -> None:
        """The body is whole: Twisted takes the timeout off, and puts it back after the answer."""
        self.setTimeout(int(IDLE_TIMEOUT_S))  # a hold may have taken it off already
        super().allContentReceived()

    def _send100Continue(self) -> None:
        """Not before somebody wants the body: see `invite_body`."""

    def lineReceived(self, line: bytes) -> None:
        """A line of a header. Twisted would unfold it, and take control characters."""
        if line[:1] in (b" ", b"\t") or _CONTROL.search(line) is not None:
            self.refuse(BadRequest("The request is not valid HTTP/1.1."))
        else:
            super().lineReceived(line)

    def lineLengthExceeded(self, line: bytes) -> None:
        """A line of a header has no end in sight."""
        # Twisted has `_command` once the first line is there.
        self.refuse(framing.too_large() if hasattr(self, "_command") else framing.too_long())

    def _respondToBadRequestAndDisconnect(self) -> None:
        """What can't be parsed is answered too."""
        if (
            self._receivedHeaderSize > self.totalHeadersSize
            or self._receivedHeaderCount > self.maxHeaders
        ):
            self.refuse(framing.too_large())
        else:
            self.refuse(BadRequest("The request is not valid HTTP/1.1."))

    def refuse(self, error: ProxyError) -> None:
        """Answer what is no request, and close."""
        self.send(self.site.malformed(error, None))
        self.close()
