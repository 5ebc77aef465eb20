"""Listening sockets that several processes share.

The supervisor binds them and accepts nothing; each worker inherits the descriptors and accepts
from the one queue that the kernel keeps for all, so what waits there outlives any worker.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from typing import Any, cast

from twisted.internet import tcp
from twisted.internet.interfaces import IListeningPort, IProtocolFactory
from twisted.python.failure import Failure

from llmproxy.reactor import UNIXPort

#: How many connections a worker takes each time that it is woken. All idle workers are woken for
#: one that comes; Twisted's usual 100 would give a whole burst to the one that is up first.
ACCEPTS = 1
#: How long a worker leaves a connection to those who hold fewer.
YIELD_S = 0.002


def hold(port: IListeningPort) -> int:
    """Keep the socket open without accepting from it; its descriptor."""
    held = cast(Any, port)
    held.stopReading()
    # To stop this port must not shut the socket down for all who share it.
    held._shouldShutdown = False
    descriptor: int = held.fileno()
    return descriptor


class Adopting:
    """Stands for the reactor where an endpoint wants to listen: it gets a socket that is there.

    So the endpoint's text is understood by its own parser.
    """

    def __init__(
        self, reactor: Any, descriptor: int, my_turn: Callable[[], bool] = lambda: True
    ) -> None:
        self._reactor = reactor
        self._descriptor = descriptor
        self._my_turn = my_turn

    def listenTCP(
        self, port: int, factory: IProtocolFactory, backlog: int = 0, interface: str = ""
    ) -> IListeningPort:
        """The socket, whatever its address."""
        return self._adopted(factory)

    def listenUNIX(
        self,
        address: str,
        factory: IProtocolFactory,
        backlog: int = 0,
        mode: int = 0,
        wantPID: int = 0,
    ) -> IListeningPort:
        """The same."""
        return self._adopted(factory)

    def _adopted(self, factory: IProtocolFactory) -> IListeningPort:
        with socket.socket(fileno=self._descriptor) as shared:
            shared.setblocking(False)
            if shared.family == socket.AF_UNIX:
                port: IListeningPort = _SharedUNIXPort.of(shared, factory, self._reactor)
            else:
                port = self._reactor.adoptStreamPort(shared.fileno(), shared.family, factory)
        accept_few(port, self._reactor, self._my_turn)
        return port


def adoptable(text: str) -> str:
    """An endpoint's text for `Adopting`: of a `systemd:` socket only the supervisor can know."""
    return re.sub(r"(?:^|(?<=:))systemd:.*", "tcp:0", text)


def accept_few(
    port: IListeningPort, reactor: Any, my_turn: Callable[[], bool] = lambda: True
) -> None:
    """Let the port take no more than `ACCEPTS` connections at a time, where it can be told so.

    When it is not `my_turn`, it leaves them to others for `YIELD_S`, and then takes one all the
    same: the others may be busy.
    """
    shared = cast(Any, port)
    if not hasattr(shared, "numberAccepts"):
        return
    read = shared.doRead

    def read_few() -> None:
        shared.numberAccepts = ACCEPTS  # it changes the number itself after each time
        read()

    def read_on() -> None:
        if shared.connected and not shared.disconnecting:
            shared.startReading()
            read_few()  # which may have to rest

    def read_in_turn() -> None:
        if my_turn():
            read_few()
        else:
            shared.stopReading()
            reactor.callLater(YIELD_S, read_on)

    shared.doRead = read_in_turn


class _SharedUNIXPort(UNIXPort):
    """A UNIX socket that is listened on already. The file that is its address stays as it is,
    and where it is: Twisted's own way to adopt one sets its mode, and removes it at the end.
    """

    _shouldShutdown = False

    @classmethod
    def of(cls, shared: socket.socket, factory: IProtocolFactory, reactor: Any) -> _SharedUNIXPort:
        """A port on a copy of `shared`, which is read at once."""
        port = cls(shared.getsockname(), factory, reactor=reactor)
        port.socket = socket.socket(fileno=os.dup(shared.fileno()))
        port.startListening()
        return port

    def startListening(self) -> None:
        """Begin to accept."""
        cast(Any, self.factory).doStart()
        self.connected = True
        self.fileno = self.socket.fileno  # type: ignore[method-assign]
        self.numberAccepts = ACCEPTS
        self.startReading()

    def connectionLost(self, reason: Failure) -> None:
        """Close our copy."""
        tcp.Port.connectionLost(self, reason)
