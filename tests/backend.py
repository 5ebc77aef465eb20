"""A backend that does what a script says: the faults that no real server shows on demand.

    async with ScriptedBackend([head(200, CHUNKED), chunk(b"data: {"), Reset()]) as backend:
        ...  # point the proxy to backend.url
        assert backend.requests[0].json()["model"] == "m"

A script is what happens on one request, once it was read: bytes are sent as they are, and steps
do the rest. After its last step the connection waits for its next request. The first request
gets the first script, and so on; the last script is used for all that follow.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import orjson
from twisted.internet import reactor as _reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IConsumer, IPullProducer, ITCPTransport
from twisted.internet.protocol import Factory
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

# The global reactor has no type of its own: it is whichever was installed.
reactor: Any = _reactor

Headers = Iterable[tuple[str, str]]
JSON = {"Content-Type": "application/json"}
SSE = {"Content-Type": "text/event-stream; charset=utf-8"}
CHUNKED = {**SSE, "Transfer-Encoding": "chunked"}
LAST_CHUNK = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


# --- answers --------------------------------------------------------------------------------


def head(status: int, headers: Mapping[str, str] | Headers = (), reason: str = "X") -> bytes:
    """A status line and headers, with the empty line; pairs may repeat a name, or lie."""
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in pairs)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def chunk(data: bytes) -> bytes:
    """`data` as one chunk (RFC 9112 section 7.1)."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def raw_answer(status: int, body: bytes, headers: Mapping[str, str] | Headers = ()) -> bytes:
    """An answer with a Content-Length and these headers."""
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    return head(status, [*pairs, ("Content-Length", str(len(body)))]) + body


def json_answer(status: int, obj: object, headers: Mapping[str, str] | None = None) -> bytes:
    """A whole answer; `headers` come on top of its Content-Type and Content-Length."""
    return raw_answer(status, orjson.dumps(obj), {**JSON, **(headers or {})})


def sse_event(event: bytes | str | Mapping[str, Any], name: str | None = None) -> bytes:
    """One event: bytes as they are, other things after `data: `.

    `name` makes it a named event; an object with a `type` is named by it, as Anthropic's are.
    """
    if isinstance(event, bytes):
        return event
    if isinstance(event, str):
        data = event.encode()
    else:
        data = orjson.dumps(event)
        name = name or cast("str | None", event.get("type"))
    prefix = b"event: %s\n" % name.encode() if name else b""
    return b"%sdata: %s\n\n" % (prefix, data)


def sse_answer(
    events: Iterable[bytes | str | Mapping[str, Any]],
    chunked: bool = True,
    headers: Mapping[str, str] | None = None,
    end: bool = True,
) -> bytes:
    """A stream of these events, each in a chunk of its own; without `end` its end is missing.

    Without `chunked` the stream lasts until the connection is closed: add `Close()`.
    """
    parts = [sse_event(event) for event in events]
    if not chunked:
        return head(200, {**SSE, "Connection": "close", **(headers or {})}) + b"".join(parts)
    body = b"".join(map(chunk, parts)) + (LAST_CHUNK if end else b"")
    return head(200, {**CHUNKED, **(headers or {})}) + body


# --- what was seen --------------------------------------------------------------------------


@dataclass(slots=True)
class Seen:
    """A request as it came: `raw` is every byte of it, `body` is without chunk framing."""

    head: bytes
    at: float
    connection: Connection
    body: bytes = b""
    raw: bytes = b""

    @property
    def line(self) -> bytes:
        """The request line."""
        return self.head.partition(b"\r\n")[0]

    @property
    def method(self) -> str:
        return self.line.split(b" ")[0].decode("latin-1")

    @property
    def target(self) -> str:
        return self.line.split(b" ")[1].decode("latin-1")

    @property
    def headers(self) -> list[tuple[str, str]]:
        """(name in lower case, value), in the order in which they came."""
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        pairs = (line.partition(":") for line in lines if line)
        return [(name.strip().lower(), value.strip()) for name, _, value in pairs]

    def header(self, name: str) -> str | None:
        """The header's value, its values with commas between, or None."""
        values = [value for found, value in self.headers if found == name.lower()]
        return ", ".join(values) if values else None

    def json(self) -> Any:
        """The body, parsed."""
        return orjson.loads(self.body)


def _limit(waiting: Deferred[Any], timeout_s: float, problem: str) -> None:
    def too_late(result: object, _: float) -> object:
        raise TimeoutError(f"{problem} after {timeout_s} s")

    waiting.addTimeout(timeout_s, reactor, too_late)


@dataclass(eq=False)
class Connection:
    """One accepted connection. Times are `time.monotonic()`; `closed` is None while it is open.

    `received` and `sent` count bytes (`sent`: handed to the transport).
    """

    transport: ITCPTransport
    opened: float
    closed: float | None = None
    reason: Failure | None = None
    received: int = 0
    sent: int = 0
    requests: list[Seen] = field(default_factory=list)
    _waiting: list[Deferred[float]] = field(default_factory=list)

    def write(self, data: bytes) -> None:
        """Send bytes."""
        self.sent += len(data)
        self.transport.write(data)

    def lost(self, reason: Failure) -> None:
        """Note that it ended."""
        self.closed, self.reason = time.monotonic(), reason
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.callback(self.closed)

    def when_closed(self, timeout_s: float = 5.0) -> Deferred[float]:
        """Fires with the time of its end; fails with TimeoutError."""
        waiting: Deferred[float] = Deferred(lambda d: self._waiting.remove(d))
        if self.closed is not None:
            waiting.callback(self.closed)
        else:
            self._waiting.append(waiting)
            _limit(waiting, timeout_s, "the connection is still open")
        return waiting

    async def flushed(self) -> None:
        """Wait until the kernel has all that was written."""
        transport: Any = self.transport
        while transport.connected and (
            transport._tempDataBuffer or len(transport.dataBuffer) > transport.offset
        ):
            await deferLater(reactor, 0)


# --- steps ----------------------------------------------------------------------------------


class Step(Protocol):
    """Something that a script does."""

    async def run(self, connection: Connection) -> None:
        """Do it; the script goes on when this returns."""


@dataclass(frozen=True)
class Pause:
    """Wait for some seconds."""

    seconds: float

    async def run(self, connection: Connection) -> None:
        await deferLater(reactor, self.seconds)


@dataclass(frozen=True)
class Wait:
    """Wait for a Deferred that the test fires. Several scripts may wait for the same one."""

    gate: Deferred[Any]

    async def run(self, connection: Connection) -> None:
        waiting: Deferred[None] = Deferred()

        def passed(result: Any) -> Any:
            if not waiting.called:
                waiting.callback(None)
            return result

        self.gate.addBoth(passed)
        await waiting


@dataclass(frozen=True)
class Stall:
    """Do nothing for ever, and keep the connection open."""

    async def run(self, connection: Connection) -> None:
        await Deferred()


@dataclass(frozen=True)
class Close:
    """Send what was written, then a FIN."""

    async def run(self, connection: Connection) -> None:
        connection.transport.loseConnection()


@dataclass(frozen=True)
class HalfClose:
    """Send what was written, then a FIN, and go on reading."""

    async def run(self, connection: Connection) -> None:
        connection.transport.loseWriteConnection()


@dataclass(frozen=True)
class Reset:
    """Send what was written, then a RST (Twisted sets SO_LINGER to 0 for an abort)."""

    async def run(self, connection: Connection) -> None:
        await connection.flushed()
        connection.transport.abortConnection()


@dataclass(frozen=True)
class Dribble:
    """Send `data` in pieces of `size` bytes, each in a write of its own."""

    data: bytes
    size: int = 1
    every_s: float = 0.0

    async def run(self, connection: Connection) -> None:
        for start in range(0, len(self.data), self.size):
            connection.write(self.data[start : start + self.size])
            await deferLater(reactor, self.every_s)
            await connection.flushed()


@dataclass(frozen=True)
class StopReading:
    """Take nothing more from the socket, so that the peer's uploads back up."""

    async def run(self, connection: Connection) -> None:
        cast(Any, connection.transport).pauseProducing()


@dataclass(frozen=True)
class Flood:
    """Send `data` `times` times, only as fast as the peer takes it; `Connection.sent` tells."""

    data: bytes
    times: int

    async def run(self, connection: Connection) -> None:
        done: Deferred[None] = Deferred()
        producer = _Repeat(connection, self.data, self.times, done)
        transport = cast(IConsumer, connection.transport)
        transport.registerProducer(producer, False)
        try:
            await done
        finally:
            transport.unregisterProducer()


@implementer(IPullProducer)
class _Repeat:
    def __init__(
        self, connection: Connection, data: bytes, times: int, done: Deferred[None]
    ) -> None:
        self._connection, self._data, self._left, self._done = connection, data, times, done

    def resumeProducing(self) -> None:
        if self._left:
            self._left -= 1
            self._connection.write(self._data)
        elif not self._done.called:
            self._done.callback(None)

    def stopProducing(self) -> None:
        self._left = 0


Script = Sequence[Step | bytes]
Scripted = Script | bytes | Step | Callable[[Seen], Script]


def _script(scripted: Scripted, request: Seen) -> Script:
    if isinstance(scripted, bytes):
        return [scripted]
    if callable(scripted):
        return scripted(request)
    return cast(Script, scripted) if isinstance(scripted, Sequence) else [scripted]


# --- the server -----------------------------------------------------------------------------


class _Body:
    """Takes the body of a request out of a buffer, as it comes."""

    def __init__(self, request: Seen) -> None:
        self._request = request
        self._chunked = (request.header("transfer-encoding") or "").lower() == "chunked"
        self._length = int(request.header("content-length") or 0)
        self._parts: list[bytes] = []
        self._raw = [request.head]

    def take(self, buffer: bytearray) -> bool:
        """Use what is there; True: the request is whole."""
        if not (self._take_chunks(buffer) if self._chunked else self._take_length(buffer)):
            return False
        self._request.body, self._request.raw = b"".join(self._parts), b"".join(self._raw)
        return True

    def _cut(self, buffer: bytearray, size: int) -> bytes:
        data = bytes(buffer[:size])
        del buffer[:size]
        self._raw.append(data)
        return data

    def _take_length(self, buffer: bytearray) -> bool:
        part = self._cut(buffer, min(self._length, len(buffer)))
        self._parts.append(part)
        self._length -= len(part)
        return self._length == 0

    def _take_chunks(self, buffer: bytearray) -> bool:
        while (end := buffer.find(b"\r\n")) >= 0:
            size = int(bytes(buffer[:end]).partition(b";")[0], 16)
            whole = end + 2 + size + 2
            if len(buffer) < whole:
                break
            self._parts.append(self._cut(buffer, whole)[end + 2 : -2])
            if not size:
                return True
        return False


class _Link(TwistedProtocol):
    """The backend's end of a connection."""

    log = Logger()
    connection: Connection

    def __init__(self, backend: ScriptedBackend) -> None:
        self._backend = backend
        self._buffer = bytearray()
        self._request: Seen | None = None
        self._body: _Body | None = None  # while it is being read
        self._work: Deferred[None] | None = None

    def connectionMade(self) -> None:
        transport = cast(ITCPTransport, self.transport)
        transport.setTcpNoDelay(True)
        self.connection = Connection(transport, time.monotonic())
        self._backend.connections.append(self.connection)
        if self._backend.on_connect:
            self._run(self._backend.on_connect)

    def dataReceived(self, data: bytes) -> None:
        self.connection.received += len(data)
        self._buffer += data
        self._advance()

    def connectionLost(self, reason: Failure | None = None) -> None:
        assert reason is not None
        self.connection.lost(reason)
        if self._work is not None:
            self._work.cancel()

    def _advance(self) -> None:
        if self._body is not None:
            self._take_body(self._body)
        while self._body is None and self._work is None and self._take_head():
            pass

    def _take_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(self._buffer[: end + 4])
        del self._buffer[: end + 4]
        self._request = Seen(head, time.monotonic(), self.connection, raw=head)
        self._body = _Body(self._request)
        if self._backend.early:
            self._begin()
        self._take_body(self._body)
        return True

    def _take_body(self, body: _Body) -> None:
        if body.take(self._buffer):
            self._body = None
            if not self._backend.early:
                self._begin()

    def _begin(self) -> None:
        assert self._request is not None
        self._backend.saw(self._request)
        self._run(self._backend.script_for(self._request))

    def _run(self, script: Script) -> None:
        self._work = Deferred.fromCoroutine(self._play(script))
        self._work.addErrback(self._failed)
        self._work.addCallback(self._played)

    async def _play(self, script: Script) -> None:
        for step in script:
            if isinstance(step, bytes):
                self.connection.write(step)
            else:
                await step.run(self.connection)

    def _failed(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            self.log.failure("a script failed", failure)

    def _played(self, _: None) -> None:
        self._work = None
        if self.connection.closed is None and self._buffer:
            reactor.callLater(0, self._advance)


class _Factory(Factory):
    noisy = False

    def __init__(self, backend: ScriptedBackend) -> None:
        self._backend = backend

    def buildProtocol(self, addr: object) -> _Link:
        link = _Link(self._backend)
        link.factory = self
        return link


class ScriptedBackend:
    """Listens on 127.0.0.1 at a free port while its `async with` lasts.

    `early`: a script begins when the head of the request was read, while the body may still come.
    `on_connect`: what happens before anything was read. `health`: the answer to `GET /health`,
    which is neither scripted nor recorded; None treats it like other requests. `tls`: a context
    factory of pyOpenSSL's kind, to listen with TLS.
    """

    def __init__(
        self,
        *scripts: Scripted,
        early: bool = False,
        on_connect: Script = (),
        health: bytes | None = json_answer(200, {}),
        tls: Any = None,
    ) -> None:
        self.early = early
        self.on_connect = on_connect
        self.requests: list[Seen] = []
        self.connections: list[Connection] = []
        self._scripts = scripts or (json_answer(200, {}),)
        self._health = health
        self._tls = tls
        self._numbers = itertools.count()
        self._waiting: list[tuple[int, Deferred[Seen]]] = []
        self._port: Any = None
        self._address = ""

    @property
    def url(self) -> str:
        """Where it listens; it keeps its name when it has stopped."""
        return f"{'https' if self._tls else 'http'}://{self._address}"

    @property
    def received(self) -> int:
        """All bytes that came, those of health checks aside."""
        return sum(
            one.received - sum(len(seen.raw) for seen in one.requests if _is_health(seen))
            for one in self.connections
        )

    @property
    def open_connections(self) -> list[Connection]:
        """Those that are not closed."""
        return [one for one in self.connections if one.closed is None]

    def request(self, number: int = 0, timeout_s: float = 5.0) -> Deferred[Seen]:
        """Fires with a request, when it is there; fails with TimeoutError."""
        waiting: Deferred[Seen] = Deferred()
        if number < len(self.requests):
            waiting.callback(self.requests[number])
        else:
            self._waiting.append((number, waiting))
            _limit(waiting, timeout_s, f"request {number} did not come")
        return waiting

    def saw(self, request: Seen) -> None:
        """Record a request."""
        request.connection.requests.append(request)
        if self._health is not None and _is_health(request):
            return
        self.requests.append(request)
        number = len(self.requests) - 1
        due = [waiting for wanted, waiting in self._waiting if wanted == number]
        self._waiting = [one for one in self._waiting if one[0] != number]
        for waiting in due:
            if not waiting.called:
                waiting.callback(request)

    def script_for(self, request: Seen) -> Script:
        """What is done about a request."""
        if self._health is not None and _is_health(request):
            return [self._health]
        number = min(next(self._numbers), len(self._scripts) - 1)
        return _script(self._scripts[number], request)

    def listen(self) -> None:
        """Begin (again, at the same port)."""
        number = int(self._address.rpartition(":")[2] or 0)
        args = (number, _Factory(self))
        if self._tls is None:
            self._port = reactor.listenTCP(*args, interface="127.0.0.1")
        else:
            self._port = reactor.listenSSL(*args, self._tls, interface="127.0.0.1")
        self._address = f"127.0.0.1:{self._port.getHost().port}"

    async def stop(self) -> None:
        """Stop listening, and abort the connections that are open."""
        port, self._port = self._port, None
        if port is not None:
            await port.stopListening()
        for connection in self.connections:
            if connection.closed is None:  # it may have ended while the one before was waited for
                connection.transport.abortConnection()
                await connection.when_closed()

    async def __aenter__(self) -> ScriptedBackend:
        self.listen()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()


def _is_health(request: Seen) -> bool:
    return request.line.startswith(b"GET /health ")
