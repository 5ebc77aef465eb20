"""Which of a model's servers gets the next request, and which are left alone for a while. Pure.

A server that fails several times in a row is taken out: its circuit opens. After a pause one
request is let through (half-open); if that goes well the circuit closes, else the pause doubles:

    closed --failures in a row--> open --pause--> half-open --success--> closed
                                   ^-----------failure----------|

When no server is left, all are candidates again: a try costs no more than a refusal.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from typing import TypeVar

#: The longest pause of a circuit, as a multiple of the first one.
LONGEST = 16
#: With prefix affinity, how many times its share a server may have in flight.
BOUND = 1.25


class Standing:
    """What is known of one server. Times are monotonic, in seconds.

    `name` tells it from others, here and in other processes. `weight`: its share. `failures` in a
    row open its circuit, for `pause_s` at first. `up`: what its last health check said, True if
    there was none.
    """

    __slots__ = (
        "_failed",
        "_failures",
        "_open_until",
        "_opened",
        "_pause_s",
        "_probing",
        "chosen_at",
        "in_flight",
        "name",
        "score",
        "up",
        "weight",
    )

    def __init__(
        self, name: str = "", *, weight: int = 1, failures: int = 5, pause_s: float = 10.0
    ) -> None:
        self.name = name.encode()
        self.weight = weight
        self.in_flight = 0
        self.up = True
        self.chosen_at = 0  # the number of the choice
        self.score = 0  # in weighted turns
        self._failures, self._pause_s = failures, pause_s
        self._failed = 0  # so many in a row
        self._opened = 0  # how often in a row
        self._open_until = -math.inf
        self._probing = False

    @property
    def is_open(self) -> bool:
        """Whether its circuit is open, or half-open."""
        return self._opened > 0

    def allows(self, now: float) -> bool:
        """Whether its circuit lets a request through."""
        return not self._opened or (now >= self._open_until and not self._probing)

    def enter(self) -> None:
        """It gets a request; `leave` must follow."""
        self.in_flight += 1
        self._probing = self._opened > 0

    def leave(self, went_well: bool | None, now: float) -> None:
        """The request has ended. `went_well`: None if that says nothing about the server."""
        self.in_flight -= 1
        self._probing = False
        if went_well:
            self._failed = self._opened = 0
        elif went_well is False:
            self._failed += 1
            # What began before the circuit opened says nothing new.
            if now >= self._open_until and (self._opened or self._failed >= self._failures):
                self._open_until = now + self._pause_s * min(2**self._opened, LONGEST)
                self._opened += 1


S = TypeVar("S", bound=Standing)


class Balancer:
    """Chooses by one of `config.POLICIES`."""

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._choices = 0

    def choose(
        self,
        standings: Sequence[S],
        now: float,
        *,
        affinity: bytes = b"",
        tried: Collection[S] = (),
    ) -> S | None:
        """The server for the next request, None if all were `tried`. The caller enters it.

        `affinity`: what requests have in common that had better go to the same server.
        """
        left = [each for each in standings if each not in tried]
        candidates = (
            [each for each in left if each.up and each.allows(now)]
            or [each for each in left if each.allows(now)]
            or left
        )
        if not candidates:
            return None
        chosen = self._of(candidates, affinity)
        self._choices += 1
        chosen.chosen_at = self._choices
        return chosen

    def _of(self, candidates: Sequence[S], affinity: bytes) -> S:
        if self._policy == "round_robin":
            return min(candidates, key=lambda each: each.chosen_at)
        if self._policy == "weighted":
            return _in_turn(candidates)
        if self._policy == "prefix" and affinity:
            return _by_prefix(candidates, affinity)
        return min(candidates, key=lambda each: (each.in_flight / each.weight, each.chosen_at))


def _in_turn(candidates: Sequence[S]) -> S:
    """By weight, and well mixed, as nginx does it: weights of 3 and 1 give a a b a."""
    for each in candidates:
        each.score += each.weight
    chosen = max(candidates, key=lambda each: each.score)
    chosen.score -= sum(each.weight for each in candidates)
    return chosen


def _by_prefix(candidates: Sequence[S], affinity: bytes) -> S:
    """The same one for the same conversation, unless it has more to do than its share.

    Rendezvous hashing: each server draws by its name, so one that comes or goes moves no other's
    conversations. With bounded loads: a hot one spills over to the next in the draw.
    """
    total = sum(each.in_flight for each in candidates) + 1
    weights = sum(each.weight for each in candidates)
    drawn = sorted(candidates, key=lambda each: _draw(each, affinity))
    for each in drawn:
        if each.in_flight < math.ceil(BOUND * total * each.weight / weights):
            return each
    return drawn[0]  # there is always one: not all can have more than their share


def _draw(standing: Standing, affinity: bytes) -> float:
    """Exponentially distributed: the lowest wins as often as its weight's share."""
    digest = hashlib.blake2b(affinity + standing.name, digest_size=8).digest()
    return -math.log((int.from_bytes(digest) + 1) / (2**64 + 1)) / standing.weight
