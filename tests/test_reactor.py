"""The reactor: what is written is sent at once, in order, with back-pressure, and errors close."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import pytest
import pytest_twisted
from housekeeping import FlushLoggedErrors
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from llmproxy.reactor import Client, Reactor, Server

reactor: Any = _reactor
MIB = 1024 * 1024


class Peer(Protocol):
    """Our end of a connection."""

    transport: Any

    def __init__(self) -> None:
        self.received = b""
        self.made: Deferred[Peer] = Deferred()
        self.lost: Deferred[None] = Deferred()
        self.reason: Failure | None = None
        self.act: Callable[[], object] = lambda: None

    def connectionMade(self) -> None:
        self.made.callback(self)

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        self.act()

    def connectionLost(self, reason: Failure | None = None) -> None:
        self.reason = reason
        self.lost.callback(None)


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Peer, socket.socket]]:
    """A server's end in the reactor, and the client's as a plain socket."""
    peer = Peer()
    port = reactor.listenTCP(0, Factory.forProtocol(lambda: peer), interface="127.0.0.1")
    client = socket.create_connection(("127.0.0.1", port.getHost().port))
    client.setblocking(False)
    try:
        await peer.made
        yield peer, client
    finally:
        client.close()
        if not peer.lost.called:
            peer.transport.abortConnection()
            await peer.lost
        await port.stopListening()


async def read(client: socket.socket, size: int) -> bytes:
    """So many bytes, as they come."""
    data = b""
    while len(data) < size:
        try:
            piece = client.recv(MIB)
        except BlockingIOError:
            await deferLater(reactor, 0.001)
            continue
        if not piece:
            break
        data += piece
    return data


def test_the_tests_run_on_it() -> None:
    assert isinstance(reactor, Reactor)


@pytest_twisted.ensureDeferred
async def test_what_is_written_is_in_the_socket_when_write_returns() -> None:
    async with connected() as (peer, client):
        assert isinstance(peer.transport, Server)
        peer.transport.write(b"abc")
        assert client.recv(10) == b"abc"
        peer.transport.writeSequence([b"d", b"e"])
        assert client.recv(10) == b"de"
        assert peer.transport not in reactor.getWriters()


@pytest_twisted.ensureDeferred
async def test_what_the_socket_does_not_take_follows_in_order() -> None:
    async with connected() as (peer, client):
        pieces = [bytes([65 + n]) * MIB for n in range(16)]
        for piece in pieces:
            peer.transport.write(piece)
        assert peer.transport in reactor.getWriters()
        assert await read(client, 16 * MIB) == b"".join(pieces)
        await deferLater(reactor, 0.01)
        assert peer.transport not in reactor.getWriters()
        peer.transport.write(b"z")
        assert client.recv(10) == b"z"


def mistake() -> None:
    raise RuntimeError("a mistake")


class Source:
    """A producer, and what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def pauseProducing(self) -> None:
        self.told.append("pause")

    def resumeProducing(self) -> None:
        self.told.append("resume")

    def stopProducing(self) -> None:
        self.told.append("stop")


@pytest_twisted.ensureDeferred
async def test_a_slow_reader_pauses_the_producer_until_it_has_caught_up() -> None:
    async with connected() as (peer, client):
        source = Source()
        peer.transport.registerProducer(source, True)
        peer.transport.write(b"x")
        assert source.told == []
        sent = 1
        while not source.told:
            peer.transport.write(bytes(100_000))
            sent += 100_000
        assert source.told == ["pause"]
        await read(client, sent)
        await deferLater(reactor, 0.01)
        assert source.told == ["pause", "resume"]
        peer.transport.unregisterProducer()


@pytest_twisted.ensureDeferred
async def test_a_producer_that_is_pulled_from_goes_on() -> None:
    async with connected() as (peer, client):
        transport, left = peer.transport, [b"a", b"b", b"c"]

        class Pulled(Source):
            def resumeProducing(self) -> None:
                if left:
                    transport.write(left.pop(0))
                else:
                    transport.unregisterProducer()

        transport.registerProducer(Pulled(), False)
        assert await read(client, 3) == b"abc"


@pytest_twisted.ensureDeferred
async def test_all_that_was_written_comes_before_the_end() -> None:
    async with connected() as (peer, client):
        peer.transport.write(bytes(8 * MIB))
        peer.transport.write(b"end")
        peer.transport.loseConnection()
        assert (await read(client, 9 * MIB))[-3:] == b"end"
        await peer.lost


@pytest_twisted.ensureDeferred
async def test_nothing_is_sent_after_an_abort() -> None:
    async with connected() as (peer, client):
        peer.transport.abortConnection()
        peer.transport.write(b"too late")
        await peer.lost
        with pytest.raises(ConnectionResetError):
            client.recv(10)


@pytest_twisted.ensureDeferred
async def test_writing_to_a_peer_that_is_gone_closes_and_calls_nothing_back_at_once() -> None:
    async with connected() as (peer, client):
        peer.transport.pauseProducing()  # else the reset is read first
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        for _ in range(3):
            peer.transport.write(b"x")
            assert not peer.lost.called
        await peer.lost


@pytest_twisted.ensureDeferred
async def test_a_mistake_in_a_protocol_closes_its_connection_alone(
    flush_logged_errors: FlushLoggedErrors,
) -> None:
    async with connected() as (peer, client), connected() as (other, other_client):
        peer.act = mistake
        client.send(b"x")
        await peer.lost
        assert peer.reason is not None
        assert peer.reason.check(RuntimeError)
        assert len(flush_logged_errors(RuntimeError)) == 1
        other_client.send(b"y")
        await deferLater(reactor, 0.01)
        assert other.received == b"y"


@contextmanager
def soon() -> Iterator[Deferred[None]]:
    """What is waited for comes at once; no other call is due for seconds."""
    began, waited = reactor.seconds(), Deferred[None]()
    waited.addTimeout(5, reactor)
    yield waited
    assert reactor.seconds() - began < 2


@pytest_twisted.ensureDeferred
async def test_a_call_that_is_asked_for_in_a_read_comes_in_time() -> None:
    async with connected() as (peer, client):
        with soon() as called:
            peer.act = lambda: reactor.callLater(0.01, called.callback, None)
            await deferLater(reactor, 0.01)
            client.send(b"x")
            await called


@pytest_twisted.ensureDeferred
async def test_a_call_that_a_read_makes_due_earlier_comes_in_time() -> None:
    async with connected() as (peer, client):
        with soon() as called:
            late = reactor.callLater(60, called.callback, None)
            peer.act = lambda: late.reset(0.01)
            await deferLater(reactor, 0.01)
            client.send(b"x")
            await called


@pytest_twisted.ensureDeferred
async def test_a_call_from_a_thread_comes_at_once() -> None:
    with soon() as called:
        await deferLater(reactor, 0.01)
        ask = partial(reactor.callFromThread, called.callback, None)
        threading.Timer(0.1, ask).start()
        await called


@pytest_twisted.ensureDeferred
async def test_a_round_that_fails_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch, flush_logged_errors: FlushLoggedErrors
) -> None:
    def fails(timeout: float | None) -> None:
        monkeypatch.undo()
        raise RuntimeError("a mistake")

    monkeypatch.setattr(reactor, "doPoll", fails)
    await deferLater(reactor, 0.01)
    assert len(flush_logged_errors(RuntimeError)) == 1


@pytest_twisted.ensureDeferred
async def test_connections_that_are_made_are_of_the_same_kind() -> None:
    port = reactor.listenTCP(0, Factory.forProtocol(Peer), interface="127.0.0.1")
    endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", port.getHost().port)
    peer: Peer = await connectProtocol(endpoint, Peer())
    assert isinstance(peer.transport, Client)
    peer.transport.loseConnection()
    await peer.lost
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_port_that_is_handed_over_makes_them_too() -> None:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    listening.setblocking(False)
    peer = Peer()
    port = reactor.adoptStreamPort(
        listening.fileno(), socket.AF_INET, Factory.forProtocol(lambda: peer)
    )
    client = socket.create_connection(listening.getsockname())
    listening.close()
    await peer.made
    assert isinstance(peer.transport, Server)
    client.close()
    await peer.lost
    await port.stopListening()


WHICH = """
import sys
from twisted.application.reactors import installReactor
print(type(installReactor("llmproxy")).__name__)
"""


@pytest.mark.parametrize(("loop", "name"), [("", "Reactor"), ("uvloop", "UvloopReactor")])
def test_twistd_knows_it_by_its_name(loop: str, name: str) -> None:
    if loop:
        pytest.importorskip("uvloop")
    told = subprocess.run(
        [sys.executable, "-c", WHICH],
        env={**os.environ, "LLMPROXY_REACTOR": loop},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == f"{name}\n"
