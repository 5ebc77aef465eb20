"""What each key may ask for: how often, and how much at once. Pure.

enter(account)  -->  hold(tokens)  -->  the request is served  -->  correct, leave
    \\--> TooManyRequests    \\--> TooManyRequests
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from llmproxy.buckets import Buckets
from llmproxy.config import KeyLimits
from llmproxy.errors import TooManyRequests
from llmproxy.model import Account

#: There is no telling when one of a key's requests will end.
TRY_AGAIN_S = 1.0


class Limits:
    """The requests of all keys, against `limits`, which hold for each key that has none of its own.

    `refused` is told the setting for which a request was refused.
    """

    def __init__(
        self, limits: KeyLimits, monotonic: Callable[[], float], refused: Callable[[str], None]
    ) -> None:
        self._settings = limits
        self._limit_all = limits != KeyLimits()
        self._requests, self._tokens = Buckets(1), Buckets(1)
        #: How many requests of a key are in flight; keys that have none are not in it.
        self.running: dict[str, int] = {}
        self._monotonic = monotonic
        self._refused = refused

    def concern(self, account: Account) -> bool:
        """Whether there is any limit for this key: else it need not enter."""
        return self._limit_all or account.limits is not None

    def of(self, account: Account) -> KeyLimits:
        """The limits that hold for this key."""
        if account.limits is None:
            return self._settings
        own = {name: n for name, n in account.limits._asdict().items() if n is not None}
        return replace(self._settings, **own)

    def enter(self, account: Account) -> None:
        """A request begins; `leave` must follow. Raises TooManyRequests, and then it must not."""
        key_id, limits = account.key_id, self.of(account)
        running = self.running.get(key_id, 0)
        if limits.concurrent_requests and running >= limits.concurrent_requests:
            self._refused("concurrent_requests")
            raise TooManyRequests(
                f"This API key may have {limits.concurrent_requests} requests in flight at once.",
                wait_s=TRY_AGAIN_S,
            )
        per_minute = limits.requests_per_minute
        if per_minute:
            wait_s = self._requests.take(key_id, self._monotonic(), per_minute)
            if wait_s:
                self._refused("requests_per_minute")
                raise TooManyRequests(
                    f"This API key may make {per_minute} requests per minute.", wait_s=wait_s
                )
        self.running[key_id] = running + 1

    def leave(self, account: Account) -> None:
        """It has ended, in whichever way."""
        running = self.running[account.key_id] - 1
        if running:
            self.running[account.key_id] = running
        else:
            del self.running[account.key_id]

    def hold(self, account: Account, most: int) -> int:
        """Set aside what the request can take at most, in tokens; `correct` must follow with what
        is returned. Raises TooManyRequests, and then it must not.

        What is over the limit of a minute waits for all of it, and what it has really taken is then
        owed: an estimate must not keep a request out for ever.
        """
        per_minute = self.of(account).tokens_per_minute
        if not per_minute:
            return 0
        held = min(most, per_minute)
        wait_s = self._tokens.take(account.key_id, self._monotonic(), per_minute, held)
        if wait_s:
            self._refused("tokens_per_minute")
            raise TooManyRequests(
                f"This API key may use {per_minute} tokens per minute, and the request may take"
                f" {most}.",
                wait_s=wait_s,
            )
        return held

    def correct(self, account: Account, held: int, taken: int) -> None:
        """The request for which `held` was set aside has taken so many tokens."""
        per_minute = self.of(account).tokens_per_minute
        if per_minute and held != taken:
            self._tokens.charge(account.key_id, self._monotonic(), per_minute, taken - held)

    def fields(self, account: Account) -> list[tuple[bytes, bytes]]:
        """What an answer to this key says of its limits now, as OpenAI's do.

        https://platform.openai.com/docs/guides/rate-limits
        """
        limits, now = self.of(account), self._monotonic()
        return [
            *_fields(b"Requests", self._requests, account, now, limits.requests_per_minute),
            *_fields(b"Tokens", self._tokens, account, now, limits.tokens_per_minute),
        ]


def _fields(
    what: bytes, buckets: Buckets, account: Account, now: float, per_minute: int
) -> list[tuple[bytes, bytes]]:
    if not per_minute:
        return []
    left, fills_s = (
        buckets.left(account.key_id, now, per_minute),
        buckets.fills_s(account.key_id, now),
    )
    return [
        (b"X-RateLimit-Limit-" + what, b"%d" % per_minute),
        (b"X-RateLimit-Remaining-" + what, b"%d" % left),
        (b"X-RateLimit-Reset-" + what, _duration(fills_s)),
    ]


def _duration(seconds: float) -> bytes:
    """As Go writes it, and so OpenAI: `20ms`, `8.64s`, `1m30.5s`."""
    ms = math.ceil(1000 * seconds - 0.01)
    if ms < 1000:
        return b"%dms" % ms
    minutes, rest = divmod(ms, 60_000)
    whole = b"%g" % (rest / 1000)
    return b"%dm%bs" % (minutes, whole) if minutes else whole + b"s"
