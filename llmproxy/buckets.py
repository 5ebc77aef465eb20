"""Token buckets: how often something may happen, for many names at once. Pure.

Of a bucket one number is kept, the time at which it will be full again (the virtual scheduling
algorithm of ITU-T I.371): a bucket that is not in use costs nothing, and none has to be filled.
"""

from __future__ import annotations

from collections import OrderedDict

#: How many buckets are kept. One that has to go has been idle for as long as so many others were
#: used, and so is mostly full again.
MOST_BUCKETS = 10_000
MINUTE_S = 60.0
#: How long a bucket may be in debt: what a backend says that it has used can be absurd.
MOST_DEBT_S = 3600.0
#: Adding up times rounds them.
ROUNDING_S = 1e-5


class Buckets:
    """A bucket of `per_minute` tokens for each name, which is filled at that rate.

    `now` is in seconds, on a clock that is never set back. The bucket that was used longest ago
    counts as full when there are over `MOST_BUCKETS`. A name may have a rate of its own,
    `per_minute` of a call; where that changes, a bucket stays as full as it is.
    """

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._full_at)

    def fills_s(self, name: str, now: float) -> float:
        """How long until it is full."""
        return max(self._full_at.get(name, now) - now, 0.0)

    def left(self, name: str, now: float, per_minute: int) -> int:
        """How many tokens are in it; 0 also where it owes some."""
        left_s = MINUTE_S - self.fills_s(name, now) + ROUNDING_S
        return min(max(int(left_s * per_minute / MINUTE_S), 0), per_minute)

    def wait_s(
        self, name: str, now: float, per_minute: int | None = None, tokens: int = 1
    ) -> float:
        """How long until there are so many tokens; 0.0: there are."""
        takes_s = tokens * MINUTE_S / (per_minute or self._per_minute)
        wait_s = self.fills_s(name, now) + takes_s - MINUTE_S
        return wait_s if wait_s > ROUNDING_S else 0.0

    def take(self, name: str, now: float, per_minute: int | None = None, tokens: int = 1) -> float:
        """Take tokens and return 0.0; where there are too few, how long until there are enough."""
        wait_s = self.wait_s(name, now, per_minute, tokens)
        if not wait_s:
            self.charge(name, now, per_minute or self._per_minute, tokens)
        return wait_s

    def charge(self, name: str, now: float, per_minute: int, tokens: int) -> None:
        """Take tokens, also those that are not there yet; less than none: give some back."""
        takes_s = tokens * MINUTE_S / per_minute
        full_at = max(self._full_at.get(name, now), now) + takes_s
        self._full_at[name] = min(full_at, now + MINUTE_S + MOST_DEBT_S)
        self._full_at.move_to_end(name)
        if len(self._full_at) > MOST_BUCKETS:
            self._full_at.popitem(last=False)
