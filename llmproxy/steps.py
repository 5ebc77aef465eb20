"""Work that would hold up all others, done in steps."""

from __future__ import annotations

import time
from collections.abc import Iterable

from twisted.internet.defer import DeferredLock
from twisted.internet.interfaces import IReactorTime

#: How long one goes on before all others have their turn.
TURN_S = 0.002


class Turns:
    """All that is done in steps, one of them at a time, and everything else in between."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._turn = DeferredLock()

    async def do(self, steps: Iterable[object]) -> None:
        """Do all of them."""
        remaining = iter(steps)
        is_done = False
        while not is_done:
            await self._turn.acquire()
            # Not at once: whoever waits would begin within the end of this turn, the next one
            # within that, and nobody else in between.
            self._clock.callLater(0, self._turn.release)
            is_done = _go_on(remaining)


def _go_on(steps: Iterable[object]) -> bool:
    """Do steps for one turn; whether that was the last."""
    turn_ends = time.monotonic() + TURN_S
    return all(time.monotonic() < turn_ends for _ in steps)
