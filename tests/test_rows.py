"""Rows written many at once: the same as one by one, in few statements, and faults held apart."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.model import Account, Attempt, Counts, Entry, Kind, Outcome, Settlement, State, events
from llmproxy.storage import rows
from llmproxy.storage.journal import Closing, Noting, Opening, Operation, Settling, _write
from llmproxy.storage.sqlite import connect, migrate, to_text

OPENED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
COUNTS = {Kind.PROMPT: 3, Kind.COMPLETION: 2}
TOO_MUCH = 2**63


def entry(rid: str, key_id: str = "id-alice") -> Entry:
    return Entry(
        rid=rid,
        opened=OPENED,
        account=Account(key_id),
        path="/v1/chat/completions",
        model="chat",
        device="gpu",
    )


def settlement(
    state: State = State.SETTLED, counts: Counts = COUNTS, seconds: int = 1
) -> Settlement:
    return Settlement(
        state=state,
        outcome=Outcome.COMPLETE,
        counts=counts,
        finished=OPENED + timedelta(seconds=seconds),
        status=200,
    )


def opened(rid: str, **fields: Any) -> Opening:
    return Opening(rows.opening(entry(rid, **fields), "owner"), 0.0)


def settled(rid: str, counts: Counts = COUNTS, *, bills_here: bool = True) -> Settling:
    return Settling(rows.closing(rid, settlement(counts=counts), bills_here=bills_here))


def database() -> sqlite3.Connection:
    connection = connect(":memory:")
    migrate(connection)
    return connection


def writer() -> sqlite3.Connection:
    connection = database()
    rows.install(connection)
    return connection


def content(connection: sqlite3.Connection) -> tuple[list[Any], list[Any], list[Any]]:
    """All of it, the bill in its order."""
    bill = "SELECT created, api_key, product, quantity, rid FROM event_oneoff ORDER BY id"
    return (
        connection.execute("SELECT * FROM ledger ORDER BY rid").fetchall(),
        connection.execute(bill).fetchall(),
        connection.execute("SELECT * FROM usage_day").fetchall(),
    )


@pytest.fixture
def file() -> Iterator[sqlite3.Connection]:
    with closing(writer()) as connection:
        yield connection


def states(connection: sqlite3.Connection) -> dict[str, str]:
    return dict(connection.execute("SELECT rid, state FROM ledger").fetchall())


def quantities(connection: sqlite3.Connection) -> list[tuple[str, int]]:
    return connection.execute("SELECT rid, quantity FROM event_oneoff ORDER BY id").fetchall()


# -- the same as one by one --------------------------------------------------------------------


@dataclass(frozen=True)
class Open:
    """What is done to a row: opened,"""

    rid: str
    key_id: str

    def plainly(self, connection: sqlite3.Connection) -> None:
        connection.execute(
            "INSERT INTO ledger (rid, state, owner, opened, api_key, path, model, device)"
            " VALUES (?, 'open', 'owner', ?, ?, '/v1/chat/completions', 'chat', 'gpu')"
            " ON CONFLICT (rid) DO NOTHING",
            (self.rid, to_text(OPENED), self.key_id),
        )

    def operation(self) -> Operation:
        return opened(self.rid, key_id=self.key_id)


@dataclass(frozen=True)
class Close:
    """closed, with the number that is known,"""

    rid: str
    settlement: Settlement
    bills_here: bool

    def plainly(self, connection: sqlite3.Connection) -> None:
        row = connection.execute(
            "SELECT api_key FROM ledger WHERE rid = ? AND state IN ('open', 'orphan')", (self.rid,)
        ).fetchone()
        if row is None:
            return
        due = events(entry(self.rid, key_id=row[0]), self.settlement)
        counts = self.settlement.counts
        delivered = self.bills_here or (not due and self.settlement.state is State.SETTLED)
        connection.execute(
            "UPDATE ledger SET state = ?, outcome = 'complete', status = 200, finished = ?,"
            " prompt = ?, completion = ?, embedding = ?, transcription = ?, delivered = ?"
            " WHERE rid = ?",
            (
                str(self.settlement.state),
                to_text(self.settlement.finished),
                *(counts.get(kind) for kind in Kind),
                delivered,
                self.rid,
            ),
        )
        if self.bills_here:
            rows.add_events(connection, due)

    def operation(self) -> Operation:
        return Settling(rows.closing(self.rid, self.settlement, bills_here=self.bills_here))


@dataclass(frozen=True)
class GiveUp:
    """or closed because its opening took too long."""

    rid: str

    def plainly(self, connection: sqlite3.Connection) -> None:
        connection.execute(
            "UPDATE ledger SET state = 'settled', outcome = 'refused', status = NULL,"
            " finished = ?, prompt = NULL, completion = NULL, embedding = NULL,"
            " transcription = NULL, delivered = 1 WHERE rid = ? AND state IN ('open', 'orphan')",
            (to_text(OPENED), self.rid),
        )

    def operation(self) -> Operation:
        return Closing(rows.closing_for_nothing(rows.opening(entry(self.rid), "owner")))


RIDS = st.sampled_from([f"r{number}" for number in range(6)])
SETTLEMENTS = st.builds(
    settlement,
    st.sampled_from([state for state in State if state is not State.OPEN]),
    st.dictionaries(st.sampled_from(list(Kind)), st.integers(0, 2**63 - 1), max_size=3),
    st.integers(0, 9),
)
STEPS = st.one_of(
    st.builds(Open, RIDS, st.sampled_from(["alice", "bob"])),
    st.builds(Close, RIDS, SETTLEMENTS, st.booleans()),
    st.builds(GiveUp, RIDS),
)


@given(st.lists(st.lists(STEPS, max_size=12), max_size=4))
def test_what_is_written_at_once_is_what_would_be_written_one_by_one(
    batches: Sequence[Sequence[Open | Close | GiveUp]],
) -> None:
    with closing(writer()) as grouped, closing(database()) as plain:
        for batch in batches:
            _write(grouped, [step.operation() for step in batch])
            for step in batch:
                step.plainly(plain)
        assert content(grouped) == content(plain)


@given(st.lists(STEPS, max_size=12), st.integers(1, 4))
def test_what_is_written_again_changes_nothing(
    batch: Sequence[Open | Close | GiveUp], times: int
) -> None:
    """As long as it has the form that life has: a row is not closed before it is opened."""
    batch = sorted(batch, key=lambda step: not isinstance(step, Open))
    with closing(writer()) as once, closing(writer()) as often:
        _write(once, [step.operation() for step in batch])
        for _ in range(times):
            _write(often, [step.operation() for step in batch])
        assert content(once) == content(often)


@pytest.mark.parametrize("count", [1, rows.MOST_ROWS, rows.MOST_ROWS + 1, 5 * rows.MOST_ROWS + 7])
def test_any_number_of_rows_is_written_in_their_order(file: sqlite3.Connection, count: int) -> None:
    rids = [f"r{number:03}" for number in range(count)]
    _write(file, [opened(rid) for rid in rids])
    _write(file, [settled(rid) for rid in reversed(rids)])
    assert states(file) == dict.fromkeys(rids, "settled")
    assert quantities(file) == [(rid, n) for rid in reversed(rids) for n in (3, 2)]


def test_a_row_that_is_opened_again_after_its_end_in_one_commit_stays_closed(
    file: sqlite3.Connection,
) -> None:
    _write(file, [opened("r1")])
    _write(file, [settled("r1"), opened("r1"), settled("r1", {Kind.PROMPT: 9})])
    assert states(file) == {"r1": "settled"}
    assert quantities(file) == [("r1", 3), ("r1", 2)]


def test_what_is_closed_before_it_is_opened_in_one_commit_is_open(file: sqlite3.Connection) -> None:
    _write(file, [settled("r1"), opened("r1")])
    assert states(file) == {"r1": "open"}
    assert quantities(file) == []


def test_a_checkpoint_of_many_rows_is_for_those_that_are_open(file: sqlite3.Connection) -> None:
    rids = [f"r{number:03}" for number in range(2 * rows.MOST_ROWS + 3)]
    _write(file, [*map(opened, rids), settled(rids[0])])
    rows.CHECKPOINT.write(file, [rows.checkpoint(rid, {Kind.COMPLETION: 7}) for rid in rids])
    noted = file.execute("SELECT prompt, completion FROM ledger ORDER BY rid").fetchall()
    assert noted == [(3, 2)] + [(None, 7)] * (len(rids) - 1)
    assert quantities(file) == [(rids[0], 3), (rids[0], 2)]


def test_the_operator_s_own_changes_add_no_lines_by_themselves(file: sqlite3.Connection) -> None:
    """llmproxyctl's connection has no triggers: it adds the lines itself."""
    with closing(database()) as other:
        assert other.execute("SELECT count(*) FROM sqlite_temp_schema").fetchone() == (0,)
    _write(file, [opened("r1"), settled("r1", bills_here=False)])
    rows.MARK_DELIVERED.write(file, [("r1",), ("r2",)])
    assert file.execute("SELECT delivered FROM ledger").fetchall() == [(1,)]
    assert quantities(file) == []


# -- few statements ----------------------------------------------------------------------------


class Counting:
    """A connection that notes each statement."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.statements: list[str] = []

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction

    def execute(self, statement: str, *parameters: Any) -> Any:
        self.statements.append(statement.split()[0])
        return self._connection.execute(statement, *parameters)


@pytest.mark.parametrize(
    ("half", "statements"),
    [
        (1, ["INSERT"]),
        (rows.MOST_ROWS // 2, ["INSERT"]),
        (rows.MOST_ROWS // 2 + 1, ["BEGIN", "INSERT", "INSERT", "COMMIT"]),
    ],
)
def test_a_commit_of_rows_is_one_statement_or_few(
    file: sqlite3.Connection, half: int, statements: list[str]
) -> None:
    _write(file, [opened(f"r{number}") for number in range(half)])
    mixed: list[Operation] = []
    for number in range(half):
        mixed += [settled(f"r{number}"), opened(f"s{number}")]
    counting = Counting(file)
    _write(cast(sqlite3.Connection, counting), mixed)
    assert counting.statements == statements
    assert len(quantities(file)) == 2 * half
    assert not file.in_transaction


# -- faults ------------------------------------------------------------------------------------


def test_one_that_can_t_be_written_does_not_hold_up_those_that_go_with_it(
    file: sqlite3.Connection,
) -> None:
    _write(file, [opened(rid) for rid in ("r1", "r2", "r3")])
    bad = [opened("n2", key_id=cast(str, None)), settled("r2", {Kind.PROMPT: TOO_MUCH})]
    good = [opened("n1"), opened("n3"), settled("r1"), settled("r3")]
    _write(file, [good[0], bad[0], good[1], good[2], bad[1], good[3]])
    assert [type(each.error) for each in bad] == [sqlite3.IntegrityError, OverflowError]
    assert [each.error for each in good] == [None] * 4
    assert states(file) == {
        "n1": "open",
        "n3": "open",
        "r1": "settled",
        "r2": "open",
        "r3": "settled",
    }
    assert quantities(file) == [("r1", 3), ("r1", 2), ("r3", 3), ("r3", 2)]


def test_a_fault_after_the_first_statement_of_many_rows_repeats_them_to_no_effect(
    file: sqlite3.Connection,
) -> None:
    rids = [f"r{number:03}" for number in range(rows.MOST_ROWS + 5)]
    _write(file, [opened(rid) for rid in rids])
    batch = [settled(rid) for rid in rids[:-1]] + [settled(rids[-1], {Kind.PROMPT: TOO_MUCH})]
    _write(file, batch)
    assert [each.error for each in batch[:-1]] == [None] * (len(rids) - 1)
    assert isinstance(batch[-1].error, OverflowError)
    assert quantities(file) == [(rid, n) for rid in rids[:-1] for n in (3, 2)]


def test_one_that_could_not_be_written_is_judged_by_its_last_try(file: sqlite3.Connection) -> None:
    operation = settled("r1")
    operation.error = ValueError("at first")
    _write(file, [opened("r1"), operation])
    assert operation.error is None


@pytest.mark.parametrize("number", [1, rows.MOST_ROWS])
def test_trouble_of_the_store_undoes_all(file: sqlite3.Connection, number: int) -> None:
    _write(file, [opened("r1")])
    before = content(file)
    file.create_function("fault", 0, lambda: 1 // 0)
    file.execute("CREATE TEMP TRIGGER fails AFTER UPDATE ON main.ledger BEGIN SELECT fault(); END")
    more = [opened(f"s{number}") for number in range(number)]
    with pytest.raises(sqlite3.OperationalError):
        _write(file, [*more, settled("r1")])
    assert content(file) == before
    assert not file.in_transaction


# -- words for the log -------------------------------------------------------------------------


def test_a_closing_is_told_with_its_numbers() -> None:
    told = [
        settled("r1").lost(),
        Settling(rows.closing("r2", settlement(State.ORPHAN, {}), bills_here=True)).lost(),
        opened("r3").lost(),
        Closing(rows.closing_for_nothing(opened("r4").row)).lost(),
    ]
    assert told == ["r1 settled: prompt 3, completion 2", "r2 orphan: nothing", "", ""]


def test_a_settlement_without_an_outcome_has_none(file: sqlite3.Connection) -> None:
    unknown = settlement(State.ORPHAN, {})._replace(outcome=None, status=None)
    _write(file, [opened("r1"), Settling(rows.closing("r1", unknown, bills_here=True))])
    assert file.execute("SELECT state, outcome, status FROM ledger").fetchall() == [
        ("orphan", None, None)
    ]


# -- attempts ----------------------------------------------------------------------------------


def noted(number: int, server: str = "http://gpu1") -> Noting:
    made = Attempt("r", number, OPENED, server, Outcome.COMPLETE, 200)
    return Noting(rows.attempt(made))


def test_an_attempt_is_there_once_however_often_it_is_written(file: sqlite3.Connection) -> None:
    _write(file, [opened("r"), noted(1), noted(2), settled("r"), noted(1, "http://other")])
    _write(file, [noted(2)])
    found = file.execute("SELECT number, server, outcome, status FROM attempt ORDER BY number")
    assert found.fetchall() == [
        (1, "http://gpu1", "complete", 200),
        (2, "http://gpu1", "complete", 200),
    ]
    assert states(file) == {"r": "settled"}
