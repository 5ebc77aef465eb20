"""How processes share the rates of one key: each takes slices, and gives back what it has not used.

    Share --take--> Share, Slice       the slice is used up without asking anybody
      ^                   |
      +---- what is left -+

A slice is what is wanted now, and while there is plenty some more: so a process asks rarely far
from a limit, and for each request near it. What is in a slice counts as used, wherever that is.
Pure.
"""

from __future__ import annotations

from typing import NamedTuple

from llmproxy.buckets import MINUTE_S, ROUNDING_S
from llmproxy.config import KeyLimits
from llmproxy.model import Claim, Share

#: How long a bucket may be in debt: what a backend says that it has used can be absurd.
MOST_DEBT_S = 3600.0
#: What is taken of what is left, beyond what is wanted: one part of so many.
PART = 16
#: How long a claim counts that is not renewed: so long the requests of a dead process do.
CLAIM_S = 20.0


class Slice(NamedTuple):
    """Requests and tokens of this minute (of tokens less than none: a debt), and places for
    requests in flight beyond those that are."""

    requests: int = 0
    tokens: int = 0
    places: int = 0


NOTHING = Slice()


def take(
    share: Share,
    limits: KeyLimits,
    now: float,
    *,
    me: str,
    running: int,
    kept: Slice,
    wanted: Slice,
    more: bool,
) -> tuple[Share, Slice]:
    """What a key's share becomes, and what the process `me` gets of it.

    `now`: Unix time in s. `running`: its requests in flight. `kept`: what it has left of its last
    slice, and gives back. `more`: it takes more than it wants, if there is plenty.
    """
    requests_full_at, requests = _draw(
        share.requests_full_at,
        now,
        limits.requests_per_minute,
        kept.requests,
        wanted.requests,
        more,
    )
    tokens_full_at, tokens = _draw(
        share.tokens_full_at, now, limits.tokens_per_minute, kept.tokens, wanted.tokens, more
    )
    # A clock that was set back must not keep the claims of the dead for hours.
    claims = {
        who: Claim(claim.slots, min(claim.until, now + CLAIM_S))
        for who, claim in share.claims.items()
        if who != me and claim.until > now
    }
    places = 0
    if limits.concurrent_requests:
        others = sum(claim.slots for claim in claims.values())
        free = max(limits.concurrent_requests - others - running, 0)
        places = min(free, max(wanted.places, free // PART if more else 0))
        if running + places:
            claims[me] = Claim(running + places, now + CLAIM_S)
    return Share(requests_full_at, tokens_full_at, claims), Slice(requests, tokens, places)


def left(full_at: float, now: float, per_minute: int) -> int:
    """How many are in a bucket; less than none: that many are owed."""
    return int((now + MINUTE_S - max(full_at, now) + ROUNDING_S) * per_minute // MINUTE_S)


def wait_s(full_at: float, now: float, per_minute: int, wanted: int) -> float:
    """How long until there are so many."""
    return max(full_at, now) + wanted * MINUTE_S / per_minute - MINUTE_S - now


def _draw(
    full_at: float, now: float, per_minute: int, kept: int, wanted: int, more: bool
) -> tuple[float, int]:
    """When a bucket is full again, and how many were taken from it, after `kept` went back.

    Those that are there are taken, where they are fewer than `wanted`.
    """
    if not per_minute:
        return 0.0, 0
    each_s = MINUTE_S / per_minute
    latest = now + MINUTE_S + MOST_DEBT_S
    full_at = min(max(min(full_at, latest), now) - kept * each_s, latest)
    there = max(left(full_at, now, per_minute), 0)
    taken = min(there, max(wanted, there // PART if more else 0))
    return max(full_at, now) + taken * each_s, taken
