"""The agent: what it writes, what it takes for an answer, and which connections it uses again."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionDone, ConnectionLost, ConnectionRefusedError
from twisted.internet.interfaces import IConsumer
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone, ResponseFailed, ResponseNeverReceived
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IAgent, IBodyProducer, IResponse
from zope.interface import implementer
from zope.interface.verify import verifyObject

from llmproxy.agent import (
    IDLE_S,
    MAX_HEADER,
    PIECE,
    BackendAgent,
    BytesBody,
    CodedAnswer,
    Connection,
)

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\nabc"


class Wire(StringTransport):
    """One connection's transport: `gone` when our side has closed it.

    pauses_after: so many bytes of a body it takes, then it is full.
    """

    def __init__(self, pauses_after: int | None = None) -> None:
        super().__init__()
        self.gone = False
        self.pauses_after = pauses_after

    def write(self, data: bytes) -> None:
        super().write(data)
        body = self.value().partition(b"\r\n\r\n")[2]
        if self.pauses_after is not None and len(body) >= self.pauses_after and self.producer:
            self.producer.pauseProducing()

    def abortConnection(self) -> None:
        self.gone = True
        super().abortConnection()


class Endpoint:
    """Connects at once; `wires` are the connections in their order."""

    def __init__(self) -> None:
        self.wires: list[Wire] = []
        self.connections: list[Connection] = []
        self.error: Exception | None = None
        self.pauses_after: int | None = None
        self.fileno: Callable[[], int] | None = None

    def connect(self, factory: Factory) -> Deferred[Any]:
        if self.error is not None:
            raise self.error
        connection: Any = factory.buildProtocol(None)
        wire: Any = Wire(self.pauses_after)
        if self.fileno is not None:
            wire.fileno = self.fileno
        self.wires.append(wire)
        self.connections.append(connection)
        connection.makeConnection(wire)
        return succeed(connection)


class Body(Protocol):
    """Collects a body."""

    def __init__(self) -> None:
        self.data = b""
        self.ends: list[type[BaseException]] = []

    def dataReceived(self, data: bytes) -> None:
        self.data += data

    def connectionLost(self, reason: Failure | None = None) -> None:
        assert reason is not None
        assert reason.type is not None
        self.ends.append(reason.type)


class Rig:
    """An agent, its endpoint and its clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.endpoint = Endpoint()
        self.agent = BackendAgent(b"http://llm:8000", self.endpoint, self.clock)  # type: ignore[arg-type]

    def ask(self, body: IBodyProducer | None = None) -> list[Any]:
        """Send a request; the list gets its answer, or the exception."""
        answers: list[Any] = []
        sent = self.agent.request(
            b"POST", b"http://llm:8000/v1/x", Headers({b"A": [b"1", b"2"]}), body or BytesBody(b"q")
        )
        sent.addCallbacks(answers.append, lambda failure: answers.append(failure.value))
        self.last = sent
        return answers

    def receive(self, *data: bytes, wire: int = -1) -> None:
        for part in data:
            self.endpoint.connections[wire].dataReceived(part)

    def answered(self, *data: bytes) -> Body:
        """The body of the answer that these bytes are."""
        answers = self.ask()
        self.receive(*data)
        body = Body()
        answers[0].deliverBody(body)
        return body


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_it_is_an_agent_and_gives_responses(rig: Rig) -> None:
    verifyObject(IAgent, rig.agent)
    answers = rig.ask()
    rig.receive(OK)
    verifyObject(IResponse, answers[0])


def test_a_request_is_written_in_full(rig: Rig) -> None:
    rig.ask(BytesBody(b"body"))
    assert rig.endpoint.wires[0].value() == (
        b"POST /v1/x HTTP/1.1\r\nHost: llm:8000\r\nContent-Length: 4\r\nA: 1\r\nA: 2\r\n\r\nbody"
    )


def test_a_request_to_another_origin_is_refused(rig: Rig) -> None:
    with pytest.raises(ValueError, match="another backend"):
        rig.agent.request(b"GET", b"http://llm.evil/x")


@pytest.mark.parametrize("size", [1, 7, len(OK)])
def test_an_answer_is_read_in_any_split(rig: Rig, size: int) -> None:
    body = rig.answered(*(OK[i : i + size] for i in range(0, len(OK), size)))
    assert (body.data, body.ends) == (b"abc", [ResponseDone])


def test_a_chunked_answer_is_read(rig: Rig) -> None:
    body = rig.answered(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"2\r\nde\r\n0\r\n\r\n",
    )
    assert (body.data, body.ends) == (b"abcde", [ResponseDone])


def test_an_interim_answer_is_passed_over(rig: Rig) -> None:
    answers = rig.ask()
    rig.receive(b"HTTP/1.1 100 Continue\r\nX: 1\r\n\r\n")
    assert answers == []
    rig.receive(OK)
    assert answers[0].code == 200
    assert not answers[0].headers.hasHeader(b"X")


def test_the_body_is_held_up_until_somebody_wants_it(rig: Rig) -> None:
    answers = rig.ask()
    rig.receive(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\na")
    wire = rig.endpoint.wires[0]
    assert wire.producerState == "paused"
    body = Body()
    answers[0].deliverBody(body)
    assert wire.producerState == "producing"
    assert body.data == b"a"


def test_a_connection_serves_again_after_a_whole_answer(rig: Rig) -> None:
    for _ in range(3):
        assert rig.answered(OK).ends == [ResponseDone]
    assert len(rig.endpoint.wires) == 1


def test_a_connection_that_was_held_up_at_its_end_serves_again(rig: Rig) -> None:
    answers = rig.ask()
    rig.receive(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n")

    class Slow(Body):
        def dataReceived(self, data: bytes) -> None:
            super().dataReceived(data)
            self.transport.pauseProducing()  # type: ignore[union-attr]

    answers[0].deliverBody(Slow())
    rig.receive(b"abc")
    assert rig.endpoint.wires[0].producerState == "producing"
    assert rig.answered(OK).data == b"abc"


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"x",
        OK + OK,
        OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        OK.replace(b"HTTP/1.1", b"HTTP/1.0"),
        OK.replace(b"1.1 200 OK", b"1.0 200 OK\r\nConnection: keep-alive"),
        OK.replace(b"200", b"205"),
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3\r\nabc\r\n0\r\n\r\n",
    ],
    ids=["bytes after it", "another answer", "close", "1.0", "1.0 kept", "205", "1.0 in chunks"],
)
def test_an_answer_that_leaves_doubt_is_given_but_its_connection_goes(
    rig: Rig, answer: bytes
) -> None:
    body = rig.answered(answer)
    assert (body.data, body.ends) == (b"abc", [ResponseDone])
    assert rig.endpoint.wires[0].gone
    rig.ask()
    assert len(rig.endpoint.wires) == 2


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_a_length_without_a_body_leaves_no_connection(rig: Rig, status: bytes) -> None:
    body = rig.answered(OK.replace(b"200 OK", status)[:-3])
    assert (body.data, body.ends) == (b"", [ResponseDone])
    assert rig.endpoint.wires[0].gone


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 3\r\nContent-Length: 3\r\n",
        b"Content-Length: 3\r\nContent-Length: 4\r\n",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
        b"Content-Length: +3\r\n",
        b"Content-Length: 99999999999999999999999\r\n",
        b"X: a\r\n b\r\n",
        b"no colon\r\n",
        b"X: " + b"a" * MAX_HEADER,
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked, chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Content-Length: 3\r\nContent-Encoding: identity\r\nContent-Encoding: gzip\r\n",
    ],
)
def test_a_header_that_is_malformed_is_no_answer(rig: Rig, head: bytes) -> None:
    answers = rig.ask()
    rig.receive(b"HTTP/1.1 200 OK\r\n" + head + b"\r\nabc")
    [error] = answers
    assert isinstance(error, ResponseNeverReceived | CodedAnswer)
    assert rig.endpoint.wires[0].gone


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n" + OK,
        *(OK.replace(b"HTTP/1.1", other) for other in (b"HTTP/0.9", b"HTTP/2.0", b"RTSP/1.1")),
        OK.replace(b"HTTP/1.1", b"ICE/1.1"),
        OK.replace(b"200", b"099") + OK,
        OK.replace(b"200", b"100") + OK,
        OK.replace(b"200", b"103")[:-3] + OK,
        b"HTTP/1.1 100 Continue\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + OK,
    ],
    ids=["empty line", "0.9", "2.0", "RTSP", "ICE", "099", "100", "103", "100 in chunks"],
)
def test_what_is_not_quite_http_is_no_answer(rig: Rig, data: bytes) -> None:
    answers = rig.ask()
    rig.receive(data)
    assert [type(answer) for answer in answers] == [ResponseNeverReceived]
    assert rig.endpoint.wires[0].gone


CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"


@pytest.mark.parametrize("trailer", [b"X-Usage: 1", b"Transfer-Encoding: gzip"])
def test_trailers_are_dropped_and_leave_no_connection(rig: Rig, trailer: bytes) -> None:
    body = rig.answered(CHUNKS + b"0\r\n", trailer + b"\r\n\r\n")
    assert (body.data, body.ends) == (b"abc", [ResponseDone])
    assert rig.endpoint.wires[0].gone


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"0\r\n", b"X: " + b"a" * 1000 + b"\r\n"),
        (b"0\r\nX: ", b"a" * 1000),
        (b"3;a=", b"a" * 1000),
    ],
    ids=["trailers", "a trailer", "an extension"],
)
def test_what_is_no_body_and_never_ends_is_cut(rig: Rig, begin: bytes, piece: bytes) -> None:
    body = rig.answered(CHUNKS, begin)
    pieces = MAX_HEADER // len(piece) + 1
    rig.receive(*[piece] * (pieces - 2))
    assert not rig.endpoint.wires[0].gone
    rig.receive(piece, piece)
    assert body.ends == [ResponseFailed]
    assert rig.endpoint.wires[0].gone


def test_chunks_that_come_in_pieces_may_have_any_number_of_extensions(rig: Rig) -> None:
    body = rig.answered(CHUNKS)
    extension = b"1;a=" + b"a" * (MAX_HEADER - 100)
    for _ in range(3):
        rig.receive(extension, b"\r\n", b"d", b"\r\n")
    rig.receive(b"0\r\n\r\n")
    assert (body.data, body.ends) == (b"abcddd", [ResponseDone])


def test_broken_chunks_break_the_body(rig: Rig) -> None:
    body = rig.answered(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"zz\r\n"
    )
    assert (body.data, body.ends) == (b"abc", [ResponseFailed])
    assert rig.endpoint.wires[0].gone


@pytest.mark.parametrize("reason", [ConnectionDone(), ConnectionLost()])
def test_a_body_without_a_length_ends_with_the_connection(rig: Rig, reason: Exception) -> None:
    body = rig.answered(b"HTTP/1.1 200 OK\r\n\r\nabc")
    assert body.ends == []
    rig.endpoint.connections[0].connectionLost(Failure(reason))
    assert (body.data, body.ends) == (b"abc", [PotentialDataLoss])


def test_a_connection_that_ends_too_early_breaks_the_body(rig: Rig) -> None:
    body = rig.answered(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc")
    rig.endpoint.connections[0].connectionLost(Failure(ConnectionDone()))
    assert (body.data, body.ends) == (b"abc", [ResponseFailed])


def test_a_connection_that_ends_before_the_answer_is_no_answer(rig: Rig) -> None:
    answers = rig.ask()
    rig.endpoint.connections[0].connectionLost(Failure(ConnectionDone()))
    assert [type(answer) for answer in answers] == [ResponseNeverReceived]


def test_an_idle_connection_that_speaks_is_closed(rig: Rig) -> None:
    rig.answered(OK)
    rig.receive(OK)
    assert rig.endpoint.wires[0].gone
    rig.ask()
    assert len(rig.endpoint.wires) == 2


@pytest.mark.parametrize("come", [OK, b""], ids=["an answer", "the end"])
def test_an_idle_connection_is_not_used_when_something_has_come_that_was_not_read_yet(
    rig: Rig, come: bytes
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        rig.endpoint.fileno = ours.fileno
        for _ in range(2):
            rig.answered(OK)
        assert len(rig.endpoint.wires) == 1
        if come:
            theirs.send(come)
        else:
            theirs.shutdown(socket.SHUT_WR)
        rig.ask()
        assert [wire.gone for wire in rig.endpoint.wires] == [True, False]


def test_an_idle_connection_that_was_closed_is_not_used(rig: Rig) -> None:
    rig.answered(OK)
    rig.endpoint.connections[0].connectionLost(Failure(ConnectionDone()))
    rig.ask()
    assert len(rig.endpoint.wires) == 2


def test_an_idle_connection_is_closed_after_its_time(rig: Rig) -> None:
    rig.answered(OK)
    rig.clock.advance(IDLE_S)
    assert rig.endpoint.wires[0].gone
    assert rig.clock.getDelayedCalls() == []


def test_an_idle_connection_is_not_used_after_its_time_even_if_the_clock_is_late(rig: Rig) -> None:
    rig.answered(OK)
    rig.clock.rightNow += IDLE_S
    rig.ask()
    assert len(rig.endpoint.wires) == 2


def test_stopping_closes_the_connection_at_once_and_says_so_once(rig: Rig) -> None:
    answers = rig.ask()
    rig.receive(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc")
    body = Body()
    answers[0].deliverBody(body)
    body.transport.stopProducing()  # type: ignore[union-attr]
    assert rig.endpoint.wires[0].gone
    rig.endpoint.connections[0].connectionLost(Failure(ConnectionLost()))
    assert body.ends == [ResponseFailed]


def test_a_whole_answer_that_nobody_wants_leaves_no_connection(rig: Rig) -> None:
    class Unwanted(Body):
        def connectionMade(self) -> None:
            self.transport.stopProducing()  # type: ignore[union-attr]

    answers = rig.ask()
    rig.receive(OK)
    answers[0].deliverBody(Unwanted())
    assert rig.endpoint.wires[0].gone
    rig.ask()
    assert len(rig.endpoint.wires) == 2


def test_cancelling_closes_the_connection(rig: Rig) -> None:
    answers = rig.ask()
    rig.last.cancel()
    assert rig.endpoint.wires[0].gone
    assert [type(answer) for answer in answers] == [ResponseNeverReceived]


def test_no_connection_is_told_as_it_is(rig: Rig) -> None:
    rig.endpoint.error = ConnectionRefusedError()
    [error] = rig.ask()
    assert isinstance(error, ConnectionRefusedError)


def test_closing_the_agent_closes_idle_connections_and_keeps_no_new_ones(rig: Rig) -> None:
    rig.answered(OK)
    answers = rig.ask()
    rig.agent.close()
    rig.receive(OK)
    answers[0].deliverBody(Body())
    assert [wire.gone for wire in rig.endpoint.wires] == [True]
    assert rig.clock.getDelayedCalls() == []


# -- bodies that come in pieces ---------------------------------------------------------------


@implementer(IBodyProducer)
class Pieces:
    """A body that is written by the test."""

    length = UNKNOWN_LENGTH

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.sent: Deferred[None] = Deferred()

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        self.consumer = consumer
        return self.sent

    def write(self, parts: Sequence[bytes]) -> None:
        for part in parts:
            self.consumer.write(part)

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def resumeProducing(self) -> None:
        self.calls.append("resume")

    def stopProducing(self) -> None:
        self.calls.append("stop")


def test_a_body_of_unknown_length_goes_in_chunks(rig: Rig) -> None:
    pieces = Pieces()
    rig.ask(pieces)
    pieces.write([b"abc", b"", b"de"])
    pieces.sent.callback(None)
    head, _, body = rig.endpoint.wires[0].value().partition(b"\r\n\r\n")
    assert b"Transfer-Encoding: chunked" in head
    assert b"Content-Length" not in head
    assert body == b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"


def test_a_slow_backend_holds_the_body_up(rig: Rig) -> None:
    pieces = Pieces()
    rig.ask(pieces)
    rig.endpoint.wires[0].producer.pauseProducing()  # type: ignore[union-attr]
    rig.endpoint.wires[0].producer.resumeProducing()  # type: ignore[union-attr]
    assert pieces.calls == ["pause", "resume"]


def test_a_body_that_breaks_off_never_looks_whole(rig: Rig) -> None:
    pieces = Pieces()
    answers = rig.ask(pieces)
    pieces.write([b"abc"])
    pieces.sent.errback(Failure(RuntimeError("the client is gone")))
    assert rig.endpoint.wires[0].gone
    assert not rig.endpoint.wires[0].value().endswith(b"0\r\n\r\n")
    [error] = answers
    assert isinstance(error.reasons[0].value, RuntimeError)


def test_an_answer_before_the_end_of_the_body_leaves_no_connection(rig: Rig) -> None:
    pieces = Pieces()
    answers = rig.ask(pieces)
    rig.receive(OK)
    body = Body()
    answers[0].deliverBody(body)
    assert (body.data, body.ends) == (b"abc", [ResponseDone])
    assert rig.endpoint.wires[0].gone
    pieces.sent.callback(None)
    rig.ask()
    assert len(rig.endpoint.wires) == 2


def test_a_large_body_goes_at_the_connections_pace_and_is_kept_no_longer_than_needed(
    rig: Rig,
) -> None:
    body, sent = BytesBody(bytes(10 * PIECE + 1)), []
    body.on_sent = lambda: sent.append(True)
    rig.endpoint.pauses_after = 3 * PIECE
    rig.ask(body)
    wire = rig.endpoint.wires[0]
    assert sent == [True]
    head, _, written = wire.value().partition(b"\r\n\r\n")
    assert b"Content-Length: 655361" in head
    assert len(written) == 3 * PIECE
    wire.pauses_after = None
    wire.producer.resumeProducing()  # type: ignore[union-attr]
    assert wire.value().partition(b"\r\n\r\n")[2] == bytes(10 * PIECE + 1)
    assert wire.producer is None
    assert body.data == b""


def test_a_large_body_that_nobody_wants_any_more_is_dropped(rig: Rig) -> None:
    body = BytesBody(bytes(10 * PIECE))
    rig.endpoint.pauses_after = PIECE
    answers = rig.ask(body)
    rig.receive(OK)
    answers[0].deliverBody(Body())
    assert body.data == b""
    assert rig.endpoint.wires[0].gone
