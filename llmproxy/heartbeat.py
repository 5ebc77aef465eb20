"""How late the reactor is: a call that should come every `PERIOD_S`, and how much later it came.

Whatever keeps the reactor's thread (a body that takes long to read, a processor that is given to
others) keeps all clients waiting at once, and no duration of a single request tells that. A pause
looks shorter by up to a period, so the period is short; but each beat wakes an idle process, which
takes 0.1 ms.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.application.service import Service
from twisted.internet.interfaces import IDelayedCall, IReactorTime

PERIOD_S = 0.05


class Heartbeat(Service):
    """Tells `late` at each beat by how many seconds it was late."""

    def __init__(self, clock: IReactorTime, late: Callable[[float], None]) -> None:
        self._clock, self._late = clock, late
        self._due = 0.0
        self._next: IDelayedCall | None = None

    def startService(self) -> None:
        """Begin."""
        super().startService()
        self._wait(self._clock.seconds())

    def stopService(self) -> None:
        """End."""
        super().stopService()
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _wait(self, now: float) -> None:
        self._due = now + PERIOD_S
        self._next = self._clock.callLater(PERIOD_S, self._beat)

    def _beat(self) -> None:
        now = self._clock.seconds()
        self._late(max(0.0, now - self._due))
        self._wait(now)
