"""What keys may use in all: who is let in, how far a stream goes, and what the store is asked."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from datetime import UTC, date, datetime
from typing import Any
from unittest.mock import Mock

import pytest
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy import budgets as room
from llmproxy.budgets import (
    FRESH_S,
    LEASE,
    LONGEST_LEASE,
    MOST_PURSES,
    READ_TIMEOUT_S,
    UNREAD_PART,
    Budgets,
    Hold,
    budgets_of,
    remaining,
)
from llmproxy.config import KeyLimits
from llmproxy.errors import InsufficientQuota, StorageError, TooManyRequests
from llmproxy.model import Account, Amount, Counts, Kind, OwnLimits, Price, Spending
from llmproxy.policy import Ask
from llmproxy.storage import ISpending

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
ALICE, BOB = Account("alice"), Account("bob")
#: A token of a prompt costs 1 micro-unit, one of an answer 2.
PRICE = Price(1, "EUR", 1_000_000, 2_000_000, 1_000_000, 0)
STREAM, WHOLE = Ask(prompt=10, answer=5000, streamed=True), Ask(prompt=10, answer=50)


@implementer(ISpending)
class Store:
    """A store that is asked, and answers when it is told to; or at once with `spent`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Mapping[str, Counts]]] = []
        self.waiting: list[Deferred[Spending]] = []
        self.spent: Spending | None = None

    def of(self, key_id: str, running: Mapping[str, Counts]) -> Deferred[Spending]:
        answer: Deferred[Spending] = Deferred()
        self.asked.append((key_id, running))
        if self.spent is not None:
            answer.callback(self.spent)
        else:
            self.waiting.append(answer)
        return answer


def spending(ever: int = 0, *, day: int = 0, month: int = 0, held: int = 0) -> Spending:
    """In tokens, and twice as much in cost."""
    in_day, in_month, in_all, in_flight = (Amount(n, 2 * n) for n in (day, month, ever, held))
    return Spending(NOON.date(), in_day, in_month, in_all, in_flight)


class Bank:
    """Budgets with their clock and store, and what they refused for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **limits: int) -> None:
        self.now, self.clock, self.store = NOON, Clock(), Store()
        self.refused: list[str] = []
        monkeypatch.setattr(room, "utcnow", lambda: self.now)
        self.budgets = Budgets(
            KeyLimits(**limits), self.store, self.clock, self.clock.seconds, self.refused.append
        )

    def asks(self, ask: Ask = WHOLE, account: Account = ALICE) -> Deferred[Hold]:
        budgets = self.budgets.of(account)
        at_once = self.budgets.at_once(account, budgets, ask, PRICE)
        if at_once is not None:
            return succeed(at_once)
        return Deferred.fromCoroutine(self.budgets.hold(account, budgets, ask, PRICE))

    def lets_in(self, ask: Ask = WHOLE, account: Account = ALICE) -> Hold:
        """The answer that is there at once."""
        return result(self.asks(ask, account))

    def spend(self, *amounts: Any, **named: int) -> None:
        """What the store says from now on."""
        self.store.spent = spending(*amounts, **named)
        self.clock.advance(FRESH_S)


def result(waited_for: Deferred[Any]) -> Any:
    found: list[Any] = []
    waited_for.addBoth(found.append)
    [outcome] = found
    if isinstance(outcome, Failure):
        outcome.raiseException()
    return outcome


def more(hold: Hold, tokens: int) -> Deferred[int]:
    renewal: Coroutine[Any, Any, int] = hold.more("rid", {Kind.COMPLETION: tokens})
    return Deferred.fromCoroutine(renewal)


@pytest.fixture
def bank(monkeypatch: pytest.MonkeyPatch) -> Bank:
    """Of keys with 1000 tokens in all."""
    return Bank(monkeypatch, tokens_total=1000)


def test_the_budgets_of_a_key_are_its_own_ones_and_else_those_of_the_settings() -> None:
    settings = KeyLimits(tokens_per_day=5, cost_total=7, requests_per_minute=3)
    assert [(each.name, each.most) for each in budgets_of(settings)] == [
        ("tokens_per_day", 5),
        ("cost_total", 7),
    ]
    own = Account("alice", limits=OwnLimits(cost_total=0, cost_per_month=9))
    assert [(each.name, each.most) for each in budgets_of(settings, own)] == [
        ("tokens_per_day", 5),
        ("cost_per_month", 9),
        ("cost_total", 0),
    ]
    assert budgets_of(KeyLimits()) == ()


@pytest.mark.parametrize(
    ("name", "wait"),
    [
        ("tokens_per_day", "43200"),
        ("tokens_per_month", "43200"),
        ("tokens_total", None),
        ("cost_per_day", "43200"),
        ("cost_per_month", "43200"),
        ("cost_total", None),
    ],
)
def test_a_key_is_let_in_until_its_budget_is_used_up(
    monkeypatch: pytest.MonkeyPatch, name: str, wait: str | None
) -> None:
    bank = Bank(monkeypatch, **{name: 1000})
    all_but_one = 999 if name.startswith("tokens") else 499
    bank.spend(all_but_one, day=all_but_one, month=all_but_one)
    assert bank.lets_in().amount == Amount(60, 110)
    bank.spend(all_but_one + 1, day=all_but_one + 1, month=all_but_one + 1)
    for ask in (WHOLE, STREAM):
        with pytest.raises(InsufficientQuota, match=f"{name} is 1000") as refused:
            bank.lets_in(ask)
        assert (refused.value.status, refused.value.code) == (402, "insufficient_quota")
        assert refused.value.headers.get("Retry-After") == wait
    assert bank.refused == [name, name]


def test_each_budget_looks_at_its_own_period(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, used in {
        "tokens_per_day": {"month": 1000},
        "tokens_per_month": {"day": 1000},
    }.items():
        bank = Bank(monkeypatch, **{name: 1000})
        bank.spend(1000, **used)
        assert bank.lets_in()


def test_a_budget_of_nothing_lets_nobody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = Bank(monkeypatch, cost_total=0)
    bank.spend()
    with pytest.raises(InsufficientQuota):
        bank.lets_in()


def test_a_budget_begins_anew_with_its_day_and_month(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tokens_per_day", "tokens_per_month"):
        bank = Bank(monkeypatch, **{name: 1000})
        bank.spend(1000, day=1000, month=1000)
        with pytest.raises(InsufficientQuota):
            bank.lets_in()
        # At once, even if the store can't be asked then.
        bank.now = datetime(2026, 2, 1, tzinfo=UTC)
        bank.store.spent = None
        asked = bank.asks()
        bank.store.waiting[0].errback(StorageError("gone"))
        assert result(asked)


def test_what_remains_is_told_for_each_budget_and_is_never_less_than_nothing() -> None:
    budgets = budgets_of(KeyLimits(tokens_per_day=5, tokens_total=100, cost_total=7))
    assert remaining(budgets, spending(30, day=3)) == {
        "tokens_per_day": 2,
        "tokens_total": 70,
        "cost_total": 0,
    }


def test_a_whole_answer_waits_where_all_that_is_left_is_held(bank: Bank) -> None:
    bank.spend(900, held=100)
    with pytest.raises(TooManyRequests) as refused:
        bank.lets_in(WHOLE)
    assert refused.value.status == 429
    assert bank.refused == ["tokens_total"]
    assert bank.lets_in(STREAM)  # which can be ended
    bank.spend(900, held=99)
    assert bank.lets_in(WHOLE)


def test_what_was_given_since_a_reading_began_is_held_too(bank: Bank) -> None:
    first, second = bank.asks(), bank.asks()
    bank.store.waiting[0].callback(spending(900))
    assert result(first).amount.tokens == 60
    bank.store.waiting[1].callback(spending(940))  # it can't have the first one's row
    with pytest.raises(TooManyRequests):
        result(second)


def test_while_there_is_plenty_the_store_is_asked_once_a_second(bank: Bank) -> None:
    bank.spend()
    small = Ask(prompt=1, answer=1)
    for _ in range(1000 // UNREAD_PART // 2):
        bank.lets_in(small)
    assert len(bank.store.asked) == 1
    bank.lets_in(small)  # would be more than a sixteenth unread
    assert len(bank.store.asked) == 2
    bank.lets_in(small)
    bank.clock.advance(FRESH_S)
    bank.lets_in(small)
    assert len(bank.store.asked) == 3


def test_who_is_refused_stays_so_while_the_reading_is_new(bank: Bank) -> None:
    free = Ask()  # as an upload, of which nothing is known before
    for amounts, refusal in (((1000,), InsufficientQuota), ((0, 1000), TooManyRequests)):
        bank.spend(amounts[0], held=sum(amounts[1:]))
        for ask in (free, free, WHOLE, free):
            with pytest.raises(refusal):
                bank.lets_in(ask)


def test_what_is_held_for_others_is_no_reason_to_ask_for_a_stream(bank: Bank) -> None:
    bank.spend(0, held=990)
    for _ in range(3):
        bank.lets_in(Ask(1, 1, streamed=True))
    assert len(bank.store.asked) == 1


def test_near_the_end_each_request_asks(bank: Bank) -> None:
    bank.spend(900)
    for number in range(3):
        bank.lets_in(WHOLE)
        assert len(bank.store.asked) == number + 1


def test_a_new_day_is_read_at_once(bank: Bank) -> None:
    bank.now = datetime(2026, 1, 31, 23, 59, 59, 600_000, UTC)
    bank.spend()
    bank.lets_in(Ask(1, 1))
    bank.clock.advance(0.3)
    bank.lets_in(Ask(1, 1))
    assert len(bank.store.asked) == 1
    bank.clock.advance(0.1)
    bank.lets_in(Ask(1, 1))
    assert len(bank.store.asked) == 2


def test_a_reading_of_another_day_is_good_for_one_request(bank: Bank) -> None:
    bank.now = datetime(2026, 2, 1, tzinfo=UTC)
    bank.spend()
    for number in range(3):
        bank.lets_in(Ask(1, 1))
        assert len(bank.store.asked) == number + 1


def test_keys_have_nothing_to_do_with_each_other(bank: Bank) -> None:
    first, second = bank.asks(account=ALICE), bank.asks(account=BOB)
    assert [key_id for key_id, _ in bank.store.asked] == ["alice", "bob"]
    bank.store.waiting[0].callback(spending(1000))
    bank.store.waiting[1].callback(spending(999))
    with pytest.raises(InsufficientQuota):
        result(first)
    assert result(second)


def test_who_waits_while_the_store_is_asked_shares_the_next_reading(bank: Bank) -> None:
    asked = [bank.asks() for _ in range(4)]
    assert len(bank.store.asked) == 1
    bank.store.waiting[0].callback(spending(999))
    assert [each.called for each in asked] == [True, False, False, False]
    assert len(bank.store.asked) == 2
    bank.store.waiting[1].callback(spending(1000))
    assert len(bank.store.asked) == 2
    for each in asked[1:]:
        with pytest.raises(InsufficientQuota):
            result(each)


def test_a_client_that_leaves_while_it_waits_is_in_nobodys_way(bank: Bank) -> None:
    first, second = bank.asks(), bank.asks()
    first.addErrback(lambda failure: None)
    first.cancel()
    bank.store.waiting[0].callback(spending(500))
    third = bank.asks()
    assert len(bank.store.asked) == 2
    bank.store.waiting[1].callback(spending(500))
    assert result(second)
    bank.store.waiting[2].callback(spending(500))
    assert result(third)
    assert len(bank.store.asked) == 3


def test_a_stream_gets_leases_until_the_budget_is_used_up(bank: Bank) -> None:
    bank.spend(0)
    hold = bank.lets_in(STREAM)
    assert (hold.amount, hold.lease) == (Amount(10 + LEASE, 10 + 2 * LEASE), LEASE)
    bank.spend(999)
    assert result(more(hold, 256)) == LEASE
    assert bank.store.asked[-1] == ("alice", {"rid": {Kind.COMPLETION: 256}})
    bank.spend(1000)
    with pytest.raises(InsufficientQuota):
        result(more(hold, 512))


def test_a_stream_goes_on_with_what_is_held_for_others(bank: Bank) -> None:
    bank.spend(999, held=5000)
    assert result(more(bank.lets_in(STREAM), 256)) == LEASE


def test_a_short_answer_holds_no_more_than_it_asks_for(bank: Bank) -> None:
    bank.spend(0)
    assert bank.lets_in(Ask(10, 20, streamed=True)).amount.tokens == 30
    assert bank.lets_in(Ask(10, 0, streamed=True)).amount.tokens == 10 + LEASE


def test_leases_are_longer_where_there_is_plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = Bank(monkeypatch, tokens_total=10**6, cost_total=10**6)
    bank.spend(0)
    assert bank.lets_in(STREAM).lease == 499  # a thousandth of what the cost allows
    bank = Bank(monkeypatch, tokens_total=10**12)
    bank.spend(0)
    assert bank.lets_in(STREAM).lease == LONGEST_LEASE


def test_leases_are_read_for_once_a_second_while_there_is_plenty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank = Bank(monkeypatch, tokens_total=100_000)
    bank.spend(0)
    hold = bank.lets_in(STREAM)
    for _ in range(100_000 // UNREAD_PART // LEASE - 1):
        result(more(hold, 1))
    assert len(bank.store.asked) == 1
    result(more(hold, 1))
    result(more(hold, 1))
    assert len(bank.store.asked) == 2


def test_what_costs_nothing_is_not_bounded_by_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = Bank(monkeypatch, cost_total=1000)
    bank.spend(0)
    for price in (None, PRICE._replace(completion=0)):
        asked = bank.budgets.hold(ALICE, bank.budgets.of(ALICE), STREAM, price)
        assert result(Deferred.fromCoroutine(asked)).lease == LONGEST_LEASE


def test_an_embedding_is_held_at_its_own_price(bank: Bank) -> None:
    bank.spend(0)
    dear = PRICE._replace(embedding=9_000_000)
    ask = Ask(10, 0, Kind.EMBEDDING)
    asked = bank.budgets.hold(ALICE, bank.budgets.of(ALICE), ask, dear)
    assert result(Deferred.fromCoroutine(asked)).amount == Amount(10, 90)


def test_a_store_that_was_never_reached_keeps_nobody_out(bank: Bank, logged: list[str]) -> None:
    asked = bank.asks(STREAM)
    bank.store.waiting[0].errback(StorageError("gone"))
    hold = result(asked)
    assert hold.lease == LEASE
    # And it is asked once a second.
    assert result(more(hold, 256)) == LEASE
    assert bank.lets_in(WHOLE)
    assert len(bank.store.asked) == 1
    bank.spend(10)
    result(more(hold, 512))
    bank.store.spent = spending(1000)  # and is asked as ever, since it answered
    with pytest.raises(InsufficientQuota):
        result(more(hold, 768))
    assert [line.partition(" {")[0] for line in logged] == [
        "budgets: what keys have used can't be read: gone",
        "budgets: what keys have used can be read again",
    ]


def test_a_store_that_does_not_answer_is_waited_for_a_second(bank: Bank) -> None:
    asked = bank.asks()
    bank.clock.advance(READ_TIMEOUT_S)
    assert result(asked)


def test_who_was_out_of_credit_stays_so_while_the_store_is_away(bank: Bank) -> None:
    bank.spend(1000)
    with pytest.raises(InsufficientQuota):
        bank.lets_in()
    bank.store.spent = None
    bank.clock.advance(10)
    asked = bank.asks()
    bank.store.waiting[0].errback(StorageError("gone"))
    with pytest.raises(InsufficientQuota):
        result(asked)


def test_a_top_up_is_in_force_at_once(bank: Bank) -> None:
    bank.spend(1000)
    with pytest.raises(InsufficientQuota):
        bank.lets_in()
    assert bank.lets_in(account=Account("alice", limits=OwnLimits(tokens_total=2000)))


def test_what_is_kept_of_keys_is_bounded(bank: Bank) -> None:
    bank.spend()
    for number in range(MOST_PURSES + 10):
        bank.lets_in(account=Account(f"key-{number}"))
        if number % 1000 == 0:
            bank.lets_in(Ask(1, 1))  # in use, and so known all the time
    assert len(bank.budgets._purses) == MOST_PURSES
    assert [key_id for key_id, _ in bank.store.asked].count("alice") == 1


def test_the_month_ends_after_its_last_day() -> None:
    [budget] = budgets_of(KeyLimits(tokens_per_month=1))
    for now, days in {
        datetime(2026, 2, 1, tzinfo=UTC): 28,
        datetime(2024, 2, 1, tzinfo=UTC): 29,
        datetime(2026, 12, 1, tzinfo=UTC): 31,
        datetime(2026, 12, 31, tzinfo=UTC): 1,
    }.items():
        assert budget.waits_s(now) == 86400 * days
    assert budget.used(spending(month=3), date(2027, 1, 31)) == 0


def test_a_fault_of_the_store_s_code_is_no_end_for_its_key(
    bank: Bank, flush_logged_errors: Any
) -> None:
    def broken(key_id: str, running: object) -> Deferred[Spending]:
        raise RuntimeError("a fault of ours")

    bank.budgets._spending = Mock(of=broken)
    assert bank.lets_in()
    assert len(flush_logged_errors(RuntimeError)) == 1
    bank.budgets._spending = bank.store
    bank.spend(1000)
    with pytest.raises(InsufficientQuota):
        bank.lets_in()
