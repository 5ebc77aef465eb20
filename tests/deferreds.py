"""What a Deferred is at now: for tests that need no reactor."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

T = TypeVar("T")


def started(story: Coroutine[Deferred[Any], Any, T]) -> Deferred[T]:
    """Run a coroutine up to its first wait."""
    return Deferred.fromCoroutine(story)


def result_of(waiting: Deferred[T]) -> T:
    """Its result; fails unless it has one."""
    results: list[Any] = []
    waiting.addBoth(results.append)
    assert results, "it has no result yet"
    if isinstance(results[0], Failure):
        results[0].raiseException()
    return results[0]


def failure_of(waiting: Deferred[Any], *expected: type[BaseException]) -> Any:
    """The exception that it failed with, which is one of `expected`; it counts as handled."""
    results: list[Any] = []
    waiting.addBoth(results.append)
    assert results, "it has no result yet"
    assert isinstance(results[0], Failure), f"it did not fail, but gave {results[0]!r}"
    assert results[0].check(*expected), f"it failed with {results[0].value!r}"
    return results[0].value


def is_waiting(waiting: Deferred[Any]) -> bool:
    """True while it has no result."""
    return not waiting.called or bool(waiting.paused)  # paused: it waits for another one
