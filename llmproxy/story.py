"""Running a coroutine that nobody waits for, cancels or asks for a result: one request's life.

`Deferred.fromCoroutine` does so too, and at each wait pays for what is not needed here: a context
of variables, a way to cancel, and a result.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

log = Logger()


def begin(story: Coroutine[Deferred[Any], Any, None]) -> None:
    """Run `story`, which waits for Deferreds, up to its end; a failure of it is logged."""
    _Story(story).go_on()


class _Story:
    __slots__ = ("_coroutine",)

    def __init__(self, coroutine: Coroutine[Deferred[Any], Any, None]) -> None:
        self._coroutine = coroutine

    def go_on(self, result: object = None) -> None:
        """Up to the next wait. What was waited for is still the Deferred's result while its
        callback, which is this, runs: there the coroutine takes it."""
        try:
            if isinstance(result, Failure):
                waiting = self._coroutine.throw(cast(Exception, result.value))
            else:
                waiting = self._coroutine.send(None)
        except StopIteration:
            return
        except BaseException:
            log.failure("a request's story failed")
            return
        waiting.addBoth(self.go_on)
