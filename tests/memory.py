"""Both sides of the proxy without a socket: real HTTP parsers, a clock that the test moves.

`Server` is a public site with one client: bytes go in by `send`, and come out in `sent`.
`Backend` has an `agent` whose connections are without a socket too: the test plays the server, by
`Link.answer` and `Link.close`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET
from zope.interface import implementer

from llmproxy.agent import BackendAgent
from llmproxy.metrics import Metrics
from llmproxy.site import Request, Site

ADDRESS = IPv4Address("TCP", "127.0.0.1", 1)


class Wire(StringTransport):
    """A TCP transport, as far as it can be without a socket: what closes it tells the protocol
    later, once, and with the reason that TCP has. `stuck`: the peer takes nothing."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(peerAddress=ADDRESS)
        self.aborted = self.connected = False
        self.stuck = False
        self._clock = clock
        self._protocol: Any = None

    def attach(self, protocol: Any) -> None:
        self._protocol, self.connected = protocol, True
        protocol.makeConnection(self)

    @property
    def is_reading(self) -> bool:
        return self.connected and self.producerState == "producing"

    def setTcpNoDelay(self, enabled: bool) -> None:
        """TCP has it."""

    def write(self, data: bytes) -> None:
        if self.connected:
            super().write(data)

    def loseConnection(self) -> None:
        if self.connected and not self.disconnecting:
            self.disconnecting = True
            if not self.stuck:
                self._clock.callLater(0, self.close, ConnectionDone())

    def loseWriteConnection(self) -> None:
        """A peer that gets our end closes its side, too."""
        self.loseConnection()

    def stopProducing(self) -> None:
        self.loseConnection()

    def abortConnection(self) -> None:
        if self.connected and not self.aborted:
            self.aborted = self.disconnecting = True
            self._clock.callLater(0, self.close, ConnectionAborted())

    def pauseProducing(self) -> None:
        if not self.disconnecting:
            super().pauseProducing()

    def resumeProducing(self) -> None:
        if not self.disconnecting:
            super().resumeProducing()

    def _checkState(self) -> None:
        """TCP is lenient: pausing twice is nothing."""

    def close(self, error: Exception | None = None) -> None:
        """The connection ends now."""
        if self.connected:
            self.connected = False
            self._protocol.connectionLost(Failure(error or ConnectionDone()))

    def slow(self) -> None:
        """Its buffer is full."""
        assert self.producer is not None
        self.producer.pauseProducing()

    def drained(self) -> None:
        """Its buffer is empty again."""
        assert self.producer is not None
        self.producer.resumeProducing()


class Kept(Resource):
    """Keeps each request that came for its test to answer, or hands it to `serve`."""

    isLeaf = True

    def __init__(self, serve: Callable[[Request], None]) -> None:
        super().__init__()
        self._serve = serve

    def render(self, request: Any) -> int:
        self._serve(request)
        return NOT_DONE_YET


class Server:
    """A public site with one client that is connected."""

    def __init__(self, clock: Clock, root: Any = None, metrics: Metrics | None = None) -> None:
        self.clock = clock
        self.requests: list[Request] = []
        self.metrics = metrics or Metrics("0")
        self.site = Site(
            root or Kept(self.requests.append),
            clock,
            metrics=self.metrics,
            monotonic=clock.seconds,
            origin="*",
        )
        self.connect()

    def connect(self, address: Any = ADDRESS) -> None:
        """A new client comes."""
        self.wire = Wire(self.clock)
        self.channel: Any = self.site.buildProtocol(address)
        self.wire.attach(self.channel)

    def send(self, data: bytes) -> None:
        """From the client; what comes in one piece is read in one piece."""
        assert self.wire.connected
        self.channel.dataReceived(data)

    @property
    def sent(self) -> bytes:
        """To the client, so far."""
        return self.wire.value()

    def leave(self, error: Exception | None = None) -> None:
        """The client goes."""
        self.wire.close(error)

    @property
    def governed(self) -> bool:
        """Whether the client's speed governs somebody."""
        names = ("_producer", "_requestProducer")  # ours, and Twisted's
        return any(getattr(self.channel, name, None) is not None for name in names)

    def active(self) -> float:
        """How many requests the metrics say are in flight."""
        lines = self.metrics.exposition().decode().splitlines()
        (line,) = [line for line in lines if line.startswith("llmproxy_active_requests ")]
        return float(line.split()[1])

    def counted(self) -> float:
        """How many requests the metrics say are done."""
        lines = self.metrics.exposition().decode().splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if line.startswith("llmproxy_requests_total{")
        )


class Link:
    """One connection to the backend, as the backend sees it."""

    def __init__(self, clock: Clock, protocol: Any) -> None:
        self.protocol = protocol
        self.wire = Wire(clock)
        self.wire.attach(protocol)

    @property
    def received(self) -> bytes:
        """What the proxy sent."""
        return self.wire.value()

    def answer(self, data: bytes) -> None:
        """Send bytes; a connection that is closed takes none."""
        if self.wire.connected:
            self.protocol.dataReceived(data)

    def close(self, error: Exception | None = None) -> None:
        """FIN, or something worse."""
        self.wire.close(error)


@implementer(IStreamClientEndpoint)
class _Endpoint:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def connect(self, protocolFactory: Any) -> Deferred[Any]:
        return self._backend.connect(protocolFactory)


class Backend:
    """Use `agent` for an `Upstream`. `refuse`: what connecting fails with. `hold`: it waits."""

    def __init__(self, clock: Clock, origin: bytes = b"http://b:1") -> None:
        self.links: list[Link] = []
        self.refuse: Exception | None = None
        self.hold: Deferred[None] = succeed(None)
        self._clock = clock
        self.agent = BackendAgent(origin, _Endpoint(self), clock)
        self.agent.close()  # no connection serves twice

    def connect(self, factory: Any) -> Deferred[Any]:
        def now(_: None) -> Any:
            if self.refuse is not None:
                raise self.refuse
            protocol = factory.buildProtocol(ADDRESS)
            self.links.append(Link(self._clock, protocol))
            return protocol

        connecting: Deferred[None] = Deferred(lambda _: None)

        def held(_: None) -> None:
            if not connecting.called:
                connecting.callback(None)

        self.hold.addCallback(held)
        return connecting.addCallback(now)

    @property
    def link(self) -> Link:
        """The only connection."""
        (link,) = self.links
        return link


def request_bytes(
    path: bytes = b"/", body: bytes = b"", *fields: bytes, version: bytes = b"HTTP/1.1"
) -> bytes:
    """A POST; a Content-Length is added unless one of the fields frames the body."""
    framed = any(f.lower().startswith((b"content-length", b"transfer-encoding")) for f in fields)
    length = () if framed else (b"Content-Length: %d" % len(body),)
    lines = [b"POST " + path + b" " + version, b"Host: proxy", *length, *fields, b"", b""]
    return b"\r\n".join(lines) + body
