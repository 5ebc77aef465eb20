"""Names of hosts: one look-up at a time for each, and what is found goes to all who wait."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as _reactor
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.interfaces import IHostnameResolver, IHostResolution
from zope.interface.verify import verifyObject

from llmproxy.names import Resolver

reactor: Any = _reactor

V4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))
V6 = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 0, 0, 3))


class Receiver:
    """Collects what a name stands for."""

    def __init__(self) -> None:
        self.addresses: list[object] = []
        self.done: Deferred[list[object]] = Deferred()

    def resolutionBegan(self, resolution: IHostResolution) -> None:
        assert verifyObject(IHostResolution, resolution)

    def addressResolved(self, address: object) -> None:
        self.addresses.append(address)

    def resolutionComplete(self) -> None:
        self.done.callback(self.addresses)


def look_up(resolver: Resolver, name: str, port: int, kinds: Sequence[Any] | None = None) -> Any:
    receiver = Receiver()
    resolver.resolveHostName(receiver, name, port, kinds)  # type: ignore[arg-type]
    return receiver.done


def test_the_proxy_s_reactor_has_it() -> None:
    assert verifyObject(IHostnameResolver, reactor.nameResolver)
    assert isinstance(reactor.nameResolver, Resolver)


@pytest_twisted.ensureDeferred
async def test_who_asks_for_the_same_name_shares_a_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    go_on = threading.Event()

    def getaddrinfo(name: str, port: int, **more: Any) -> list[Any]:
        asked.append(name)
        go_on.wait(5)
        return [V6, V4]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    resolver = Resolver(reactor)
    waiting = [look_up(resolver, "a.test", port) for port in (1, 2)]
    waiting.append(look_up(resolver, "a.test", 3, [IPv4Address]))
    go_on.set()
    one, two, three = await gatherResults(waiting)
    assert asked == ["a.test"]
    v6 = IPv6Address("TCP", "fe80::1", 1, 0, 3)
    assert one == [v6, IPv4Address("TCP", "192.0.2.1", 1)]
    assert [address.port for address in two] == [2, 2]
    assert three == [IPv4Address("TCP", "192.0.2.1", 3)]
    await look_up(resolver, "a.test", 4)
    assert asked == ["a.test", "a.test"]  # nothing is kept: DNS may have changed


@pytest.mark.parametrize("error", [socket.gaierror(), UnicodeError(), OSError()])
@pytest_twisted.ensureDeferred
async def test_a_name_that_is_not_found_stands_for_nothing(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def getaddrinfo(*args: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert await look_up(Resolver(reactor), "no.test", 1) == []


@pytest_twisted.ensureDeferred
async def test_a_name_is_not_found_where_no_thread_can_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    resolver = Resolver(reactor)
    with monkeypatch.context() as without:
        without.setattr(threading.Thread, "start", start)
        assert await look_up(resolver, "127.0.0.1", 1) == []
    assert await look_up(resolver, "127.0.0.1", 1) == [IPv4Address("TCP", "127.0.0.1", 1)]
