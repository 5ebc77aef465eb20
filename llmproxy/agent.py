"""An `IAgent` for one backend: HTTP/1.1 on llhttp, over a pool of connections.

    request --> idle or new Connection --> Call: writes the request, reads the answer
                       ^                     |
                       +--- whole, and nothing after it

Strict where a mistake could mix up two answers (RFC 9112 sections 6.3 and 9.3): an answer with two
lengths, with a length and chunks, or with bytes after its end is an error, and its connection is
never used again. A request is never repeated: once a byte of it was written, its fate is unknown.
"""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import httptools
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import (
    IDelayedCall,
    IProtocol,
    IReactorTime,
    IStreamClientEndpoint,
    ITCPTransport,
)
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone, ResponseFailed, ResponseNeverReceived
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IAgent, IBodyProducer, IResponse
from zope.interface import implementer

#: Largest header of an answer.
MAX_HEADER = 64 * 1024
#: Idle connections are dropped before the servers do it (uvicorn: 5 s), because a request that
#: meets a closing connection can't be repeated safely.
IDLE_S = 4.0
#: How many idle connections are kept.
MAX_IDLE = 1024


class BadAnswer(Exception):
    """The backend's answer is not valid HTTP/1.1, or not only an answer."""


@implementer(IResponse)
class Response:
    """An answer whose header has come. Its body is held up until `deliverBody`."""

    version = (b"HTTP", 1, 1)
    length: Any = UNKNOWN_LENGTH
    request: Any = None
    previousResponse: IResponse | None = None

    def __init__(self, call: Call, code: int, phrase: bytes, headers: Headers) -> None:
        self.code = code
        self.phrase = phrase
        self.headers = headers
        self._call = call

    def deliverBody(self, protocol: IProtocol) -> None:
        """See `IResponse.deliverBody`."""
        self._call.deliver(protocol)

    def setPreviousResponse(self, response: IResponse) -> None:
        """See `IResponse.setPreviousResponse`."""
        self.previousResponse = response


class Call:
    """One request and its answer, on one connection.

    States: asking (`answer` has not fired); answering (the body waits for its protocol, or goes to
    it); over (whole, failed or stopped; the protocol was told).
    """

    def __init__(self, connection: Connection) -> None:
        self.answer: Deferred[IResponse] = Deferred(self._cancelled)
        self._connection = connection
        self._transport: Any = connection.transport  # a TCP or TLS transport and producer
        self._parser = httptools.HttpResponseParser(self)
        self._fields: list[tuple[bytes, bytes]] = []
        self._phrase = b""
        self._header_bytes = 0
        self._response: Response | None = None
        self._framed = False
        self._keep = False
        self._parts: list[bytes] = []
        self._body: IProtocol | None = None
        self._end: Failure | None = None
        self._sent = False
        self._sending: IBodyProducer | None = None

    # -- the request -----------------------------------------------------------------------

    def send(self, head: bytes, body: IBodyProducer | None) -> None:
        """Write the request."""
        self._transport.write(head)
        if body is None:
            self._sent = True
            return
        consumer = Chunks(self._transport) if body.length is UNKNOWN_LENGTH else self._transport
        self._sending = body
        self._transport.registerProducer(body, True)
        sending = body.startProducing(consumer)
        sending.addCallbacks(self._was_sent, self._was_not_sent, callbackArgs=(consumer,))

    def _was_sent(self, _: object, consumer: object) -> None:
        if self._sending is not None:
            self._sending = None
            self._transport.unregisterProducer()
            if isinstance(consumer, Chunks):
                consumer.finish()
            self._sent = True

    def _was_not_sent(self, failure: Failure) -> None:
        """The body broke off on our side: the backend must not take it for whole."""
        self._sending = None
        self._break(failure)

    def _send_no_more(self) -> None:
        sending, self._sending = self._sending, None
        if sending is not None:
            self._transport.unregisterProducer()
            sending.stopProducing()

    def _cancelled(self, _: Deferred[IResponse]) -> None:
        self._break(Failure(CancelledError()))

    # -- the answer, as llhttp tells it ----------------------------------------------------

    def on_message_begin(self) -> None:
        """A status line begins."""
        if self._end is not None:
            raise BadAnswer("bytes after the end of the answer")

    def on_status(self, phrase: bytes) -> None:
        """The reason phrase, or a part of it."""
        self._phrase += phrase

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field."""
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        """The header is complete; that of an interim answer (1xx) is of no interest."""
        code = self._parser.get_status_code()
        if code >= 200:
            headers = Headers()
            for name, value in self._fields:
                headers.addRawHeader(name, value)
            has = headers.hasHeader
            self._framed = has(b"Content-Length") or has(b"Transfer-Encoding")
            self._keep = self._parser.should_keep_alive()
            self._response = Response(self, code, self._phrase, headers)
        self._fields, self._phrase = [], b""

    def on_body(self, data: bytes) -> None:
        """A part of the body, without its framing."""
        self._parts.append(data)

    def on_message_complete(self) -> None:
        """The answer is whole."""
        if self._response is not None:
            self._end = Failure(ResponseDone())

    # -- the answer, as it goes on ---------------------------------------------------------

    def received(self, data: bytes) -> None:
        """Bytes from the backend."""
        if self._end is not None:
            self._break(Failure(BadAnswer("bytes after the end of the answer")))
            return
        is_header = self._response is None
        if is_header:
            self._header_bytes += len(data)
        try:
            self._parser.feed_data(data)
            if self._response is None and self._header_bytes > MAX_HEADER:
                raise BadAnswer("the header is too large")
        except Exception as error:  # llhttp's, and those of the callbacks above
            self._break(Failure(BadAnswer(str(error))))
        if is_header and self._response is not None:
            if self._end is None:
                self._transport.pauseProducing()  # until somebody wants the body
            self.answer.callback(self._response)
        self._hand_over()

    def lost(self, reason: Failure) -> None:
        """The connection has ended, and with it a body that has no other end."""
        if self._response is not None and not self._framed and self._end is None:
            self._end = Failure(PotentialDataLoss())
            self._hand_over()
        elif self._end is None:
            self._break(reason)

    def deliver(self, protocol: IProtocol) -> None:
        """Hand the body to `protocol` as it comes."""
        self._body = protocol
        protocol.makeConnection(cast(Any, BodyTransport(self, self._transport)))
        if self._end is None:
            self._transport.resumeProducing()
        self._hand_over()

    def _hand_over(self) -> None:
        if self._body is None:
            return
        parts, self._parts = self._parts, []
        if parts:
            self._body.dataReceived(parts[0] if len(parts) == 1 else b"".join(parts))
        if self._end is not None and self._body is not None:
            self._send_no_more()
            body, self._body = self._body, None
            # An answer that came before all was sent leaves a connection that can't be told apart.
            whole = self._end.check(ResponseDone) is not None
            self._connection.release(whole and self._sent and self._keep and self._framed)
            body.connectionLost(self._end)

    def stop(self) -> None:
        """Nobody wants the rest of the answer."""
        self._break(Failure(ConnectionDone()))

    def _break(self, reason: Failure) -> None:
        """This can't come to a good end: close, and tell whoever waits, once."""
        self._keep = False
        self._send_no_more()
        self._connection.abort()
        if self._end is not None:
            return
        self._end = Failure(ResponseFailed([reason]))
        if self._response is None:
            self.answer.errback(Failure(ResponseNeverReceived([reason])))
        else:
            self._hand_over()


class BodyTransport:
    """What a body's protocol may do to the connection, as in `twisted.web`."""

    disconnecting = False

    def __init__(self, call: Call, transport: Any) -> None:
        self._call = call
        self._transport = transport

    def pauseProducing(self) -> None:
        """Hold the backend up."""
        self._transport.pauseProducing()

    def resumeProducing(self) -> None:
        """Go on."""
        self._transport.resumeProducing()

    def stopProducing(self) -> None:
        """Close the connection."""
        self._call.stop()

    loseConnection = stopProducing


class Chunks:
    """A consumer that writes each piece as a chunk (RFC 9112 section 7.1)."""

    def __init__(self, transport: ITCPTransport) -> None:
        self._transport = transport

    def write(self, data: bytes) -> None:
        """One chunk; nothing for no data, as an empty chunk is the end."""
        if data:
            self._transport.writeSequence((b"%x\r\n" % len(data), data, b"\r\n"))

    def finish(self) -> None:
        """The end of the body."""
        self._transport.write(b"0\r\n\r\n")


class Connection(Protocol):
    """One connection: idle in the pool, or serving its call."""

    def __init__(self, agent: BackendAgent) -> None:
        self.idle_since = 0.0
        self._agent = agent
        self._call: Call | None = None

    def ask(self, head: bytes, body: IBodyProducer | None) -> Deferred[IResponse]:
        """Send a request; fires with its answer. Cancel it to close the connection."""
        self._call = call = Call(self)
        call.send(head, body)
        return call.answer

    def release(self, reusable: bool) -> None:
        """The call is over, and leaves a connection that can serve again, or can't."""
        if reusable:
            self._call = None
            cast(Any, self.transport).resumeProducing()  # a slow client may have held it up
            self._agent.put_back(self)
        else:
            self.abort()

    def abort(self) -> None:
        """Close it, whatever is under way."""
        if self.transport is not None:
            cast(ITCPTransport, self.transport).abortConnection()

    def dataReceived(self, data: bytes) -> None:
        """Bytes of an answer, or of a server that speaks unasked."""
        if self._call is None:
            self._agent.forget(self)
            self.abort()
        else:
            self._call.received(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """It has ended."""
        self._agent.forget(self)
        if self._call is not None:
            self._call.lost(reason)


@implementer(IAgent)
class BackendAgent:
    """Requests to one backend.

    `origin`: scheme, host and port as in the URLs that `request` gets. `endpoint`: how to connect.
    """

    def __init__(self, origin: bytes, endpoint: IStreamClientEndpoint, clock: IReactorTime) -> None:
        self._origin = origin
        self._host = origin.partition(b"://")[2]
        self._endpoint = endpoint
        self._clock = clock
        self._factory = Factory.forProtocol(lambda: Connection(self))
        self._factory.noisy = False
        self._idle: deque[Connection] = deque()
        self._sweeper: IDelayedCall | None = None
        self._closed = False

    def request(
        self,
        method: bytes,
        uri: bytes,
        headers: Headers | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> Deferred[IResponse]:
        """See `IAgent.request`. Fails with what `endpoint` fails with when nothing was sent."""
        head = self._head(method, uri, headers, bodyProducer)
        connection = self._take()
        if connection is not None:
            return connection.ask(head, bodyProducer)
        return Deferred.fromCoroutine(self._connect(head, bodyProducer))

    async def _connect(self, head: bytes, body: IBodyProducer | None) -> IResponse:
        connection = cast(Connection, await self._endpoint.connect(self._factory))
        return await connection.ask(head, body)

    def _head(
        self, method: bytes, uri: bytes, headers: Headers | None, body: IBodyProducer | None
    ) -> bytes:
        lines = [b"%b %b HTTP/1.1\r\nHost: %b" % (method, self._target(uri), self._host)]
        if body is not None:
            unknown = body.length is UNKNOWN_LENGTH
            framing = b"Transfer-Encoding: chunked" if unknown else b"Content-Length: %d"
            lines.append(framing if unknown else framing % body.length)
        for name, values in (headers or Headers()).getAllRawHeaders():
            lines.extend(b"%b: %b" % (name, value) for value in values)
        return b"\r\n".join((*lines, b"", b""))

    def _target(self, uri: bytes) -> bytes:
        if not uri.startswith(self._origin):
            raise ValueError("a request to another backend")
        return uri[len(self._origin) :] or b"/"

    # -- the pool --------------------------------------------------------------------------

    def _take(self) -> Connection | None:
        """The connection that was used last: the others may grow old and go."""
        if self._idle and self._clock.seconds() - self._idle[-1].idle_since < IDLE_S:
            return self._idle.pop()
        return None

    def put_back(self, connection: Connection) -> None:
        """It can serve again."""
        if self._closed or len(self._idle) >= MAX_IDLE:
            connection.abort()
            return
        connection.idle_since = self._clock.seconds()
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = self._clock.callLater(IDLE_S, self._sweep)

    def forget(self, connection: Connection) -> None:
        """It can't."""
        if connection in self._idle:
            self._idle.remove(connection)

    def _sweep(self) -> None:
        """Close what has been idle for too long."""
        self._sweeper = None
        now = self._clock.seconds()
        while self._idle and now - self._idle[0].idle_since >= IDLE_S:
            self._idle.popleft().abort()
        if self._idle:
            oldest = self._idle[0].idle_since
            self._sweeper = self._clock.callLater(oldest + IDLE_S - now, self._sweep)

    def close(self) -> None:
        """Close the idle connections now, and the others once they have served."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        while self._idle:
            self._idle.pop().abort()
