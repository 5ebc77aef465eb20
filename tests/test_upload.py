"""A request's body as it arrives: limits, patience, and who is held up."""

from __future__ import annotations

import tracemalloc

import pytest
from deferreds import failure_of, is_waiting, result_of, started
from twisted.internet.task import Clock

from llmproxy.errors import BodyTooLarge, RequestTimeout
from llmproxy.upload import BODY_S, HIGH_WATER, MIN_RATE, ClientGone, Upload


class Flow:
    """An upload, and what it told its channel."""

    def __init__(self, clock: Clock, length: int | None = None) -> None:
        self.told: list[str] = []
        self.upload = Upload(length, clock, self)

    def hold_up(self, hold: bool) -> None:
        self.told.append("pause" if hold else "resume")

    def invite_body(self) -> None:
        self.told.append("invite")

    @property
    def holds(self) -> list[str]:
        return [word for word in self.told if word != "invite"]


@pytest.fixture
def flow(clock: Clock) -> Flow:
    return Flow(clock)


def test_a_body_is_read_in_order_to_its_end(flow):
    reading = started(flow.upload.read(100, 5))
    for part in (b"a", b"bc", b"d"):
        flow.upload.received(part)
    assert is_waiting(reading)
    flow.upload.ended()
    assert result_of(reading) == b"abcd"


def test_a_body_that_came_before_it_was_wanted_is_kept(flow):
    flow.upload.received(b"ab")
    flow.upload.ended()
    assert result_of(started(flow.upload.read(2, 5))) == b"ab"
    assert result_of(started(flow.upload.next(5))) is None


def test_a_body_is_invited_only_when_it_is_wanted(flow):
    assert flow.told == []
    reading = started(flow.upload.next(5))
    assert flow.told == ["invite"]
    flow.upload.received(b"a")
    assert result_of(reading) == b"a"


def test_an_announced_length_over_the_limit_is_refused_before_it_is_invited(clock):
    flow = Flow(clock, length=11)
    error = failure_of(started(flow.upload.read(10, 5)), BodyTooLarge)
    assert error.status == 413
    assert flow.told == []


@pytest.mark.parametrize("length", [0, 9, 10])
def test_an_announced_length_up_to_the_limit_is_read(clock, length):
    flow = Flow(clock, length)
    flow.upload.received(bytes(length))
    flow.upload.ended()
    assert len(result_of(started(flow.upload.read(10, 5)))) == length


def test_a_body_without_a_length_is_refused_when_it_passes_the_limit(flow):
    reading = started(flow.upload.read(10, 5))
    flow.upload.received(bytes(10))
    assert is_waiting(reading)
    flow.upload.received(b"x")
    failure_of(reading, BodyTooLarge)


def test_silence_gives_408_and_every_byte_renews_the_patience(flow, clock):
    reading = started(flow.upload.read(100, 5))
    for _ in range(4):
        clock.advance(4.9)
        flow.upload.received(b"x")
    clock.advance(4.9)
    assert is_waiting(reading)
    clock.advance(0.1)
    assert failure_of(reading, RequestTimeout).status == 408
    assert clock.getDelayedCalls() == []


def test_no_timer_is_left_when_the_body_is_there(flow, clock):
    reading = started(flow.upload.read(100, 5))
    flow.upload.ended()
    result_of(reading)
    assert clock.getDelayedCalls() == []


def test_the_client_is_held_up_at_the_high_water_mark_and_not_before(flow):
    flow.upload.received(bytes(HIGH_WATER - 1))
    assert flow.holds == []
    flow.upload.received(b"x")
    assert flow.holds == ["pause"]


def test_the_client_goes_on_when_enough_was_taken(flow):
    flow.upload.received(bytes(HIGH_WATER // 2))
    flow.upload.received(bytes(HIGH_WATER))
    result_of(started(flow.upload.next(5)))
    assert flow.holds == ["pause"]
    result_of(started(flow.upload.next(5)))
    assert flow.holds == ["pause", "resume"]


def test_bytes_that_come_in_spite_of_a_hold_renew_it(flow):
    flow.upload.received(bytes(HIGH_WATER))
    flow.upload.received(b"x")
    assert flow.holds == ["pause", "pause"]


def test_a_reader_that_keeps_up_leaves_the_channel_running(flow):
    reading = started(flow.upload.read(10 * HIGH_WATER, 5))
    for _ in range(5):
        flow.upload.received(bytes(HIGH_WATER))
    flow.upload.ended()
    assert len(result_of(reading)) == 5 * HIGH_WATER
    assert flow.holds[-1:] in ([], ["resume"])


def test_a_body_that_nobody_wants_is_dropped_and_the_client_goes_on(flow):
    whole: list[bool] = []
    flow.upload.received(bytes(HIGH_WATER))
    flow.upload.discard(lambda: whole.append(True))
    assert flow.holds == ["pause", "resume"]
    for _ in range(10):
        flow.upload.received(bytes(HIGH_WATER))
    assert (flow.holds, whole) == (["pause", "resume"], [])
    flow.upload.ended()
    assert whole == [True]
    assert result_of(started(flow.upload.next(5))) is None  # nothing of it was kept


def test_a_reader_learns_at_once_that_the_client_is_gone(flow, clock):
    reading = started(flow.upload.read(100, 5))
    flow.upload.received(b"x")
    flow.upload.lost()
    failure_of(reading, ClientGone)
    assert clock.getDelayedCalls() == []


def test_a_reader_that_comes_later_learns_that_the_client_is_gone(flow):
    flow.upload.received(b"x")
    flow.upload.lost()
    assert result_of(started(flow.upload.next(5))) == b"x"
    failure_of(started(flow.upload.next(5)), ClientGone)


def test_a_client_that_leaves_after_the_time_ran_out_is_no_second_error(flow, clock):
    reading = started(flow.upload.read(100, 5))
    clock.advance(5)
    failure_of(reading, RequestTimeout)
    flow.upload.received(b"x")
    flow.upload.lost()


def test_a_body_in_tiny_parts_takes_no_more_memory_than_it_is_long(flow):
    body = bytes(2 * HIGH_WATER)
    reading = started(flow.upload.read(len(body), 5))
    tracemalloc.start()
    try:
        for at in range(0, len(body), 8):
            flow.upload.received(body[at : at + 8])
            flow.told.clear()
        flow.upload.ended()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(result_of(reading)) == len(body)
    assert peak < 2.5 * len(body) + HIGH_WATER


@pytest.mark.parametrize("part", [1, 500, MIN_RATE])
def test_a_body_has_the_time_that_its_size_takes_however_it_comes(flow, clock, part):
    """Never silent for long: `part` bytes each second."""
    reading = started(flow.upload.read(1_000_000, 5))
    seconds = 0
    while is_waiting(reading) and seconds < 600:
        clock.advance(1)
        seconds += 1
        flow.upload.received(bytes(part))
    if part == MIN_RATE:
        assert seconds == 600
        flow.upload.ended()
        assert len(result_of(reading)) == 600 * part
    else:
        failure_of(reading, RequestTimeout)
        allowed = BODY_S / (1 - part / MIN_RATE)
        assert allowed <= seconds <= allowed + 2
