"""An `IAgent` for one backend: HTTP/1.1 on llhttp, over a pool of connections.

    request --> idle or new Connection --> Call: writes the request, reads the answer
                       ^                     |
                       +--- whole, and nothing after it

Strict where a mistake could mix up two answers (RFC 9112 sections 6.3 and 9.3): an answer with two
lengths, with a length and chunks, or with bytes after its end is an error, and its connection is
never used again; nor is one whose answer another reader could take for longer or shorter. A request
is never repeated: once a byte of it was written, its fate is unknown.
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import httptools
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectError, ConnectionDone
from twisted.internet.interfaces import (
    IConsumer,
    IDelayedCall,
    IHandshakeListener,
    IProtocol,
    IReactorTime,
    ISSLTransport,
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

from llmproxy.errors import BackendError
from llmproxy.framing import Fields, combined
from llmproxy.headers import Lines
from llmproxy.story import Wait

#: Largest header of an answer, and how much may come in a row of which nothing is its body: the
#: extensions of chunks, and trailers.
MAX_HEADER = 64 * 1024
#: Idle connections are dropped before the servers do it (uvicorn: 5 s), because a request that
#: meets a closing connection can't be repeated safely.
IDLE_S = 4.0
#: How many idle connections are kept.
MAX_IDLE = 1024
#: How much of a body in memory is written at once.
PIECE = 64 * 1024


class BadAnswer(Exception):
    """The backend's answer is not valid HTTP/1.1, or not only an answer."""


class NoHandshake(ConnectError):
    """TLS was not agreed upon, for these `reasons`: nothing of the request was sent."""

    def __init__(self, reasons: list[Failure]) -> None:
        super().__init__()
        self.reasons = reasons


class CodedAnswer(BackendError):
    """The backend compressed its answer, unasked: it can't be metered."""

    def __init__(self) -> None:
        super().__init__("The model's server sent an answer in a form that was not asked for.")


_WHOLE = Failure(ResponseDone())
_VERSIONS = ("1.1", "1.0")
# They have no body whatever their fields say (RFC 9112 section 6.3), which not everybody believes.
_BODILESS = (204, 205, 304)
_IDENTITY = (b"identity", b"")


@implementer(IBodyProducer)
class BytesBody:
    """A request body that is in memory. `on_sent` is called once it is on its way.

    It goes in pieces, at the pace of the connection: as one, each buffer would have a copy of it.
    """

    __slots__ = ("_consumer", "_done", "_paused", "_position", "data", "length", "on_sent")

    def __init__(self, data: bytes) -> None:
        self.length = len(data)
        self.data = data
        self.on_sent: Callable[[], None] = nothing
        self._consumer: IConsumer | None = None
        self._done: Deferred[None] | None = None
        self._position = 0
        self._paused = False

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        """See `IBodyProducer.startProducing`."""
        self._consumer = consumer
        done: Deferred[None] = Deferred()
        self._done = done
        self.on_sent()
        self.resumeProducing()
        return done

    def pauseProducing(self) -> None:
        """The connection is slower than we are."""
        self._paused = True

    def resumeProducing(self) -> None:
        """The connection takes more."""
        self._paused = False
        while self._consumer is not None and not self._paused:
            piece = self.data[self._position : self._position + PIECE]
            self._position += len(piece)
            self._consumer.write(piece)
            if self._position >= self.length and self._done is not None:
                self.stopProducing()
                self._done.callback(None)

    def stopProducing(self) -> None:
        """Nobody wants more of it; it is in memory no longer."""
        self._consumer = None
        self.data = b""


def nothing() -> None:
    """What is called when nobody wants to know."""


@implementer(IResponse)
class Response:
    """An answer whose header has come. Its body is held up until `deliverBody`.

    `fields`: the header's fields by their lower-case name. `phrase`, `length`: not told, as nobody
    needs them.
    """

    version = (b"HTTP", 1, 1)
    phrase = b""
    length: Any = UNKNOWN_LENGTH
    request: Any = None
    previousResponse: IResponse | None = None

    def __init__(self, connection: Connection, code: int, fields: Fields) -> None:
        self.code = code
        self.fields = fields
        self._connection = connection

    @property
    def headers(self) -> Headers:
        """The same as Twisted has it; to build it takes as long as to parse the answer."""
        return Headers({name: [value] for name, value in self.fields.items()})

    def deliverBody(self, protocol: IProtocol) -> None:
        """See `IResponse.deliverBody`."""
        self._connection.deliver(protocol)

    def at_once(self) -> bytes | None:
        """The body, if all of it has come already; it can be taken once, instead of delivered."""
        return self._connection.take()

    def setPreviousResponse(self, response: IResponse) -> None:
        """See `IResponse.setPreviousResponse`."""
        self.previousResponse = response


@implementer(IHandshakeListener)
class Connection(Protocol):
    """One connection, which asks one thing at a time.

    States: idle (in the pool); asking (`_answer` waits); answering (the body waits for its
    protocol, or goes to it); over (`_end` is set: the answer is whole, or broke off).
    """

    def __init__(self, agent: BackendAgent) -> None:
        self.idle_since = 0.0
        self._agent = agent
        self._parts: list[bytes] = []
        #: Called by llhttp with a part of the body, without its framing.
        self.on_body = self._parts.append
        self._parser: Any = httptools.HttpResponseParser(self)
        self.wire: Any = None  # a TCP or TLS transport and producer
        self._busy = False
        self._closed = False
        self._shakes = False  # what is written waits for the end of the handshake
        self._arrivals: select.poll | None = None
        self._reset()

    def _reset(self) -> None:
        """Nothing is known of the next answer."""
        self._answer: Deferred[IResponse] | None = None
        self.response: Response | None = None
        self._fields: list[tuple[bytes, bytes]] = []
        self._header_bytes = self._bare_bytes = 0
        self._framed = self._keep = self._held = False
        self._parts.clear()
        self._body: IProtocol | None = None
        self._end: Failure | None = None
        self._sent = False
        self._sending: IBodyProducer | None = None

    def connectionMade(self) -> None:
        """It is there."""
        self.wire = wire = cast(Any, self.transport)
        # The endpoint's wrapper has done its work, and would be in the way of each read.
        if getattr(getattr(wire, "protocol", None), "_wrappedProtocol", None) is self:
            wire.protocol = self
        if hasattr(wire, "setTcpNoDelay"):
            wire.setTcpNoDelay(True)
        self._shakes = ISSLTransport.providedBy(wire)
        descriptor = wire.fileno() if hasattr(wire, "fileno") else -1
        if descriptor >= 0:
            self._arrivals = select.poll()
            self._arrivals.register(descriptor, select.POLLIN)

    def handshakeCompleted(self) -> None:
        """TLS is spoken: the request goes out."""
        self._shakes = False

    def is_quiet(self) -> bool:
        """Nothing has come since its last answer, though it may not have been read yet: it would be
        taken for the next one, and the connection's end for the next request's."""
        return self._arrivals is None or not self._arrivals.poll(0)

    # -- the request -------------------------------------------------------------------------

    def ask(self, head: bytes, body: IBodyProducer | None) -> Deferred[IResponse]:
        """Send a request; fires with its answer. Cancel it to close the connection."""
        self._busy = True
        answer: Wait[IResponse] = Wait(self._cancelled)
        self._answer = answer
        if body is None:
            self._sent = True
            self.wire.write(head)
        elif isinstance(body, BytesBody) and body.length <= PIECE:  # nothing to wait for
            self._sent = True
            self.wire.write(head + body.data)
            body.on_sent()
        else:
            self.wire.write(head)
            self._send(body)
        return answer

    def _send(self, body: IBodyProducer) -> None:
        consumer = Chunks(self.wire) if body.length is UNKNOWN_LENGTH else self.wire
        self._sending = body
        self.wire.registerProducer(body, True)
        sending = body.startProducing(consumer)
        sending.addCallbacks(self._was_sent, self._was_not_sent, callbackArgs=(body, consumer))

    def _was_sent(self, _: object, body: IBodyProducer, consumer: object) -> None:
        if self._sending is body:
            self._sending = None
            self.wire.unregisterProducer()
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
            self.wire.unregisterProducer()
            sending.stopProducing()

    def _cancelled(self, _: Deferred[IResponse]) -> None:
        self._break(Failure(CancelledError()))

    # -- the answer, as llhttp tells it ------------------------------------------------------

    def on_message_begin(self) -> None:
        """A status line begins."""
        if self._end is not None or not self._busy:
            raise BadAnswer("bytes after the end of the answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the header; those behind the body (trailers) are of no interest."""
        if self.response is None:
            self._fields.append((name, value))
        else:
            self._keep = False  # llhttp takes one that speaks of framing for the next answer's

    def on_headers_complete(self) -> None:
        """The header is complete; that of an interim answer (1xx) is of no interest."""
        parser, fields = self._parser, combined(self._fields)
        code, version = parser.get_status_code(), parser.get_http_version()
        self._framed = b"content-length" in fields or b"transfer-encoding" in fields
        self._check(code, version, fields)
        if code >= 200:
            # HTTP/1.0 knows no chunks, whose ends its readers would not agree on.
            in_doubt = version == "1.0" or code in _BODILESS
            self._keep = parser.should_keep_alive() and not in_doubt
            self.response = Response(self, code, fields)
        self._fields = []

    def _check(self, code: int, version: str, fields: Fields) -> None:
        """Raises BadAnswer for what llhttp lets through, and others could read in another way."""
        if version not in _VERSIONS:
            raise BadAnswer("not HTTP/1.1")
        if code < 200 and (code < 100 or self._framed):
            raise BadAnswer("an interim answer with a body")
        if fields.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
            raise BadAnswer("a transfer coding that was not asked for")

    def on_message_complete(self) -> None:
        """The answer is whole."""
        if self.response is not None:
            self._end = _WHOLE

    # -- the answer, as it goes on -----------------------------------------------------------

    def dataReceived(self, data: bytes) -> None:
        """Bytes of an answer, or of a server that speaks unasked."""
        if self._body is None and not self._can_be_of_answer(data):
            return
        try:
            self._parser.feed_data(data)
        except Exception as error:  # llhttp's, and those of the callbacks above
            self._break(Failure(BadAnswer(str(error))))
        if self._answer is not None:
            self._head_went_on(self._answer)
            return
        parts, body = self._parts, self._body
        if not parts:
            self._no_part_came(len(data))
        else:
            self._bare_bytes = 0
            if len(parts) == 1 and body is not None and self._end is None:  # as a rule
                body.dataReceived(parts.pop())
                return
        self._hand_over()

    def _can_be_of_answer(self, data: bytes) -> bool:
        """Whether it is to be parsed. If not, this is the connection's end."""
        if not self._busy:
            self._agent.forget(self)
            self.abort()
            return False
        if self._end is not None:
            self._break(Failure(BadAnswer("bytes after the end of the answer")))
            return False
        if self.response is None:
            # llhttp takes empty lines, RTSP and ICE too.
            if not self._header_bytes and data[:1] != b"H":
                self._break(Failure(BadAnswer("not HTTP")))
                return False
            self._header_bytes += len(data)
        return True

    def _no_part_came(self, size: int) -> None:
        self._bare_bytes += size
        if self._bare_bytes > MAX_HEADER:
            self._break(Failure(BadAnswer("too much that is no body")))

    def _head_went_on(self, answer: Deferred[IResponse]) -> None:
        response = self.response
        if response is None:
            if self._header_bytes > MAX_HEADER and self._end is None:
                self._break(Failure(BadAnswer("the header is too large")))
            return
        self._answer = None
        if response.fields.get(b"content-encoding", b"identity").lower() not in _IDENTITY:
            self._end = self._end or _WHOLE  # of it, no more is wanted
            self.abort()
            self._send_no_more()
            answer.errback(Failure(CodedAnswer()))
            return
        answer.callback(response)
        waits = self.response is response and self._body is None and self._end is None
        if waits and not self._closed:
            self.hold(True)  # until somebody wants the body

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """It has ended, and with it a body that has no other end."""
        self._closed = True
        self._agent.forget(self)
        if self._busy and self._end is None:
            if self.response is not None and not self._framed:
                self._end = Failure(PotentialDataLoss())
                self._hand_over()
            else:
                self._break(reason)
        self._parser = None  # they know each other: else only the garbage collector would end them

    def hold(self, hold: bool) -> None:
        """Stop reading from the backend, or go on."""
        self._held = hold
        if hold:
            self.wire.pauseProducing()
        else:
            self.wire.resumeProducing()

    def deliver(self, protocol: IProtocol) -> None:
        """Hand the body to `protocol` as it comes."""
        self._body = protocol
        protocol.makeConnection(cast(Any, BodyTransport(self)))
        if self._held and self._end is None:
            self.hold(False)
        self._hand_over()

    def _hand_over(self) -> None:
        body = self._body
        if body is None:
            return
        parts = self._parts
        if parts:
            if len(parts) == 1:
                data = parts.pop()
            else:
                data = b"".join(parts)
                parts.clear()
            body.dataReceived(data)
        if self._end is not None and self._body is not None:
            self._finish(body, self._end)

    def take(self) -> bytes | None:
        """The whole body, if it is here; the connection is free then."""
        if self._end is not _WHOLE or self._body is not None:
            return None
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._free(_WHOLE)
        return body

    def _finish(self, body: IProtocol, end: Failure) -> None:
        self._body = None
        self._free(end)
        body.connectionLost(end)

    def _free(self, end: Failure) -> None:
        """The answer has ended: the connection can serve again, or can't."""
        if self._sending is not None:
            self._send_no_more()
        # An answer that came before all was sent leaves a connection that can't be told apart.
        reusable = end is _WHOLE and self._sent and self._keep and self._framed
        if reusable and not self._closed:
            self._busy = False
            if self._held:  # by a slow client
                self.hold(False)
            self._reset()
            self._agent.put_back(self)
        else:
            self.abort()

    def _break(self, reason: Failure) -> None:
        """This can't come to a good end: close, and tell whoever waits, once."""
        self._keep = False
        self._send_no_more()
        self.abort()
        if self._end is not None:
            return
        self._end = Failure(ResponseFailed([reason]))
        if self.response is None and self._answer is not None:
            answer, self._answer = self._answer, None
            error = NoHandshake if self._shakes else ResponseNeverReceived
            answer.errback(Failure(error([reason])))
        else:
            self._hand_over()

    def stop(self) -> None:
        """Nobody wants the rest of the answer."""
        self._break(Failure(ConnectionDone()))

    def abort(self) -> None:
        """Close it, whatever is under way."""
        if self.wire is not None and not self._closed:
            self.wire.abortConnection()


class BodyTransport:
    """What a body's protocol may do to the connection, as in `twisted.web`; nothing once the body
    has ended, as the connection may serve another one by then."""

    __slots__ = ("_connection", "_response")

    disconnecting = False

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._response = connection.response

    def pauseProducing(self) -> None:
        """Hold the backend up."""
        if self._connection.response is self._response:
            self._connection.hold(True)

    def resumeProducing(self) -> None:
        """Go on."""
        if self._connection.response is self._response:
            self._connection.hold(False)

    def stopProducing(self) -> None:
        """Close the connection."""
        if self._connection.response is self._response:
            self._connection.stop()

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


@implementer(IAgent)
class BackendAgent:
    """Requests to one backend.

    `origin`: scheme, host and port as in the URLs that `request` gets. `endpoint`: how to connect.
    `served` is given the transport of each connection that has served for the first time.
    """

    def __init__(
        self,
        origin: bytes,
        endpoint: IStreamClientEndpoint,
        clock: IReactorTime,
        served: Callable[[Any], None] | None = None,
    ) -> None:
        self._origin = origin
        self._served = served
        self._starts: dict[tuple[bytes, bytes], bytes] = {}
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
        start = self._starts.get((method, uri)) or self._start(method, uri)
        if isinstance(headers, Lines):
            lines = headers.lines
        else:
            sent = (headers or Headers()).getAllRawHeaders()
            lines = b"".join(b"\r\n%b: %b" % (name, value) for name, all in sent for value in all)
        if body is None:
            return b"%b%b\r\n\r\n" % (start, lines)
        if body.length is UNKNOWN_LENGTH:
            return b"%b\r\nTransfer-Encoding: chunked%b\r\n\r\n" % (start, lines)
        return b"%b\r\nContent-Length: %d%b\r\n\r\n" % (start, body.length, lines)

    def _start(self, method: bytes, uri: bytes) -> bytes:
        """The first line and the Host; the same for all requests to this place."""
        if not uri.startswith(self._origin):
            raise ValueError("a request to another backend")
        host = self._origin.partition(b"://")[2]
        target = uri[len(self._origin) :] or b"/"
        if target[:1] != b"/":
            raise ValueError("a request to another backend")
        start = b"%b %b HTTP/1.1\r\nHost: %b" % (method, target, host)
        self._starts[method, uri] = start
        return start

    # -- the pool --------------------------------------------------------------------------

    def _take(self) -> Connection | None:
        """The connection that was used last: the others may grow old and go."""
        while self._idle and self._clock.seconds() - self._idle[-1].idle_since < IDLE_S:
            connection = self._idle.pop()
            if connection.is_quiet():
                return connection
            connection.abort()
        return None

    def put_back(self, connection: Connection) -> None:
        """It can serve again."""
        if self._served is not None and not connection.idle_since:
            self._served(connection.wire)
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
