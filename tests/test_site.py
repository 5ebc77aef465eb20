"""The public server: connections that live on, bodies that nobody wants, and clients that stall.

Most of it on a transport without a socket, with a clock that the test moves; the end is real.
"""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_twisted
from backend import DONE, ScriptedBackend, json_answer, sse_answer, sse_event
from channels import only_ours
from deferreds import failure_of, result_of, started
from memory import Kept, Server, request_bytes
from proxy import Answer, ProxyHandle, running_proxy
from proxy import request_bytes as real_request
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from llmproxy.channel import IDLE_TIMEOUT_S, LINGER_S, MAX_PIPELINED
from llmproxy.downstream import Downstream
from llmproxy.endpoints import Dialect
from llmproxy.errors import InvalidKey, NotFound, RequestTimeout
from llmproxy.site import DISCARD_S, Request
from llmproxy.upload import HIGH_WATER, ClientGone

CHUNKED = b"Transfer-Encoding: chunked"


@pytest.fixture
def server(clock: Clock) -> Server:
    return Server(clock)


def respond(request: Request, body: bytes = b"ok") -> None:
    """Answer it, whole."""
    request.answer(200, [], body)


def silent_until_closed(server):
    """The client asks for nothing more: it is closed when it is time, and not before."""
    server.clock.advance(IDLE_TIMEOUT_S - 1)
    assert server.wire.connected
    server.clock.advance(1)
    server.clock.advance(0)
    assert not server.wire.connected


def answers(sent: bytes) -> list[Answer]:
    """All the answers that came; each has a Content-Length."""
    found = []
    while sent:
        size = int(re.search(rb"Content-Length: (\d+)", sent)[1])  # type: ignore[index]
        end = sent.index(b"\r\n\r\n") + 4 + size
        found.append(Answer(sent[:end]))
        sent = sent[end:]
    return found


# --- one connection, several requests ---------------------------------------------------------


def test_a_request_is_served_when_its_header_is_there(server):
    server.send(request_bytes(b"/a?key=1", b"", b"Content-Length: 5"))
    (request,) = server.requests
    assert (request.path, request.method) == (b"/a", b"POST")
    reading = started(request.upload.read(10, 5))
    server.send(b"12345")
    assert result_of(reading) == b"12345"
    server.leave()


def test_a_connection_serves_one_request_after_the_other(server):
    for number in range(3):
        server.send(request_bytes(b"/%d" % number, b"body"))
        respond(server.requests[-1])
    assert [request.path for request in server.requests] == [b"/0", b"/1", b"/2"]
    told = [answer.fields["x-request-id"] for answer in answers(server.sent)]
    assert len(set(told)) == 3
    assert server.wire.is_reading
    assert (server.active(), server.counted()) == (0, 3)
    server.leave()


def test_requests_in_one_packet_are_served_in_order(server):
    server.send(request_bytes(b"/1", b"a") + request_bytes(b"/2", b"b"))
    assert [request.path for request in server.requests] == [b"/1"]
    respond(server.requests[0], b"one")
    respond(server.requests[1], b"two")
    assert [answer.body for answer in answers(server.sent)] == [b"one", b"two"]
    server.leave()


def test_a_client_that_closes_is_closed(server):
    server.send(request_bytes(b"/", b"", b"Connection: close"))
    respond(server.requests[0])
    server.clock.advance(0)
    assert not server.wire.connected


def test_an_answer_to_http_1_0_is_not_chunked_and_ends_with_the_connection(server):
    server.send(request_bytes(version=b"HTTP/1.0"))
    down = Downstream(server.requests[0], server.clock, 10)
    down.start(200, [])
    down.write(b"one")
    down.write(b"two")
    down.finish()
    assert b"chunked" not in server.sent.lower()
    assert server.sent.endswith(b"\r\n\r\nonetwo")
    server.clock.advance(0)
    assert not server.wire.connected


# --- bodies -----------------------------------------------------------------------------------


def test_a_body_in_chunks_is_read_without_their_framing(server):
    server.send(request_bytes(b"/", b"", CHUNKED))
    reading = started(server.requests[0].upload.read(10, 5))
    for piece in (b"3\r\nab", b"c\r\n", b"2;x=y\r\nde\r\n0\r", b"\n\r\n"):
        server.send(piece)
    assert result_of(reading) == b"abcde"
    server.leave()


@pytest.mark.parametrize(
    "chunk", [b"x\r\n", b"-1\r\n", b"0x3\r\nabc\r\n", b"+3\r\nabc\r\n", b"3 \r\nabc\r\n"]
)
def test_a_body_in_malformed_chunks_ends_the_connection(server, chunk):
    server.send(request_bytes(b"/", b"", CHUNKED))
    reading = started(server.requests[0].upload.read(10, 5))
    server.send(chunk + b"0\r\n\r\n")
    server.clock.advance(0)
    assert not server.wire.connected
    failure_of(reading, ClientGone)
    assert answers(server.sent)[0].status == 400
    assert server.active() == 0


def test_a_client_is_held_up_when_nobody_takes_its_body(server):
    server.send(request_bytes(b"/", b"", b"Content-Length: 1000000"))
    server.send(bytes(HIGH_WATER - 1))
    assert server.wire.is_reading
    server.send(b"x")
    assert not server.wire.is_reading
    result_of(started(server.requests[0].upload.next(5)))
    assert server.wire.is_reading
    server.leave()


def test_a_client_that_is_held_up_is_not_closed_for_its_silence(server):
    server.send(request_bytes(b"/", b"", b"Content-Length: 1000000"))
    server.send(bytes(HIGH_WATER))
    server.clock.advance(10 * IDLE_TIMEOUT_S)
    assert server.wire.connected
    upload = server.requests[0].upload
    result_of(started(upload.next(5)))
    reading = started(upload.next(5))  # now the silence is the client's
    server.clock.advance(5)
    failure_of(reading, RequestTimeout)
    assert server.wire.connected  # who reads answers
    server.leave()


def test_an_answer_that_was_taken_is_no_reason_to_read_a_body_that_nobody_takes(server):
    server.send(request_bytes(b"/", b"", b"Content-Length: 1000000"))
    server.send(bytes(HIGH_WATER))
    server.wire.slow()
    server.wire.drained()  # Twisted reads on now
    server.send(b"x")
    assert not server.wire.is_reading
    server.leave()


@pytest.mark.parametrize("holds", [0, 1, 2, 5])
def test_a_connection_whose_body_was_held_up_still_idles_out(server, holds):
    size = holds * HIGH_WATER + 10
    server.send(request_bytes(b"/", b"", b"Content-Length: %d" % size))
    upload = server.requests[0].upload
    for _ in range(holds):
        server.send(bytes(HIGH_WATER))
        result_of(started(upload.next(5)))
    server.send(bytes(10))
    server.clock.advance(10 * IDLE_TIMEOUT_S)  # the answer takes long
    assert server.wire.connected
    respond(server.requests[0])
    silent_until_closed(server)


def test_a_body_that_ends_while_it_is_held_up_leaves_the_answer_all_the_time(server):
    server.send(request_bytes(b"/", bytes(2 * HIGH_WATER)))
    reading = started(server.requests[0].upload.read(2 * HIGH_WATER, 5))
    assert len(result_of(reading)) == 2 * HIGH_WATER
    server.clock.advance(10 * IDLE_TIMEOUT_S)
    assert server.wire.connected
    respond(server.requests[0])
    server.clock.advance(IDLE_TIMEOUT_S)
    server.clock.advance(0)
    assert not server.wire.connected


def test_a_body_is_invited_when_somebody_wants_it_and_once(server):
    server.send(request_bytes(b"/", b"", b"Content-Length: 2", b"Expect: 100-continue"))
    assert server.sent == b""
    reading = started(server.requests[0].upload.read(10, 5))
    assert server.sent == b"HTTP/1.1 100 Continue\r\n\r\n"
    server.send(b"a")
    server.send(b"b")
    assert result_of(reading) == b"ab"
    assert server.sent.count(b"100 Continue") == 1
    server.leave()


# --- bodies that nobody wants -----------------------------------------------------------------


@pytest.mark.parametrize("framing", [b"Content-Length: 500000", CHUNKED])
def test_a_refused_body_is_dropped_and_the_connection_used_again(server, framing):
    server.send(request_bytes(b"/1", b"", framing))
    server.requests[0].refuse(Dialect.OPENAI, InvalidKey())
    assert answers(server.sent)[0].status == 401  # at once
    body = bytes(500000)
    if framing == CHUNKED:
        body = b"7a120\r\n" + body + b"\r\n0\r\n\r\n"
    for start in range(0, len(body), 50000):
        server.send(body[start : start + 50000])
        assert server.wire.is_reading
    server.send(request_bytes(b"/2"))
    respond(server.requests[1])
    assert [answer.status for answer in answers(server.sent)] == [401, 200]
    assert (server.active(), server.counted()) == (0, 2)
    server.leave()
    assert server.clock.getDelayedCalls() == []


def test_a_refused_body_that_was_held_up_already_is_dropped_too(server):
    server.send(request_bytes(b"/1", b"", b"Content-Length: 100000"))
    server.send(bytes(HIGH_WATER))
    server.requests[0].refuse(Dialect.OPENAI, InvalidKey())
    server.send(bytes(100000 - HIGH_WATER) + request_bytes(b"/2"))
    assert len(server.requests) == 2
    server.leave()


def test_a_refused_body_that_never_ends_is_not_waited_for(server):
    server.send(request_bytes(b"/", b"", b"Content-Length: 100"))
    server.requests[0].refuse(Dialect.OPENAI, InvalidKey())
    server.clock.advance(DISCARD_S - 0.1)
    server.send(b"x")
    assert server.wire.connected
    server.clock.advance(0.1)
    server.clock.advance(0)
    assert not server.wire.connected
    assert answers(server.sent)[0].status == 401
    assert (server.active(), server.counted()) == (0, 1)
    assert server.clock.getDelayedCalls() == []


def test_a_client_that_takes_no_answer_and_sends_no_end_is_reset(server):
    server.send(request_bytes(b"/", b"", b"Content-Length: 100"))
    server.wire.stuck = True
    server.requests[0].refuse(Dialect.OPENAI, InvalidKey())
    server.clock.advance(DISCARD_S)
    assert not server.wire.aborted
    server.clock.advance(DISCARD_S)
    assert server.wire.aborted
    server.clock.advance(0)
    assert server.clock.getDelayedCalls() == []


def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing_behind(server):
    server.send(request_bytes(b"/", b"", b"Content-Length: 100"))
    down = Downstream(server.requests[0], server.clock, 10)
    reading = started(server.requests[0].upload.read(100, 5))

    def refused(failure: Failure) -> None:
        failure.trap(ClientGone)
        down.abort()

    over = reading.addErrback(refused)
    server.send(b"x")
    server.leave(ConnectionLost())
    result_of(over)
    assert down.gone
    assert (server.active(), server.counted()) == (0, 1)
    assert server.clock.getDelayedCalls() == []


# --- silence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [b"", b"POST /", b"POST / HTTP/1.1\r\nHost: pro"])
def test_a_silent_client_is_closed(server, begun):
    if begun:
        server.send(begun)
    server.clock.advance(IDLE_TIMEOUT_S)
    server.clock.advance(0)
    assert not server.wire.connected
    assert (server.requests, server.active()) == ([], 0)
    assert server.clock.getDelayedCalls() == []


def test_a_silent_client_that_takes_nothing_is_reset(server):
    server.wire.stuck = True
    server.clock.advance(IDLE_TIMEOUT_S)
    server.clock.advance(60)
    assert server.wire.aborted
    server.clock.advance(0)


def test_the_silence_counts_from_the_last_answer(server):
    for number in range(2):
        server.clock.advance(IDLE_TIMEOUT_S - 1)
        server.send(request_bytes(b"/", b"x"))
        respond(server.requests[number])
    silent_until_closed(server)


def test_nothing_is_left_of_a_client_that_leaves_before_its_answer(server):
    server.send(request_bytes(b"/", b"x"))
    server.leave()
    assert server.clock.getDelayedCalls() == []


def test_a_client_may_wait_for_its_answer_as_long_as_that_takes(server):
    server.send(request_bytes(b"/", b"x"))
    server.clock.advance(100 * IDLE_TIMEOUT_S)
    assert server.wire.connected
    server.leave()


# --- what is no request -----------------------------------------------------------------------

HOST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"
NO_REQUEST = {
    "no target": b"POST\r\n\r\n",
    "no version": b"POST /\r\n\r\n",
    "four words": b"POST / x HTTP/1.1\r\n\r\n",
    "another protocol": b"POST / FTP/1.1\r\n\r\n",
    "http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no colon": HOST + b"nonsense\r\nA: b\r\n\r\n",
    "no name": HOST + b": x\r\nA: b\r\n\r\n",
    "space before colon": HOST + b"Content-Length : 3\r\nA: b\r\n\r\nabc",
    "space in name": HOST + b"Con tent: 3\r\nA: b\r\n\r\n",
    "nul in value": HOST + b"X: a\0b\r\nA: b\r\n\r\n",
    "two lengths": HOST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "length and chunked": HOST + b"Content-Length: 3\r\n" + CHUNKED + b"\r\n\r\n0\r\n\r\n",
    "chunked and length": HOST + CHUNKED + b"\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "chunked twice": HOST + CHUNKED + b"\r\n" + CHUNKED + b"\r\n\r\n0\r\n\r\n",
    "list of lengths": HOST + b"Content-Length: 3, 3\r\n\r\nabc",
    "signed length": HOST + b"Content-Length: +3\r\n\r\nabc",
    "negative length": HOST + b"Content-Length: -1\r\n\r\nabc",
    "hexadecimal length": HOST + b"Content-Length: 0x3\r\n\r\nabc",
    "underlined length": HOST + b"Content-Length: 0_3\r\n\r\nabc",
    "unicode length": HOST + b"Content-Length: \xd9\xa3\r\n\r\nabc",
    "empty length": HOST + b"Content-Length:\r\n\r\nabc",
    "unknown coding": HOST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two codings": HOST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
}
TOO_LARGE = {
    "many fields": (HOST + b"A: b\r\n" * 101 + b"\r\n", 431),
    "long fields": (HOST + b"A: %b\r\n" % (b"b" * 9000) * 4 + b"\r\n", 431),
    "a long field": (HOST + b"A: %b\r\n\r\n" % (b"b" * 40_000), 431),
    "a field without an end": (HOST + b"A: " + b"b" * 40_000, 431),
    "a long target": (b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"b" * 40_000), 414),
}


def malformed(server: Server) -> dict[str, float]:
    """How often what came was no request, by the status of the answer."""
    exposition = server.metrics.exposition().decode()
    found = re.findall(
        r'requests_total\{method="other",path="other",status="(\d+)"\} ([\d.]+)', exposition
    )
    return {status: float(count) for status, count in found}


@pytest.mark.parametrize("data", NO_REQUEST.values(), ids=NO_REQUEST)
def test_what_is_no_request_is_told_so_and_never_served(server, data, logged):
    server.send(data + request_bytes(b"/next"))
    server.clock.advance(0)
    assert server.requests == []
    assert not server.wire.connected
    (answer,) = answers(server.sent)
    assert answer.status == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.fields["connection"] == "close"
    assert uuid.UUID(answer.fields["x-request-id"]).version == 7
    [line] = logged
    assert line.startswith(f"no request {answer.fields['x-request-id']}: status=400 code=invalid")
    assert (server.active(), server.counted()) == (0, 1)
    assert malformed(server) == {"400": 1}
    assert server.clock.getDelayedCalls() == []


@pytest.mark.parametrize(("data", "status"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_header_that_is_too_large_is_told_so_and_never_served(server, data, status):
    server.send(request_bytes(b"/first"))
    respond(server.requests[0])
    server.send(data)
    server.clock.advance(0)
    assert len(server.requests) == 1
    assert not server.wire.connected
    first, answer = answers(server.sent)
    assert (first.status, answer.status) == (200, status)
    assert malformed(server) == {f"{status}": 1}
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.fields["connection"] == "close"
    assert server.clock.getDelayedCalls() == []


def test_every_refusal_of_what_is_no_request_has_an_id_of_its_own(server):
    for _ in range(2):
        server.send(NO_REQUEST["no version"])
        server.clock.advance(0)
        sent = server.sent
        server.connect()
        server.site.__dict__.setdefault("seen", []).append(answers(sent)[0].fields["x-request-id"])
    server.leave()
    first, second = server.site.__dict__["seen"]
    assert first != second


# --- what our own channel does, and Twisted's does not -------------------------------------------

GET = b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n"


@only_ours
def test_a_header_has_ten_seconds_however_it_comes(server):
    server.send(b"POST / HTTP/1.1\r\n")
    for _ in range(9):
        server.clock.advance(1)
        server.send(b"A: b\r\n")
    server.clock.advance(0.9)
    assert server.sent == b""
    server.clock.advance(0.1)
    (answer,) = answers(server.sent)
    assert (answer.status, answer.fields["connection"]) == (408, "close")
    server.clock.advance(0)
    assert not server.wire.connected
    assert server.clock.getDelayedCalls() == []


@only_ours
def test_requests_that_come_with_one_in_service_wait_for_their_turn(server):
    server.send(GET % 0)
    for number in range(1, 4):
        server.send(GET % number)
    assert [request.path for request in server.requests] == [b"/0"]
    for _ in range(4):
        respond(server.requests[-1])
    assert [request.path for request in server.requests] == [b"/0", b"/1", b"/2", b"/3"]
    server.leave()


@only_ours
def test_a_thousand_requests_in_one_piece_are_too_many_and_the_first_are_served(clock):
    server = Server(clock, Kept(lambda request: respond(request)))
    server.send(b"".join(GET % number for number in range(1000)))
    clock.advance(0)
    found = answers(server.sent)
    assert [answer.status for answer in found] == [200] * MAX_PIPELINED + [400]
    assert not server.wire.connected
    assert server.active() == 0


@only_ours
def test_what_makes_no_sense_is_told_so_after_the_requests_before_it(server):
    server.send(GET % 0 + GET % 1 + b"nonsense\r\n\r\n")
    assert server.sent == b""
    respond(server.requests[0])
    respond(server.requests[1])
    server.clock.advance(0)
    assert [answer.status for answer in answers(server.sent)] == [200, 200, 400]
    assert not server.wire.connected


@only_ours
@pytest.mark.parametrize("before", [b"", GET % 0])
def test_a_header_has_its_limit_in_whatever_piece_it_comes(server, before):
    server.send(
        before + b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: %b\r\n" % (b"b" * 9000) * 4 + b"\r\n"
    )
    if before:
        respond(server.requests[0])
    server.clock.advance(0)
    assert answers(server.sent)[-1].status == 431
    assert len(server.requests) == bool(before)


@only_ours
def test_bytes_after_the_last_request_are_nobodys(server):
    server.send(request_bytes(b"/", b"", b"Connection: close") + GET % 1)
    respond(server.requests[0])
    server.clock.advance(0)
    assert len(server.requests) == 1
    (answer,) = answers(server.sent)
    assert answer.fields["connection"] == "close"
    assert not server.wire.connected


@pytest.mark.parametrize("body", [b"", b"abc"])
@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_another_protocol_is_refused_and_nothing_follows_it(server, protocol, body):
    fields = b"Connection: keep-alive, Upgrade", b"Upgrade: " + protocol
    server.send(request_bytes(b"/", body, *fields) + GET % 1)
    server.clock.advance(0)
    assert server.requests == []
    (answer,) = answers(server.sent)
    assert (answer.status, answer.fields["connection"]) == (400, "close")
    assert "Upgrade" in answer.json()["error"]["message"]
    assert not server.wire.connected


@only_ours
@pytest.mark.parametrize(
    "piece", [b"1\r\nx\r\n", b"1;%b\r\nx\r\n" % (b"e" * 200)], ids=["tiny", "extension"]
)
def test_a_body_of_chunks_that_are_mostly_framing_is_refused(server, piece):
    server.send(request_bytes(b"/", b"", CHUNKED))
    reading = started(server.requests[0].upload.read(10_000_000, 5))
    for _ in range(100):
        if server.wire.connected:
            server.send(piece * 1000)
            server.clock.advance(0)
    failure_of(reading, ClientGone)
    (answer,) = answers(server.sent)
    assert answer.status == 400
    assert not server.wire.connected


@only_ours
def test_a_trailer_changes_nothing(server):
    server.send(request_bytes(b"/", b"", CHUNKED) + b"3\r\nabc\r\n0\r\nX: x\r\nA: b\r\n\r\n")
    assert result_of(started(server.requests[0].upload.read(10, 5))) == b"abc"
    assert not {b"x", b"a"} & set(server.requests[0].fields)
    respond(server.requests[0])
    server.send(GET % 1)
    assert len(server.requests) == 2
    server.leave()


@only_ours
def test_a_client_that_does_not_read_is_not_read_from(server):
    server.wire.slow()
    assert not server.wire.is_reading
    server.wire.drained()
    assert server.wire.is_reading
    server.leave()


@only_ours
@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_requests_are_the_same_in_any_split(server, size):
    data = (
        request_bytes(b"/1", b"abc") + request_bytes(b"/2", b"", CHUNKED) + b"2\r\nde\r\n0\r\n\r\n"
    )
    data += request_bytes(b"/3", b"", b"Expect: 100-continue")
    bodies: list[Any] = []
    for start in range(0, len(data), size):
        server.send(data[start : start + size])
        if len(server.requests) > len(bodies) and server.requests[-1].upload.whole:
            request = server.requests[-1]
            bodies.append((request.path, request.upload.at_once(100)))
            respond(request)
    assert bodies == [(b"/1", b"abc"), (b"/2", b"de"), (b"/3", b"")]
    server.leave()


# --- counting -----------------------------------------------------------------------------------


def _answered(server: Server, request: Request) -> None:
    respond(request)
    server.leave()


def _refused(server: Server, request: Request) -> None:
    request.refuse(Dialect.OPENAI, InvalidKey())
    server.leave()


def _left(server: Server, request: Request) -> None:
    server.leave(ConnectionLost())


def _left_in_mid_answer(server: Server, request: Request) -> None:
    Downstream(request, server.clock, 10).start(200, [])
    server.leave(ConnectionLost())


def _cut(server: Server, request: Request) -> None:
    down = Downstream(request, server.clock, 10)
    down.start(200, [])
    down.abort()
    server.clock.advance(0)


def _never_taken(server: Server, request: Request) -> None:
    down = Downstream(request, server.clock, 10)
    down.attach(server.wire)
    server.wire.slow()
    server.clock.advance(10)
    server.clock.advance(0)


ENDINGS = [_answered, _refused, _left, _left_in_mid_answer, _cut, _never_taken]


@pytest.mark.parametrize("body", [b"", b"x"], ids=["whole", "half a body"])
@pytest.mark.parametrize("end", ENDINGS)
def test_a_request_is_in_flight_until_it_ends_and_counted_once(server, end, body):
    server.send(request_bytes(b"/", body, b"Content-Length: %d" % (2 * len(body))))
    assert (server.active(), server.counted()) == (1, 0)
    end(server, server.requests[0])
    server.clock.advance(100)
    assert not server.wire.connected
    assert (server.active(), server.counted()) == (0, 1)
    assert server.clock.getDelayedCalls() == []


def test_a_request_does_not_show_its_target(server):
    server.send(request_bytes(b"/a?key=canary"))
    assert "canary" not in repr(server.requests[0])
    server.leave()


# --- real sockets -------------------------------------------------------------------------------

CHAT = "/v1/chat/completions"
ASK = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
COMPLETION = {"choices": [], "usage": USAGE}
TEXT: list[Any] = [{"choices": [{"index": 0, "delta": {"content": "Hello"}}]}]
STREAM: list[Any] = [*TEXT, {"choices": [], "usage": USAGE}, DONE]


def proxy_for(folder: Path, backend: ScriptedBackend) -> Any:
    return running_proxy(folder, {"chat": {"url": backend.url}})


async def active(proxy: ProxyHandle) -> float:
    """The requests in flight, as the admin site shows them."""
    exposition = (await proxy.get("/metrics", port=proxy.admin_port)).body.decode()
    (value,) = re.findall(r"^llmproxy_active_requests (\S+)$", exposition, re.MULTILINE)
    return float(value)


@pytest_twisted.ensureDeferred
async def test_an_http_1_0_client_gets_its_stream_up_to_the_end_of_the_connection(
    tmp_path: Path,
) -> None:
    async with (
        ScriptedBackend([sse_answer(STREAM)]) as backend,
        proxy_for(tmp_path, backend) as proxy,
    ):
        body = orjson.dumps({**ASK, "stream": True})
        client = await proxy.open()
        client.send(real_request("POST", CHAT, body, version="HTTP/1.0"))
        await client.closed
        top, _, rest = client.received.partition(b"\r\n\r\n")
        assert b"chunked" not in top.lower()
        assert rest == b"".join(map(sse_event, [*TEXT, DONE]))
        assert client.clean
        assert proxy.rows() == [("settled", "complete", 3, 2)]
        assert await active(proxy) == 0


@pytest_twisted.ensureDeferred
async def test_a_refused_request_and_good_ones_share_a_real_connection(tmp_path: Path) -> None:
    async with (
        ScriptedBackend([json_answer(200, COMPLETION)]) as backend,
        proxy_for(tmp_path, backend) as proxy,
    ):
        client = await proxy.open()
        good = orjson.dumps(ASK)
        chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(good), good)
        client.send(real_request("POST", CHAT, bytes(200_000), key="wrong"))
        client.send(real_request("POST", CHAT, good))
        client.send(
            real_request("POST", CHAT, fields={"Transfer-Encoding": "chunked"}).replace(
                b"Content-Length: 0\r\n", b""
            )
            + chunks
        )
        await client.when(lambda received: received.count(b"HTTP/1.1 200") == 2)
        told = answers(client.received)
        assert [answer.status for answer in told] == [401, 200, 200]
        assert [answer.body for answer in told[1:]] == [orjson.dumps(COMPLETION)] * 2
        assert [seen.body for seen in backend.requests] == [good] * 2
        assert await active(proxy) == 0
        client.transport.loseConnection()
        await client.closed
        assert proxy.bill() == {"chat/gpu/prompt": 6, "chat/gpu/completion": 4}


@pytest.mark.parametrize("takes_it", [True, False])
def test_a_client_that_does_not_take_its_last_answer_is_cut_off(
    clock: Clock, takes_it: bool
) -> None:
    server = Server(clock)
    server.wire.stuck = not takes_it
    server.send(request_bytes(b"/", b"", b"Connection: close"))
    server.requests[0].refuse(Dialect.OPENAI, NotFound("nothing"))
    clock.advance(0)
    assert server.wire.connected is not takes_it
    clock.advance(LINGER_S)
    clock.advance(0)
    assert not server.wire.connected
    assert server.wire.aborted is not takes_it
    assert server.site.connections == set()
    assert clock.getDelayedCalls() == []
