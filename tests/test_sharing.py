"""Tests of sockets that are shared: two ports in one process stand for those of two workers."""

from __future__ import annotations

import os
import socket
import ssl
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from certificates import make_certificate
from twisted.internet import reactor as _reactor
from twisted.internet.endpoints import quoteStringArgument
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from llmproxy.proxy import stopped
from llmproxy.server_tls import Certificate, Loaded, Pem
from llmproxy.sharing import Adopting, accept_few, adoptable, hold, open_port

# The global reactor has no type of its own: it is whichever was installed.
reactor: Any = _reactor


class Greeting(Protocol):
    """Says the name of its factory."""

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.write(self.factory.name)
        self.transport.loseConnection()


class Greeter(Factory[Greeting]):
    protocol = Greeting

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.greeted = 0

    def buildProtocol(self, addr: object) -> Greeting | None:
        self.greeted += 1
        return super().buildProtocol(addr)  # type: ignore[arg-type]


class Shared:
    """A socket that is held, and ports that accept from it."""

    def __init__(self, text: str, held: IListeningPort, descriptor: int) -> None:
        self.text, self.held, self._descriptor = text, held, descriptor
        self.ports: list[IListeningPort] = []

    async def adopt(
        self, greeter: Any, my_turn: Callable[[], bool] = lambda: True
    ) -> IListeningPort:
        adopting = Adopting(reactor, os.dup(self._descriptor), my_turn)
        self.ports.append(await open_port(adopting, adoptable(self.text), greeter))
        return self.ports[-1]

    async def close(self) -> None:
        await stopped([*self.ports, self.held])


async def share(text: str) -> Shared:
    held = await open_port(reactor, text, Factory())
    return Shared(text, held, hold(held))


def ask(address: Any, *, tls: ssl.SSLContext | None = None) -> bytes:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as plain:
        plain.settimeout(5)
        plain.connect(address)
        client = tls.wrap_socket(plain, server_hostname="localhost") if tls else plain
        try:
            return client.recv(100)
        finally:
            client.close()


def address_of(shared: Shared) -> tuple[str, int]:
    host = shared.held.getHost()
    return "127.0.0.1", host.port  # type: ignore[attr-defined]


LOCAL = "tcp:0:interface=127.0.0.1"


@pytest_twisted.ensureDeferred
async def test_who_holds_a_socket_accepts_nothing_and_who_adopts_it_does():
    shared = await share(LOCAL)
    asking = deferToThread(ask, address_of(shared))
    await deferLater(reactor, 0.05)
    assert not asking.called
    await shared.adopt(Greeter(b"one"))
    assert await asking == b"one"
    await shared.close()


@pytest_twisted.ensureDeferred
async def test_when_one_of_two_stops_the_other_goes_on():
    shared = await share(LOCAL)
    first = await shared.adopt(Greeter(b"one"))
    await shared.adopt(Greeter(b"two"))
    await stopped([first])
    for _ in range(3):
        assert await deferToThread(ask, address_of(shared)) == b"two"
    await shared.close()


@pytest_twisted.ensureDeferred
async def test_when_the_holder_stops_those_who_adopted_go_on_until_the_last_one():
    shared = await share(LOCAL)
    port = await shared.adopt(Greeter(b"one"))
    address = address_of(shared)
    await stopped([shared.held])
    assert await deferToThread(ask, address) == b"one"
    await stopped([port])
    with pytest.raises(ConnectionRefusedError):
        await deferToThread(ask, address)


@pytest_twisted.ensureDeferred
async def test_a_burst_is_not_taken_whole_by_one():
    shared = await share(LOCAL)
    waiting = [socket.create_connection(address_of(shared)) for _ in range(40)]
    greeters = [Greeter(b"one"), Greeter(b"two")]
    for greeter in greeters:
        await shared.adopt(greeter)
    while sum(greeter.greeted for greeter in greeters) < len(waiting):
        await deferLater(reactor, 0.01)
    # With one reactor for both they take turns.
    assert min(greeter.greeted for greeter in greeters) >= 10
    for each in waiting:
        each.close()
    await shared.close()


@pytest.mark.parametrize("others_are_busy", [False, True])
@pytest_twisted.ensureDeferred
async def test_who_holds_more_leaves_connections_to_others_but_not_for_ever(others_are_busy):
    shared = await share(LOCAL)
    mine, theirs = Greeter(b"mine"), Greeter(b"theirs")
    await shared.adopt(mine, my_turn=lambda: False)
    if not others_are_busy:
        await shared.adopt(theirs, my_turn=lambda: True)
    waiting = [socket.create_connection(address_of(shared)) for _ in range(20)]
    while mine.greeted + theirs.greeted < len(waiting):
        await deferLater(reactor, 0.01)
    assert theirs.greeted >= 15 or others_are_busy
    for each in waiting:
        each.close()
    await shared.close()


@pytest_twisted.ensureDeferred
async def test_a_unix_socket_keeps_its_file_and_mode_until_its_holder_stops(tmp_path: Path):
    path = tmp_path / "http.sock"
    shared = await share(f"unix:{quoteStringArgument(str(path))}:mode=600")
    first = await shared.adopt(Greeter(b"one"))
    assert await deferToThread(ask, str(path)) == b"one"
    await stopped([first])
    await shared.adopt(Greeter(b"two"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert await deferToThread(ask, str(path)) == b"two"
    await shared.close()
    assert not path.exists()


@pytest_twisted.ensureDeferred
async def test_tls_is_spoken_on_a_socket_that_was_opened_without_it(tmp_path: Path):
    file = make_certificate(tmp_path)
    pem = file.read_text()
    shared = await share("tcp:0:interface=127.0.0.1")
    await shared.adopt(Certificate(Loaded.of(Pem(pem, pem))).over(Greeter(b"one"), reactor))
    trusting = ssl.create_default_context(cafile=file)
    assert await deferToThread(ask, address_of(shared), tls=trusting) == b"one"
    await shared.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest_twisted.ensureDeferred
async def test_of_a_systemd_socket_only_the_descriptor_is_needed(listener: socket.socket):
    adopting = Adopting(reactor, os.dup(listener.fileno()))
    text = adoptable("systemd:domain=INET:index=0")
    port = await open_port(adopting, text, Greeter(b"one"))
    assert await deferToThread(ask, listener.getsockname()) == b"one"
    await stopped([port])


@pytest.mark.parametrize(
    ("text", "adopted"),
    [
        ("tcp:80", "tcp:80"),
        ("systemd:domain=INET:index=0", "tcp:0"),
        ("haproxy:systemd:domain=INET:name=x", "haproxy:tcp:0"),
        ("unix:/run/systemd/x.sock", "unix:/run/systemd/x.sock"),
    ],
)
def test_an_endpoint_s_text_is_kept_but_for_systemd_s(text, adopted):
    assert adoptable(text) == adopted


def test_a_port_that_can_not_be_told_is_left_alone():
    accept_few(object(), reactor)  # type: ignore[arg-type]
