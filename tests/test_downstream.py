"""The client's side: every method is safe at every time, and nobody waits for ever.

A real site and a real request, on a transport without a socket.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from memory import Server, request_bytes
from twisted.internet.task import Clock

from llmproxy.downstream import LINGER_S, Downstream

PATIENCE_S = 20.0
FIELDS = [(b"Content-Type", b"text/plain")]


class Source:
    """Something that can be held up."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def pauseProducing(self) -> None:
        self.told.append("pause")

    def resumeProducing(self) -> None:
        self.told.append("resume")


class Client:
    """A client whose request has come, and the `Downstream` that answers it."""

    def __init__(self, clock: Clock, version: bytes = b"HTTP/1.1") -> None:
        self.clock = clock
        self.server = Server(clock)
        self.server.send(request_bytes(version=version))
        (self.request,) = self.server.requests
        self.down = Downstream(self.request, clock, PATIENCE_S)
        self.left: list[bool] = []
        self.down.when_gone(lambda: self.left.append(True))

    @property
    def body(self) -> bytes:
        return self.server.sent.partition(b"\r\n\r\n")[2]


@pytest.fixture
def client(clock: Clock) -> Client:
    return Client(clock)


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


def test_a_whole_answer_has_its_length_and_leaves_the_connection_open(client):
    client.down.answer(418, FIELDS, b"body")
    assert client.server.sent.startswith(b"HTTP/1.1 418 ")
    assert b"Content-Length: 4\r\n" in client.server.sent
    assert client.body == b"body"
    assert client.server.wire.is_reading
    client.server.leave()


def test_a_streams_header_goes_out_before_its_first_byte(client):
    client.down.start(200, FIELDS)
    assert client.server.sent.endswith(b"\r\n\r\n")
    assert b"Content-Type: text/plain\r\n" in client.server.sent
    client.down.write(b"a")
    client.down.write(b"")
    client.down.write(b"bc")
    assert client.body == chunked(b"a", b"bc")
    client.down.finish()
    assert client.body == chunked(b"a", b"bc", b"")
    client.server.leave()


def test_an_aborted_stream_is_closed_without_its_end(client):
    client.down.start(200, FIELDS)
    client.down.write(b"a")
    client.down.abort()
    client.clock.advance(0)
    assert client.body == chunked(b"a")
    assert not client.server.wire.connected
    assert not client.server.wire.aborted


def test_an_aborted_stream_of_http_1_0_is_reset_as_a_plain_close_would_be_its_end(clock):
    client = Client(clock, b"HTTP/1.0")
    client.down.start(200, FIELDS)
    client.down.write(b"a")
    client.down.abort()
    assert client.server.wire.aborted
    clock.advance(0)


def test_a_client_that_does_not_take_the_rest_of_a_cut_answer_is_reset(client):
    client.server.wire.stuck = True
    client.down.start(200, FIELDS)
    client.down.abort()
    client.clock.advance(LINGER_S - 0.1)
    assert not client.server.wire.aborted
    client.clock.advance(0.1)
    assert client.server.wire.aborted
    client.clock.advance(0)
    assert client.clock.getDelayedCalls() == []


CALLS: dict[str, Callable[[Downstream], None]] = {
    "start": lambda down: down.start(200, FIELDS),
    "write": lambda down: down.write(b"x"),
    "answer": lambda down: down.answer(200, FIELDS, b"x"),
    "attach": lambda down: down.attach(Source()),
    "detach": lambda down: down.detach(),
    "finish": lambda down: down.finish(),
    "abort": lambda down: down.abort(),
    "pauseProducing": lambda down: down.pauseProducing(),
    "resumeProducing": lambda down: down.resumeProducing(),
    "stopProducing": lambda down: down.stopProducing(),
}
STATES = {
    "fresh": [],
    "started": ["start"],
    "attached": ["start", "attach"],
    "finished": ["start", "finish"],
    "answered": ["answer"],
    "aborted": ["start", "abort"],
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_every_method_is_safe_after_the_client_has_gone(client, state, call):
    for name in state:
        CALLS[name](client.down)
    client.server.leave()
    before = client.server.sent
    for _ in range(2):
        CALLS[call](client.down)
    assert client.server.sent == before
    client.down.detach()  # what a forward does in the end
    client.down.resumeProducing()
    client.clock.advance(0)
    assert client.clock.getDelayedCalls() == []


@pytest.mark.parametrize("end", ["finish", "abort"])
@pytest.mark.parametrize("again", ["finish", "abort"])
def test_an_answer_ends_once(client, end, again):
    client.down.start(200, FIELDS)
    CALLS[end](client.down)
    before = client.server.sent
    CALLS[again](client.down)
    assert client.server.sent == before
    client.server.leave()


def test_the_client_leaving_is_told_once(client):
    client.server.leave()
    assert client.down.gone
    assert client.left == [True]


def test_the_client_leaving_is_told_to_who_asks_late(client):
    client.server.leave()
    late: list[bool] = []
    client.down.when_gone(lambda: late.append(True))
    assert late == [True]


def test_an_answer_that_is_out_is_no_client_that_left(client):
    client.down.answer(200, FIELDS, b"x")
    client.server.leave()
    assert client.left == []


def test_the_clients_speed_governs_the_source(client):
    source = Source()
    client.down.start(200, FIELDS)
    client.down.attach(source)
    client.server.wire.slow()
    assert source.told == ["pause"]
    client.server.wire.drained()
    assert source.told == ["pause", "resume"]
    client.server.leave()


def test_a_source_that_is_done_is_told_no_more(client):
    source = Source()
    client.down.start(200, FIELDS)
    client.down.attach(source)
    client.down.detach()
    client.server.wire.slow()
    client.server.wire.drained()
    assert source.told == []
    client.down.attach(source)  # the place is free again
    client.server.leave()


def test_a_client_that_takes_nothing_is_cut_off_and_counts_as_gone(client):
    client.down.start(200, FIELDS)
    client.down.attach(Source())
    client.server.wire.slow()
    client.clock.advance(PATIENCE_S - 0.1)
    client.server.wire.slow()  # being told again is no reason for more patience
    assert client.left == []
    client.clock.advance(0.1)
    assert client.server.wire.aborted
    client.clock.advance(0)
    assert client.left == [True]
    assert client.clock.getDelayedCalls() == []


def test_a_client_that_catches_up_has_all_patience_again(client):
    client.down.start(200, FIELDS)
    client.down.attach(Source())
    for _ in range(3):
        client.server.wire.slow()
        client.clock.advance(PATIENCE_S - 0.1)
        client.server.wire.drained()
    client.clock.advance(2 * PATIENCE_S)
    assert client.left == []
    client.server.leave()


def test_patience_ends_when_the_client_leaves(client):
    client.down.start(200, FIELDS)
    client.down.attach(Source())
    client.server.wire.slow()
    client.server.leave()
    assert client.clock.getDelayedCalls() == []


def test_patience_ends_with_the_answer(client):
    client.down.start(200, FIELDS)
    client.down.attach(Source())
    client.server.wire.slow()
    client.down.finish()
    assert all(call.getTime() - client.clock.seconds() > 50 for call in client.clock.calls)
    client.server.leave()


def test_a_source_that_is_attached_after_the_client_left_runs_free(client):
    source = Source()
    client.server.leave()
    client.down.attach(source)
    assert source.told == []
