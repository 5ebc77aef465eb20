"""Sums of use: kept with the ledger in the same commit, whoever closes a row, and each row once."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from llmproxy.ctl.ledger import settle
from llmproxy.errors import StorageError
from llmproxy.model import (
    BILLED,
    MAX_COUNT,
    Account,
    Counts,
    Entry,
    Kind,
    Outcome,
    Price,
    Settlement,
    State,
    Used,
)
from llmproxy.storage import rows
from llmproxy.storage.sqlite import connect, migrate, prepare
from llmproxy.storage.usage_days import READ_TIMEOUT_S, SQLiteUsage

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
PRICE = Price(7, "EUR", 1, 2, 3, 4)
COUNTS = {Kind.PROMPT: 3, Kind.COMPLETION: 2}
Sums = dict[tuple[str, str, str, int], list[int]]


def entry(rid: str, key_id: str = "alice", price: Price | None = PRICE) -> Entry:
    return Entry(rid, NOON, Account(key_id), "/v1/chat/completions", "chat", "gpu", price)


def closed(
    state: State = State.SETTLED, counts: Counts = COUNTS, finished: datetime = NOON
) -> Settlement:
    return Settlement(state, Outcome.COMPLETE, counts, finished, 200)


def write(connection: sqlite3.Connection, entry: Entry, *settlements: Settlement) -> None:
    rows.CHANGE.write(connection, [rows.opening(entry, "owner")])
    for each in settlements:
        rows.CHANGE.write(connection, [rows.closing(entry.rid, each, bills_here=True)])


def sums(connection: sqlite3.Connection) -> Sums:
    found = connection.execute("SELECT * FROM usage_day").fetchall()
    return {row[:4]: list(row[4:]) for row in found}


def added_up(connection: sqlite3.Connection) -> Sums:
    """The same from the ledger, by Python."""
    found: Sums = {}
    billed = ", ".join(f"'{state}'" for state in BILLED)
    for *key, prompt, completion, embedding, transcription in connection.execute(
        "SELECT substr(finished, 1, 10), api_key, model, ifnull(price, 0), prompt, completion,"
        f" embedding, transcription FROM ledger WHERE state IN ({billed})"
    ):
        counts = [1, *(n or 0 for n in (prompt, completion, embedding, transcription))]
        before = found.get((key[0], key[1], key[2], key[3]), [0] * 5)
        found[key[0], key[1], key[2], key[3]] = [
            min(a + b, MAX_COUNT) for a, b in zip(before, counts, strict=True)
        ]
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    prepare(tmp_path / "db.sqlite")
    return tmp_path / "db.sqlite"


@pytest.fixture
def file(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(connect(path)) as connection:
        rows.install(connection)
        rows.add_prices(connection, [PRICE])
        yield connection


CLOSINGS = st.builds(
    closed,
    st.sampled_from([state for state in State if state is not State.OPEN]),
    st.dictionaries(st.sampled_from(list(Kind)), st.integers(0, MAX_COUNT), max_size=3),
    st.sampled_from([NOON, NOON + timedelta(days=1)]),
)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["alice", "bob"]),
            st.sampled_from([PRICE, None]),
            st.lists(CLOSINGS, max_size=3),
        ),
        max_size=8,
    )
)
def test_the_sums_are_those_of_the_ledger_at_any_time(life: Sequence[Any]) -> None:
    with closing(connect(":memory:")) as connection:
        migrate(connection)
        rows.install(connection)
        for number, (key_id, price, closings) in enumerate(life):
            write(connection, entry(f"r{number}", key_id, price), *closings)
            assert sums(connection) == added_up(connection)


def test_a_commit_that_is_repeated_counts_once(file: sqlite3.Connection) -> None:
    for _ in range(3):
        write(file, entry("r1"), closed())
    assert sums(file) == {("2026-01-31", "alice", "chat", 7): [1, 3, 2, 0, 0]}


def test_a_commit_that_is_undone_counts_nothing(file: sqlite3.Connection) -> None:
    file.execute("BEGIN IMMEDIATE")
    write(file, entry("r1"), closed())
    assert sums(file)
    file.execute("ROLLBACK")
    assert sums(file) == {}


def test_a_row_that_becomes_better_known_counts_when_it_is_billed(file: sqlite3.Connection) -> None:
    write(file, entry("r1"), closed(State.ORPHAN))
    assert sums(file) == {}
    write(file, entry("r1"), closed(State.ESTIMATED), closed(State.SETTLED))
    file.execute("UPDATE ledger SET state = 'settled'")
    assert sums(file) == {("2026-01-31", "alice", "chat", 7): [1, 3, 2, 0, 0]}


@pytest.mark.parametrize("state", [State.DISPUTED, State.ORPHAN])
def test_what_the_operator_resolves_counts_on_the_day_of_its_end(
    path: Path, file: sqlite3.Connection, state: State
) -> None:
    write(file, entry("r1"), closed(state, {}))
    with closing(connect(path)) as operator:
        settle(operator, "r1", COUNTS, bills_here=True)
    assert sums(file) == {("2026-01-31", "alice", "chat", 7): [1, 3, 2, 0, 0]}


def without_sums(path: Path) -> None:
    """As an earlier version has left it."""
    with closing(connect(path)) as connection:
        connection.execute("DROP TRIGGER usage_row")
        connection.execute("DROP TABLE usage_day")


def test_an_earlier_ledger_is_added_up_once_however_many_start(
    path: Path, file: sqlite3.Connection
) -> None:
    without_sums(path)
    for number in range(50):
        write(file, entry(f"r{number}", "ab"[number % 2]), closed())
    write(file, entry("huge"), closed(counts={Kind.PROMPT: MAX_COUNT}))
    write(file, entry("more"), closed(counts={Kind.PROMPT: MAX_COUNT}))
    write(file, entry("waits"), closed(State.ORPHAN))
    write(file, entry("open"))
    starting = [threading.Thread(target=prepare, args=(path,)) for _ in range(8)]
    for each in starting:
        each.start()
    for each in starting:
        each.join()
    found = sums(file)
    # Of sums that are too large, the last digits may be missing.
    assert found.pop(("2026-01-31", "alice", "chat", 7))[1] > MAX_COUNT - 2 * 10**9
    assert found == {("2026-01-31", key, "chat", 7): [25, 75, 50, 0, 0] for key in "ab"}
    write(file, entry("r0"), closed())
    write(file, entry("later", "a"), closed())
    assert sums(file)["2026-01-31", "a", "chat", 7] == [26, 78, 52, 0, 0]


def test_sums_whose_trigger_was_lost_are_made_again(path: Path, file: sqlite3.Connection) -> None:
    write(file, entry("before"), closed())
    file.execute("DROP TRIGGER usage_row")
    write(file, entry("missed"), closed())
    prepare(path)
    assert sums(file) == {("2026-01-31", "alice", "chat", 7): [2, 6, 4, 0, 0]}


def test_a_program_of_an_earlier_version_that_still_runs_is_counted_too(
    path: Path, file: sqlite3.Connection
) -> None:
    without_sums(path)
    write(file, entry("before"), closed())
    prepare(path)  # the new version starts, while this connection goes on
    write(file, entry("after"), closed())
    assert sums(file) == {("2026-01-31", "alice", "chat", 7): [2, 6, 4, 0, 0]}


# -- reading -----------------------------------------------------------------------------------


class Pool:
    """A pool that answers when it is told to; `path` is asked for the answers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[Callable[[], None]] = []

    def runQuery(self, statement: str, parameters: Sequence[Any]) -> Deferred[Any]:
        done: Deferred[Any] = Deferred()

        def answer() -> None:
            with closing(connect(self.path)) as connection:
                done.callback(connection.execute(statement, parameters).fetchall())

        self.waiting.append(answer)
        return done

    def answer(self) -> None:
        self.waiting.pop(0)()


@pytest_twisted.ensureDeferred
async def test_a_key_reads_its_own_days(path: Path, file: sqlite3.Connection) -> None:
    for days in range(-1, 3):
        finished = NOON + timedelta(days=days)
        write(file, entry(f"mine{days}"), closed(finished=finished))
        write(file, entry(f"other{days}", "bob"), closed(finished=finished))
    write(file, entry("free", price=None), closed(State.ESTIMATED, {Kind.EMBEDDING: 5}))
    pool: Any = Pool(path)
    reading = SQLiteUsage(pool, Clock()).of("alice", date(2026, 1, 31), date(2026, 2, 2))
    pool.answer()
    counts = {kind: COUNTS.get(kind, 0) for kind in Kind}
    assert await reading == [
        Used("2026-01-31", "chat", 1, {**dict.fromkeys(Kind, 0), Kind.EMBEDDING: 5}, None),
        Used("2026-01-31", "chat", 1, counts, PRICE),
        Used("2026-02-01", "chat", 1, counts, PRICE),
    ]


@pytest_twisted.ensureDeferred
async def test_a_read_is_waited_for_so_long_and_takes_its_key_s_turn(path: Path) -> None:
    clock, pool = Clock(), Pool(path)
    usage = SQLiteUsage(pool, clock)  # type: ignore[arg-type]
    days = (date(2026, 1, 1), date(2026, 2, 1))
    slow = usage.of("alice", *days)
    with pytest.raises(StorageError):
        await usage.of("alice", *days)
    other = usage.of("bob", *days)
    clock.advance(READ_TIMEOUT_S)
    for given_up in (slow, other):
        with pytest.raises(StorageError):
            await given_up
    with pytest.raises(StorageError):
        await usage.of("alice", *days)
    assert len(pool.waiting) == 2
    pool.answer()
    again = usage.of("alice", *days)
    pool.answer()
    pool.answer()
    assert await again == []
