"""What a key has used, as its budgets count it: read from the ledger's file, each request once."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.task import Clock

from llmproxy.model import (
    MAX_COUNT,
    Account,
    Amount,
    Counts,
    Entry,
    Kind,
    Outcome,
    Price,
    Settlement,
    Spending,
    State,
)
from llmproxy.storage import rows
from llmproxy.storage.journal import GroupCommit
from llmproxy.storage.rows import install
from llmproxy.storage.spending import PAST_FRESH_S, SQLiteSpending
from llmproxy.storage.sqlite import connect, make_pool, prepare

TODAY, NOTHING = date(2026, 3, 15), Amount()
# A token costs 2, 3 and 5 micro-units, a second of audio 7.
PRICE = Price(1, "EUR", 2_000_000, 3_000_000, 5_000_000, 7_000_000)
DOLLARS = PRICE._replace(id=2, currency="USD")


class File:
    """A ledger's file, and what is read of it as if it were `today`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "db.sqlite"
        prepare(self.path)
        self.today, self.clock = TODAY, Clock()
        self.currency = "EUR"
        self.connection = connect(self.path)
        install(self.connection)
        rows.add_prices(self.connection, [PRICE, DOLLARS])
        self.pool = make_pool(self.path, reactor, install)
        self.spending = SQLiteSpending(
            GroupCommit(self.pool, reactor),
            lambda: self.currency,
            today=lambda: self.today,
            monotonic=self.clock.seconds,
        )

    def open(
        self, rid: str, key: str = "alice", held: Any = NOTHING, price: Any = PRICE, **running: int
    ) -> None:
        """A row in flight, which has taken so much until now."""
        moment = datetime(2026, 3, 15, tzinfo=UTC)
        entry = Entry(rid, moment, Account(key), "/v1/x", "m", "gpu", price, held)
        rows.CHANGE.write(self.connection, [rows.opening(entry, "owner")])
        rows.CHECKPOINT.write(self.connection, [rows.checkpoint(rid, counted(running))])

    def close(self, rid: str, state: State, day: date = TODAY, **counts: int) -> None:
        noon = datetime(day.year, day.month, day.day, 12, tzinfo=UTC)
        closing = Settlement(state, Outcome.COMPLETE, counted(counts), noon, 200)
        rows.CHANGE.write(self.connection, [rows.closing(rid, closing, bills_here=True)])

    def billed(self, rid: str, day: date, key: str = "alice", **counts: int) -> None:
        self.open(rid, key)
        self.close(rid, State.SETTLED, day, **counts)

    async def read(self, key: str = "alice", **running: Counts) -> Spending:
        return await self.spending.of(key, running)


def counted(numbers: dict[str, int]) -> Counts:
    return {Kind(kind): number for kind, number in numbers.items()}


@pytest.fixture
def file(tmp_path: Path) -> Any:
    opened = File(tmp_path)
    yield opened
    opened.connection.close()
    opened.pool.close()


@pytest_twisted.ensureDeferred
async def test_what_is_on_the_bill_counts_on_its_day_in_its_month_and_for_ever(file: File) -> None:
    file.billed("r1", TODAY, prompt=10, completion=1)
    file.billed("r2", date(2026, 3, 1), embedding=100)
    file.billed("r3", date(2026, 2, 28), prompt=1000)
    file.billed("r4", TODAY, key="bob", prompt=5)
    found = await file.read()
    assert found.today == TODAY
    assert (found.day, found.month, found.ever) == (
        Amount(11, 23),
        Amount(111, 523),
        Amount(1111, 2523),
    )
    assert found.held == Amount()
    assert (await file.read("bob")).ever == Amount(5, 10)
    assert (await file.read("carol")).ever == Amount()


@pytest_twisted.ensureDeferred
async def test_seconds_of_audio_are_no_tokens_but_cost(file: File) -> None:
    file.billed("r1", TODAY, transcription=10)
    assert (await file.read()).day == Amount(0, 70)


@pytest_twisted.ensureDeferred
async def test_what_has_no_price_or_one_in_another_currency_costs_nothing(file: File) -> None:
    for rid, price in (("r1", None), ("r2", DOLLARS)):
        file.open(rid, price=price)
        file.close(rid, State.SETTLED, completion=4)
        file.open(f"open-{rid}", price=price, completion=3)
    assert (await file.read()).day == Amount(14, 0)
    file.currency = "USD"
    assert (await file.read()).day == Amount(14, 21)


@pytest_twisted.ensureDeferred
async def test_a_request_in_flight_counts_with_what_it_has_been_given(file: File) -> None:
    file.open("r1", held=Amount(300, 1000), completion=20)
    file.open("r2", held=Amount(30, 1000), completion=90)
    found = await file.read()
    assert (found.day, found.month, found.ever) == (Amount(110, 330),) * 3
    assert found.held == Amount(280, 940 + 730)
    found = await file.read(r1={Kind.COMPLETION: 21})  # written, and read in the same commit
    assert (found.day.tokens, found.held.tokens) == (111, 279)
    assert file.connection.execute("SELECT completion FROM ledger WHERE rid = 'r1'").fetchone() == (
        21,
    )


@pytest_twisted.ensureDeferred
async def test_a_row_is_counted_once_when_it_is_closed_and_not_if_it_is_not_billed(
    file: File,
) -> None:
    for rid, state in {"r1": State.SETTLED, "r2": State.ESTIMATED, "r3": State.ORPHAN}.items():
        file.open(rid, held=Amount(100, 0), completion=20)
        file.close(rid, state, completion=25)
    found = await file.read()
    assert (found.day.tokens, found.held) == (50, Amount())


@pytest_twisted.ensureDeferred
async def test_rows_of_keys_without_a_budget_are_not_looked_at(file: File) -> None:
    file.open("r1", held=None, completion=20)
    assert (await file.read()).day == Amount()


@pytest_twisted.ensureDeferred
async def test_a_new_day_begins_at_nothing(file: File) -> None:
    file.billed("r1", TODAY, prompt=10)
    await file.read()
    file.today = TODAY + timedelta(days=1)
    found = await file.read()
    assert (found.today, found.day.tokens, found.month.tokens) == (file.today, 0, 10)
    file.today = date(2026, 4, 1)
    found = await file.read()
    assert (found.month.tokens, found.ever.tokens) == (0, 10)


@pytest_twisted.ensureDeferred
async def test_what_is_put_on_an_old_days_bill_is_seen_after_a_while(file: File) -> None:
    await file.read()
    file.billed("r1", TODAY - timedelta(days=1), prompt=10)
    file.clock.advance(PAST_FRESH_S + 1)
    assert (await file.read()).month.tokens == 10


@pytest_twisted.ensureDeferred
async def test_absurd_counts_are_the_most_and_no_error(file: File) -> None:
    file.billed("r1", TODAY, prompt=MAX_COUNT, completion=MAX_COUNT)
    file.open("r2", completion=MAX_COUNT)
    assert (await file.read()).day == Amount(MAX_COUNT, MAX_COUNT)


@pytest_twisted.ensureDeferred
async def test_readings_have_growing_numbers_for_all_who_use_the_file(file: File) -> None:
    first = (await file.read()).number
    other = File(file.path.parent)
    second, third = (await other.read()).number, (await file.read("bob")).number
    assert first < second < third
    other.connection.close()
    other.pool.close()
