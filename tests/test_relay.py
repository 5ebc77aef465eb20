"""Reading a backend's body: one ending, whatever happens, and no silence for ever."""

from __future__ import annotations

import pytest
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web._newclient import ResponseFailed, TransportProxyProducer
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss

from llmproxy.relay import BodyEnd, BodyReader

SILENCE_S = 10.0


class Connection:
    """What stands behind a body's transport: it has these methods and no others. `rude`: it still
    delivers after it was stopped, as sockets do, and tells of its end at once."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.reader: BodyReader | None = None

    def pauseProducing(self) -> None:
        self.told.append("pause")

    def resumeProducing(self) -> None:
        self.told.append("resume")

    def stopProducing(self) -> None:
        self.told.append("stop")
        if self.reader is not None:
            self.reader.dataReceived(b"too late")
            self.reader.connectionLost(Failure(ConnectionDone()))

    def loseConnection(self) -> None:
        raise AssertionError("twisted.web closes the connection itself")


class Body:
    """A body that is being read, through the very transport that twisted.web gives it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.got: list[bytes] = []
        self.at: list[float] = []
        self.ends: list[BodyEnd] = []
        self.connection = Connection()
        self.proxy = TransportProxyProducer(self.connection)
        self.reader = BodyReader(self.take, clock, SILENCE_S)
        self.reader.ended.addCallback(self.ends.append)

    def take(self, data: bytes, now: float) -> None:
        self.got.append(data)
        self.at.append(now)

    def begin(self) -> Body:
        self.reader.makeConnection(self.proxy)
        return self

    def lose(self, error: Exception) -> None:
        """As twisted.web does: the transport is of no use from here on."""
        self.proxy.stopProxying()
        self.reader.connectionLost(Failure(error))


@pytest.fixture
def body(clock: Clock) -> Body:
    return Body(clock).begin()


def broken() -> ResponseFailed:
    return ResponseFailed([Failure(ConnectionLost())])


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (ResponseDone(), BodyEnd.WHOLE),
        (PotentialDataLoss(), BodyEnd.UNFRAMED),
        (broken(), BodyEnd.BROKEN),
        (ConnectionLost(), BodyEnd.BROKEN),
        (ConnectionAborted(), BodyEnd.BROKEN),
        (ConnectionDone(), BodyEnd.BROKEN),
        (ValueError("a fault of a parser"), BodyEnd.BROKEN),
    ],
)
def test_the_connections_reason_says_how_it_ended_once(body, clock, error, end):
    body.reader.dataReceived(b"x")
    body.lose(error)
    assert (body.got, body.ends) == ([b"x"], [end])
    assert clock.getDelayedCalls() == []
    body.reader.stop()
    body.reader.pauseProducing()
    body.reader.resumeProducing()
    body.reader.finish_within(1)
    assert clock.getDelayedCalls() == []
    assert body.ends == [end]


def test_silence_ends_it(body, clock):
    clock.advance(SILENCE_S - 0.1)
    assert body.ends == []
    clock.advance(0.1)
    assert (body.ends, body.connection.told) == ([BodyEnd.STALLED], ["stop"])


def test_each_piece_renews_the_patience(body, clock):
    for _ in range(5):
        clock.advance(SILENCE_S - 0.1)
        body.reader.dataReceived(b"x")
    assert body.ends == []
    clock.advance(SILENCE_S)
    assert body.ends == [BodyEnd.STALLED]


def test_each_piece_comes_with_its_time(body, clock):
    for seconds in (1.0, 2.0):
        clock.advance(seconds)
        body.reader.dataReceived(b"x")
    assert body.at == [1.0, 3.0]


def test_the_silence_of_a_paused_backend_is_not_its_fault(body, clock):
    body.reader.pauseProducing()
    clock.advance(100 * SILENCE_S)
    assert (body.ends, body.connection.told) == ([], ["pause"])
    body.reader.resumeProducing()
    assert body.connection.told == ["pause", "resume"]
    clock.advance(SILENCE_S - 0.1)
    assert body.ends == []
    clock.advance(0.1)
    assert body.ends == [BodyEnd.STALLED]


def test_pausing_and_resuming_twice_leaves_one_timer(body, clock):
    for _ in range(2):
        body.reader.pauseProducing()
    for _ in range(2):
        body.reader.resumeProducing()
    assert len(clock.getDelayedCalls()) == 1


def test_bytes_that_come_while_it_is_paused_are_taken(body, clock):
    body.reader.pauseProducing()
    body.reader.dataReceived(b"on its way")
    assert body.got == [b"on its way"]
    assert clock.getDelayedCalls() == []


def test_after_the_last_event_the_end_is_near_whatever_drips_in(body, clock):
    body.reader.finish_within(1)
    clock.advance(0.9)
    body.reader.dataReceived(b"a trailer")
    body.reader.finish_within(1)
    assert body.ends == []
    clock.advance(0.1)
    assert (body.ends, body.connection.told) == ([BodyEnd.WHOLE], ["stop"])


def test_an_end_that_is_near_while_it_is_paused_comes_after_it_goes_on(body, clock):
    body.reader.pauseProducing()
    body.reader.finish_within(1)
    clock.advance(50)
    assert body.ends == []
    body.reader.resumeProducing()
    clock.advance(1)
    assert body.ends == [BodyEnd.WHOLE]


@pytest.mark.parametrize("end", [BodyEnd.STOPPED, BodyEnd.WHOLE])
def test_a_stop_is_final_whatever_still_comes(body, clock, end):
    body.connection.reader = body.reader
    body.reader.stop(end)
    body.reader.stop(BodyEnd.BROKEN)
    assert (body.got, body.ends, body.connection.told) == ([], [end], ["stop"])
    assert clock.getDelayedCalls() == []


def test_a_stop_out_of_the_sink_is_final(clock):
    body = Body(clock)
    body.reader._sink = lambda data, now: body.reader.stop()  # as a limit does
    body.begin()
    body.reader.dataReceived(b"x")
    body.reader.dataReceived(b"y")
    assert (body.ends, body.connection.told) == ([BodyEnd.STOPPED], ["stop"])
    assert clock.getDelayedCalls() == []


def test_a_body_that_is_stopped_before_it_began_never_begins(clock):
    body = Body(clock)
    body.reader.stop()
    body.begin()
    assert body.ends == [BodyEnd.STOPPED]
    assert clock.getDelayedCalls() == []


def test_the_fake_connection_has_what_the_real_transport_uses():
    used = {name for name in vars(TransportProxyProducer) if not name.startswith("_")}
    assert used - {"stopProxying", "disconnecting"} == {
        name for name in vars(Connection) if not name.startswith("_")
    }
