"""What each key may ask for: the pure part. The rest is in `threats/test_keys_limits.py`."""

from __future__ import annotations

import pytest

from llmproxy.config import KeyLimits
from llmproxy.errors import TooManyRequests
from llmproxy.limits import Limits
from llmproxy.model import BUDGETS, Account, OwnLimits

ALICE, BOB = Account("alice"), Account("bob")


class Door:
    """Limits with their clock, and what they refused for."""

    def __init__(self, **limits: int) -> None:
        self.now = 100.0
        self.refused: list[str] = []
        self.limits = Limits(KeyLimits(**limits), lambda: self.now, self.refused.append)

    def enters(self, account: Account = ALICE) -> bool:
        """Whether a request is let in."""
        try:
            self.limits.enter(account)
        except TooManyRequests:
            return False
        return True

    def retried(self) -> bool:
        """Whether there is a token."""
        try:
            return self.limits.hold(ALICE, 1) == 1
        except TooManyRequests:
            return False

    def retry_after(self) -> str:
        """What a request that is not let in is told."""
        with pytest.raises(TooManyRequests) as refused:
            self.limits.enter(ALICE)
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
    assert door.limits.running == {}


def test_keys_that_are_gone_take_no_memory() -> None:
    door = Door(concurrent_requests=1)
    accounts = [Account(f"{number}") for number in range(1000)]
    assert all(map(door.enters, accounts))
    assert len(door.limits.running) == 1000
    for account in accounts:
        door.limits.leave(account)
    assert door.limits.running == {}


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
    assert door.limits.hold(ALICE, 80) == 80
    with pytest.raises(TooManyRequests) as refused:
        door.limits.hold(ALICE, 30)
    assert refused.value.headers["Retry-After"] == "6"
    assert door.refused == ["tokens_per_minute"]
    assert door.limits.hold(BOB, 30) == 30
    door.limits.correct(ALICE, 80, 10)
    assert told(door) == ["100", "90", "6s"]
    assert door.limits.hold(ALICE, 90) == 90


def test_what_was_taken_beyond_what_was_held_is_owed() -> None:
    door = Door(tokens_per_minute=60)
    assert door.limits.hold(ALICE, 10) == 10
    door.limits.correct(ALICE, 10, 180)
    assert told(door) == ["60", "0", "3m0s"]
    door.now += 179
    assert door.limits.hold(ALICE, 59) == 59


def test_a_request_over_the_limit_of_a_minute_waits_for_all_of_it() -> None:
    door = Door(tokens_per_minute=60)
    assert door.limits.hold(ALICE, 1) == 1
    for _ in range(2):
        with pytest.raises(TooManyRequests) as refused:
            door.limits.hold(ALICE, 10**9)
        assert refused.value.headers["Retry-After"] == "1"
    door.now += 1
    assert door.limits.hold(ALICE, 10**9) == 60


def test_an_absurd_count_keeps_a_key_out_for_an_hour_and_not_for_ever() -> None:
    door = Door(tokens_per_minute=1)
    door.limits.correct(ALICE, door.limits.hold(ALICE, 1), 2**63 - 1)
    door.now += 3600
    assert door.retried() is False
    door.now += 60
    assert door.retried() is True


def test_where_tokens_are_not_limited_none_is_held() -> None:
    door = Door(requests_per_minute=1)
    free = Account("bob", limits=OwnLimits(tokens_per_minute=0))
    assert (door.limits.hold(ALICE, 10**9), door.limits.hold(free, 1)) == (0, 0)
    door.limits.correct(ALICE, 0, 10**9)
    assert told(door) == ["1", "1", "0ms"]
