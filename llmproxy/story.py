"""Running a coroutine that nobody waits for, cancels or asks for a result: one request's life.

`Deferred.fromCoroutine` does so too, and at each wait pays for what is not needed here: a context
of variables, a way to cancel, and a result. What a story waits for most often is a `Wait`, which
pays for no chain of callbacks either.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from typing import Any, TypeVar, cast

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

log = Logger()
T = TypeVar("T")


class Wait(Deferred[T]):
    """A Deferred that a story waits for on a shorter way; for anybody else it is like any other.

    `story`: the one that waits. If there are callbacks, it comes after them.
    """

    story: _Story | None = None

    def __await__(self) -> Generator[Deferred[T], Any, T]:
        """The same as the base class's, but the result is what is sent."""
        if self.called:
            return (yield from super().__await__())
        result: T = yield self
        return result

    def callback(self, result: T | Failure) -> None:
        """See the base class."""
        story = self.story
        if story is None or self._callbacks:
            self._as_any()
            super().callback(result)
        else:
            self.called, self.result, self.story = True, result, None
            story.go_on(result)

    def errback(self, fail: Failure | BaseException | None = None) -> None:
        """See the base class."""
        self._as_any()
        super().errback(fail)

    def _as_any(self) -> None:
        story, self.story = self.story, None
        if story is not None:
            self.addBoth(story.go_on)


def begin(story: Coroutine[Deferred[Any], Any, None]) -> None:
    """Run `story`, which waits for Deferreds, up to its end; a failure of it is logged."""
    _Story(story).go_on()


class _Story:
    __slots__ = ("_coroutine",)

    def __init__(self, coroutine: Coroutine[Deferred[Any], Any, None]) -> None:
        self._coroutine = coroutine

    def go_on(self, result: object = None) -> None:
        """Up to the next wait, with the result of the last one. What is no `Wait` looks into itself
        for it: the result is still there while its callback, which is this, runs."""
        try:
            if isinstance(result, Failure):
                waiting = self._coroutine.throw(cast(Exception, result.value))
            else:
                waiting = self._coroutine.send(result)
        except StopIteration:
            return
        except BaseException:
            log.failure("a request's story failed")
            return
        if type(waiting) is Wait:
            waiting.story = self
        else:
            waiting.addBoth(self.go_on)
