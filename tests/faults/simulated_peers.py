"""The proxy's two sides: backends that follow their plans, clients that leave when they like."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from simulated_network import SimTransport
from simulated_traffic import Ask
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

if TYPE_CHECKING:
    from simulation import History

#: How long a client waits for an answer before it calls that a fault.
PATIENCE_S = 150.0


class BackendEnd(Protocol):
    """A backend's side of one connection: reads a request, does what its plan says."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._buffer = b""
        self._ask: Ask | None = None
        self._call: IDelayedCall | None = None
        self._transport: SimTransport

    def connectionMade(self) -> None:
        transport: Any = self.transport
        self._transport = transport

    def dataReceived(self, data: bytes) -> None:
        self._buffer += data
        if self._ask is None and _whole_request(self._buffer):
            self._serve()

    def _serve(self) -> None:
        request, self._buffer = self._buffer, b""
        ask = self._ask = self._history.arrived(request)
        world = self._history.world
        think = world.rng.choices((0.0, 0.02, 3.0, 8.0), (60, 30, 4, 1))[0] * world.rng.random()
        self._later(think, self._send, deque(ask.plan.pieces))

    def _send(self, pieces: deque[tuple[float, bytes]]) -> None:
        if pieces:
            delay, piece = pieces.popleft()
            self._transport.write(piece)
            self._later(delay, self._send, pieces)
        else:
            self._finish()

    def _finish(self) -> None:
        world = self._history.world
        assert self._ask is not None
        after = self._ask.plan.after
        if after == "stall":
            self._later(60, self._transport.abortConnection)
            return
        self._ask = None
        if after == "close":
            self._later(world.rng.random() * 0.01, self._transport.loseConnection)
        elif after == "reset":
            self._transport.abortConnection()
        elif world.rng.random() < 0.2:  # an idle connection's end
            self._later(world.rng.random() * 3, self._transport.loseConnection)

    def _later(self, delay: float, act: Callable[..., None], *args: Any) -> None:
        self._stop()
        self._call = self._history.backends.callLater(delay, act, *args)

    def _stop(self) -> None:
        if self._call is not None and self._call.active():
            self._call.cancel()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._stop()
        if self._ask is not None:
            self._history.stopped(self._ask)
        elif self._buffer:
            self._history.arrived_in_part(self._buffer)


def _whole_request(data: bytes) -> bool:
    head, found, body = data.partition(b"\r\n\r\n")
    if not found:
        return False
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    return len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n")


@dataclass
class Seen:
    """What a client saw of one answer."""

    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    whole: bool = False
    fields: dict[bytes, bytes] = field(default_factory=dict)
    released: bool = False


class Client(Protocol):
    """A client with one connection: sends its requests, and leaves when it likes."""

    def __init__(self, history: History, process: str, asks: list[Ask]) -> None:
        rng = history.world.rng
        self.asks = asks
        self.process = process
        self.over = False
        self.left = False
        self._history = history
        self._transport: SimTransport | None = None
        self._pipelined = rng.random() < 0.3
        self._pace = rng.choices((0.0, 0.01, 0.5), (80, 12, 3))[0]
        self._leave_bytes = rng.choice((1, 30, 300, 500, 900)) if rng.random() < 0.25 else None
        self._leave_s = rng.random() * rng.choice((0.01, 0.1, 1, 5))
        self._leaves_in_time = rng.random() < 0.2
        self._received = 0
        self._buffer = b""
        self._at = 0
        self._calls: list[IDelayedCall] = []
        self._unsent: deque[tuple[float, bytes]] = deque()

    def begin(self) -> None:
        """Connect."""
        process = self._history.processes[self.process]
        if process.connect(self._history.clients, self) is None:
            self.over = True
            return
        self._later(PATIENCE_S, self._hangs)
        if self._leaves_in_time:
            self._later(self._leave_s, self._leave)
        asks = self.asks if self._pipelined else self.asks[:1]
        self._send(b"".join(ask.data for ask in asks))

    def connectionMade(self) -> None:
        transport: Any = self.transport
        self._transport = transport

    def _later(self, delay: float, act: Callable[..., None], *args: Any) -> None:
        self._calls.append(self._history.clients.callLater(delay, act, *args))

    def _send(self, data: bytes) -> None:
        """Send after what is on its way, and not always at once."""
        rng = self._history.world.rng
        cut = len(data) if rng.random() < 0.6 else rng.randint(1, len(data))
        pause_s = rng.random() * rng.choice((0.001, 0.1, 0.1, 0.1, 4))
        self._unsent += [(0.0, data[:cut]), (pause_s, data[cut:])]
        if len(self._unsent) == 2:
            self._write_on()

    def _write_on(self) -> None:
        if self._transport is None:
            return
        self._transport.write(self._unsent.popleft()[1])
        if self._unsent:
            self._later(self._unsent[0][0], self._write_on)

    def dataReceived(self, data: bytes) -> None:
        self._received += len(data)
        self._buffer += data
        while self._at < len(self.asks) and self._parse(self._history.seen[self._ask.number]):
            self._at += 1
            if self._at == len(self.asks):
                self._later(self._history.world.rng.random(), self._leave)
            elif not self._pipelined:
                self._send(self._ask.data)
        if self._leave_bytes is not None and self._received >= self._leave_bytes:
            self._leave()
        elif self._pace and self._transport is not None:
            self._transport.pauseProducing()
            self._later(self._pace * self._history.world.rng.random(), self._read_on)

    def _read_on(self) -> None:
        if self._transport is not None:
            self._transport.resumeProducing()

    @property
    def _ask(self) -> Ask:
        return self.asks[self._at]

    def _parse(self, seen: Seen) -> bool:
        """Take what has come of an answer; True when it is whole."""
        if not seen.status and not self._parse_head(seen):
            return False
        if seen.fields.get(b"transfer-encoding") == b"chunked":
            self._parse_chunks(seen)
        else:
            size = int(seen.fields.get(b"content-length", b"0"))
            if seen.status == 204:
                size = 0
            taken = size - len(seen.body)
            seen.body += self._buffer[:taken]
            self._buffer = self._buffer[taken:]
            seen.whole = len(seen.body) == size
        self._history.check_release(self._ask, seen)
        return seen.whole

    def _parse_head(self, seen: Seen) -> bool:
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return False
        self._buffer = rest
        line, *lines = head.split(b"\r\n")
        status = int(line.split()[1])
        if status == 100:
            return self._parse_head(seen)
        seen.status = status
        for text in lines:
            name, _, value = text.partition(b": ")
            seen.fields[name.lower()] = value
        return True

    def _parse_chunks(self, seen: Seen) -> None:
        while not seen.whole:
            size_text, found, rest = self._buffer.partition(b"\r\n")
            if not found:
                return
            size = int(size_text, 16)
            if len(rest) < size + 2:
                return
            seen.body += rest[:size]
            self._buffer = rest[size + 2 :]
            seen.whole = size == 0

    def _leave(self) -> None:
        if self._transport is not None and not self.left:
            self.left = True
            reset = self._history.world.rng.random() < 0.4
            self._history.world.say(f"client {self.names} leaves ({'RST' if reset else 'FIN'})")
            if reset:
                self._transport.abortConnection()
            else:
                self._transport.loseConnection()

    def _hangs(self) -> None:
        self._history.broken(f"client {self.names} got no end of its answer")

    @property
    def names(self) -> str:
        return ",".join(str(ask.number) for ask in self.asks)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._transport = None
        self.over = True
        for call in self._calls:
            if call.active():
                call.cancel()
