"""What each key may ask for in a minute and at once, over all processes of all proxies.

    enter  -->  hold(tokens)  -->  the request is served  -->  correct, leave
      \\--> TooManyRequests  \\--> TooManyRequests

A process has a slice of each key's share (`shares.py`). What is in it is given away at once; else
the store is asked, and who comes meanwhile waits for its next answer. While the store does not
answer, this process counts alone.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, fail, maybeDeferred
from twisted.internet.defer import TimeoutError as DeferTimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from llmproxy.buckets import MINUTE_S
from llmproxy.config import KeyLimits
from llmproxy.errors import StorageError, TooManyRequests
from llmproxy.model import Account, OwnLimits, Share
from llmproxy.shares import CLAIM_S, NOTHING, Slice, left, take, wait_s
from llmproxy.storage import IShares

#: There is no telling when one of a key's requests will end.
TRY_AGAIN_S = 1.0
#: How long a slice is good. A bucket fills while a slice of it lies about.
SLICE_S = 1.0
#: What lay about for so long is not given back: the process was frozen, and the bucket has filled
#: without it, perhaps for others.
STALE_S = 5.0
#: How long the store may take, and how long it is not asked after it failed.
ANSWER_S, PAUSE_S = 1.0, 1.0
#: How often is looked what can be given back, and how often a claim is renewed.
TICK_S, RENEW_S = 0.25, CLAIM_S / 4
#: How long a key that was refused is refused without asking again.
REFUSED_S = 0.25
#: Of how many keys that have no request in flight a slice is kept.
MOST_LOTS = 10_000


class _Lot:
    """What this process has of one key's limits.

    `slice`: what can be given away; `spare`: how many places were in it when it was taken. `turns`:
    who waits for the next answer of the store, and for what.
    """

    __slots__ = (
        *("is_asking", "key_id", "limits", "own", "refused_until", "running", "share", "short"),
        *("short_until", "slice", "spare", "taken_at", "touched_at", "turns"),
    )

    def __init__(self, key_id: str, own: OwnLimits | None, limits: KeyLimits, now: float) -> None:
        self.key_id, self.own, self.limits = key_id, own, limits
        self.share, self.slice = Share(), NOTHING
        self.spare = self.running = 0
        self.taken_at, self.touched_at = -math.inf, now
        self.is_asking = False
        self.turns: list[tuple[Slice, Deferred[None]]] = []
        self.refused_until = self.short_until = -math.inf
        self.short = 0  # so many tokens were too many, until then

    def covers(self, wanted: Slice) -> bool:
        """Whether so much is in the slice, of what is limited."""
        limits, has = self.limits, self.slice
        return not (
            (wanted.requests and limits.requests_per_minute and has.requests < wanted.requests)
            or (wanted.tokens and limits.tokens_per_minute and has.tokens < wanted.tokens)
            or (wanted.places and limits.concurrent_requests and has.places < wanted.places)
        )

    def give(self, wanted: Slice) -> None:
        """Let a request have so much of it."""
        requests, tokens, places = self.slice
        limits = self.limits
        self.slice = Slice(
            requests - wanted.requests if limits.requests_per_minute else 0,
            tokens - wanted.tokens if limits.tokens_per_minute else 0,
            places - wanted.places if limits.concurrent_requests else 0,
        )
        self.running += wanted.places

    def add(self, more: Slice) -> None:
        """Put so much into it."""
        self.slice = Slice(*(a + b for a, b in zip(self.slice, more, strict=True)))

    def touch(self, now: float) -> None:
        """It is used now."""
        self.drop_stale(now)
        self.touched_at = now

    def drop_stale(self, now: float) -> None:
        """Keep nothing that has lain about for too long, but what is owed."""
        if now - self.touched_at >= STALE_S:
            self.slice = Slice(*(min(n, 0) for n in self.slice))

    def is_loose(self, now: float) -> bool:
        """There is something in it that others should know of, or have."""
        has = self.slice
        is_idle = has != NOTHING and now - self.touched_at >= SLICE_S
        return is_idle or has.places > self.spare or has.tokens < 0


#: What a request needs at its beginning.
_ONE = Slice(requests=1, places=1)


class Limits(Service):
    """The requests of all keys, against `limits`, which hold for each key that has none of its own.

    `me`: names this process to all others. `now`: the Unix time. `refused` is told the setting for
    which a request was refused.
    """

    log = Logger()

    def __init__(
        self,
        limits: KeyLimits,
        shares: IShares,
        me: str,
        clock: IReactorTime,
        now: Callable[[], float],
        refused: Callable[[str], None],
    ) -> None:
        self._settings = limits
        self._limit_all = limits != KeyLimits()
        self._shares = shares
        self._me = me
        self._clock = clock
        self._now = now
        self._refused = refused
        self._lots: OrderedDict[str, _Lot] = OrderedDict()
        self._failed_at: float | None = None
        self._ticks = LoopingCall(self._tick)
        self._ticks.clock = clock

    @property
    def in_flight(self) -> dict[str, int]:
        """How many requests of a key are in flight here; keys that have none are not in it."""
        return {key_id: lot.running for key_id, lot in self._lots.items() if lot.running}

    def concern(self, account: Account) -> bool:
        """Whether there is any limit for this key: else it need not enter."""
        return self._limit_all or account.limits is not None

    def of(self, account: Account) -> KeyLimits:
        """The limits that hold for this key."""
        if account.limits is None:
            return self._settings
        own = {name: n for name, n in account.limits._asdict().items() if n is not None}
        return replace(self._settings, **own)

    def enter(self, account: Account) -> Deferred[None] | None:
        """A request begins; None: it has. `leave` must follow, once it has.

        Fails with TooManyRequests, which this also raises at once. It may be cancelled.
        """
        lot = self._lot(account)
        if lot.refused_until > self._clock.seconds() and not lot.covers(_ONE):
            raise self._refusal(lot, _ONE)
        return self._get(lot, _ONE)

    def leave(self, account: Account) -> None:
        """It has ended, in whichever way."""
        lot = self._lot(account)
        lot.running -= 1
        if lot.limits.concurrent_requests:
            lot.add(Slice(places=1))

    def most(self, account: Account, most: int) -> int:
        """What is to be held for a request that can take so many tokens at most.

        What is over the limit of a minute waits for all of it, and what it has really taken is then
        owed: an estimate must not keep a request out for ever.
        """
        return min(most, self._lot(account).limits.tokens_per_minute)

    def hold(self, account: Account, tokens: int) -> Deferred[None] | None:
        """Set tokens aside; None: they are. `correct` must follow, once they are.

        Fails with TooManyRequests, which this also raises at once. It may be cancelled.
        """
        if not tokens:
            return None
        lot, wanted = self._lot(account), Slice(tokens=tokens)
        if lot.short_until > self._clock.seconds() and lot.short <= tokens > lot.slice.tokens:
            raise self._refusal(lot, wanted)
        return self._get(lot, wanted)

    def correct(self, account: Account, held: int, taken: int) -> None:
        """The request for which `held` was set aside has taken so many tokens."""
        lot = self._lot(account)
        if lot.limits.tokens_per_minute:
            lot.touch(self._clock.seconds())
            lot.add(Slice(tokens=held - taken))

    def fields(self, account: Account) -> list[tuple[bytes, bytes]]:
        """What an answer to this key says of its limits now, as OpenAI's do.

        https://platform.openai.com/docs/guides/rate-limits
        """
        lot, now = self._lot(account), self._now()
        limits, (requests, tokens, _), share = lot.limits, lot.slice, lot.share
        return [
            *_fields(
                b"Requests", share.requests_full_at, requests, now, limits.requests_per_minute
            ),
            *_fields(b"Tokens", share.tokens_full_at, tokens, now, limits.tokens_per_minute),
        ]

    def startService(self) -> None:
        """Begin to look what can be given back."""
        super().startService()
        self._ticks.start(TICK_S, now=False).addErrback(
            lambda failure: self.log.failure("limits", failure)
        )

    def stopService(self) -> Deferred[None]:
        """Give all slices back, as far as the store takes them soon."""
        super().stopService()
        if self._ticks.running:
            self._ticks.stop()
        ends = [self._ask(lot, NOTHING) for lot in self._lots.values()]
        return DeferredList(ends, consumeErrors=True).addCallback(lambda _: None)

    # -- what is in a slice ----------------------------------------------------------------

    def _lot(self, account: Account) -> _Lot:
        key_id, own = account.key_id, account.limits
        lot = self._lots.get(key_id)
        if lot is None:
            lot = _Lot(key_id, own, self.of(account), self._clock.seconds())
            self._lots[key_id] = lot
            if len(self._lots) > MOST_LOTS:
                self._drop_oldest()
        elif lot.own != own:
            lot.own, lot.limits = own, self.of(account)
            lot.refused_until = lot.short_until = -math.inf
        return lot

    def _drop_oldest(self) -> None:
        for key_id, lot in self._lots.items():
            if not lot.running and not lot.is_asking:
                del self._lots[key_id]
                return

    def _get(self, lot: _Lot, wanted: Slice) -> Deferred[None] | None:
        now = self._clock.seconds()
        lot.touch(now)
        is_good = 0 <= now - lot.taken_at < SLICE_S
        if (is_good and lot.covers(wanted)) or not _is_limited(lot.limits, wanted):
            lot.give(wanted)
            return None
        return self._ask(lot, wanted)

    def _refusal(self, lot: _Lot, wanted: Slice) -> TooManyRequests:
        limits, now, share = lot.limits, self._now(), lot.share
        if wanted.places and limits.concurrent_requests and lot.slice.places < wanted.places:
            self._refused("concurrent_requests")
            return TooManyRequests(
                f"This API key may have {limits.concurrent_requests} requests in flight at once.",
                wait_s=TRY_AGAIN_S,
            )
        if wanted.requests:
            self._refused("requests_per_minute")
            per_minute = limits.requests_per_minute
            return TooManyRequests(
                f"This API key may make {per_minute} requests per minute.",
                wait_s=wait_s(share.requests_full_at, now, per_minute, 1 - lot.slice.requests),
            )
        self._refused("tokens_per_minute")
        per_minute, more = limits.tokens_per_minute, wanted.tokens - lot.slice.tokens
        return TooManyRequests(
            f"This API key may use {per_minute} tokens per minute, and the request may take"
            f" {wanted.tokens}.",
            wait_s=wait_s(share.tokens_full_at, now, per_minute, more),
        )

    # -- asking the store ------------------------------------------------------------------

    def _ask(self, lot: _Lot, wanted: Slice) -> Deferred[None]:
        """Fires when the store has answered and there was so much."""
        turn: Deferred[None] = Deferred()
        lot.turns.append((wanted, turn))
        if not lot.is_asking:
            self._begin(lot)
        return turn

    def _begin(self, lot: _Lot) -> None:
        """Give back what is left, and take what those want who wait."""
        turns, lot.turns = lot.turns, []
        kept, lot.slice = lot.slice, NOTHING
        lot.is_asking = True
        running = lot.running
        wanted = Slice(*map(sum, zip(*(each for each, _ in turns), strict=True)))
        taken: list[Slice] = [NOTHING]

        def change(share: Share) -> Share:
            after, taken[0] = take(
                share,
                lot.limits,
                self._now(),
                me=self._me,
                running=running,
                kept=kept,
                wanted=wanted,
                more=wanted != NOTHING,
            )
            return after

        answer = self._change(lot, change)
        answer.addErrback(self._failed, lot, change)
        answer.addCallback(self._answered, lot, taken, turns)
        answer.addErrback(self._broken, lot, turns)

    def _change(self, lot: _Lot, change: Callable[[Share], Share]) -> Deferred[Share]:
        failed_at = self._failed_at
        if failed_at is not None and 0 <= self._clock.seconds() - failed_at < PAUSE_S:
            return fail(StorageError("it failed a moment ago"))
        answer = maybeDeferred(self._shares.change, lot.key_id, change)
        answer.addTimeout(ANSWER_S, self._clock).addCallback(self._works)
        return answer

    def _works(self, share: Share) -> Share:
        if self._failed_at is not None:
            self._failed_at = None
            self.log.info("limits: the store answers again; they hold over all processes")
        return share

    def _failed(self, failure: Failure, lot: _Lot, change: Callable[[Share], Share]) -> Share:
        """Go on alone, from what was known last. Whether the store has made the change is not
        known: then what was taken in vain is there again after a minute."""
        if not failure.check(StorageError, DeferTimeoutError):  # it must not hang who waits
            self.log.failure("limits", failure)
        now = self._clock.seconds()
        if self._failed_at is None:
            self.log.error(
                "limits: the store does not answer, each process counts alone: {error}",
                error=failure.value,
            )
            self._failed_at = now
        elif now - self._failed_at >= PAUSE_S:
            self._failed_at = now
        return change(lot.share)

    def _broken(
        self, failure: Failure, lot: _Lot, turns: list[tuple[Slice, Deferred[None]]]
    ) -> None:
        """A fault of ours: who waits is told so, and the next request begins anew."""
        self.log.failure("limits", failure)
        lot.is_asking = False
        for wanted, turn in turns:
            if turn.called:
                continue
            if wanted == NOTHING:  # nobody waits for it
                turn.callback(None)
            else:
                turn.errback(failure)
        if lot.turns:
            self._begin(lot)

    def _answered(
        self, share: Share, lot: _Lot, taken: list[Slice], turns: list[tuple[Slice, Deferred[None]]]
    ) -> None:
        now = self._clock.seconds()
        lot.share, lot.taken_at = share, now
        lot.add(taken[0])
        lot.is_asking = False
        for wanted, turn in turns:
            if turn.called:  # its client has left
                continue
            if lot.covers(wanted):
                lot.give(wanted)
                turn.callback(None)
            else:
                turn.errback(self._note_refusal(lot, wanted, now))
        lot.spare = max(lot.slice.places, 0)
        if lot.turns and not lot.is_asking:
            self._begin(lot)

    def _note_refusal(self, lot: _Lot, wanted: Slice, now: float) -> TooManyRequests:
        """A flood of what can't be had must not become a flood for the store."""
        if wanted.requests:
            lot.refused_until = now + REFUSED_S
        else:
            lot.short, lot.short_until = wanted.tokens, now + REFUSED_S
        return self._refusal(lot, wanted)

    # -- giving back -----------------------------------------------------------------------

    def _tick(self) -> None:
        now = self._clock.seconds()
        for lot in list(self._lots.values()):
            if lot.is_asking:
                continue
            lot.drop_stale(now)
            is_claimed = self._me in lot.share.claims
            is_late = now - lot.taken_at >= (RENEW_S if lot.running else SLICE_S)
            if lot.is_loose(now) or (is_claimed and is_late):
                self._ask(lot, NOTHING)
            elif not lot.running and not is_claimed and now - lot.touched_at >= SLICE_S:
                del self._lots[lot.key_id]


def _is_limited(limits: KeyLimits, wanted: Slice) -> bool:
    """Whether any of it is."""
    return bool(
        (wanted.requests and limits.requests_per_minute)
        or (wanted.places and limits.concurrent_requests)
        or (wanted.tokens and limits.tokens_per_minute)
    )


def _fields(
    what: bytes, full_at: float, kept: int, now: float, per_minute: int
) -> list[tuple[bytes, bytes]]:
    if not per_minute:
        return []
    full_at = max(full_at, now) - kept * MINUTE_S / per_minute
    there = min(max(left(full_at, now, per_minute), 0), per_minute)
    return [
        (b"X-RateLimit-Limit-" + what, b"%d" % per_minute),
        (b"X-RateLimit-Remaining-" + what, b"%d" % there),
        (b"X-RateLimit-Reset-" + what, _duration(max(full_at - now, 0.0))),
    ]


def _duration(seconds: float) -> bytes:
    """As Go writes it, and so OpenAI: `20ms`, `8.64s`, `1m30.5s`."""
    ms = math.ceil(1000 * seconds - 0.01)
    if ms < 1000:
        return b"%dms" % ms
    minutes, rest = divmod(ms, 60_000)
    whole = b"%g" % (rest / 1000)
    return b"%dm%bs" % (minutes, whole) if minutes else whole + b"s"
