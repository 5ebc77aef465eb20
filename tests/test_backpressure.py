"""Slow peers on real sockets: what waits in the proxy stays bounded, and nobody waits for ever.

What the kernel keeps for a connection is not the proxy's; the sockets' buffers are made small
where that is possible, so that little of a flood is enough to fill them.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
import pytest_twisted
from backend import (
    CHUNKED,
    DONE,
    LAST_CHUNK,
    Connection,
    Flood,
    ScriptedBackend,
    Seen,
    StopReading,
    Wait,
    chunk,
    head,
    json_answer,
    sse_event,
)
from proxy import Answer, Client, ProxyHandle, request_bytes, running_proxy
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.interfaces import IPullProducer
from twisted.internet.protocol import Protocol
from twisted.internet.task import deferLater
from zope.interface import implementer

from llmproxy.upload import HIGH_WATER

# The global reactor has no type of its own: it is whichever was installed.
reactor: Any = _reactor

MIB = 1024 * 1024
CHAT = "/v1/chat/completions"
AUDIO = "/v1/audio/transcriptions"
ASK = request_bytes("POST", CHAT, orjson.dumps({"model": "m", "messages": [], "stream": True}))
MARK = b'xxxx"}}]}'
TEXT = chunk(sse_event({"choices": [{"index": 0, "delta": {"content": "x" * 8000}}]}))
END = (
    chunk(sse_event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}))
    + chunk(DONE)
    + LAST_CHUNK
)
#: A transport's own buffer: what Twisted lets it grow to, one read of 64 KiB, and some framing.
HELD_PER_STREAM = 2 * HIGH_WATER + 32 * 1024
#: What the kernel may keep on a way with two hops, where we can't make it keep less.
KERNEL = 16 * MIB


def flood(times: int) -> list[Any]:
    return [head(200, CHUNKED), Flood(TEXT, times), END]


def sockets(proxy: ProxyHandle) -> Iterator[Any]:
    """The transports of the proxy's clients."""
    for channel in proxy.proxy._site.connections:  # type: ignore[union-attr]
        yield channel.transport


def waiting(transport: Any) -> int:
    """How much a transport of Twisted's holds that the kernel has not taken."""
    return len(transport.dataBuffer) - transport.offset + transport._tempDataLen


def rss() -> int:
    """The bytes of memory that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def steady(read: Any, timeout_s: float = 10.0) -> int:
    """The value of `read()`, when it does not change any more."""
    before, same = -1, 0
    for _ in range(int(timeout_s / 0.01)):
        now = read()
        same = same + 1 if now == before else 0
        if same == 10:
            return cast(int, now)
        before = now
        await deferLater(reactor, 0.01)
    raise TimeoutError(f"still changing: {before}")


class Taker(Protocol):
    """A client that takes nothing until it is told to. `taken`: how many bytes it has; `tail`: the
    last of them; `events`: how many pieces of text were in them. `peer`: the proxy's transport."""

    peer: Any

    def __init__(self) -> None:
        self.taken, self.events, self.tail = 0, 0, b""
        self.closed: Deferred[None] = Deferred()

    def connectionMade(self) -> None:
        self.wire = cast(Any, self.transport)
        self.wire.pauseProducing()

    def buffer(self, size: int) -> None:
        """Make the kernel keep that much of what is for us."""
        if self.peer.connected:
            self.peer.getHandle().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)

    def take(self) -> None:
        """Read on, at full speed."""
        self.buffer(MIB)
        self.wire.resumeProducing()

    def dataReceived(self, data: bytes) -> None:
        self.taken += len(data)
        self.events += (self.tail + data).count(MARK) - self.tail.count(MARK)
        self.tail = (self.tail + data)[-200:]

    def connectionLost(self, reason: object = None) -> None:
        self.closed.callback(None)

    async def leave(self) -> None:
        self.wire.abortConnection()
        await self.closed


async def deaf(proxy: ProxyHandle) -> Taker:
    """A client that asked, and takes nothing; what the kernel keeps for it is little."""
    before = set(sockets(proxy))
    endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", proxy.port)
    taker: Taker = await connectProtocol(endpoint, Taker())
    while not (new := set(sockets(proxy)) - before):
        await deferLater(reactor, 0)
    taker.peer = new.pop()
    taker.buffer(16 * 1024)
    taker.wire.write(ASK)
    return taker


def proxy_for(folder: Path, backend: ScriptedBackend, **settings: Any) -> Any:
    served = {"url": backend.url, "timeout": 30.0, **settings.pop("served", {})}
    return running_proxy(folder, {"m": served}, **settings)


@pytest_twisted.ensureDeferred
async def test_a_client_that_does_not_read_holds_the_backend_up_until_it_reads(tmp_path: Path):
    times = 32 * MIB // len(TEXT)
    async with ScriptedBackend(flood(times)) as backend, proxy_for(tmp_path, backend) as proxy:
        client = await deaf(proxy)
        link = (await backend.request()).connection
        held_up_at = await steady(lambda: link.sent)
        (transport,) = sockets(proxy)
        assert held_up_at < KERNEL
        assert 0 < waiting(transport) < HELD_PER_STREAM
        client.take()
        while not client.tail.endswith(LAST_CHUNK):
            await deferLater(reactor, 0.01)
        assert client.events == times
        assert DONE in client.tail
        await client.leave()
        assert proxy.rows() == [("settled", "complete", 3, 2)]


@pytest.mark.parametrize(
    ("on_disconnect", "state"), [("drain", "settled"), ("cancel", "estimated")]
)
@pytest_twisted.ensureDeferred
async def test_a_client_that_never_reads_is_cut_off_and_billed(
    tmp_path: Path, on_disconnect: str, state: str
):
    served = {"on_disconnect": on_disconnect}
    times = 8 * MIB // len(TEXT)
    async with (
        ScriptedBackend(flood(times)) as backend,
        proxy_for(tmp_path, backend, served=served, timeout_read=0.3) as proxy,
    ):
        client = await deaf(proxy)
        [(found, outcome, prompt, completion)] = await proxy.settled()
        assert (found, outcome) == (state, "client_gone")
        if state == "settled":
            assert (prompt, completion) == (3, 2)
        else:
            assert 0 < completion < times
            await backend.requests[0].connection.when_closed()
        client.take()
        await client.closed
        assert LAST_CHUNK not in client.tail


@pytest_twisted.ensureDeferred
async def test_many_clients_that_never_read_are_bounded_in_memory_and_billed(tmp_path: Path):
    count, times = 200, 512 * 1024 // len(TEXT)
    async with ScriptedBackend(flood(times)) as backend, proxy_for(tmp_path, backend) as proxy:
        before = rss()
        clients = [await deaf(proxy) for _ in range(count)]
        await backend.request(count - 1, timeout_s=20)
        held = await steady(lambda: sum(map(waiting, sockets(proxy))))
        assert len(list(sockets(proxy))) == count
        assert max(map(waiting, sockets(proxy))) < HELD_PER_STREAM
        assert 0 < held < count * HELD_PER_STREAM
        assert rss() - before < count * 3 * HIGH_WATER
        for client in clients:
            await client.leave()
        rows = await proxy.settled(count, timeout_s=30)
        assert rows == [("settled", "client_gone", 3, 2)] * count


# --- uploads ------------------------------------------------------------------------------------


@implementer(IPullProducer)
class Uploading:
    """Sends a form as fast as it is taken; `sent` counts its bytes."""

    def __init__(self, client: Client, size: int) -> None:
        self.sent = 0
        self._left = size
        self._transport = cast(Any, client.transport)
        top = (
            b'--X\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
            b'--X\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        )
        self._end = b"\r\n--X--\r\n"
        fields = {
            "Content-Type": "multipart/form-data; boundary=X",
            "Content-Length": str(len(top) + size + len(self._end)),
        }
        client.send(request_bytes("POST", AUDIO, fields=fields) + top)
        self._transport.registerProducer(self, False)

    def resumeProducing(self) -> None:
        piece = min(self._left, 64 * 1024)
        self._left -= piece
        self.sent += piece
        self._transport.write(bytes(piece))
        if not self._left:
            self._transport.unregisterProducer()
            self._transport.write(self._end)

    def stopProducing(self) -> None:
        """The connection is gone."""


@dataclass
class ReadOn:
    """Read again, and wait until the request is whole."""

    request: Seen

    async def run(self, connection: Connection) -> None:
        cast(Any, connection.transport).resumeProducing()
        while not self.request.body:
            await deferLater(reactor, 0.01)


@pytest_twisted.ensureDeferred
async def test_a_backend_that_does_not_read_holds_the_uploading_client_up_until_it_reads(
    tmp_path: Path,
):
    size = 64 * MIB
    answer = json_answer(200, {"text": "hello", "duration": 1.0})
    gate: Deferred[None] = Deferred()

    def script(seen: Seen) -> list[Any]:
        return [StopReading(), Wait(gate), ReadOn(seen), answer]

    async with (
        ScriptedBackend(script, early=True) as backend,
        proxy_for(tmp_path, backend) as proxy,
    ):
        before = rss()
        client = await proxy.open()
        uploading = Uploading(client, size)
        taken = await steady(lambda: uploading.sent)
        assert MIB < taken < KERNEL
        assert rss() - before < 8 * MIB
        gate.callback(None)
        await client.when(lambda received: Answer(received).whole)
        assert client.answer().json() == {"text": "hello"}
        assert len(backend.requests[0].body) > size
        client.transport.loseConnection()
        await client.closed
        assert proxy.bill() == {"m/gpu/transcription": 1}


@pytest.mark.parametrize("reads", [True, False], ids=["reads on", "reads no more"])
@pytest_twisted.ensureDeferred
async def test_a_backend_that_answers_before_the_upload_is_whole_is_heard(
    tmp_path: Path, reads: bool
):
    refusal = json_answer(413, {"error": {"message": "too long"}})
    script: list[Any] = [refusal] if reads else [StopReading(), refusal]
    async with (
        ScriptedBackend(script, early=True) as backend,
        proxy_for(tmp_path, backend) as proxy,
    ):
        client = await proxy.open()
        Uploading(client, 64 * MIB)
        await client.when(lambda received: Answer(received).whole)
        assert client.answer().status == 413
        assert proxy.rows("state, outcome, status") == [("settled", "refused", 413)]
        link = backend.requests[0].connection
        if not reads:
            cast(Any, link.transport).resumeProducing()  # now the kernel tells of the end
        await link.when_closed()
        assert link.received < KERNEL
        client.transport.abortConnection()
        await client.closed
