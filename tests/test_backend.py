"""The scripted backend does on a real socket what its scripts say."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import pytest_twisted
from backend import (
    DONE,
    LAST_CHUNK,
    Close,
    Dribble,
    Flood,
    HalfClose,
    Pause,
    Reset,
    ScriptedBackend,
    Stall,
    StopReading,
    Wait,
    chunk,
    head,
    json_answer,
    raw_answer,
    sse_answer,
    sse_event,
)
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

reactor: Any = _reactor
T = TypeVar("T")

POST = b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 7\r\n\r\n" + b'{"a":1}'
GET = b"GET /%s HTTP/1.1\r\nHost: a\r\n\r\n"


def with_socket(backend: ScriptedBackend, story: Callable[[socket.socket], T]) -> Deferred[T]:
    """Run `story` in a thread, with a connection to the backend."""
    address = ("127.0.0.1", int(backend.url.rpartition(":")[2]))

    def told() -> T:
        with socket.create_connection(address, timeout=5) as sock:
            return story(sock)

    return deferToThread(told)


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def exchange(*sent: bytes) -> Callable[[socket.socket], bytes]:
    """Send these in turn and read to the end of what comes."""

    def story(sock: socket.socket) -> bytes:
        for data in sent:
            sock.sendall(data)
        return read_all(sock)

    return story


def read_until_error(sock: socket.socket) -> tuple[bytes, type[BaseException] | None]:
    sock.sendall(POST)
    got = b""
    try:
        while part := sock.recv(65536):
            got += part
    except OSError as error:
        return got, type(error)
    return got, None


@pytest_twisted.ensureDeferred
async def test_bytes_are_sent_as_they_are_and_the_request_is_recorded():
    async with ScriptedBackend([b"not even HTTP", Close()]) as backend:
        assert await with_socket(backend, exchange(POST)) == b"not even HTTP"
        [seen] = backend.requests
    assert seen.raw == POST
    assert seen.head == POST.partition(b"{")[0]
    assert (seen.method, seen.target) == ("POST", "/v1/x")
    assert seen.headers == [("host", "a"), ("content-length", "7")]
    assert seen.header("Content-Length") == "7"
    assert seen.header("x") is None
    assert seen.json() == {"a": 1}
    assert seen.connection.received == backend.received == len(POST)


@pytest_twisted.ensureDeferred
async def test_a_chunked_body_is_put_together_however_it_was_cut():
    start = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = chunk(b"ab") + b"3;x=y\r\ncde\r\n" + LAST_CHUNK
    async with ScriptedBackend([Close()]) as backend:
        pieces = [bytes([byte]) for byte in start + body]
        assert await with_socket(backend, exchange(*pieces)) == b""
        [seen] = backend.requests
    assert seen.body == b"abcde"
    assert seen.raw == start + body


@pytest_twisted.ensureDeferred
async def test_each_request_gets_its_script_and_the_last_one_is_kept():
    scripts: list[Any] = [
        b"1",
        lambda request: [b"2" + request.target.encode()],
        [b"3", Close()],
    ]
    async with ScriptedBackend(*scripts) as backend:
        first = await with_socket(backend, exchange(GET % b"a", GET % b"b", GET % b"c"))
        assert first == b"12/b3"
        assert await with_socket(backend, exchange(GET % b"d")) == b"3"
        assert [request.target for request in backend.requests] == ["/a", "/b", "/c", "/d"]
        assert [len(connection.requests) for connection in backend.connections] == [3, 1]


@pytest_twisted.ensureDeferred
async def test_health_is_answered_without_a_script_or_a_record():
    async with ScriptedBackend([b"script", Close()]) as backend:
        assert await with_socket(backend, exchange(GET % b"health", POST)) == (
            json_answer(200, {}) + b"script"
        )
        assert [request.target for request in backend.requests] == ["/v1/x"]
        assert backend.received == len(POST)


@pytest_twisted.ensureDeferred
async def test_a_reset_comes_after_what_was_sent():
    data = b"x" * 300_000
    async with ScriptedBackend([data, Reset()]) as backend:
        got, error = await with_socket(backend, read_until_error)
    assert error is ConnectionResetError
    assert data.startswith(got)
    assert got


@pytest_twisted.ensureDeferred
async def test_a_close_is_a_clean_end():
    async with ScriptedBackend([b"some", Close()]) as backend:
        assert await with_socket(backend, read_until_error) == (b"some", None)


@pytest_twisted.ensureDeferred
async def test_after_a_half_close_it_still_reads():
    def story(sock: socket.socket) -> None:
        sock.sendall(POST)
        assert read_all(sock) == b"bye"
        sock.sendall(GET % b"more")

    async with ScriptedBackend([b"bye", HalfClose()], [Close()]) as backend:
        await with_socket(backend, story)
        assert (await backend.request(1)).target == "/more"


@pytest_twisted.ensureDeferred
async def test_a_stalled_connection_tells_when_the_peer_has_left():
    async with ScriptedBackend([b"some", Stall()]) as backend:

        def story(sock: socket.socket) -> bytes:
            sock.sendall(POST)
            return sock.recv(100)

        assert await with_socket(backend, story) == b"some"
        left = time.monotonic()
        closed = await backend.connections[0].when_closed()
        assert closed - left < 0.2
        assert backend.open_connections == []
        assert backend.connections[0].opened < closed
        assert await backend.connections[0].when_closed() == closed


@pytest_twisted.ensureDeferred
async def test_a_connection_that_stays_open_is_a_timeout():
    async with ScriptedBackend([Stall()]) as backend:
        gone = with_socket(backend, exchange(POST))
        await backend.request()
        with pytest.raises(TimeoutError):
            await backend.connections[0].when_closed(timeout_s=0.02)
        assert backend.open_connections == backend.connections
        with pytest.raises(TimeoutError):
            await backend.request(1, timeout_s=0.02)
        backend.connections[0].transport.loseConnection()
        assert await gone == b""


@pytest_twisted.ensureDeferred
async def test_a_script_waits_until_the_test_goes_on():
    gate: Deferred[str] = Deferred()
    async with ScriptedBackend([b"a", Wait(gate), b"b", Close()]) as backend:
        got = with_socket(backend, exchange(POST))
        await backend.request()
        await deferLater(reactor, 0.02)
        assert backend.connections[0].sent == 1
        gate.callback("go")
        assert await got == b"ab"
        assert await gate == "go"


@pytest_twisted.ensureDeferred
async def test_a_pause_lasts_its_time():
    async with ScriptedBackend([Pause(0.05), Close()]) as backend:
        begun = time.monotonic()
        await with_socket(backend, exchange(POST))
    assert time.monotonic() - begun >= 0.05


@pytest_twisted.ensureDeferred
async def test_dribbled_bytes_come_one_at_a_time():
    def story(sock: socket.socket) -> list[bytes]:
        sock.sendall(POST)
        return list(iter(lambda: sock.recv(100), b""))

    async with ScriptedBackend([Dribble(b"abcd", every_s=0.02), Close()]) as backend:
        assert await with_socket(backend, story) == [b"a", b"b", b"c", b"d"]


@pytest_twisted.ensureDeferred
async def test_a_flood_is_no_faster_than_its_reader():
    size = 64 * 2**20
    async with ScriptedBackend([Flood(b"x" * 65536, size // 65536), Close()]) as backend:
        read: list[int] = []

        def story(sock: socket.socket) -> int:
            sock.sendall(POST)
            time.sleep(0.1)
            read.append(backend.connections[0].sent)
            return len(read_all(sock))

        assert await with_socket(backend, story) == size
        assert 0 < read[0] < size / 2
        assert backend.connections[0].sent == size


@pytest_twisted.ensureDeferred
async def test_an_upload_backs_up_when_nothing_is_read():
    size = 99_999_999

    def story(sock: socket.socket) -> int:
        sock.sendall(b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n")
        sock.settimeout(0.2)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < size:
                sent += sock.send(b"x" * 65536)
        return sent

    async with ScriptedBackend([StopReading(), Stall()], early=True) as backend:
        sent = await with_socket(backend, story)
        assert sent < size
        assert backend.received < sent
        assert backend.requests[0].body == b""


@pytest_twisted.ensureDeferred
async def test_an_early_answer_comes_before_the_body():
    def story(sock: socket.socket) -> bytes:
        sock.sendall(POST[:-1])
        first = sock.recv(100)
        sock.sendall(POST[-1:] + GET % b"next")
        return first + b"|" + read_all(sock)

    async with ScriptedBackend(b"early", [b"second", Close()], early=True) as backend:
        assert await with_socket(backend, story) == b"early|second"
        assert backend.requests[0].body == b'{"a":1}'


@pytest_twisted.ensureDeferred
async def test_a_connection_can_be_reset_before_it_says_anything():
    async with ScriptedBackend(on_connect=[Reset()]) as backend:
        with pytest.raises(ConnectionResetError):
            await with_socket(backend, lambda sock: sock.recv(1))
        assert backend.received == 0


@pytest_twisted.ensureDeferred
async def test_a_stopped_backend_refuses_until_it_listens_again():
    async with ScriptedBackend([b"again", Close()]) as backend:
        url = backend.url
        await backend.stop()
        with pytest.raises(ConnectionRefusedError):
            await with_socket(backend, exchange(POST))
        backend.listen()
        assert backend.url == url
        assert await with_socket(backend, exchange(POST)) == b"again"


@pytest_twisted.ensureDeferred
async def test_a_script_that_fails_is_logged(flush_logged_errors):
    def broken(request: object) -> list[Any]:
        return [b"some", None]

    async with ScriptedBackend(broken) as backend:
        gone = with_socket(backend, exchange(POST))
        await backend.request()
    with pytest.raises(ConnectionResetError):
        await gone
    assert len(flush_logged_errors(AttributeError)) == 1


def test_answers_are_framed():
    assert head(200, [("Content-Length", "1"), ("Content-Length", "2")]) == (
        b"HTTP/1.1 200 X\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"
    )
    assert raw_answer(500, b"ab", {"A": "b"}) == (
        b"HTTP/1.1 500 X\r\nA: b\r\nContent-Length: 2\r\n\r\nab"
    )
    assert json_answer(404, {"a": 1}, {"Set-Cookie": "x"}) == (
        b"HTTP/1.1 404 X\r\nContent-Type: application/json\r\nSet-Cookie: x\r\n"
        b'Content-Length: 7\r\n\r\n{"a":1}'
    )


def test_events_are_framed():
    assert sse_event({"a": 1}) == b'data: {"a":1}\n\n'
    assert sse_event({"type": "ping"}) == b'event: ping\ndata: {"type":"ping"}\n\n'
    assert sse_event("x", "y") == b"event: y\ndata: x\n\n"
    assert sse_event(b": raw") == b": raw"


def test_a_stream_is_chunked_unless_it_lasts_until_the_close():
    chunked = sse_answer(["a", DONE])
    assert chunked.endswith(b"\r\n\r\n9\r\ndata: a\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    assert b"Transfer-Encoding: chunked\r\n" in chunked
    assert sse_answer(["a"], end=False).endswith(b"\r\n\r\n9\r\ndata: a\n\n\r\n")
    plain = sse_answer(["a"], chunked=False)
    assert plain.endswith(b"\r\n\r\ndata: a\n\n")
    assert b"Connection: close\r\n" in plain
    assert b"Transfer-Encoding" not in plain
