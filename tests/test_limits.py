"""What each key may ask for: the pure part. The rest is in `threats/test_keys_limits.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
from deferreds import failure_of, result_of
from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.internet.task import Clock

from llmproxy import limits
from llmproxy.config import KeyLimits
from llmproxy.errors import StorageError, TooManyRequests
from llmproxy.limits import ANSWER_S, MOST_LOTS, PAUSE_S, SLICE_S, STALE_S, TICK_S, Limits
from llmproxy.model import BUDGETS, Account, OwnLimits, Share
from llmproxy.shares import CLAIM_S
from llmproxy.storage.memory import MemoryShares

ALICE, BOB = Account("alice"), Account("bob")


class Door:
    """Limits with their clock, and what they refused for."""

    def __init__(self, **limits: int) -> None:
        self.refused: list[str] = []
        self.shares, self.clock = MemoryShares(), Clock()
        self.clock.advance(100)
        seconds = self.clock.seconds
        self.limits = Limits(
            KeyLimits(**limits), self.shares, "me", self.clock, seconds, self.refused.append
        )
        self.limits.startService()

    @property
    def now(self) -> float:
        return self.clock.seconds()

    @now.setter
    def now(self, now: float) -> None:
        self.clock.advance(TICK_S)  # what is owed is told to all others then
        self.clock.advance(now - self.clock.seconds())

    def enter(self, account: Account = ALICE) -> None:
        """Raises TooManyRequests."""
        if (entering := self.limits.enter(account)) is not None:
            result_of(entering)

    def hold(self, account: Account, most: int) -> int:
        """What is held for it. Raises TooManyRequests."""
        tokens = self.limits.most(account, most)
        if (holding := self.limits.hold(account, tokens)) is not None:
            result_of(holding)
        return tokens

    def enters(self, account: Account = ALICE) -> bool:
        """Whether a request is let in."""
        try:
            self.enter(account)
        except TooManyRequests:
            return False
        return True

    def retried(self) -> bool:
        """Whether there is a token."""
        try:
            return self.hold(ALICE, 1) == 1
        except TooManyRequests:
            return False

    def retry_after(self) -> str:
        """What a request that is not let in is told."""
        with pytest.raises(TooManyRequests) as refused:
            self.enter(ALICE)
        assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
        return refused.value.headers["Retry-After"]


def test_a_key_has_so_many_requests_in_flight_and_no_more() -> None:
    door = Door(concurrent_requests=2)
    assert [door.enters() for _ in range(4)] == [True, True, False, False]
    assert door.refused == ["concurrent_requests"] * 2
    assert door.enters(BOB)
    door.limits.leave(ALICE)
    assert [door.enters(), door.enters()] == [True, False]
    assert door.retry_after() == "1"


def test_a_key_has_so_many_requests_in_a_minute_and_no_more() -> None:
    door = Door(requests_per_minute=2)
    for _ in range(2):
        assert door.enters()
        door.limits.leave(ALICE)
    assert not door.enters()
    assert door.refused == ["requests_per_minute"]
    assert door.enters(BOB)
    assert door.retry_after() == "30"
    door.now += 29.5
    assert door.retry_after() == "1"
    door.now += 0.5
    assert door.enters()


def test_who_does_not_get_in_has_used_up_nothing() -> None:
    door = Door(requests_per_minute=2, concurrent_requests=1)
    assert door.enters()
    assert not any(door.enters() for _ in range(9))
    door.limits.leave(ALICE)
    assert door.enters()
    assert door.refused == ["concurrent_requests"] * 9
    door.limits.leave(ALICE)
    assert door.limits.in_flight == {}


def test_keys_that_are_gone_take_no_memory() -> None:
    door = Door(concurrent_requests=1)
    accounts = [Account(f"{number}") for number in range(1000)]
    assert all(map(door.enters, accounts))
    assert len(door.limits.in_flight) == 1000
    for account in accounts:
        door.limits.leave(account)
    assert door.limits.in_flight == {}


# -- a key's own limits ------------------------------------------------------------------------


def test_a_key_s_own_limit_takes_the_place_of_the_setting_and_the_others_hold() -> None:
    door = Door(requests_per_minute=2, concurrent_requests=1)
    free = Account("alice", limits=OwnLimits(requests_per_minute=0))
    strict = Account("bob", limits=OwnLimits(requests_per_minute=1, concurrent_requests=9))
    for _ in range(20):
        assert door.enters(free)
        assert not door.enters(free)
        door.limits.leave(free)
    assert [door.enters(strict) for _ in range(2)] == [True, False]
    assert door.refused == ["concurrent_requests"] * 20 + ["requests_per_minute"]


def test_a_limit_that_changes_holds_from_the_next_request_on() -> None:
    door = Door()
    few = Account("alice", limits=OwnLimits(requests_per_minute=4))
    many = Account("alice", limits=OwnLimits(requests_per_minute=8))
    assert [door.enters(few) for _ in range(5)] == [True] * 4 + [False]
    door.now += 30  # half of it is there again
    assert [door.enters(many) for _ in range(5)] == [True] * 4 + [False]


def test_a_key_without_any_limit_need_not_enter() -> None:
    none, some = Door().limits, Door(concurrent_requests=1).limits
    assert not none.concern(ALICE)
    assert none.concern(Account("alice", limits=OwnLimits(concurrent_requests=1)))
    assert some.concern(ALICE)
    assert Door(tokens_total=0).limits.concern(ALICE)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_of_a_key_s_own_takes_the_place_of_the_setting(budget: str) -> None:
    limits = Door(**{budget: 7}).limits
    own = Account("alice", limits=OwnLimits()._replace(**{budget: 0}))
    assert getattr(limits.of(own), budget) == 0
    assert getattr(limits.of(BOB), budget) == 7
    assert getattr(limits.of(Account("c", limits=OwnLimits(9))), budget) == 7


def told(door: Door, account: Account = ALICE) -> list[str]:
    """The values of the fields, in their order: limit, remaining, reset."""
    return [value.decode() for _, value in door.limits.fields(account)]


def test_a_key_is_told_what_is_left_and_when_all_of_it_is_there_again() -> None:
    door = Door(requests_per_minute=3)
    assert told(door) == ["3", "3", "0ms"]
    assert door.enters()
    assert told(door) == ["3", "2", "20s"]
    door.now += 19.985
    assert told(door) == ["3", "2", "15ms"]
    door.now += 1
    assert [door.enters() for _ in range(4)] == [True, True, True, False]
    assert told(door) == ["3", "0", "1m0s"]
    door.now += 7.75
    assert told(door) == ["3", "0", "52.25s"]
    assert [name.lower() for name, _ in door.limits.fields(ALICE)] == [
        b"x-ratelimit-limit-requests",
        b"x-ratelimit-remaining-requests",
        b"x-ratelimit-reset-requests",
    ]


def test_where_requests_are_not_limited_nothing_is_told() -> None:
    assert told(Door(concurrent_requests=1)) == []


# -- tokens ------------------------------------------------------------------------------------


def test_what_a_request_may_take_is_held_and_then_what_it_took() -> None:
    door = Door(tokens_per_minute=100)
    assert door.hold(ALICE, 80) == 80
    with pytest.raises(TooManyRequests) as refused:
        door.hold(ALICE, 30)
    assert refused.value.headers["Retry-After"] == "6"
    assert door.refused == ["tokens_per_minute"]
    assert door.hold(BOB, 30) == 30
    door.limits.correct(ALICE, 80, 10)
    assert told(door) == ["100", "90", "6s"]
    assert door.hold(ALICE, 90) == 90


def test_what_was_taken_beyond_what_was_held_is_owed() -> None:
    door = Door(tokens_per_minute=60)
    assert door.hold(ALICE, 10) == 10
    door.limits.correct(ALICE, 10, 180)
    assert told(door) == ["60", "0", "3m0s"]
    door.now += 179
    assert door.hold(ALICE, 59) == 59


def test_a_request_over_the_limit_of_a_minute_waits_for_all_of_it() -> None:
    door = Door(tokens_per_minute=60)
    assert door.hold(ALICE, 1) == 1
    for _ in range(2):
        with pytest.raises(TooManyRequests) as refused:
            door.hold(ALICE, 10**9)
        assert refused.value.headers["Retry-After"] == "1"
    door.now += 1
    assert door.hold(ALICE, 10**9) == 60


def test_an_absurd_count_keeps_a_key_out_for_an_hour_and_not_for_ever() -> None:
    door = Door(tokens_per_minute=1)
    door.limits.correct(ALICE, door.hold(ALICE, 1), 2**63 - 1)
    door.now += 3600
    assert door.retried() is False
    door.now += 60 + TICK_S
    assert door.retried() is True


def test_where_tokens_are_not_limited_none_is_held() -> None:
    door = Door(requests_per_minute=1)
    free = Account("bob", limits=OwnLimits(tokens_per_minute=0))
    assert (door.hold(ALICE, 10**9), door.hold(free, 1)) == (0, 0)
    door.limits.correct(ALICE, 0, 10**9)
    assert told(door) == ["1", "1", "0ms"]


# -- several processes -------------------------------------------------------------------------


class SlowShares(MemoryShares):
    """Shares that answer when they are told to, and how often they were asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.waiting: list[Callable[[], None]] = []
        self.at_once = True

    def change(self, key_id: str, change: Callable[[Share], Share]) -> Deferred[Share]:
        self.asked += 1
        if self.at_once:
            return super().change(key_id, change)
        answer: Deferred[Share] = Deferred()
        make = super().change
        self.waiting.append(lambda: answer.callback(result_of(make(key_id, change))))
        return answer


class House(Door):
    """Several doors to one place."""

    def __init__(self, doors: int = 2, **limits: int) -> None:
        super().__init__(**limits)
        self.slow = self.shares = SlowShares()
        self.doors = [self._door(f"door-{n}", limits) for n in range(doors)]

    def _door(self, name: str, limits: dict[str, int]) -> Door:
        door = Door(**limits)
        door.refused, door.clock, seconds = self.refused, self.clock, self.clock.seconds
        settings, refused = KeyLimits(**limits), self.refused.append
        door.limits = Limits(settings, self.slow, name, self.clock, seconds, refused)
        door.limits.startService()
        return door

    def pass_time(self, seconds: float) -> None:
        for _ in range(int(seconds / TICK_S)):
            self.clock.advance(TICK_S)


def test_all_doors_together_let_no_more_in_than_the_limit() -> None:
    house = House(doors=3, requests_per_minute=100)
    let_in = sum(door.enters() for _ in range(100) for door in house.doors)
    assert let_in == 100
    house.pass_time(3)
    assert sum(door.enters() for _ in range(9) for door in house.doors) == 5


def test_a_place_that_is_free_again_can_be_had_at_another_door() -> None:
    house = House(concurrent_requests=2)
    one, other = house.doors
    assert [one.enters(), one.enters(), other.enters()] == [True, True, False]
    one.limits.leave(ALICE)
    house.pass_time(2 * TICK_S)
    assert other.enters()
    assert not one.enters()


def test_places_of_a_process_that_is_no_more_are_free_after_a_while() -> None:
    house = House(concurrent_requests=1)
    one, other = house.doors
    assert one.enters()
    one.limits._ticks.stop()  # it is dead
    house.pass_time(CLAIM_S - 1)
    assert not other.enters()
    house.pass_time(1)
    assert other.enters()


def test_places_of_a_long_request_are_kept() -> None:
    house = House(concurrent_requests=1)
    one, other = house.doors
    assert one.enters()
    house.pass_time(5 * CLAIM_S)
    assert not other.enters()


def test_a_process_that_stops_gives_back_what_it_has() -> None:
    house = House(requests_per_minute=160, concurrent_requests=160, tokens_per_minute=1600)
    one, other = house.doors
    assert one.enters()
    one.hold(ALICE, 10)
    one.limits.correct(ALICE, 10, 4)
    one.limits.leave(ALICE)
    result_of(one.limits.stopService())
    assert house.shares.shares["alice"].claims == {}
    assert other.enters()
    other.hold(ALICE, 1)
    assert told(other) == ["160", "158", "750ms", "1600", "1595", "188ms"]


def test_far_from_the_limit_the_store_is_asked_once_a_second() -> None:
    house = House(requests_per_minute=6000, tokens_per_minute=600_000, concurrent_requests=6000)
    door = house.doors[0]
    for _ in range(100):
        assert door.enters()
        door.hold(ALICE, 10)
        door.limits.correct(ALICE, 10, 9)
        door.limits.leave(ALICE)
    assert house.slow.asked == 1
    house.clock.advance(SLICE_S)
    assert door.enters()
    assert house.slow.asked <= 3


def test_a_busy_key_asks_once_a_second() -> None:
    house = House(requests_per_minute=60_000, concurrent_requests=60_000)
    door = house.doors[0]
    for _ in range(400):
        assert door.enters()
        house.clock.advance(0.01)
        door.limits.leave(ALICE)
    assert house.slow.asked <= 4 + 1


def test_a_slice_does_not_keep() -> None:
    house = House(requests_per_minute=1600)
    door = house.doors[0]
    door.limits._ticks.stop()  # as if there had been no time
    assert door.enters()
    house.clock.advance(SLICE_S)
    assert door.enters()
    assert house.slow.asked == 2


@pytest.mark.parametrize("wakes", ["enter", "tick", "correct"])
def test_a_process_that_was_frozen_gives_nothing_back_that_others_have_had(wakes: str) -> None:
    house = House(requests_per_minute=1600, tokens_per_minute=16_000)
    one, other = house.doors
    assert one.enters()  # and has some more
    one.limits._ticks.stop()
    house.pass_time(60)
    assert sum(other.enters() for _ in range(1700)) == 1600
    if wakes == "tick":
        one.limits._tick()
    elif wakes == "correct":
        one.limits.correct(ALICE, 0, 0)
    assert not one.enters()


def test_what_a_long_request_did_not_take_is_given_back() -> None:
    house = House(tokens_per_minute=1000)
    one, other = house.doors
    assert one.enters()
    assert one.hold(ALICE, 600) == 600
    house.pass_time(STALE_S + 1)
    one.limits.correct(ALICE, 600, 0)
    house.pass_time(SLICE_S + TICK_S)
    assert other.hold(ALICE, 1000) == 1000


def test_a_limit_that_is_raised_lets_in_at_once_who_was_refused() -> None:
    door = Door(concurrent_requests=1)
    assert [door.enters(), door.enters()] == [True, False]
    assert door.enters(Account("alice", limits=OwnLimits(concurrent_requests=2)))


def test_a_flood_that_is_refused_is_none_for_the_store() -> None:
    house = House(requests_per_minute=1, tokens_per_minute=10)
    door = house.doors[0]
    assert door.enters()
    asked = house.slow.asked
    assert not any(door.enters() for _ in range(100))
    assert house.slow.asked == asked + 1
    assert len(house.refused) == 100
    for _ in range(100):
        with contextlib.suppress(TooManyRequests):
            door.hold(BOB, 10)
    assert house.slow.asked <= asked + 4


def test_who_waits_while_the_store_is_asked_shares_the_next_answer() -> None:
    house = House(requests_per_minute=2)
    door = house.doors[0]
    house.slow.at_once = False
    turns = [door.limits.enter(ALICE) for _ in range(4)]
    assert house.slow.asked == 1
    house.slow.waiting.pop(0)()
    house.slow.waiting.pop(0)()
    first, second, third, fourth = turns
    for turn in (first, second):
        assert turn is not None
        result_of(turn)
    for turn in (third, fourth):
        assert turn is not None
        failure_of(turn, TooManyRequests)
    assert (house.slow.asked, door.limits.in_flight) == (2, {"alice": 2})


def test_who_leaves_while_it_waits_has_used_up_nothing() -> None:
    house = House(requests_per_minute=1, concurrent_requests=1)
    one, other = house.doors
    house.slow.at_once = False
    turn = one.limits.enter(ALICE)
    assert turn is not None
    turn.cancel()
    failure_of(turn, CancelledError)
    house.slow.waiting.pop(0)()
    assert one.limits.in_flight == {}
    house.slow.at_once = True
    house.pass_time(3)
    assert house.shares.shares["alice"].claims == {}
    assert other.enters()


def test_while_the_store_is_away_each_process_counts_alone(logged: list[str]) -> None:
    house = House(requests_per_minute=4)
    one, other = house.doors
    assert one.enters()
    house.slow.at_once = False
    for door, free in ((one, 3), (other, 4)):
        turn = door.limits.enter(ALICE)
        assert turn is not None
        house.clock.advance(ANSWER_S)
        result_of(turn)
        assert [door.enters() for _ in range(free)] == [True] * (free - 1) + [False]
    # It is asked again once a second, and holds for all when it answers.
    house.slow.at_once = True
    house.pass_time(15)
    assert [one.enters(), other.enters()] == [True, True]
    assert [line.split(": ")[1].split(" {")[0] for line in logged] == [
        *["the store does not answer, each process counts alone"] * 2,
        *["the store answers again; they hold over all processes"] * 2,
    ]


def test_a_store_that_fails_is_asked_once_a_second() -> None:
    house = House(requests_per_minute=1)
    door = house.doors[0]
    failing = Mock(side_effect=lambda key_id, change: fail(StorageError("gone")))
    door.limits._shares = Mock(change=failing)
    for number in range(50):
        door.enters(Account(f"{number}"))
    assert failing.call_count == 1
    house.clock.advance(PAUSE_S)
    door.enters(Account("one more"))
    door.enters(Account("and another one"))
    assert failing.call_count == 2


def test_what_nobody_uses_is_forgotten() -> None:
    house = House(requests_per_minute=60, concurrent_requests=5, tokens_per_minute=60)
    door = house.doors[0]
    for number in range(100):
        account = Account(f"{number}")
        assert door.enters(account)
        door.limits.leave(account)
    house.pass_time(5)
    assert len(door.limits._lots) == 0
    for number in range(MOST_LOTS + 5):
        door.enters(Account(f"{number}"))
        door.limits.leave(Account(f"{number}"))
    assert len(door.limits._lots) == MOST_LOTS


def test_a_fault_of_the_store_s_code_is_no_end_for_its_key(flush_logged_errors: Any) -> None:
    def broken(key_id: str, change: object) -> Deferred[Share]:
        raise RuntimeError("a fault of ours")

    for faulty in (broken, lambda key_id, change: fail(RuntimeError("a fault of ours"))):
        house = House(requests_per_minute=2)
        door = house.doors[0]
        door.limits._shares = Mock(change=faulty)
        assert [door.enters() for _ in range(3)] == [True, True, False]  # counted alone
        door.limits._shares = house.slow
        house.pass_time(30)
        assert door.enters()
        assert len(flush_logged_errors(RuntimeError)) == 1


def test_a_fault_of_ours_in_a_change_is_told_to_who_waits_and_to_nobody_else(
    monkeypatch: pytest.MonkeyPatch, flush_logged_errors: Any
) -> None:
    door = House(requests_per_minute=2).doors[0]
    monkeypatch.setattr(limits, "take", Mock(side_effect=RuntimeError("a fault of ours")))
    for _ in range(2):
        entering = door.limits.enter(ALICE)
        assert entering is not None
        failure_of(entering, RuntimeError)
    monkeypatch.undo()
    assert door.enters()
    assert flush_logged_errors(RuntimeError)
