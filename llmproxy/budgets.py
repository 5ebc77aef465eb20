"""What each key may use in all: budgets by day and month, and prepaid credit.

    at_once, hold ---> a request is let in, with what it takes at most held for it
               \\--> InsufficientQuota: a budget is used up
               \\--> TooManyRequests: all that is left is held for other requests in flight
    Hold.more ---> a stream's next lease, or InsufficientQuota

What a key has used is read from the store, at most once a second while there is plenty, and for
each request and each lease when there is not. A reading is shared by all who wait when it begins.
While the store does not answer, what was read last counts.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import NamedTuple

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.defer import TimeoutError as DeferTimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from llmproxy.config import KeyLimits
from llmproxy.errors import InsufficientQuota, StorageError, TooManyRequests
from llmproxy.limits import TRY_AGAIN_S
from llmproxy.model import BUDGETS, Account, Amount, Counts, Kind, Price, Spending, utcnow
from llmproxy.policy import Ask
from llmproxy.prices import PICO, cost
from llmproxy.storage import ISpending

#: Tokens of an answer that a stream may pass on before it has to ask again: at least, and at most.
LEASE, LONGEST_LEASE = 256, 65_536
#: A lease is no longer than this part of what is left, so that many streams have room beside it.
LEASE_PART = 1000
#: How much of what was left at the last reading is given away without another one.
UNREAD_PART = 16
#: How long a reading is good, and how long one may take.
FRESH_S, READ_TIMEOUT_S = 1.0, 1.0
#: Of how many keys is kept what they have used.
MOST_PURSES = 10_000


class Budget(NamedTuple):
    """`most` of a `unit` (a field of `Amount`) in a `period` (a field of `Spending`). `name`: the
    setting's."""

    name: str
    unit: str
    period: str
    most: int

    def used(self, spending: Spending, today: date) -> int:
        """What is used of it up to now, as far as `spending` knows."""
        read = spending.today
        if (self.period == "day" and read != today) or (
            self.period == "month" and (read.year, read.month) != (today.year, today.month)
        ):
            return 0
        return self.of(getattr(spending, self.period))

    def of(self, amount: Amount) -> int:
        """What it counts of an amount."""
        return int(getattr(amount, self.unit))

    def waits_s(self, now: datetime) -> float | None:
        """How long until it begins anew; None: it does not."""
        if self.period == "ever":
            return None
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        anew = midnight + timedelta(days=1)
        if self.period == "month":
            anew = (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)
        return (anew - now).total_seconds()


_PERIODS = {"per_day": "day", "per_month": "month", "total": "ever"}
_SETTINGS = tuple(
    (name, unit, _PERIODS[suffix]) for name in BUDGETS for unit, _, suffix in [name.partition("_")]
)


def budgets_of(settings: KeyLimits, account: Account | None = None) -> tuple[Budget, ...]:
    """The budgets in force: a key's own ones, and those of the settings where it has none."""
    own = None if account is None else account.limits
    found = []
    for name, unit, period in _SETTINGS:
        most: int | None = None if own is None else getattr(own, name)
        if most is None:
            most = getattr(settings, name)
        if most is not None:
            found.append(Budget(name, unit, period, most))
    return tuple(found)


def remaining(budgets: Sequence[Budget], spending: Spending) -> dict[str, int]:
    """What is left of each, by its name."""
    return {
        budget.name: max(budget.most - budget.used(spending, spending.today), 0)
        for budget in budgets
    }


class _Purse:
    """What this process knows of one key, which is news `until` then. `given`: what was given away
    since the last reading began; `early`: the part of it that was before the one that runs now."""

    __slots__ = ("early", "given", "known", "running", "until", "waiting")

    def __init__(self) -> None:
        self.known: Spending | None = None
        self.until = -math.inf
        self.given = self.early = Amount()
        self.running: dict[str, Counts] = {}
        #: Who waits for the next reading; None: none is under way.
        self.waiting: list[Deferred[None]] | None = None

    def give(self, amount: Amount) -> None:
        self.given = _sum(self.given, amount)


class Hold:
    """What one request was let in with. `amount`: the most that it takes, of a stream with its
    first lease. `lease`: how many events with content it may pass on; None: it is no stream."""

    __slots__ = ("_account", "_budgets", "_of", "_price", "amount", "lease")

    def __init__(
        self,
        of: Budgets,
        account: Account,
        budgets: tuple[Budget, ...],
        price: Price | None,
        amount: Amount,
        lease: int | None,
    ) -> None:
        self._of = of
        self._account = account
        self._budgets = budgets
        self._price = price
        self.amount = amount
        self.lease = lease

    async def more(self, rid: str, counts: Counts) -> int:
        """How many events more, for a stream whose row has come to these counts.

        Raises InsufficientQuota.
        """
        return await self._of.lease(self._account, self._budgets, self._price, rid, counts)


class Budgets:
    """The budgets of all keys: their own ones, and those of `settings` where they have none.

    `refused` is told the setting for which a request was refused, or a stream ended.
    """

    log = Logger()

    def __init__(
        self,
        settings: KeyLimits,
        spending: ISpending,
        clock: IReactorTime,
        monotonic: Callable[[], float],
        refused: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._for_all = budgets_of(settings)
        self._spending = spending
        self._clock = clock
        self._monotonic = monotonic
        self._refused = refused
        self._purses: OrderedDict[str, _Purse] = OrderedDict()
        self._failed_at: float | None = None

    def of(self, account: Account) -> tuple[Budget, ...]:
        """The budgets of a key; few have any."""
        return self._for_all if account.limits is None else budgets_of(self._settings, account)

    async def left(self, account: Account) -> dict[str, int] | None:
        """What is left of each budget of a key, by its name; None: that can't be known now."""
        budgets = self.of(account)
        if not budgets:
            return {}
        purse = self._purse(account)
        await self._read(account.key_id, purse)
        if purse.known is None or self._failed_at is not None:
            return None
        return remaining(budgets, purse.known)

    def at_once(
        self, account: Account, budgets: tuple[Budget, ...], ask: Ask, price: Price | None
    ) -> Hold | None:
        """Let a request in where there is plenty; None: `hold` may, after a look."""
        purse, amount = self._purse(account), _most(ask, price)
        if not self._has_plenty(purse, budgets, amount, whole=not ask.streamed):
            return None
        return self._give(purse, account, budgets, ask, price, amount)

    async def hold(
        self, account: Account, budgets: tuple[Budget, ...], ask: Ask, price: Price | None
    ) -> Hold:
        """Let a request in. Raises InsufficientQuota, TooManyRequests."""
        purse = self._purse(account)
        await self._read(account.key_id, purse)
        self._check(purse, budgets, whole=not ask.streamed)
        return self._give(purse, account, budgets, ask, price, _most(ask, price))

    def _give(
        self,
        purse: _Purse,
        account: Account,
        budgets: tuple[Budget, ...],
        ask: Ask,
        price: Price | None,
        amount: Amount,
    ) -> Hold:
        purse.give(amount)
        lease = self._lease(purse, budgets, price) if ask.streamed else None
        return Hold(self, account, budgets, price, amount, lease)

    async def lease(
        self,
        account: Account,
        budgets: tuple[Budget, ...],
        price: Price | None,
        rid: str,
        counts: Counts,
    ) -> int:
        """See `Hold.more`."""
        purse = self._purse(account)
        amount = _amount({Kind.COMPLETION: LEASE}, price)
        if not self._has_plenty(purse, budgets, amount, whole=False):
            await self._read(account.key_id, purse, rid, counts)
            self._check(purse, budgets, whole=False)
        purse.give(amount)
        return self._lease(purse, budgets, price)

    # -- what is left ----------------------------------------------------------------------

    def _has_plenty(
        self, purse: _Purse, budgets: Sequence[Budget], amount: Amount, *, whole: bool
    ) -> bool:
        """Whether so much can be given away unread."""
        known = purse.known
        if known is None or self._monotonic() >= purse.until:
            return False
        given = _sum(purse.given, amount)
        for budget in budgets:
            left = budget.most - budget.of(getattr(known, budget.period))
            held = budget.of(known.held) if whole else 0
            if left - held <= 0 or budget.of(given) * UNREAD_PART > left - held:
                return False
        return True

    def _check(self, purse: _Purse, budgets: Sequence[Budget], *, whole: bool) -> None:
        """Raises InsufficientQuota where a budget is used up; TooManyRequests where all that is
        left is held, and the answer comes as a `whole` that can't be ended in the middle."""
        known, now = purse.known, utcnow()
        if known is None:  # the store has not been reached yet
            return
        for budget in budgets:
            left = budget.most - budget.used(known, now.date())
            if left <= 0:
                self._refused(budget.name)
                raise InsufficientQuota(
                    f"This API key has used up its budget: {budget.name} is {budget.most}.",
                    wait_s=budget.waits_s(now),
                )
            if whole and left <= budget.of(known.held) + budget.of(purse.given):
                self._refused(budget.name)
                raise TooManyRequests(
                    f"What is left of this API key's budget ({budget.name}) is set aside for its"
                    " requests in flight.",
                    wait_s=TRY_AGAIN_S,
                )

    def _lease(self, purse: _Purse, budgets: Sequence[Budget], price: Price | None) -> int:
        """How many tokens of an answer may be passed on until the next look at what is left."""
        known, today, lease = purse.known, utcnow().date(), LONGEST_LEASE
        if known is None:
            return LEASE
        for budget in budgets:
            left = budget.most - budget.used(known, today) - budget.of(purse.given)
            if budget.unit == "cost":
                if price is None or not price.completion:
                    continue
                left = left * PICO // price.completion
            lease = min(lease, left // LEASE_PART)
        return max(lease, LEASE)

    # -- what was used ---------------------------------------------------------------------

    def _purse(self, account: Account) -> _Purse:
        purse = self._purses.get(account.key_id)
        if purse is None:
            purse = self._purses[account.key_id] = _Purse()
            if len(self._purses) > MOST_PURSES:
                self._purses.popitem(last=False)
        self._purses.move_to_end(account.key_id)
        return purse

    async def _read(
        self, key_id: str, purse: _Purse, rid: str | None = None, counts: Counts | None = None
    ) -> None:
        """Wait for a reading that begins now or later. Returns also where that fails."""
        failed_at = self._failed_at
        if failed_at is not None and 0 <= self._monotonic() - failed_at < FRESH_S:
            return
        if rid is not None and counts is not None:
            purse.running[rid] = counts
        turn: Deferred[None] = Deferred()
        if purse.waiting is not None:
            purse.waiting.append(turn)
        else:
            purse.waiting = []
            self._begin_reading(key_id, purse, [turn])
        await turn

    def _begin_reading(self, key_id: str, purse: _Purse, turns: list[Deferred[None]]) -> None:
        running, purse.running, purse.early = purse.running, {}, purse.given
        reading = maybeDeferred(self._spending.of, key_id, running)
        reading.addTimeout(READ_TIMEOUT_S, self._clock)
        reading.addCallbacks(
            self._was_read, self._was_not_read, callbackArgs=(purse,), errbackArgs=(purse, running)
        )
        reading.addErrback(lambda failure: self.log.failure("what a key has used", failure))
        reading.addCallback(lambda _: self._end_reading(key_id, purse, turns))

    def _was_read(self, spending: Spending, purse: _Purse) -> None:
        purse.known, now = spending, utcnow()
        purse.until = self._monotonic() + _fresh_s(spending, now)
        given, early = purse.given, purse.early
        purse.given = Amount(given.tokens - early.tokens, given.cost - early.cost)
        if self._failed_at is not None:
            self._failed_at = None
            self.log.info("budgets: what keys have used can be read again")

    def _was_not_read(self, failure: Failure, purse: _Purse, running: Mapping[str, Counts]) -> None:
        failure.trap(StorageError, DeferTimeoutError)
        if self._failed_at is None:
            self.log.error(
                "budgets: what keys have used can't be read: {error}", error=failure.value
            )
        self._failed_at = self._monotonic()

    def _end_reading(self, key_id: str, purse: _Purse, turns: list[Deferred[None]]) -> None:
        waiting, purse.waiting = purse.waiting, None
        if waiting:
            purse.waiting = []
            self._begin_reading(key_id, purse, waiting)
        for turn in turns:
            turn.callback(None)  # of those whose clients have left, too


def _fresh_s(spending: Spending, now: datetime) -> float:
    """How long a reading is good: no longer than its day."""
    if spending.today != now.date():
        return 0.0
    tomorrow = datetime.combine(spending.today + timedelta(days=1), time.min, UTC)
    return min((tomorrow - now).total_seconds(), FRESH_S)


def _most(ask: Ask, price: Price | None) -> Amount:
    """What a request can take at most, a stream with its first lease."""
    answer = min(ask.answer or LEASE, LEASE) if ask.streamed else ask.answer
    return _amount({ask.kind: ask.prompt, Kind.COMPLETION: answer}, price)


def _amount(counts: Counts, price: Price | None) -> Amount:
    """What `counts` are in each unit, cost rounded up."""
    tokens = sum(n for kind, n in counts.items() if kind is not Kind.TRANSCRIPTION)
    return Amount(tokens, -(-cost(counts, price) // PICO) if price is not None else 0)


def _sum(one: Amount, other: Amount) -> Amount:
    return Amount(one.tokens + other.tokens, one.cost + other.cost)
