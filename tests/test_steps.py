"""Long work in steps: one turn at a time, and everything else in between."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from deferreds import failure_of, is_waiting, result_of, started
from twisted.internet.task import Clock

from llmproxy import steps
from llmproxy.steps import Turns


class Rounds(Clock):
    """A clock that goes on as a reactor does."""

    def go_round(self) -> None:
        """Do what is due by now, and not what comes of that."""
        due, self.calls = self.calls, []
        for call in due:
            call.func(*call.args, **call.kw)


@pytest.fixture
def clock() -> Rounds:
    return Rounds()


@pytest.fixture
def turns(clock: Rounds) -> Turns:
    return Turns(clock)


def told(log: list[str], name: str, count: int) -> Iterator[None]:
    for _ in range(count):
        log.append(name)
        yield


def test_all_have_their_turns_one_after_the_other(
    turns: Turns, clock: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "TURN_S", 0)
    log: list[str] = []
    result_of(started(turns.do([])))
    first, second = (started(turns.do(told(log, name, 2))) for name in "ab")
    for so_far in ("a", "ab", "aba", "abab"):
        clock.go_round()
        assert "".join(log) == so_far
    clock.go_round()
    result_of(first)
    assert is_waiting(second)
    clock.go_round()
    result_of(second)


def test_however_many_are_done_in_one_turn_everything_else_goes_on_between_two(
    turns: Turns, clock: Rounds
) -> None:
    first, *others = (started(turns.do([])) for _ in range(sys.getrecursionlimit()))
    result_of(first)
    for other in others:
        assert is_waiting(other)
        clock.go_round()
        result_of(other)


def test_who_fails_lets_the_next_one_in(turns: Turns, clock: Rounds) -> None:
    def failing() -> Iterator[None]:
        yield
        raise ValueError("canary")

    first, second = started(turns.do(failing())), started(turns.do([]))
    failure_of(first, ValueError)
    clock.go_round()
    result_of(second)
