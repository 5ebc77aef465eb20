"""Histories from seeds: every promise holds in each, and every planted mistake is found."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import planted
import pytest
import simulation
from figures import LONG, report
from housekeeping import FlushLoggedErrors
from simulated_network import SimReactor, SimTransport, World, attach, socket_pair
from simulation import Result, describe, play, play_all
from twisted.internet.interfaces import IPushProducer, IReactorTime, ITCPTransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.verify import verifyObject

HISTORIES = 100_000 if LONG else 1_500
PROCESSES = 2
CHUNK = 1_000
#: How many histories a planted mistake may survive.
BOUND = 1_000


def _play_chunk(start: int) -> Result:
    return play_all(range(start, start + CHUNK), limit=3)


def _play_many() -> Result:
    if not LONG:
        return play_all(range(HISTORIES), limit=3)
    total = Result()
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        for result in pool.map(_play_chunk, range(0, HISTORIES, CHUNK)):
            total.faults |= result.faults
            total.tally += result.tally
    return total


@pytest.mark.timeout(7200 if LONG else 120)
def test_every_promise_holds_in_every_history() -> None:
    began = time.monotonic()
    result = _play_many()
    report("simulation", **result.tally, broken=len(result.faults), s=time.monotonic() - began)
    if result.faults:
        seed, faults = next(iter(result.faults.items()))
        pytest.fail("\n".join([describe(seed), *faults]), pytrace=False)
    assert result.tally["histories"] == HISTORIES
    _assert_that_much_happened(result.tally)


def _assert_that_much_happened(tally: Counter[str]) -> None:
    """A simulation in which nothing goes wrong, or nothing right, would prove nothing."""
    per_history = {name: count / tally["histories"] for name, count in tally.items()}
    assert per_history["sent"] > 1
    assert per_history["whole_answers"] > 0.5
    assert per_history["clients_left"] > 0.5
    assert per_history["failed_commits"] > 0.5
    assert per_history["killed"] > 0.3
    assert per_history["stopped"] > 0.05
    for state in ("settled", "estimated", "disputed", "orphan"):
        assert per_history[state] > 0.02


@pytest.mark.parametrize("plant", planted.PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_mistake_is_found(
    plant: planted.Plant, flush_logged_errors: FlushLoggedErrors
) -> None:
    with plant():
        result = play_all(range(BOUND))
    flush_logged_errors()  # what a mistake makes the proxy log is the mistake's
    (seed,) = result.faults
    assert not play(seed).faults  # it is the mistake that was found


def test_a_seed_always_gives_the_same_history() -> None:
    for seed in range(5):
        first: list[str] = []
        again: list[str] = []
        play(seed, first.append)
        play(seed, again.append)
        assert len(first) > 3
        assert first == again


def test_the_simulated_parts_are_what_they_stand_for() -> None:
    history = simulation.History(1, lambda text: None)
    reactor = SimReactor(history.world)
    one, _ = socket_pair(history.world)
    assert verifyObject(IReactorTime, reactor)
    assert verifyObject(ITCPTransport, attach(reactor, one, Protocol()))


class Recorder(Protocol):
    """Keeps what comes; `held` pauses the connection from the start."""

    def __init__(self, held: bool = False) -> None:
        self.received = b""
        self.reasons: list[str] = []
        self._held = held

    def connectionMade(self) -> None:
        if self._held:
            self._pipe.pauseProducing()

    @property
    def _pipe(self) -> SimTransport:
        assert isinstance(self.transport, SimTransport)
        return self.transport

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.reasons.append(type(reason.value).__name__)


def _connected(seed: int, held: bool = False) -> tuple[World, SimTransport, Recorder]:
    world = simulation.History(seed, lambda text: None).world
    world.calls.clear()
    one, other = socket_pair(world)
    reader = Recorder(held)
    attach(SimReactor(world), other, reader)
    return world, attach(SimReactor(world), one, Recorder()), reader


def _run(world: World) -> None:
    while world.calls:
        world.step()


@pytest.mark.parametrize("seed", range(20))
def test_all_that_was_written_arrives_before_the_end(seed: int) -> None:
    world, writer, reader = _connected(seed)
    writer.write(b"x" * 10_000)
    writer.loseConnection()
    _run(world)
    assert reader.received == b"x" * 10_000
    assert reader.reasons == ["ConnectionDone"]


def test_a_reader_that_does_not_read_is_not_written_to_without_end() -> None:
    world, writer, reader = _connected(1, held=True)
    paused: list[bool] = []

    @implementer(IPushProducer)
    class Producer:
        def pauseProducing(self) -> None:
            paused.append(True)

        def resumeProducing(self) -> None:
            """Not while nobody reads."""

        def stopProducing(self) -> None:
            """Not here."""

    writer.registerProducer(Producer(), True)
    writer.write(b"x" * 200_000)
    _run(world)
    assert paused
    assert reader.received == b""


def test_an_abort_is_seen_as_a_lost_connection() -> None:
    world, writer, reader = _connected(1)
    writer.abortConnection()
    _run(world)
    assert reader.reasons == ["ConnectionLost"]
