"""Listening sockets that several processes share, at the same time or one after the other.

The supervisor binds them and accepts nothing; each worker inherits the descriptors and accepts
from the one queue that the kernel keeps for all, so what waits there outlives any worker. A
process that takes another one's place inherits them too: they are never closed in between.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

from twisted.internet import tcp
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort, IProtocolFactory
from twisted.python.failure import Failure
from twisted.python.lockfile import FilesystemLock

from llmproxy.errors import ConfigError
from llmproxy.reactor import UNIXPort

#: How many connections a worker takes each time that it is woken. All idle workers are woken for
#: one that comes; Twisted's usual 100 would give a whole burst to the one that is up first.
ACCEPTS = 1
#: How long a worker leaves a connection to those who hold fewer.
YIELD_S = 0.002


async def open_port(reactor: Any, text: str, factory: Any) -> IListeningPort:
    """Listen on the endpoint without TLS that `text` names. Raises ConfigError."""
    factory.noisy = False
    try:
        port: IListeningPort = await serverFromString(reactor, text).listen(factory)
    except CannotListenError as error:
        raise ConfigError(f"can't listen on {text}: {error.socketError}") from None
    except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
        raise ConfigError(f"can't listen on {text}: {error}") from None
    return port


def hold(port: IListeningPort) -> int:
    """Keep the socket open without accepting from it; its descriptor."""
    held = cast(Any, port)
    held.stopReading()
    # To stop this port must not shut the socket down for all who share it.
    held._shouldShutdown = False
    descriptor: int = held.fileno()
    return descriptor


class Sockets:
    """All that a process listens on, to be handed on to one that takes its place.

    `inherited`: texts of endpoints without their TLS, and the descriptors of sockets that are
    listened on there already. What an endpoint's text names is taken from these, else opened.
    """

    def __init__(self, reactor: Any, inherited: Iterable[tuple[str, int]] = ()) -> None:
        self.reactor = reactor
        self._inherited = [*inherited]
        self._ports: list[tuple[str, IListeningPort]] = []

    async def open(self, text: str, factory: Any) -> IListeningPort:
        """Listen on the endpoint without TLS that `text` names. Raises ConfigError."""
        port = await self._port(text, factory)
        self._ports.append((text, port))
        return port

    async def _port(self, text: str, factory: Any) -> IListeningPort:
        for each in self._inherited:
            if each[0] == text:
                self._inherited.remove(each)
                return await open_port(Adopting(self.reactor, each[1]), adoptable(text), factory)
        return await open_port(self.reactor, text, factory)

    def pause(self) -> None:
        """Accept nobody."""
        for _, port in self._ports:
            cast(Any, port).stopReading()

    def own(self) -> None:
        """Nobody else is left who uses what was inherited. What is not listened on is closed."""
        for _, descriptor in self._inherited:
            os.close(descriptor)
        self._inherited.clear()
        for text, port in self._ports:
            if isinstance(port, _SharedUNIXPort) and adoptable(text) == text:
                port.own()

    def descriptors(self) -> list[tuple[str, int]]:
        """What another process is to inherit."""
        return [(text, cast(Any, port).fileno()) for text, port in self._ports]

    def hand_on(self, pid: int) -> None:
        """The process `pid` has inherited them: accept nobody, and leave all but our copies."""
        for _, port in self._ports:
            hold(port)
            if isinstance(port, UNIXPort):
                _hand_on_file(port, pid)


def _hand_on_file(port: UNIXPort, pid: int) -> None:
    shared = cast(Any, port)
    shared.connectionLost = partial(tcp.Port.connectionLost, port)
    if shared.lockFile is not None:
        lock = os.fsdecode(shared.lockFile.name)
        os.symlink(str(pid), f"{lock}.{pid}")
        os.replace(f"{lock}.{pid}", lock)


class Adopting:
    """Stands for the reactor where an endpoint wants to listen: it gets a socket that is there.

    So the endpoint's text is understood by its own parser. `my_turn`: see `accept_few`; without it
    nobody else accepts from that socket.
    """

    def __init__(
        self, reactor: Any, descriptor: int, my_turn: Callable[[], bool] | None = None
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
        if self._my_turn is not None:
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
    `own` makes it ours, to be removed at the end.
    """

    _shouldShutdown = False
    _is_ours = False

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

    def own(self) -> None:
        """The file is ours from now on, and the lock beside it if there is one."""
        self._is_ours = True
        lock = os.fsencode(self.socket.getsockname()) + b".lock"
        if os.path.islink(lock):
            self.lockFile = FilesystemLock(lock)  # which whoever had it has made over to us

    def connectionLost(self, reason: Failure) -> None:
        """Close our copy; of what is ours, all."""
        if self._is_ours:
            super().connectionLost(reason)
        else:
            tcp.Port.connectionLost(self, reason)
