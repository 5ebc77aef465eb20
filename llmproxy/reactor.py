"""A reactor for many small messages: Twisted's own on epoll, with the costs per message taken out.

Three things differ in that. Bytes are sent where they are written, and only what the socket does
not take waits for epoll to say that it will: Twisted registers for writing, and sends in the next
round, which takes two more system calls for each message. What is ready is read without a logging
context of its own around each read. Together they are half of what a message costs there. And a
round is a wait and the reads, where no call can be due.

Who comes while no file descriptor is left waits in the kernel's queue: Twisted accepts all of them
by means of one that it keeps for that, closes them at once, and logs each.

And its time is one that nobody can set: a system clock that leaps by a day would make all timeouts
due at once, or none of them for a day.

Everything else is Twisted's: `twistd --reactor=llmproxy` has it, and so has `python -m llmproxy`.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import time
from select import EPOLLIN
from typing import Any, cast

from twisted.internet import main, tcp, unix
from twisted.internet.asyncioreactor import AsyncioSelectorReactor
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.interfaces import IConnector, IListeningPort
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.log import callWithLogger

from llmproxy.names import Resolver

log = Logger()

#: For comparison: which event loop is below.
VARIABLE = "LLMPROXY_REACTOR"
#: How much is read at once, and how much may wait to be sent before a producer is paused: a peer
#: that takes nothing costs as much as both.
READ_SIZE = 32 * 1024
SEND_SIZE = 16 * 1024
_AGAIN = (errno.EAGAIN, errno.ENOBUFS)
#: How long nobody is accepted when that failed, and how often it is logged.
REST_S, TELL_S = 1.0, 60.0
#: A longer wait than this is left to Twisted, which knows how long epoll can wait.
LONGEST_WAIT_S = 3600.0
#: What concerns the one connection alone, which has gone again or may not come.
_NOT_OURS = (errno.ECONNABORTED, errno.EPERM)


class _SendsAtOnce(tcp.Connection):
    """A TCP connection that does not wait for the next round of the reactor.

    Nothing is called back from `write`: an error is left for epoll to report.
    """

    def __init__(self, *args: Any, **kw: Any) -> None:
        # Python 3.11 finds them faster here than in the class, where Twisted has them.
        self.bufferSize, self.dataBuffer = READ_SIZE, b""
        self._aborting = self._writeDisconnected = self.TLS = False
        super().__init__(*args, **kw)

    def doRead(self) -> Any:
        """Take what has come; the same as Twisted's, in one step."""
        try:
            data = self.socket.recv(self.bufferSize)
        except OSError as problem:
            return None if problem.errno == errno.EAGAIN else main.CONNECTION_LOST
        if not data:
            return main.CONNECTION_DONE
        self.protocol.dataReceived(data)
        return None

    def write(self, data: bytes) -> None:
        """Send now what the socket takes; the rest waits, and counts for back-pressure."""
        if (
            self._tempDataLen
            or self.dataBuffer
            or not self.connected
            or self._aborting
            or self._writeDisconnected
            or self.TLS
            # One that is pulled from is called from the reactor's round alone.
            or (self.producer is not None and not self.streamingProducer)
        ):
            super().write(data)
            return
        try:
            sent = self.socket.send(data)
        except OSError as problem:
            if problem.errno not in _AGAIN:
                super().write(data)  # whose own attempt will find the error, and close
                return
            sent = 0
        if sent < len(data):
            super().write(data[sent:])

    def writeSequence(self, iovec: Any) -> None:
        """The same, in one piece."""
        self.write(b"".join(iovec))

    def _isSendBufferFull(self) -> bool:
        return len(self.dataBuffer) - self.offset + self._tempDataLen > SEND_SIZE


class Server(_SendsAtOnce, tcp.Server):
    """A connection that was accepted."""


class Client(_SendsAtOnce, tcp.Client):
    """A connection that was made."""


class _Accepts(tcp.Port):
    """Takes who waits; when it can't, for lack of descriptors mostly, it rests for a while."""

    _told_at = -math.inf

    def doRead(self) -> None:
        """Accept up to `numberAccepts` connections."""
        for _ in range(self.numberAccepts):
            try:
                client, address = self.socket.accept()
            except BlockingIOError:
                return
            except OSError as problem:
                if problem.errno not in _NOT_OURS:
                    self._rest(problem)
                    return
            else:
                self._welcome(client, address)

    def _welcome(self, client: socket.socket, address: Any) -> None:
        if self.addressFamily == socket.AF_INET6 and address[3]:  # else its scope is not shown
            address = (socket.getnameinfo(address, socket.NI_NUMERICHOST)[0], *address[1:])
        try:
            protocol = cast(Any, self.factory).buildProtocol(self._buildAddr(address))
            if protocol is None:
                client.close()
                return
            self.sessionno = number = self.sessionno + 1
            transport = self.transport(client, protocol, address, self, number, self.reactor)
            protocol.makeConnection(transport)
        except Exception:
            log.failure("a connection could not be served")

    def _rest(self, problem: OSError) -> None:
        now = time.monotonic()
        if now - self._told_at >= TELL_S:
            self._told_at = now
            log.warn("new connections have to wait: {error}", error=problem.strerror)
        self.stopReading()
        cast(Any, self.reactor).callLater(REST_S, self._go_on)

    def _go_on(self) -> None:
        if self.connected and not self.disconnecting:
            self.startReading()


class Port(_Accepts):
    """A listening port for them."""

    transport = Server


class UNIXPort(_Accepts, unix.Port):
    """The same on a UNIX socket, with Twisted's own connections."""


class Connector(tcp.Connector):
    """Makes such connections."""

    def _makeTransport(self) -> Client:
        return Client(self.host, self.port, self.bindAddress, self, self.reactor)

    def connectionLost(self, reason: Failure) -> None:
        """See `BaseConnector.connectionLost`."""
        super().connectionLost(reason)
        if self.state == "disconnected":  # else it was told to connect again
            self.transport = None  # which knows us: only the garbage collector would end them


class _Transports:
    """The part of a reactor that makes connections."""

    def listenTCP(
        self, port: int, factory: Any, backlog: int = 50, interface: str = ""
    ) -> IListeningPort:
        """See `IReactorTCP.listenTCP`."""
        return _listening(Port(port, factory, backlog, interface, self))

    def listenUNIX(
        self, address: Any, factory: Any, backlog: int = 50, mode: int = 0o666, wantPID: int = 0
    ) -> IListeningPort:
        """See `IReactorUNIX.listenUNIX`."""
        return _listening(UNIXPort(address, factory, backlog, mode, self, wantPID))

    def adoptStreamPort(
        self, fileDescriptor: int, addressFamily: int, factory: Any
    ) -> IListeningPort:
        """See `IReactorSocket.adoptStreamPort`."""
        if addressFamily == socket.AF_UNIX:
            adopted = UNIXPort._fromListeningDescriptor(self, fileDescriptor, factory)
            adopted.backlog = socket.SOMAXCONN  # it is told to listen once more
            return _listening(adopted)
        port = Port._fromListeningDescriptor(self, fileDescriptor, addressFamily, factory)
        return _listening(port)

    def connectTCP(
        self, host: str, port: int, factory: Any, timeout: float = 30.0, bindAddress: Any = None
    ) -> IConnector:
        """See `IReactorTCP.connectTCP`."""
        connector: Any = Connector(host, port, factory, timeout, bindAddress, self)
        connector.connect()
        return cast(IConnector, connector)


class Reactor(_Transports, EPollReactor):
    """The reactor."""

    #: See `IReactorTime.seconds`; but since some moment, and not since 1970.
    seconds = staticmethod(time.monotonic)

    def mainLoop(self) -> None:
        """Twisted's, but calls that are due are looked for only where there can be one."""
        while self._started:
            try:
                self._round()
            except Exception:
                log.failure("a round of the reactor failed")

    def _round(self) -> None:
        # On its own, as Python 3.11 makes faster what is called often, and not what runs for ever.
        calls = self._pendingTimedCalls
        wait = calls[0].time - time.monotonic() if calls else 0.0
        if 0.0 < wait < LONGEST_WAIT_S and not (
            self._newTimedCalls or self.threadCallQueue or self._justStopped or not self.running
        ):
            self.doPoll(wait)
        else:
            self.runUntilCurrent()
            self.doPoll(self.timeout() if self.running else 0.0)

    def doPoll(self, timeout: float | None) -> None:
        """Wait for what is ready, and serve it."""
        selectables = self._selectables
        try:
            ready = self._poller.poll(timeout)
        except InterruptedError:
            return
        for descriptor, event in ready:
            selectable = selectables.get(descriptor)
            if selectable is None:  # closed by one of those before it
                continue
            if event == EPOLLIN:
                try:
                    why = selectable.doRead()
                except Exception as problem:
                    log.failure("reading from {what} failed", what=type(selectable).__name__)
                    why = problem
                if why:
                    self._disconnectSelectable(selectable, why, True)
            else:
                callWithLogger(selectable, self._doReadOrWrite, selectable, descriptor, event)

    doIteration = doPoll


def _listening(port: Any) -> IListeningPort:
    port.startListening()
    return cast(IListeningPort, port)


class UvloopReactor(_Transports, AsyncioSelectorReactor):
    """The same connections on uvloop's event loop."""

    seconds = staticmethod(time.monotonic)


def install() -> None:
    """Make it the process's reactor, as `twisted.internet.main.installReactor` does.

    With `uvloop` in the environment variable `LLMPROXY_REACTOR` it is one on uvloop instead.
    """
    if os.environ.get(VARIABLE) == "uvloop":
        import uvloop

        reactor: Any = UvloopReactor(uvloop.new_event_loop())
    else:
        reactor = Reactor()
    reactor.installNameResolver(Resolver(reactor))
    main.installReactor(reactor)
