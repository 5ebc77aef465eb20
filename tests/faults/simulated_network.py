"""A network, and time, in memory: Twisted's own transport over sockets that are byte arrays.

    protocol -- SimTransport -- SimSocket ~~ SimSocket -- SimTransport -- protocol

Buffers, producers, half-written data and the closing of a connection are those of
`twisted.internet.abstract.FileDescriptor`, which real connections use too: a transport of our own
would be kinder than the real one. What is simulated is the kernel: how much it takes, when data
arrives, and in which pieces.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, cast

from twisted.internet import main
from twisted.internet.abstract import FileDescriptor
from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionAborted, ConnectionRefusedError, UserError
from twisted.internet.error import TimeoutError as ConnectTimeout
from twisted.internet.interfaces import (
    IConnector,
    IDelayedCall,
    IHostnameResolver,
    IHostResolution,
    IProtocol,
    IReactorPluggableNameResolver,
    IReactorTime,
    IResolutionReceiver,
    ITCPTransport,
)
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer

#: When histories begin: a Unix time.
EPOCH = 1_800_000_000.0
HERE = IPv4Address("TCP", "127.0.0.1", 80)
THERE = IPv4Address("TCP", "127.0.0.1", 40_000)


class World(Clock):
    """Fake time, and the dice of one history."""

    def __init__(self, rng: random.Random, say: Callable[[str], None]) -> None:
        super().__init__()
        self.rightNow = EPOCH
        self.rng = rng
        self.say = say
        self.calm = rng.random() < 0.4  # a network without delays finds other orders of events

    def latency(self) -> float:
        """How long something takes to be noticed."""
        roll = self.rng.random()
        if self.calm or roll < 0.5:
            return 0.0001
        return self.rng.uniform(0.0001, 0.01) if roll < 0.97 else self.rng.uniform(0.01, 0.4)

    def step(self) -> None:
        """Let time pass until the next thing happens."""
        self.advance(max(0.0, self.calls[0].getTime() - self.seconds()))


@implementer(IHostnameResolver)
class SimResolver:
    """Every name is here."""

    def resolveHostName(
        self,
        resolutionReceiver: IResolutionReceiver,
        hostName: str,
        portNumber: int = 0,
        addressTypes: object = None,
        transportSemantics: str = "TCP",
    ) -> IHostResolution:
        resolution = SimResolution()
        resolutionReceiver.resolutionBegan(resolution)
        resolutionReceiver.addressResolved(IPv4Address("TCP", "127.0.0.1", portNumber))
        resolutionReceiver.resolutionComplete()
        return resolution


@implementer(IHostResolution)
class SimResolution:
    name = "backend"

    def cancel(self) -> None:
        """It was over at once."""


@implementer(IReactorTime, IReactorPluggableNameResolver)
class SimReactor:
    """The reactor of one process: time, descriptors, connections. `kill` ends the process."""

    nameResolver = SimResolver()

    def __init__(self, world: World) -> None:
        self.world = world
        self.dead = False
        self.readers: set[SimTransport] = set()
        self.writers: set[SimTransport] = set()
        self.transports: dict[SimTransport, None] = {}  # a set has no order that repeats
        self.accept: Callable[[SimReactor], SimTransport | None] = lambda reactor: None
        self._calls: list[IDelayedCall] = []

    def seconds(self) -> float:
        return self.world.seconds()

    def callLater(
        self, delay: float, callable: Callable[..., object], *args: object, **kw: object
    ) -> IDelayedCall:
        call: Any = self.world.callLater(delay, callable, *args, **kw)
        if self.dead:
            self._forget(call)
        else:
            self._calls.append(call)
        return cast(IDelayedCall, call)

    def _forget(self, call: Any) -> None:
        """It will not happen; what is left of the process, as garbage, may still cancel it."""
        self.world.calls.remove(call)
        call.canceller = call.resetter = lambda call: None

    def getDelayedCalls(self) -> list[IDelayedCall]:
        return [call for call in self._calls if call.active()]

    def addReader(self, transport: SimTransport) -> None:
        self.readers.add(transport)
        transport.wake()

    def addWriter(self, transport: SimTransport) -> None:
        self.writers.add(transport)
        transport.wake()

    def removeReader(self, transport: SimTransport) -> None:
        self.readers.discard(transport)

    def removeWriter(self, transport: SimTransport) -> None:
        self.writers.discard(transport)

    def connectTCP(
        self, host: str, port: int, factory: Any, timeout: float = 30, bindAddress: object = None
    ) -> IConnector:
        return SimConnector(self, factory, timeout)

    def installNameResolver(self, resolver: IHostnameResolver) -> IHostnameResolver:
        raise NotImplementedError("names are resolved as they are")

    def kill(self) -> None:
        """No code of this process runs any more; the kernel closes its sockets."""
        for call in self.getDelayedCalls():
            self._forget(call)
        self.dead = True
        for transport in list(self.transports):
            transport.socket.close(reset=self.world.rng.random() < 0.5)
        self.readers.clear()
        self.writers.clear()


class SimSocket:
    """One end of a connection, in the kernel: what has arrived, and how it ended."""

    def __init__(self, capacity: int) -> None:
        self.arrived = bytearray()
        self.capacity = capacity
        self.eof = False
        self.reset = False
        self.closed = False
        self.peer: SimSocket
        self.wake: Callable[[], None] = lambda: None

    @property
    def readable(self) -> bool:
        return bool(self.arrived) or self.eof or self.reset

    @property
    def writable(self) -> bool:
        return self.reset or self.peer.closed or len(self.peer.arrived) < self.peer.capacity

    def send(self, data: bytes) -> int | Exception:
        if self.reset:
            return main.CONNECTION_LOST
        if self.peer.closed:  # the other side answers with a reset
            self.reset = True
            self.wake()
            return len(data)
        taken = data[: self.peer.capacity - len(self.peer.arrived)]
        self.peer.arrived += taken
        self.peer.wake()
        return len(taken)

    def receive(self, size: int) -> bytes:
        data = bytes(self.arrived[:size])
        del self.arrived[:size]
        self.peer.wake()
        return data

    def close(self, *, reset: bool) -> None:
        if self.closed:
            return
        self.closed = True
        if reset or self.arrived:  # what nobody will read is answered with a reset
            self.peer.reset = True
            if reset:
                self.peer.arrived.clear()
        else:
            self.peer.eof = True
        self.peer.wake()


@implementer(ITCPTransport)
class SimTransport(FileDescriptor):
    """A connection of a process. `chunk` gives the size of the next read."""

    def __init__(
        self,
        reactor: SimReactor,
        socket: SimSocket,
        protocol: Any,
        chunk: Callable[[], int],
        buffer_size: int,
    ) -> None:
        super().__init__(reactor)  # type: ignore[arg-type]
        self.bufferSize = buffer_size
        self.socket = socket
        self.protocol = protocol
        self.connected = 1
        self._chunk = chunk
        self._turn: IDelayedCall | None = None
        self._aborting = False
        self.on_lost: Callable[[], None] = lambda: None
        socket.wake = self.wake
        reactor.transports[self] = None

    def wake(self) -> None:
        """Something may have become possible: the reactor will look."""
        reactor: SimReactor = self.reactor  # type: ignore[assignment]
        if self._turn is None and not reactor.dead and (self._can_read or self._can_write):
            world = reactor.world
            self._turn = world.callLater(world.latency(), self._look)

    @property
    def _can_read(self) -> bool:
        return self in self.reactor.readers and self.socket.readable  # type: ignore[attr-defined]

    @property
    def _can_write(self) -> bool:
        return self in self.reactor.writers and self.socket.writable  # type: ignore[attr-defined]

    def _look(self) -> None:
        self._turn = None
        if self.reactor.dead or not self.connected:  # type: ignore[attr-defined]
            return
        why = self.doRead() if self._can_read else None
        if why is None and self._can_write:
            why = self.doWrite()
        if why is not None and self.connected:
            self.connectionLost(Failure(why))
        self.wake()

    def doRead(self) -> Exception | None:
        if self.socket.arrived:
            self.protocol.dataReceived(self.socket.receive(self._chunk()))
            return None
        return main.CONNECTION_LOST if self.socket.reset else main.CONNECTION_DONE

    def writeSomeData(self, data: bytes) -> int | BaseException:
        return self.socket.send(bytes(data))

    def abortConnection(self) -> None:
        if self.disconnected or self._aborting:
            return
        self._aborting = True
        self.stopReading()
        self.stopWriting()
        self.doRead = self.doWrite = lambda: None  # type: ignore[method-assign]
        self.reactor.callLater(  # type: ignore[attr-defined]
            0, self.connectionLost, Failure(ConnectionAborted())
        )

    def connectionLost(self, reason: Failure) -> None:
        if self not in self.reactor.transports:  # type: ignore[attr-defined]
            return
        super().connectionLost(reason)
        del self.reactor.transports[self]  # type: ignore[attr-defined]
        self.socket.close(reset=bool(reason.check(ConnectionAborted)))
        protocol, self.protocol = self.protocol, None
        self.on_lost()
        protocol.connectionLost(reason)

    def getHost(self) -> IPv4Address:
        return HERE

    def getPeer(self) -> IPv4Address:
        return THERE

    def setTcpNoDelay(self, enabled: bool) -> None:
        """There is no delay."""

    def getTcpNoDelay(self) -> bool:
        return True

    def setTcpKeepAlive(self, enabled: bool) -> None:
        """Nothing is lost here."""

    def getTcpKeepAlive(self) -> bool:
        return False

    def loseWriteConnection(self) -> None:
        raise NotImplementedError("nobody here closes half of a connection")


@implementer(IConnector)
class SimConnector:
    """A connection that is being made, as `IReactorTCP.connectTCP` gives it."""

    def __init__(self, reactor: SimReactor, factory: Any, timeout: float) -> None:
        self._reactor, self._factory = reactor, factory
        self._over = False
        world = reactor.world
        factory.doStart()
        factory.startedConnecting(self)
        self._timeout = reactor.callLater(timeout, self._fail, ConnectTimeout())
        self._attempt = reactor.callLater(world.latency(), self._try)

    def _try(self) -> None:
        other = self._reactor.accept(self._reactor)
        if other is None:
            self._fail(ConnectionRefusedError())
            return
        self._timeout.cancel()
        self._over = True
        socket = other.socket.peer
        protocol = self._factory.buildProtocol(HERE)
        world = self._reactor.world
        transport = SimTransport(self._reactor, socket, protocol, sizes(world), buffer_size(world))
        transport.startReading()
        protocol.makeConnection(transport)

    def _fail(self, error: Exception) -> None:
        if not self._over:
            self._over = True
            for call in (self._timeout, self._attempt):
                if call.active():
                    call.cancel()
            self._reactor.world.say("no connection to the backend")
            self._factory.clientConnectionFailed(self, Failure(error))

    def stopConnecting(self) -> None:
        self._fail(UserError())

    def disconnect(self) -> None:
        self._fail(UserError())

    def connect(self) -> None:
        raise NotImplementedError("an attempt is made once")

    def getDestination(self) -> IPv4Address:
        return HERE


def buffer_size(world: World) -> int:
    """When a transport asks its producer to pause."""
    return world.rng.choice((100, 1000, 2**16, 2**16))


def sizes(world: World) -> Callable[[], int]:
    """How much one read gives, for one connection: little at first, or always all."""
    most = world.rng.choices((1, 7, 60, 500, 2**16), (1, 2, 6, 11, 80))[0]
    reads = 0

    def size() -> int:
        nonlocal reads
        reads += 1
        return world.rng.randint(1, 2 * most) if reads < SMALL_READS else 2**16

    return size if most < 2**16 else lambda: most


#: How many reads of a connection are small ones; a history should end.
SMALL_READS = 300


def socket_pair(world: World) -> tuple[SimSocket, SimSocket]:
    """The two ends of a connection."""
    one, other = (SimSocket(world.rng.choice((50, 400, 2**16, 2**16))) for _ in range(2))
    one.peer, other.peer = other, one
    return one, other


def attach(reactor: SimReactor, socket: SimSocket, protocol: IProtocol) -> SimTransport:
    """Make `protocol` speak through `socket`."""
    world = reactor.world
    transport = SimTransport(reactor, socket, protocol, sizes(world), buffer_size(world))
    transport.startReading()
    protocol.makeConnection(transport)
    return transport
