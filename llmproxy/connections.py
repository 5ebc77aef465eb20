"""How many connections clients may hold: in all, and from one address.

All of them, and one to a backend for each, fit below the process's limit of file descriptors, so
that what a new client meets is an answer. One address alone can't take all of them, and who holds
one for nothing makes room for who comes.
"""

from __future__ import annotations

import math
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from twisted.logger import Logger

from llmproxy.errors import ProxyError, TooManyRequests, Unavailable

#: Descriptors that are neither a client's nor a backend's: database, log, ports, admin site,
#: connections that are being refused.
RESERVE = 128
#: No more than this unless it is set: they take 150 MB, and more with TLS.
MOST = 32_768
#: What one address may have of all, unless it is set.
SHARE = 0.75
#: What is short, as metrics name it: the settings, and what is done first.
TOTAL, ADDRESS, IDLE = "max_connections", "max_connections_per_address", "idle"
#: When to come again who finds no room.
RETRY_S = 2
#: How often the same is logged.
TELL_S = 60.0

log = Logger()


class Holder(Protocol):
    """A connection. `source`: where it comes from (see `throttle.source_of`); None where that is
    not known, which is not counted as one address."""

    source: str | None

    def abort(self) -> None:
        """Cut it off now."""


def descriptors() -> int:
    """How many this process may have, after the soft limit was raised to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 2**20


def bounds(files: int, most: int, per_address: int) -> tuple[int, int]:
    """How many there may be with so many descriptors, in all and from one address.

    The settings are 0 where they are not given: half of the descriptors but `MOST`, and `SHARE` of
    that.
    """
    room = max(2, files - RESERVE)
    most = min(most, room) if most else min(MOST, room // 2)
    return most, per_address or max(1, int(SHARE * most))


class Connections:
    """Those that there are. Only addresses that hold one are remembered.

    `short_of` is called for each that is refused, or is closed to make room.
    """

    def __init__(
        self,
        most: float = math.inf,
        per_address: float = math.inf,
        short_of: Callable[[str], None] = lambda limit: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.all: set[Holder] = set()
        #: Those of them that serve no request, the one that has not for longest first.
        self.resting: dict[Holder, None] = {}
        self._of_address: Counter[str] = Counter()
        self._most, self._per_address = most, per_address
        self._short_of = short_of
        self._monotonic = monotonic
        self._told: dict[str, float] = {}

    def refusal(self, source: str | None) -> ProxyError | None:
        """What one that comes from there is told; None: it is welcome, and has room."""
        if source is not None and self._of_address[source] >= self._per_address:
            self._short(ADDRESS, "new ones from an address that has its share are refused")
            return TooManyRequests("Too many connections from this address.", wait_s=RETRY_S)
        if len(self.all) < self._most:
            return None
        if not self.resting:
            self._short(TOTAL, "new ones are refused, all are busy")
            return Unavailable("Too many connections; try again shortly.", retry_after=RETRY_S)
        self._short(IDLE, "idle ones are closed to make room")
        oldest = next(iter(self.resting))
        del self.resting[oldest]
        oldest.abort()
        return None

    def _short(self, limit: str, what: str) -> None:
        self._short_of(limit)
        now = self._monotonic()
        if now - self._told.get(limit, -math.inf) >= TELL_S:
            self._told[limit] = now
            log.warn("of {count} connections: {what}", count=len(self.all), what=what)

    def joined(self, one: Holder) -> None:
        """It came."""
        self.all.add(one)
        self.resting[one] = None
        if one.source is not None:
            self._of_address[one.source] += 1

    def left(self, one: Holder) -> None:
        """It went."""
        self.all.discard(one)
        self.resting.pop(one, None)
        if one.source is not None:
            self._of_address[one.source] -= 1
            if not self._of_address[one.source]:
                del self._of_address[one.source]
