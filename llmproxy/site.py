"""The public HTTP server: requests that are served from their header on, and what they share.

    Channel --header--> Request.process --> Resource tree --> Exchange
            --body----> Request.upload  (pulled by the exchange)

Twisted serves a request when its body is whole, which it keeps in memory or in a file. Here a
request is served at once: keys and sizes are checked before a body is invited, and audio streams
through.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol, cast

from twisted.internet.interfaces import IAddress, IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.web import server
from twisted.web.http import datetimeToString
from twisted.web.resource import IResource

from llmproxy import __version__, dialects, logs
from llmproxy.channel import IDLE_TIMEOUT_S, Channel, Message, Refused, refusal_answer
from llmproxy.connections import Connections
from llmproxy.endpoints import Dialect
from llmproxy.errors import CLIENT_GONE, ProxyError
from llmproxy.ids import new_request_id
from llmproxy.logs import Line
from llmproxy.metrics import Metrics
from llmproxy.throttle import source_of
from llmproxy.upload import Upload

if TYPE_CHECKING:
    from llmproxy.downstream import Producer

#: How long the rest of a refused body is waited for.
DISCARD_S = 2.0
#: How much of a path that is not served is logged.
MAX_LOGGED = 200
#: For comparison: `twisted` has Twisted's own HTTP channel serve the clients.
VARIABLE = "LLMPROXY_HTTP"

log = Logger()
_REFUSED = Line(
    log,
    "refused {rid} key={key_id} model={model} path={path} status={status} code={code}"
    " ms={duration_ms}",
)
_NO_REQUEST = Line(log, "no request {rid}: status={status} code={code} {reason}")

_VERSIONS = (b"HTTP/1.1", b"HTTP/1.0")
_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}
_STATUS_LINES = {
    (version, status): b"%b %d %b\r\n" % (version, status, _PHRASES.get(status, b"Unknown"))
    for version in _VERSIONS
    for status in range(200, 600)
}
_NO_BODY = (204, 304)


class IsChannel(Protocol):
    """The connection, as a request uses it."""

    #: Bytes to the client.
    send: Callable[[bytes], None]

    @property
    def keep(self) -> bool:
        """Whether it will serve another request after this one."""

    @property
    def peer(self) -> IAddress:
        """The client's address."""

    def done(self) -> None:
        """The answer is out, and the request whole."""

    def close(self, linger_s: float = ...) -> None:
        """Close it once all is sent, or after `linger_s`."""

    def abort(self) -> None:
        """Cut it off."""

    def attach(self, producer: Producer) -> None:
        """Let the client's speed govern `producer`."""

    def detach(self) -> None:
        """It has nothing more."""


class Request:
    """A request with an id, whose body is pulled, and whose answer can be cut short.

    States: reading and answering go on at once; `end` waits for the body, because the connection
    can't be used again before that; over (`finished`, or `lost`: the client has gone or was cut
    off). All that is written then is dropped.
    """

    __slots__ = (
        "_began",
        "_channel",
        "_chunked",
        "_headless",
        "_lingering",
        "_lost_calls",
        "_over",
        "_served",
        "fields",
        "finished",
        "lost",
        "method",
        "more_fields",
        "path",
        "postpath",
        "prepath",
        "rid",
        "site",
        "sitepath",
        "started",
        "status",
        "upload",
        "uri",
        "version",
    )

    #: What Twisted's tree asks for while it looks for the resource.
    prepath: list[bytes]
    postpath: list[bytes]

    def __init__(self, site: Site, channel: IsChannel, message: Message, upload: Upload) -> None:
        self.rid = new_request_id()
        self.site = site
        self.method, self.uri = message.method, message.target
        self.version = message.version
        self.path = message.target.partition(b"?")[0]
        self.fields = message.fields
        self.upload = upload
        self.started = self.finished = self.lost = False
        self.status = 0
        #: Fields that its answer gets too, whichever it is.
        self.more_fields: Sequence[tuple[bytes, bytes]] = ()
        self._channel = channel
        self._chunked = self._over = False
        self._headless = message.method == b"HEAD"
        self._served = False
        self._lingering: IDelayedCall | None = None
        self._lost_calls: list[Callable[[], None]] = []
        self._began = site.monotonic()
        site.began(self)

    def process(self) -> None:
        """Give the request to its resource, found by the raw path: no other spelling is it."""
        try:
            self.site.resource_of(self).render(self)
        except Exception:
            log.failure("request {rid} failed", rid=self.rid)
            self.refuse(Dialect.OPENAI, ProxyError("Something went wrong on our side."))

    @property
    def peer(self) -> IAddress:
        """The client's address, or that of a proxy before us."""
        return self._channel.peer

    def when_lost(self, act: Callable[[], None]) -> None:
        """Call `act` when the client has gone or was cut off before the answer's end."""
        self._lost_calls.append(act)

    # -- the answer ----------------------------------------------------------------------------

    def start(self, status: int, fields: Iterable[tuple[bytes, bytes]]) -> None:
        """Send the header of an answer whose length is not known."""
        if not self._over:
            self._channel.send(self._head(status, fields, None))

    def write(self, data: bytes) -> None:
        """Send a part of the body."""
        if not data or self._over:
            return
        send = self._channel.send
        if self._chunked:
            send(b"%x\r\n%b\r\n" % (len(data), data))
        elif not self._headless:
            send(data)

    def answer(self, status: int, fields: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """Send a whole answer."""
        if not self._over:
            head = self._head(status, fields, len(body))
            self._channel.send(head if self._headless else head + body)
            self._ended()

    def _head(
        self, status: int, fields: Iterable[tuple[bytes, bytes]], length: int | None
    ) -> bytes:
        self.started, self.status = True, status
        lines = [_STATUS_LINES[self.version, status], self.site.preamble(), self.rid.encode()]
        for name, value in fields:
            lines += (b"\r\n", name, b": ", value)
        for name, value in self.more_fields:
            lines += (b"\r\n", name, b": ", value)
        if not self._channel.keep:
            lines.append(b"\r\nConnection: close")
        if length is None and self.version == b"HTTP/1.1":
            self._chunked = not self._headless
            lines.append(b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        elif length is None or status in _NO_BODY:
            lines.append(b"\r\n\r\n")
        else:
            lines.append(b"\r\nContent-Length: %d\r\n\r\n" % length)
        return b"".join(lines)

    def end(self, last: bytes = b"") -> None:
        """The answer is complete with `last`; what is left of the request's body is dropped."""
        if self._over:
            return
        if not self._chunked:
            self.write(last)
        elif last:
            self._channel.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last))
        else:
            self._channel.send(b"0\r\n\r\n")
        self._ended()

    def _ended(self) -> None:
        """All is sent; the connection is free once the request's body has come, too."""
        if self.upload.whole:
            self._finish()
            return
        # Closing at once could take the answer away from a client that is still sending.
        self._lingering = self.site.clock.callLater(DISCARD_S, self._close)
        self.upload.discard(self._drained)

    def refuse(self, dialect: Dialect, error: ProxyError) -> None:
        """Answer with an error at once."""
        self.log_refusal(error)
        self.answer(*dialects.error_answer(dialect, error))

    def cut(self, linger_s: float) -> None:
        """Close the connection without the end of the answer, after sending what is buffered."""
        if self._over:
            return
        self._over = True
        if linger_s and self.version == b"HTTP/1.1":
            self._channel.close(linger_s)
        else:
            self._channel.abort()

    def attach(self, producer: Producer) -> None:
        """Let the client's speed govern `producer`."""
        if not self._over:
            self._channel.attach(producer)

    def detach(self) -> None:
        """It has nothing more."""
        if not self._over:
            self._channel.detach()

    # -- its end -------------------------------------------------------------------------------

    def _drained(self) -> None:
        self._stop_lingering()
        if not self._over:
            self._finish()

    def _close(self) -> None:
        """The connection's next bytes would not be a request."""
        self._lingering = None
        self.cut(DISCARD_S)

    def _stop_lingering(self) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None

    def _finish(self) -> None:
        self.finished = self._over = True
        self._lost_calls.clear()
        self._account()
        self._channel.done()

    def connectionLost(self, reason: object = None) -> None:
        """The client is gone, or was cut off."""
        self._stop_lingering()
        self._account()
        if not (self.finished or self.lost):
            self.lost = self._over = True
            calls, self._lost_calls = self._lost_calls, []
            for act in calls:
                act()
        self.upload.lost()  # who waits for it must find the client gone already

    def _account(self) -> None:
        if not self._served:
            self._served = True
            self.site.ended(self, self.site.monotonic() - self._began)

    def log_refusal(
        self, error: ProxyError, key_id: str | None = None, model: str | None = None
    ) -> None:
        """The line for a request that was sent to no backend."""
        _REFUSED(
            self.rid,
            key_id,
            model and logs.word(model),  # the client's own
            self.path[:MAX_LOGGED].decode("ascii", "replace"),
            error.status,
            error.code,
            round(1000 * (self.site.monotonic() - self._began), 1),
        )

    def __repr__(self) -> str:
        return f"<Request {self.rid}>"  # its target could hold a key


class Site(server.Site):
    """A site. `metrics`: None, and nothing is counted. `origin`: the value of
    Access-Control-Allow-Origin; None, and no page of another site may read the answers. `http`:
    whose HTTP serves the clients, `llhttp` or `twisted`. `room`: for whom there is room; else for
    all who come."""

    def __init__(
        self,
        root: IResource,
        clock: IReactorTime,
        *,
        metrics: Metrics | None,
        monotonic: Callable[[], float],
        origin: str | None,
        http: str | None = None,
        room: Connections | None = None,
    ) -> None:
        super().__init__(root, timeout=int(IDLE_TIMEOUT_S), reactor=clock)
        self.clock = clock
        self.monotonic = monotonic
        self.room = room or Connections()
        self.connections: set[Any] = self.room.all
        #: Those who come and are refused.
        self.refused: set[Refused] = set()
        #: Told how many connections there are, each time that this changes.
        self.on_count: Callable[[int], None] = lambda count: None
        self._metrics = metrics
        self._http = http or os.environ.get(VARIABLE) or "llhttp"
        self._cors = _cors(origin)
        self._dated, self._preamble = -1, b""
        self._resources: dict[bytes, Any] = {}
        self.noisy = False

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """A channel for a client that came, or a refusal if there is no room."""
        source = source_of(addr)
        refusal = self.room.refusal(source)
        if refusal is not None:
            return Refused(self, refusal)
        channel = self._new_channel()
        channel.source = source
        return channel

    def _new_channel(self) -> Any:
        if self._http == "twisted":
            from llmproxy.twisted_channel import TwistedChannel

            return TwistedChannel(self)
        return Channel(self)

    def joined(self, channel: Any) -> None:
        """A client came."""
        self.room.joined(channel)
        self.on_count(len(self.connections))

    def left(self, channel: Any) -> None:
        """It went."""
        self.room.left(channel)
        self.on_count(len(self.connections))

    def startFactory(self) -> None:
        """No log file, and no timer for its dates."""

    def stopFactory(self) -> None:
        """See `startFactory`."""

    def new_request(self, channel: IsChannel, message: Message) -> Request:
        """A request whose header is complete, as a channel has read it."""
        assert message.upload is not None
        return Request(self, channel, message, message.upload)

    def resource_of(self, request: Request) -> Any:
        """The resource of the request's path."""
        found = self._resources.get(request.path)
        if found is None:
            request.prepath, request.postpath = [], request.path.split(b"/")
            found = self.getResourceFor(cast(Any, request))
            if getattr(found, "is_fixed", False):  # what is not in the tree could be anything
                self._resources[request.path] = found
        return found

    def preamble(self) -> bytes:
        """The fields that each answer has, up to the value of the last one, made once a second.

        Date: RFC 9110 section 6.6.1.
        """
        now = int(time.time())
        if now != self._dated:
            self._dated, self._preamble = (
                now,
                b"".join(
                    (
                        b"Server: llmproxy/%b\r\n" % __version__.encode(),
                        b"Date: %b\r\n" % datetimeToString(now),
                        self._cors,
                        b"X-Request-Id: ",
                    )
                ),
            )
        return self._preamble

    def began(self, request: Request) -> None:
        """A request came."""
        if self._metrics is not None:
            self._metrics.request_started()

    def malformed(self, error: ProxyError, request: Request | None) -> bytes:
        """Something came that is no request, or `request` is none after all; the answer to it."""
        rid = new_request_id()
        _NO_REQUEST(rid, error.status, error.code, error.message)
        if self._metrics is not None and request is None:  # else it is counted when it ends
            self._metrics.malformed(error.status)
        return refusal_answer(error, rid)

    def ended(self, request: Request, seconds: float) -> None:
        """It was answered, or its client left."""
        if self._metrics is None:
            return
        status = request.status if request.started else CLIENT_GONE
        self._metrics.request_done(request.method, request.path, status, seconds)


def _cors(origin: str | None) -> bytes:
    """The fields by which browsers may show our answers to pages of this origin (Fetch standard,
    section 3.2)."""
    if origin is None:
        return b""
    return (
        b"Access-Control-Allow-Origin: %b\r\n"
        b"Access-Control-Expose-Headers: X-Request-ID, Retry-After\r\n"
        % origin.encode()
        + (b"" if origin == "*" else b"Vary: Origin\r\n")
    )
