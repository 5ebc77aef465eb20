"""What each key may ask for: the pure part. The rest is in `threats/test_keys_limits.py`."""

from __future__ import annotations

import pytest

from llmproxy.config import KeyLimits
from llmproxy.errors import TooManyRequests
from llmproxy.limits import Limits
from llmproxy.model import Account

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
