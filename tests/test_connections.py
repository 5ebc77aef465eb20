"""For how many connections there is room, and who makes room for whom."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from llmproxy.connections import (
    ADDRESS,
    IDLE,
    MOST,
    RESERVE,
    TOTAL,
    Connections,
    bounds,
    descriptors,
)
from llmproxy.errors import ProxyError


class One:
    def __init__(self, source: str | None = None) -> None:
        self.source = source
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


def welcome(room: Connections, source: str | None = None) -> One:
    assert room.refusal(source) is None
    one = One(source)
    room.joined(one)
    return one


def status(refusal: ProxyError | None) -> int | None:
    if refusal is None:
        return None
    assert refusal.headers["Retry-After"] == "2"
    return refusal.status


@pytest.mark.parametrize(
    ("files", "most", "per_address", "expected"),
    [
        (20_128, 0, 0, (10_000, 7_500)),
        (1024, 0, 0, (448, 336)),
        (2**20, 0, 0, (MOST, MOST * 3 // 4)),
        (2**20, 100_000, 0, (100_000, 75_000)),
        (1024, 800, 0, (800, 600)),  # most of them idle, the operator thinks
        (1024, 2000, 0, (896, 672)),
        (1024, 100, 100, (100, 100)),
        (1024, 1, 0, (1, 1)),
        (100, 0, 0, (1, 1)),
    ],
)
def test_they_fit_below_the_descriptors_with_one_more_each(files, most, per_address, expected):
    assert bounds(files, most, per_address) == expected
    assert expected[0] <= max(2, files - RESERVE)


@pytest.fixture
def soft_limit() -> Iterator[int]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = min(512, before[0])
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, before[1]))
    yield low
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_is_raised_to_the_hard_one(soft_limit):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert descriptors() == hard
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


def test_when_all_are_busy_the_next_one_is_refused_until_one_has_gone():
    short: list[str] = []
    room = Connections(2, short_of=short.append)
    first, second = welcome(room), welcome(room)
    room.resting.clear()
    assert status(room.refusal(None)) == 503
    assert short == [TOTAL]
    room.left(first)
    welcome(room)
    assert not second.aborted
    assert short == [TOTAL]


def test_who_has_been_idle_for_longest_makes_room():
    short: list[str] = []
    room = Connections(3, short_of=short.append)
    busy, old, young = (welcome(room) for _ in range(3))
    del room.resting[busy]
    welcome(room)
    assert (busy.aborted, old.aborted, young.aborted) == (False, True, False)
    welcome(room)  # before the first of them has gone
    assert (busy.aborted, young.aborted) == (False, True)
    assert short == [IDLE, IDLE]


def test_one_address_has_its_share_and_others_the_rest():
    short: list[str] = []
    room = Connections(10, 2, short.append)
    mine = [welcome(room, "192.0.2.1") for _ in range(2)]
    assert status(room.refusal("192.0.2.1")) == 429
    assert not any(each.aborted for each in mine)
    for number in range(4):
        welcome(room, f"192.0.2.{number + 2}")
    for _ in range(4):
        welcome(room, None)  # as on a UNIX socket
    assert short == [ADDRESS]
    room.left(mine[0])
    welcome(room, "192.0.2.1")
    assert short == [ADDRESS]


def test_no_address_is_remembered_that_holds_none():
    room = Connections(10, 2)
    for number in range(1000):
        assert room.refusal(f"{number}") is None
        room.left(welcome(room, f"{number}"))
    assert (room._of_address, room.all, room.resting) == ({}, set(), {})


def test_the_same_is_logged_once_a_minute(logged):
    now = 0.0
    room = Connections(0, monotonic=lambda: now)
    for now in (0.0, 1.0, 59.0, 60.0, 61.0):  # noqa: B007
        room.refusal(None)
    lines = [line for line in logged if line.startswith("of 0 connections: new ones are refused")]
    assert len(lines) == len(logged) == 2
