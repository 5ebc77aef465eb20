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
#: Adding up times rounds them.
ROUNDING_S = 1e-5


class Buckets:
    """A bucket of `per_minute` tokens for each name, which is filled at that rate.

    `now` is in seconds, on a clock that is never set back. The bucket that was used longest ago
    counts as full when there are over `MOST_BUCKETS`.
    """

    def __init__(self, per_minute: int) -> None:
        self._token_s = MINUTE_S / per_minute
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._full_at)

    def wait_s(self, name: str, now: float) -> float:
        """How long until there is a token; 0.0: there is."""
        wait_s = max(self._full_at.get(name, now), now) + self._token_s - MINUTE_S - now
        return wait_s if wait_s > ROUNDING_S else 0.0

    def take(self, name: str, now: float) -> float:
        """Take a token and return 0.0; where there is none, how long until there is."""
        wait_s = self.wait_s(name, now)
        if not wait_s:
            self._full_at[name] = max(self._full_at.get(name, now), now) + self._token_s
            self._full_at.move_to_end(name)
            if len(self._full_at) > MOST_BUCKETS:
                self._full_at.popitem(last=False)
        return wait_s
