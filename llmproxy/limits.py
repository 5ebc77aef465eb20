"""What each key may ask for: how often, and how much at once. Pure.

enter(account)  -->  the request is served  -->  leave(account)
    \\--> TooManyRequests
"""

from __future__ import annotations

from collections.abc import Callable

from llmproxy.buckets import Buckets
from llmproxy.config import KeyLimits
from llmproxy.errors import TooManyRequests
from llmproxy.model import Account

#: There is no telling when one of a key's requests will end.
TRY_AGAIN_S = 1.0


class Limits:
    """The requests of all keys, against `limits`, which hold for each key.

    `refused` is told the setting for which a request was refused.
    """

    def __init__(
        self, limits: KeyLimits, monotonic: Callable[[], float], refused: Callable[[str], None]
    ) -> None:
        self._at_once = limits.concurrent_requests
        self._per_minute = limits.requests_per_minute
        self._buckets = Buckets(self._per_minute) if self._per_minute else None
        #: How many requests of a key are in flight; keys that have none are not in it.
        self.running: dict[str, int] = {}
        self._monotonic = monotonic
        self._refused = refused

    def enter(self, account: Account) -> None:
        """A request begins; `leave` must follow. Raises TooManyRequests, and then it must not."""
        key_id = account.key_id
        running = self.running.get(key_id, 0)
        if self._at_once and running >= self._at_once:
            self._refused("concurrent_requests")
            raise TooManyRequests(
                f"This API key may have {self._at_once} requests in flight at once.",
                wait_s=TRY_AGAIN_S,
            )
        if self._buckets is not None:
            wait_s = self._buckets.take(key_id, self._monotonic())
            if wait_s:
                self._refused("requests_per_minute")
                raise TooManyRequests(
                    f"This API key may make {self._per_minute} requests per minute.",
                    wait_s=wait_s,
                )
        self.running[key_id] = running + 1

    def leave(self, account: Account) -> None:
        """It has ended, in whichever way."""
        running = self.running[account.key_id] - 1
        if running:
            self.running[account.key_id] = running
        else:
            del self.running[account.key_id]
