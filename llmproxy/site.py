"""The public HTTP server: Twisted's channel, with requests that are served from their header on.

    Channel --header--> Request.gotLength --> Resource tree --> Exchange
            --body----> Request.upload  (pulled by the exchange)

Twisted serves a request when its body is whole, which it keeps in memory or in a file. Here a
request is served at once: keys and sizes are checked before a body is invited, and audio streams
through.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from io import BytesIO
from typing import cast

from twisted.internet.interfaces import IDelayedCall, IReactorTime, ITransport
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web import server
from twisted.web.http import HTTPChannel, datetimeToString
from twisted.web.http import Request as HTTPRequest
from twisted.web.resource import IResource

from llmproxy import __version__, dialects
from llmproxy.endpoints import Dialect
from llmproxy.errors import CLIENT_GONE, BadRequest, HeaderTooLarge, ProxyError, TargetTooLong
from llmproxy.ids import new_request_id
from llmproxy.metrics import Metrics
from llmproxy.upload import Upload

#: An idle connection is closed after this time.
IDLE_TIMEOUT_S = 60
#: How long a client may take what is buffered for it when its connection is to be closed.
LINGER_S = 15.0
#: How long the rest of a refused body is waited for.
DISCARD_S = 2.0
#: How much of a path that is not served is logged.
MAX_LOGGED = 200
log = Logger()

SERVER = b"llmproxy/" + __version__.encode()


class Request(server.Request):
    """A request with an id, whose body is pulled, and whose answer can be cut short.

    States: reading and answering go on at once; `end` waits for the body, because the connection
    can't be used again before that.
    """

    upload: Upload
    site: Site
    channel: Channel

    def gotLength(self, length: int | None) -> None:
        """The header is complete: serve the request."""
        channel = self.channel
        self.rid = new_request_id()
        self.content = BytesIO()  # Twisted's own place for a body stays empty
        self._served = False
        self._lingering: IDelayedCall | None = None
        site = channel.site
        self.upload = Upload(
            length,
            site.clock,
            pause=lambda: channel.hold_up(True),
            resume=lambda: channel.hold_up(False),
            invite=self._invite,
        )
        self.method, self.uri, self.clientproto = channel.request_line()
        self.path = self.uri.partition(b"?")[0]
        self.args = {}
        self._began = site.monotonic()
        site.began(self)
        self.process()

    def process(self) -> None:
        """Give the request to its resource, found by the raw path: no other spelling is it."""
        self.site = self.channel.site
        self.defaultContentType = None
        self.setHeader(b"Server", SERVER)
        self.setHeader(b"Date", self.site.date())
        self.setHeader(b"X-Request-Id", self.rid.encode())
        self.site.add_cors(self)
        self.prepath, self.postpath = [], self.path.split(b"/")
        try:
            self.render(self.site.getResourceFor(self))
        except Exception:
            log.failure("request {rid} failed", rid=self.rid)
            self.refuse(Dialect.OPENAI, ProxyError("Something went wrong on our side."))

    def handleContentChunk(self, data: bytes) -> None:
        """A part of the body."""
        self.upload.received(data)

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """The body is whole."""
        self.upload.ended()

    def _invite(self) -> None:
        """The body is wanted (RFC 9110 section 10.1.1)."""
        expected = self.requestHeaders.getRawHeaders(b"Expect")
        if expected and not self.upload.whole and self.channel is not None:
            self.requestHeaders.removeHeader(b"Expect")
            self.channel.invite_body()

    def refuse(self, dialect: Dialect, error: ProxyError) -> None:
        """Answer with an error at once."""
        self.log_refusal(error)
        status, fields, body = dialects.error_answer(dialect, error)
        self.setResponseCode(status)
        for name, value in fields:
            self.setHeader(name, value)
        self.setHeader(b"Content-Length", b"%d" % len(body))
        self.write(body)
        self.end()

    def log_refusal(
        self, error: ProxyError, key_id: str | None = None, model: str | None = None
    ) -> None:
        """The line for a request that was sent to no backend."""
        log.info(
            "refused {rid} key={key_id} model={model} path={path} status={status} code={code}"
            " ms={duration_ms}",
            rid=self.rid,
            key_id=key_id,
            model=model,
            path=self.path[:MAX_LOGGED].decode("ascii", "replace"),
            status=error.status,
            code=error.code,
            duration_ms=round(1000 * (self.site.monotonic() - self._began), 1),
        )

    def end(self) -> None:
        """The answer is complete; the rest of the request's body, if any, is dropped."""
        if self.upload.whole:
            self.finish()
            return
        # Closing at once could take the answer away from a client that is still sending.
        self._lingering = self.site.clock.callLater(DISCARD_S, self._close)
        self.upload.discard(self._drained)

    def _drained(self) -> None:
        self._stop_lingering()
        if self.channel is not None and not self.finished:
            self.finish()

    def _close(self) -> None:
        """The connection's next bytes would not be a request."""
        self._lingering = None
        self.cut(DISCARD_S)

    def cut(self, linger_s: float) -> None:
        """Close the connection without the end of the answer, after sending what is buffered."""
        channel = self.channel
        if channel is None or self.finished or self._disconnected:
            return
        if linger_s and self.clientproto == b"HTTP/1.1":
            channel.loseConnection(linger_s)
        else:
            channel.forceAbortClient()

    def _stop_lingering(self) -> None:
        if self._lingering is not None and self._lingering.active():
            self._lingering.cancel()
        self._lingering = None

    def finish(self) -> None:
        """The answer is out, and the request whole."""
        self._account()
        super().finish()

    def connectionLost(self, reason: Failure) -> None:
        """The client is gone, or was cut off."""
        if hasattr(self, "upload"):  # else the header was not complete
            self._stop_lingering()
            self._account()
        super().connectionLost(reason)
        if hasattr(self, "upload"):
            self.upload.lost()  # who waits for it must find the client gone already

    def _account(self) -> None:
        if not self._served:
            self._served = True
            self.site.ended(self, self.site.monotonic() - self._began)

    def __repr__(self) -> str:
        return f"<Request {getattr(self, 'rid', '-')}>"  # Twisted's would show the query


class Channel(HTTPChannel):
    """Twisted's channel; it tells a request's first line early, and leaves `100 Continue` to it."""

    site: Site
    _retiring = False
    _gone = False

    def connectionMade(self) -> None:
        """A client came."""
        super().connectionMade()
        self.site.connections.add(self)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """It went."""
        self._gone = True
        self.site.connections.discard(self)
        super().connectionLost(reason)

    def loseConnection(self, linger_s: float = LINGER_S) -> None:
        """Close once all is sent. A client that does not take it within `linger_s` is cut off: it
        is not read from any more, so nothing else would tell that it has gone."""
        if self._abortingCall is None and not self._gone:
            self._abortingCall = self.callLater(linger_s, self.forceAbortClient)
        super().loseConnection()

    def forceAbortClient(self) -> None:
        """Cut the client off now."""
        if self._abortingCall is not None and self._abortingCall.active():
            self._abortingCall.cancel()
        super().forceAbortClient()

    @property
    def is_idle(self) -> bool:
        """Nothing has been asked that waits for an answer."""
        return not self.requests

    def retire(self) -> None:
        """Close after the answer that is due, or now if none is."""
        self._retiring = True
        self.persistent = False
        if self.is_idle:
            self.loseConnection()
        for request in self.requests:
            if not request.startedWriting:
                request.setHeader(b"Connection", b"close")

    def checkPersistence(self, request: HTTPRequest, version: bytes) -> bool:
        """Whether the connection outlives this request, as Twisted asks once it has its header."""
        if self._retiring:
            request.setHeader(b"Connection", b"close")
            return False
        kept: bool = super().checkPersistence(request, version)
        return kept

    def request_line(self) -> tuple[bytes, bytes, bytes]:
        """Method, target and version of the request whose header has just come."""
        return self._command, self._path, self._version

    def hold_up(self, hold: bool) -> None:
        """Stop reading the client's body, or go on."""
        if hold:
            self.setTimeout(None)  # the silence is ours
            self._networkProducer.pauseProducing()
        else:
            if not self._handlingRequest:
                self.setTimeout(self.site.timeOut)
            self._networkProducer.resumeProducing()

    def allContentReceived(self) -> None:
        """The body is whole: Twisted takes the timeout off, and puts it back after the answer."""
        self.setTimeout(self.site.timeOut)  # a hold may have taken it off already
        super().allContentReceived()

    def invite_body(self) -> None:
        """Tell a client that waits for it to send its body."""
        super()._send100Continue()

    def _send100Continue(self) -> None:
        """Not before somebody wants the body: see `Request._invite`."""

    def lineLengthExceeded(self, line: bytes) -> None:
        """A line of a header has no end in sight."""
        if hasattr(self, "_command"):  # as it has once the first line is there
            self._refuse(HeaderTooLarge("The request's header is too large."))
        else:
            self._refuse(TargetTooLong("The request's target is too long."))

    def _respondToBadRequestAndDisconnect(self) -> None:
        """What can't be parsed is answered too."""
        if (
            self._receivedHeaderSize > self.totalHeadersSize
            or self._receivedHeaderCount > self.maxHeaders
        ):
            self._refuse(HeaderTooLarge("The request's header is too large."))
        else:
            self._refuse(BadRequest("The request is not valid HTTP/1.1."))

    def _refuse(self, error: ProxyError) -> None:
        """Answer what is no request, in the most common dialect, and close."""
        reason = HTTPStatus(error.status).phrase.encode()
        body = dialects.error_body(Dialect.OPENAI, error)
        rid = new_request_id().encode()
        cast(ITransport, self.transport).write(
            b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\nX-Request-Id: %b\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%b"
            % (error.status, reason, rid, len(body), body)
        )
        self.loseConnection()


class Site(server.Site):
    """The public site. `origin`: the value of Access-Control-Allow-Origin."""

    protocol = Channel  # type: ignore[assignment]  # no HTTP/2, so no wrapper that chooses it

    def __init__(
        self,
        root: IResource,
        clock: IReactorTime,
        *,
        metrics: Metrics,
        monotonic: Callable[[], float],
        origin: str,
    ) -> None:
        super().__init__(root, requestFactory=Request, timeout=IDLE_TIMEOUT_S, reactor=clock)
        self.clock = clock
        self.monotonic = monotonic
        self.connections: set[Channel] = set()
        self._metrics = metrics
        self._origin = origin.encode()
        self._dated, self._date = -1, b""
        self.noisy = False

    def log(self, request: object) -> None:
        """No access log: exchanges log themselves."""

    def startFactory(self) -> None:
        """No log file, and no timer for its dates."""

    def stopFactory(self) -> None:
        """See `startFactory`."""

    def date(self) -> bytes:
        """The time as a Date field has it (RFC 9110 section 6.6.1), made once a second."""
        now = int(self.clock.seconds())
        if now != self._dated:
            self._dated, self._date = now, datetimeToString(now)
        return self._date

    def add_cors(self, request: Request) -> None:
        """Browsers may show our answers to pages of this origin (Fetch standard, section 3.2)."""
        request.setHeader(b"Access-Control-Allow-Origin", self._origin)
        request.setHeader(b"Access-Control-Expose-Headers", b"X-Request-ID, Retry-After")
        if self._origin != b"*":
            request.setHeader(b"Vary", b"Origin")

    def began(self, request: Request) -> None:
        """A request came."""
        self._metrics.request_started()

    def ended(self, request: Request, seconds: float) -> None:
        """It was answered, or its client left."""
        path = request.path.decode("ascii", "replace")
        method = request.method.decode("ascii", "replace")
        status = request.code if request.startedWriting else CLIENT_GONE
        self._metrics.request_done(method, path, status, seconds)
