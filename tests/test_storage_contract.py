"""What every ledger and every store of keys keeps to, in memory and in SQLite alike.

A test takes a `Box`: a store that outlives its ledgers, each of which stands for one process.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import pytest
import pytest_twisted
from twisted.enterprise.adbapi import ConnectionPool
from twisted.internet import reactor as _reactor
from zope.interface.verify import verifyObject

from llmproxy.ctl import ledger as ctl
from llmproxy.model import Account, Counts, Entry, Event, Kind, Outcome, Settlement, State
from llmproxy.storage import IAccounts, ILedger, IOutbox
from llmproxy.storage.journal import SQLiteLedger
from llmproxy.storage.memory import MemoryAccounts, MemoryLedger, MemoryStore
from llmproxy.storage.owners import Owners
from llmproxy.storage.rows import install
from llmproxy.storage.sqlite import SQLiteAccounts, connect, make_pool, prepare

# The global reactor has no type of its own: it is whichever was installed.
reactor: Any = _reactor
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
COUNTS = {Kind.PROMPT: 3, Kind.COMPLETION: 2}
Ledger = MemoryLedger | SQLiteLedger
Bill = Sequence[tuple[str, str, int, str]]


class Box(Protocol):
    """A store under test."""

    def ledger(self, owner: str = "me", *, bills_here: bool = True) -> Ledger: ...
    def die(self, owner: str) -> None: ...
    def states(self) -> dict[str, State]: ...
    def counts(self, rid: str) -> Counts: ...
    def bill(self) -> Bill: ...
    def resolve(self, rid: str, counts: Counts) -> None: ...
    def accounts(self, expires: datetime | None) -> MemoryAccounts | SQLiteAccounts: ...


class FakeOwners(Owners):
    """Who is dead, as the test says."""

    def __init__(self, me: str, dead: set[str]) -> None:
        self.me = me
        self._dead = dead

    def is_dead(self, owner: str) -> bool:
        return owner in self._dead

    def bury(self, owner: str) -> None:
        """There is no file."""


class MemoryBox:
    """Everything in memory."""

    def __init__(self) -> None:
        self._store = MemoryStore()
        self._dead: set[str] = set()

    def ledger(self, owner: str = "me", *, bills_here: bool = True) -> Ledger:
        owners = FakeOwners(owner, self._dead)
        return MemoryLedger(self._store, owners, bills_here=bills_here)

    def die(self, owner: str) -> None:
        self._dead.add(owner)

    def states(self) -> dict[str, State]:
        return {rid: row.state for rid, row in self._store.rows.items()}

    def counts(self, rid: str) -> Counts:
        row = self._store.rows[rid]
        return row.running if row.settlement is None else row.settlement.counts

    def bill(self) -> Bill:
        bill = self._store.bill.values()
        return sorted((e.rid, e.product, e.quantity, e.account.key_id) for e in bill)

    def resolve(self, rid: str, counts: Counts) -> None:
        row = self._store.rows[rid]
        assert row.settlement is not None
        row.settlement = row.settlement._replace(state=State.SETTLED, counts=counts)
        row.delivered = False

    def accounts(self, expires: datetime | None) -> MemoryAccounts:
        secret = hashlib.sha256(b"key").hexdigest()
        return MemoryAccounts({secret: Account("id", expires=expires)})

    def close(self) -> None:
        """Nothing is open."""


class SQLiteBox:
    """A real file, and for each ledger a pool of its own, as each process has one."""

    def __init__(self, path: Path) -> None:
        prepare(path)
        self._path = path
        self._pools: list[ConnectionPool] = []
        self._dead: set[str] = set()

    def _pool(self) -> ConnectionPool:
        self._pools.append(make_pool(self._path, reactor, install))
        return self._pools[-1]

    def ledger(self, owner: str = "me", *, bills_here: bool = True) -> Ledger:
        owners = FakeOwners(owner, self._dead)
        return SQLiteLedger(self._pool(), reactor, owners, bills_here=bills_here)

    def die(self, owner: str) -> None:
        self._dead.add(owner)

    def _query(self, statement: str, *parameters: object) -> list[Any]:
        connection = sqlite3.connect(self._path)
        try:
            return connection.execute(statement, parameters).fetchall()
        finally:
            connection.close()

    def states(self) -> dict[str, State]:
        return {rid: State(state) for rid, state in self._query("SELECT rid, state FROM ledger")}

    def counts(self, rid: str) -> Counts:
        columns = ", ".join(Kind)
        (row,) = self._query(f"SELECT {columns} FROM ledger WHERE rid = ?", rid)
        return {kind: n for kind, n in zip(Kind, row, strict=True) if n is not None}

    def bill(self) -> Bill:
        columns = "rid, product, quantity, api_key"
        return self._query(f"SELECT {columns} FROM event_oneoff ORDER BY {columns}")

    def resolve(self, rid: str, counts: Counts) -> None:
        connection = connect(self._path)
        try:
            ctl.settle(connection, rid, counts, bills_here=False)
        finally:
            connection.close()

    def accounts(self, expires: datetime | None) -> SQLiteAccounts:
        connection = connect(self._path)
        secret = hashlib.sha256(b"key").hexdigest()
        connection.execute(
            "INSERT INTO api_key (id, secret, type, expires) VALUES ('id', ?, 'LLM', ?)",
            (secret, expires and expires.isoformat()),
        )
        connection.close()
        return SQLiteAccounts(self._pool())

    def close(self) -> None:
        for pool in self._pools:
            pool.close()


@pytest.fixture(params=["memory", "sqlite"])
def box(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Box]:
    made = MemoryBox() if request.param == "memory" else SQLiteBox(tmp_path / "db.sqlite")
    yield made
    made.close()


def entry(number: int = 1) -> Entry:
    return Entry(
        rid=f"r{number}",
        opened=NOW,
        account=Account(f"key{number}", "user"),
        path="/v1/chat/completions",
        model="chat",
        device="gpu",
    )


def closing(
    state: State = State.SETTLED,
    counts: Counts = COUNTS,
    seconds: float = 1.0,
    outcome: Outcome | None = Outcome.COMPLETE,
) -> Settlement:
    finished = NOW + timedelta(seconds=seconds)
    return Settlement(state=state, outcome=outcome, counts=counts, finished=finished, status=200)


def billed(number: int, counts: Counts) -> list[tuple[str, str, int, str]]:
    return sorted(
        (f"r{number}", f"chat/gpu/{kind}", count, f"key{number}") for kind, count in counts.items()
    )


def rids(events: Sequence[Event]) -> list[str]:
    return list(dict.fromkeys(event.rid for event in events))


async def closed(ledger: Ledger, number: int, settlement: Settlement) -> None:
    await ledger.open(entry(number))
    await ledger.settle(entry(number), settlement)


# -- rows ----------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_ledger_is_what_it_says(box: Box) -> None:
    assert verifyObject(ILedger, box.ledger())
    assert verifyObject(IOutbox, box.ledger())


@pytest_twisted.ensureDeferred
async def test_an_opened_row_is_there_and_puts_nothing_on_the_bill(box: Box) -> None:
    await box.ledger().open(entry())
    assert box.states() == {"r1": State.OPEN}
    assert box.bill() == []


@pytest_twisted.ensureDeferred
async def test_a_row_that_is_opened_again_is_there_once(box: Box) -> None:
    ledger = box.ledger()
    await ledger.open(entry())
    await ledger.open(entry())
    assert box.states() == {"r1": State.OPEN}


@pytest_twisted.ensureDeferred
async def test_a_row_that_is_opened_again_after_its_settlement_stays_closed(box: Box) -> None:
    ledger = box.ledger()
    await closed(ledger, 1, closing())
    await ledger.open(entry())
    assert box.states() == {"r1": State.SETTLED}


@pytest_twisted.ensureDeferred
async def test_a_settled_row_puts_exactly_its_events_on_the_bill(box: Box) -> None:
    await closed(box.ledger(), 1, closing())
    assert box.states() == {"r1": State.SETTLED}
    assert box.bill() == billed(1, COUNTS)


@pytest_twisted.ensureDeferred
async def test_a_count_of_zero_is_an_event_and_a_count_that_is_missing_is_none(box: Box) -> None:
    await closed(box.ledger(), 1, closing(counts={Kind.EMBEDDING: 0}))
    assert box.bill() == billed(1, {Kind.EMBEDDING: 0})


@pytest_twisted.ensureDeferred
async def test_an_estimated_row_is_billed(box: Box) -> None:
    await closed(box.ledger(), 1, closing(State.ESTIMATED, {Kind.COMPLETION: 7}))
    assert box.states() == {"r1": State.ESTIMATED}
    assert box.bill() == billed(1, {Kind.COMPLETION: 7})


@pytest.mark.parametrize("state", [State.DISPUTED, State.ORPHAN])
@pytest_twisted.ensureDeferred
async def test_a_row_that_waits_for_the_operator_is_not_billed(box: Box, state: State) -> None:
    await closed(box.ledger(), 1, closing(state))
    assert box.states() == {"r1": state}
    assert box.bill() == []


@pytest.mark.parametrize("state", [State.SETTLED, State.ESTIMATED, State.DISPUTED])
@pytest_twisted.ensureDeferred
async def test_settling_again_changes_nothing(box: Box, state: State) -> None:
    ledger = box.ledger()
    await closed(ledger, 1, closing(state))
    bill = box.bill()
    await ledger.settle(entry(), closing(State.SETTLED, {Kind.PROMPT: 99, Kind.EMBEDDING: 1}))
    assert box.states() == {"r1": state}
    assert box.counts("r1") == COUNTS
    assert box.bill() == bill


@pytest_twisted.ensureDeferred
async def test_the_settlement_of_a_request_that_was_taken_for_dead_counts(box: Box) -> None:
    ledger = box.ledger()
    await closed(ledger, 1, closing(State.ORPHAN, {}, outcome=None))
    await ledger.settle(entry(), closing())
    assert box.states() == {"r1": State.SETTLED}
    assert box.bill() == billed(1, COUNTS)


@pytest_twisted.ensureDeferred
async def test_settling_what_was_never_opened_makes_no_row(box: Box) -> None:
    await box.ledger().settle(entry(), closing())
    assert box.states() == {}
    assert box.bill() == []


# -- checkpoints ---------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_checkpoint_is_kept_and_the_last_one_wins(box: Box) -> None:
    ledger = box.ledger()
    await ledger.open(entry())
    await ledger.checkpoint({"r1": {Kind.PROMPT: 3, Kind.COMPLETION: 1}})
    await ledger.checkpoint({"r1": {Kind.PROMPT: 3, Kind.COMPLETION: 5}})
    assert box.counts("r1") == {Kind.PROMPT: 3, Kind.COMPLETION: 5}
    assert box.states() == {"r1": State.OPEN}
    assert box.bill() == []


@pytest_twisted.ensureDeferred
async def test_a_checkpoint_after_the_settlement_changes_nothing(box: Box) -> None:
    ledger = box.ledger()
    await closed(ledger, 1, closing())
    await ledger.checkpoint({"r1": {Kind.PROMPT: 1}, "r2": {Kind.PROMPT: 1}})
    assert box.counts("r1") == COUNTS
    assert box.states() == {"r1": State.SETTLED}


# -- recovery ------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_recovery_closes_the_rows_of_the_dead_and_no_others(box: Box) -> None:
    dead, living, mine = box.ledger("dead"), box.ledger("living"), box.ledger("mine")
    await dead.open(entry(1))
    await dead.open(entry(2))
    await dead.checkpoint({"r2": COUNTS})
    await living.open(entry(3))
    await mine.open(entry(4))
    box.die("dead")
    assert await mine.recover() == {State.ORPHAN: 1, State.ESTIMATED: 1}
    assert box.states() == {
        "r1": State.ORPHAN,
        "r2": State.ESTIMATED,
        "r3": State.OPEN,
        "r4": State.OPEN,
    }
    assert box.bill() == billed(2, COUNTS)


@pytest_twisted.ensureDeferred
async def test_recovery_leaves_closed_rows_alone_and_finds_nothing_twice(box: Box) -> None:
    dead, mine = box.ledger("dead"), box.ledger("mine")
    await closed(dead, 1, closing())
    await dead.open(entry(2))
    box.die("dead")
    assert await mine.recover() == {State.ORPHAN: 1}
    assert await mine.recover() == {}
    assert box.states() == {"r1": State.SETTLED, "r2": State.ORPHAN}
    assert box.bill() == billed(1, COUNTS)


# -- delivery ------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_rows_wait_in_the_order_of_their_ends_with_all_their_events(box: Box) -> None:
    ledger = box.ledger(bills_here=False)
    await closed(ledger, 1, closing(seconds=3))
    await closed(ledger, 2, closing(seconds=1))
    await closed(ledger, 4, closing(State.ESTIMATED, seconds=2))
    await closed(ledger, 3, closing(seconds=2))
    events = await ledger.undelivered(10)
    assert rids(events) == ["r2", "r3", "r4", "r1"]
    assert len(events) == 8
    assert events[0] == Event(
        rid="r2",
        created=NOW + timedelta(seconds=1),
        account=Account("key2", "user"),
        product="chat/gpu/prompt",
        quantity=3,
    )
    assert box.bill() == []


@pytest_twisted.ensureDeferred
async def test_a_limit_counts_rows_not_events(box: Box) -> None:
    ledger = box.ledger(bills_here=False)
    for number in (1, 2, 3):
        await closed(ledger, number, closing(seconds=number))
    assert [event.rid for event in await ledger.undelivered(2)] == ["r1", "r1", "r2", "r2"]


@pytest_twisted.ensureDeferred
async def test_rows_with_nothing_to_bill_take_no_place(box: Box) -> None:
    ledger = box.ledger(bills_here=False)
    await closed(ledger, 1, closing(counts={}, outcome=Outcome.REFUSED))
    await closed(ledger, 2, closing(seconds=2))
    assert rids(await ledger.undelivered(1)) == ["r2"]


@pytest_twisted.ensureDeferred
async def test_what_was_delivered_does_not_wait_any_more(box: Box) -> None:
    ledger = box.ledger(bills_here=False)
    await closed(ledger, 1, closing())
    await closed(ledger, 2, closing(seconds=2))
    await ledger.mark_delivered(["r1", "unknown"])
    assert rids(await ledger.undelivered(10)) == ["r2"]
    await ledger.mark_delivered(["r1", "r2"])
    assert await ledger.undelivered(10) == []


@pytest_twisted.ensureDeferred
async def test_what_is_billed_in_the_store_itself_never_waits(box: Box) -> None:
    ledger = box.ledger()
    await closed(ledger, 1, closing())
    assert await ledger.undelivered(10) == []
    assert await ledger.backlog() == (0, 0.0)


@pytest_twisted.ensureDeferred
async def test_what_a_dead_process_left_is_delivered_by_the_next(box: Box) -> None:
    dead, mine = box.ledger("dead", bills_here=False), box.ledger("mine", bills_here=False)
    await dead.open(entry(1))
    await dead.open(entry(2))
    await dead.checkpoint({"r2": COUNTS})
    await closed(dead, 3, closing())
    box.die("dead")
    await mine.recover()
    assert rids(await mine.undelivered(10)) == ["r3", "r2"]


@pytest.mark.parametrize("state", [State.DISPUTED, State.ORPHAN])
@pytest_twisted.ensureDeferred
async def test_a_row_is_delivered_once_the_operator_has_resolved_it(box: Box, state: State) -> None:
    ledger = box.ledger(bills_here=False)
    await closed(ledger, 1, closing(state, {Kind.PROMPT: 99}))
    assert await ledger.undelivered(10) == []
    assert (await ledger.backlog())[0] == 0
    box.resolve("r1", COUNTS)
    delivered = [(event.product, event.quantity) for event in await ledger.undelivered(10)]
    assert delivered == [("chat/gpu/prompt", 3), ("chat/gpu/completion", 2)]


@pytest_twisted.ensureDeferred
async def test_the_backlog_is_as_old_as_the_row_that_finished_first(box: Box) -> None:
    ledger = box.ledger(bills_here=False)
    assert await ledger.backlog() == (0, 0.0)
    ago = datetime.now(UTC) - timedelta(seconds=100)
    for number, later_s in ((1, 50), (2, 0)):
        finished = ago + timedelta(seconds=later_s)
        await closed(ledger, number, closing()._replace(finished=finished))
    rows, age_s = await ledger.backlog()
    assert rows == 2
    assert age_s == pytest.approx(100, abs=10)


@pytest_twisted.ensureDeferred
async def test_the_backlog_is_never_younger_than_now(box: Box) -> None:
    ledger = box.ledger(bills_here=False)
    later = datetime.now(UTC) + timedelta(hours=1)
    await closed(ledger, 1, closing()._replace(finished=later))
    assert await ledger.backlog() == (1, 0.0)


# -- keys ----------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_key_is_found_by_its_hash(box: Box) -> None:
    accounts = box.accounts(None)
    assert verifyObject(IAccounts, accounts)
    assert await accounts.find(hashlib.sha256(b"key").hexdigest(), NOW) == Account("id")
    assert await accounts.find(hashlib.sha256(b"other").hexdigest(), NOW) is None


@pytest.mark.parametrize(("later_s", "valid"), [(1, True), (0, False), (-1, False)])
@pytest_twisted.ensureDeferred
async def test_a_key_is_valid_until_it_expires(box: Box, later_s: int, valid: bool) -> None:
    expires = NOW + timedelta(seconds=later_s)
    accounts = box.accounts(expires)
    found = await accounts.find(hashlib.sha256(b"key").hexdigest(), NOW)
    assert found == (Account("id", expires=expires) if valid else None)
