"""Running a coroutine that nobody waits for."""

from __future__ import annotations

from typing import Any

import pytest
from housekeeping import FlushLoggedErrors
from twisted.internet.defer import AlreadyCalledError, CancelledError, Deferred, fail, succeed
from twisted.python.failure import Failure

from llmproxy.story import Wait, begin


@pytest.mark.parametrize("kind", [Deferred, Wait])
def test_it_goes_from_wait_to_wait_and_gets_each_result(kind: type[Deferred[Any]]) -> None:
    first: Deferred[int] = kind()
    second: Deferred[str] = kind()
    told: list[object] = []

    async def story() -> None:
        told.append("begun")
        told.append(await first)
        told.append(await succeed("at once"))
        told.append(await second)

    begin(story())
    assert told == ["begun"]
    first.callback(1)
    assert told == ["begun", 1, "at once"]
    second.callback("two")
    assert told == ["begun", 1, "at once", "two"]


@pytest.mark.parametrize("kind", [Deferred, Wait])
def test_a_failure_is_raised_where_it_was_waited_for(kind: type[Deferred[Any]]) -> None:
    waiting: Deferred[None] = kind()
    told: list[str] = []

    async def story() -> None:
        for deferred in (fail(ValueError("now")), waiting):
            with pytest.raises(ValueError, match=r"now|later") as raised:
                await deferred
            told.append(str(raised.value))

    begin(story())
    waiting.errback(Failure(ValueError("later")))
    assert told == ["now", "later"]


def test_a_story_that_fails_is_logged(flush_logged_errors: FlushLoggedErrors) -> None:
    waiting: Deferred[None] = Deferred()

    async def story() -> None:
        await waiting
        raise KeyError("canary")

    begin(story())
    assert flush_logged_errors(KeyError) == []
    waiting.callback(None)
    assert len(flush_logged_errors(KeyError)) == 1


def test_it_waits_for_one_that_waits_for_another() -> None:
    outer: Deferred[int] = Deferred()
    inner: Deferred[int] = Deferred()
    told: list[int] = []

    async def story() -> None:
        told.append(await outer)

    outer.addCallback(lambda _: inner)
    begin(story())
    outer.callback(0)
    assert told == []
    inner.callback(7)
    assert told == [7]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_wait_tells_others_too(when: str) -> None:
    waiting: Wait[int] = Wait()
    told: list[int] = []

    async def story() -> None:
        told.append(await waiting)

    def add(number: int) -> int:
        told.append(-number)
        return number

    if when == "before":
        waiting.addCallback(add)
    begin(story())
    if when == "after":
        waiting.addCallback(add)
    waiting.callback(7)
    assert sorted(told) == [-7, 7]


def test_a_wait_has_one_result() -> None:
    waiting: Wait[int] = Wait()
    told: list[int] = []

    async def story() -> None:
        told.append(await waiting)

    begin(story())
    waiting.callback(1)
    with pytest.raises(AlreadyCalledError):
        waiting.callback(2)
    assert told == [1]
    assert waiting.called


def test_a_wait_can_be_cancelled() -> None:
    cancelled: list[Deferred[None]] = []
    waiting: Wait[None] = Wait(cancelled.append)
    told: list[str] = []

    async def story() -> None:
        try:
            await waiting
        except CancelledError:
            told.append("cancelled")

    begin(story())
    waiting.cancel()
    assert cancelled == [waiting]
    assert told == ["cancelled"]


def test_a_wait_that_is_over_is_not_waited_for() -> None:
    waiting: Wait[int] = Wait()
    broken: Wait[int] = Wait()
    told: list[object] = []

    async def story() -> None:
        told.append(await waiting)
        with pytest.raises(ValueError, match="gone"):
            await broken
        told.append("broken")

    waiting.callback(7)
    broken.errback(ValueError("gone"))
    begin(story())
    assert told == [7, "broken"]


def test_a_wait_can_be_waited_for_by_any_coroutine() -> None:
    waiting: Wait[int] = Wait()
    told: list[int] = []

    async def twice() -> int:
        return 2 * await waiting

    Deferred.fromCoroutine(twice()).addCallback(told.append)
    waiting.callback(7)
    assert told == [14]
