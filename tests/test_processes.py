"""Tests of the pool of workers: when it counts as started, starts one again, and has stopped."""

from __future__ import annotations

import signal
from typing import Any, cast

import pytest
from twisted.internet.error import ProcessDone, ProcessTerminated
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from llmproxy.control import Decoder, encode
from llmproxy.errors import ConfigError
from llmproxy.processes import RETRY_MAX_S, STEADY_S, Worker, Workers, how_ended, pause_before
from llmproxy.totals import Snapshot

METRICS = Snapshot(counts={"n": {(): [1.0]}}, gauges={"g": {(): [1.0]}}).to_json()
KILLED = ProcessTerminated(signal=signal.SIGKILL)


class Pipes:
    """The transport of a worker that is no process: what it was told, and whether it was killed."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.killed = False
        self._decoder = Decoder()

    def writeToChild(self, descriptor: int, data: bytes) -> None:
        for message in self._decoder.feed(data):
            kind = message.pop("kind")
            self.told.append(kind + (" and linger" if message.get("linger") else ""))

    def signalProcess(self, name: str) -> None:
        assert name == "KILL"
        self.killed = True


class Pool:
    """Workers that do as a test says."""

    def __init__(self, count: int = 2, *, lingers: bool = False) -> None:
        self.clock = Clock()
        self.launched: list[Worker] = []
        self.workers = Workers(self.clock, count, self._launch, lingers=lingers)
        self.result: list[Any] = []

    def _launch(self, worker: Worker) -> None:
        worker.transport = cast(Any, Pipes())
        self.launched.append(worker)

    def pipes(self, index: int) -> Pipes:
        return cast(Pipes, self.launched[index].transport)

    def say(self, index: int, kind: str, **content: object) -> None:
        self.launched[index].childDataReceived(4, encode(kind, **content))

    def ready(self, index: int) -> None:
        self.say(index, "ready", metrics=METRICS, checks={"ledger": True})

    def end(self, index: int, error: Exception = KILLED) -> None:
        self.launched[index].processEnded(Failure(error))

    def start(self, *, ready: bool = True) -> None:
        self.workers.start().addBoth(self.result.append)
        for index in range(len(self.launched) if ready else 0):
            self.ready(index)

    def stop(self, patience_s: float = 9.0) -> list[None]:
        ended: list[None] = []
        self.workers.stop(patience_s).addCallback(ended.append)
        return ended


@pytest.fixture
def pool() -> Pool:
    return Pool()


def test_all_have_started_when_the_last_one_serves(pool):
    pool.start(ready=False)
    pool.ready(1)
    assert not pool.result
    assert [worker.number for worker in pool.workers.serving] == [1]
    pool.ready(0)
    assert pool.result == [None]


def test_one_that_can_not_start_makes_the_start_fail_with_its_reason_once(pool):
    pool.start(ready=False)
    for index in (1, 0):
        pool.say(index, "failed", reason=f"no luck {index}")
        pool.end(index, ProcessTerminated(exitCode=1))
    [failure] = pool.result
    assert (failure.type, str(failure.value)) == (ConfigError, "no luck 1")
    pool.clock.advance(60)
    assert len(pool.launched) == 2


def test_one_that_dies_at_its_first_start_makes_the_start_fail(pool):
    pool.start(ready=False)
    pool.end(0)
    assert str(pool.result[0].value) == "worker 0 ended: signal 9 (SIGKILL)"


def test_one_that_ends_is_started_again_at_once_with_the_same_number(pool):
    pool.start()
    pool.end(1)
    assert pool.workers.restarts == 1
    pool.clock.advance(0)
    assert [worker.number for worker in pool.launched] == [0, 1, 1]
    pool.ready(2)
    assert len(pool.workers.serving) == 2


def test_who_has_ended_is_missing_until_it_is_started_again(pool):
    told: list[list[int]] = []
    pool.workers.on_change = lambda: told.append(list(pool.workers.missing))
    pool.start(ready=False)
    pool.ready(0)  # worker 1 is starting, which is not to be missing
    pool.ready(1)
    pool.end(1)
    assert told == [[], [], [1]]
    pool.clock.advance(0)
    assert pool.workers.missing == []


def test_one_that_ends_again_at_once_waits_longer_each_time(pool):
    pool.start()
    pauses: list[float] = []
    for _ in range(10):
        pool.end(-1)
        waited = 0.0
        while len(pool.launched) == 2 + len(pauses):
            pool.clock.advance(0.5 if waited or pauses else 0)
            waited += 0.5 if pauses else 0
        pauses.append(waited)
        pool.ready(-1)
    assert pauses == [0, 0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_one_that_was_steady_is_started_again_at_once(pool):
    pool.start()
    for _ in range(3):
        pool.end(-1)
        pool.clock.advance(RETRY_MAX_S)
        pool.ready(-1)
    pool.clock.advance(STEADY_S)
    pool.end(-1)
    before = len(pool.launched)
    pool.clock.advance(0)
    assert len(pool.launched) == before + 1


def test_the_pause_has_a_bound():
    assert pause_before(10**6) == RETRY_MAX_S


def test_what_a_dead_one_has_counted_stays(pool):
    pool.start()
    pool.end(0)
    total = pool.workers.totals.now()
    assert (total.counts["n"][()], total.gauges["g"][()]) == ([2.0], [1.0])


def test_everybody_is_told_to_stop_and_waited_for(pool):
    pool.start()
    ended = pool.stop()
    assert pool.pipes(0).told == pool.pipes(1).told == ["stop"]
    pool.end(0, ProcessDone(0))
    assert not ended
    pool.end(1, ProcessDone(0))
    assert ended == [None]
    assert pool.clock.getDelayedCalls() == []
    assert pool.workers.restarts == 0


def test_nobody_is_started_while_all_stop(pool):
    pool.start()
    pool.end(0)
    ended = pool.stop()
    pool.clock.advance(60)
    pool.end(1)
    assert (len(pool.launched), ended) == (2, [None])


def test_who_does_not_stop_is_killed(pool):
    pool.start()
    ended = pool.stop(patience_s=3.0)
    pool.end(0, ProcessDone(0))
    pool.clock.advance(2.9)
    assert not pool.pipes(1).killed
    pool.clock.advance(0.1)
    assert pool.pipes(1).killed
    pool.end(1)
    assert ended == [None]


def test_a_stop_without_any_worker_is_over_at_once(pool):
    assert pool.stop() == [None]


def test_the_one_that_delivers_leaves_last():
    pool = Pool(3, lingers=True)
    pool.start()
    ended = pool.stop()
    assert [pool.pipes(index).told for index in range(3)] == [
        ["stop and linger"],
        ["stop"],
        ["stop"],
    ]
    pool.end(2, ProcessDone(0))
    assert pool.pipes(0).told[1:] == []
    pool.end(1, ProcessDone(0))
    assert pool.pipes(0).told[1:] == ["leave"]
    assert not ended
    pool.end(0, ProcessDone(0))
    assert ended == [None]


def test_the_one_that_delivers_leaves_at_once_if_it_is_alone():
    pool = Pool(2, lingers=True)
    pool.start()
    pool.end(1)
    pool.stop()
    assert pool.pipes(0).told == ["stop and linger", "leave"]


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (ProcessDone(0), "exit code 0"),
        (ProcessTerminated(exitCode=3), "exit code 3"),
        (ProcessTerminated(signal=signal.SIGSEGV), "signal 11 (SIGSEGV)"),
        (ProcessTerminated(signal=40), "signal 40"),
    ],
)
def test_how_it_ended_is_told_in_a_few_words(error, how):
    assert how_ended(error) == how
