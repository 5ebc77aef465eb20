"""Looking up names of hosts: each in a thread of its own, and one look-up at a time for a name.

Twisted has ten threads for that. One name whose server does not answer (which takes glibc 10 s and
more) fills them with its look-ups, and no other name is found meanwhile; and a process that stops
waits for them.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from threading import Thread
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import (
    IHostnameResolver,
    IHostResolution,
    IReactorFromThreads,
    IResolutionReceiver,
)
from zope.interface import implementer

_FAMILIES: dict[int, Any] = {socket.AF_INET: IPv4Address, socket.AF_INET6: IPv6Address}


@implementer(IHostResolution)
class _LookUp:
    """Who waits for a name, with the port and the kinds of address that each wants."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting: list[tuple[IResolutionReceiver, int, Sequence[Any]]] = []

    def cancel(self) -> None:
        """See `IHostResolution.cancel`: a look-up ends by itself."""


@implementer(IHostnameResolver)
class Resolver:
    """The system's resolver. Who can't wait sets a deadline of his own."""

    def __init__(self, reactor: IReactorFromThreads) -> None:
        self._reactor = reactor
        self._running: dict[str, _LookUp] = {}

    def resolveHostName(
        self,
        resolutionReceiver: IResolutionReceiver,
        hostName: str,
        portNumber: int = 0,
        addressTypes: Sequence[Any] | None = None,
        transportSemantics: str = "TCP",
    ) -> IHostResolution:
        """See `IHostnameResolver.resolveHostName`."""
        running = self._running.get(hostName)
        begins = running is None
        if running is None:
            running = self._running[hostName] = _LookUp(hostName)
        wanted = addressTypes or tuple(_FAMILIES.values())
        running.waiting.append((resolutionReceiver, portNumber, wanted))
        resolutionReceiver.resolutionBegan(running)
        if begins:
            self._begin(hostName)
        return running

    def _begin(self, name: str) -> None:
        try:
            # No process waits for such a thread at its end.
            Thread(target=self._look_up, args=(name,), daemon=True).start()
        except RuntimeError:  # there are too many threads on this machine
            self._reactor.callFromThread(self._found, name, [])

    def _look_up(self, name: str) -> None:
        found: Sequence[Any] = []
        try:
            found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            pass  # it stands for nothing
        finally:
            self._reactor.callFromThread(self._found, name, found)

    def _found(self, name: str, found: Sequence[Any]) -> None:
        for receiver, port, wanted in self._running.pop(name).waiting:
            for family, _, _, _, (host, _, *scope) in found:
                kind = _FAMILIES.get(family)
                if kind is not None and kind in wanted:
                    receiver.addressResolved(kind("TCP", host, port, *scope))
            receiver.resolutionComplete()
