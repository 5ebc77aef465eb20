"""The ledger's writer: commits in groups, repeated until they are there; and their rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_twisted
from proxy import reactor
from twisted.enterprise import adbapi
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import Clock, deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface.verify import verifyObject

from llmproxy.errors import StorageError
from llmproxy.model import Account, Entry, Event, Kind, Outcome, Settlement, State
from llmproxy.storage import ILedger, IOutbox, journal
from llmproxy.storage.journal import (
    OPEN_TIMEOUT_S,
    RETRY_S,
    SWEEP_S,
    Operation,
    SQLiteLedger,
)
from llmproxy.storage.owners import Owners
from llmproxy.storage.rows import add_events, install
from llmproxy.storage.sqlite import connect, make_pool, prepare
from llmproxy.storage.turnstile import Turnstile

OPENED = datetime(2026, 1, 2, 3, 4, 5, 6000, tzinfo=UTC)
FINISHED = OPENED + timedelta(seconds=7)
COUNTS = {Kind.PROMPT: 3, Kind.COMPLETION: 2}


def entry(rid: str, key_id: str = "id-alice") -> Entry:
    return Entry(
        rid=rid,
        opened=OPENED,
        account=Account(key_id, "user-7"),
        path="/v1/chat/completions",
        model="chat",
        device="gpu",
    )


def settled(state: State = State.SETTLED, **fields: Any) -> Settlement:
    usual: dict[str, Any] = {"outcome": Outcome.COMPLETE, "counts": COUNTS, "finished": FINISHED}
    usual["status"] = 200
    return Settlement(state=state, **(usual | fields))


class HeldPool:
    """The writer's pool, whose commits run when the test says so, against the real file."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.connection = connect(path)
        self._clock = clock
        install(self.connection)
        self.commits: list[int] = []  # how many operations were in each
        self._waiting: list[tuple[Deferred[Any], Callable[[], Any], int]] = []

    def runWithConnection(
        self, act: Callable[..., Any], take: Callable[[], Sequence[Operation]], *args: Any
    ) -> Deferred[Any]:
        """The thread begins at once: what is there by now is in this commit."""
        assert not self._waiting, "two commits at a time"
        done: Deferred[Any] = Deferred()
        batch = take()
        self._waiting.append((done, lambda: act(self.connection, lambda: batch, *args), len(batch)))
        return done

    @property
    def runs(self) -> bool:
        """A commit has begun."""
        return bool(self._waiting)

    @property
    def busy(self) -> bool:
        """The same, once the reactor's rounds have passed that it waits for."""
        self._clock.advance(0)
        return self.runs

    def commit(self) -> None:
        """Let the commit that waits succeed."""
        assert self.busy
        ((done, act, operations),) = self._waiting
        self._waiting.clear()
        try:
            result = act()
        except Exception:
            done.errback(Failure())
        else:
            self.commits.append(operations)
            done.callback(result)

    def fail(self, *, applied: bool = False, text: str = "disk I/O error") -> None:
        """Let it fail; `applied`: it took effect all the same."""
        assert self.busy
        ((done, act, _),) = self._waiting
        self._waiting.clear()
        if applied:
            act()
        done.errback(sqlite3.OperationalError(text))

    def commit_all(self) -> None:
        while self.busy:
            self.commit()


class Rounds(Clock):
    """A clock that can run like a reactor, in rounds."""

    def round(self) -> None:
        """Run what is due, but not what that adds."""
        for call in [each for each in self.calls if each.getTime() <= self.seconds()]:
            self.calls.remove(call)
            call.called = 1
            call.func(*call.args, **call.kw)


class Books:
    """A ledger on a real file, with a clock and commits in the test's hands."""

    def __init__(self, folder: Path, *, bills_here: bool = True) -> None:
        self.path = folder / "db.sqlite"
        prepare(self.path)
        self.owners = Owners(self.path)
        self.owners.join()
        self.clock = Rounds()
        self.pool = HeldPool(self.path, self.clock)
        self.commits: list[int] = []
        self.ledger = SQLiteLedger(
            cast(adbapi.ConnectionPool, self.pool),
            self.clock,
            self.owners,
            bills_here=bills_here,
            on_commit=lambda seconds, operations: self.commits.append(operations),
        )
        self.writer = self.ledger.writer

    def close(self) -> None:
        self.writer.stop()
        assert self.clock.getDelayedCalls() == []
        self.pool.connection.close()
        self.owners.leave()

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(self.path)
        try:
            return connection.execute(statement).fetchall()
        finally:
            connection.close()

    def rows(self) -> list[tuple[Any, ...]]:
        return self.query(
            "SELECT rid, state, outcome, prompt, completion, delivered FROM ledger ORDER BY rid"
        )

    def bill(self) -> list[tuple[Any, ...]]:
        return self.query("SELECT rid, product, quantity FROM event_oneoff ORDER BY rid, id")

    def lock(self) -> Callable[[], object]:
        """Another process's lock; call the result to end it."""
        self.pool.connection.execute("PRAGMA busy_timeout = 0")
        other = connect(self.path)
        other.execute("BEGIN EXCLUSIVE")
        return other.close

    def forbid(self) -> Callable[[], object]:
        """Statements begin, and can't write; call the result to end it."""
        self.pool.connection.execute("PRAGMA query_only = 1")
        return lambda: self.pool.connection.execute("PRAGMA query_only = 0")


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    books = Books(tmp_path)
    yield books
    books.close()


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Books]:
    """The same, where the bills are stored elsewhere."""
    books = Books(tmp_path, bills_here=False)
    yield books
    books.close()


def failure_of(waiting: Deferred[Any]) -> Failure:
    failures: list[Failure] = []
    waiting.addErrback(failures.append)
    (failure,) = failures
    return failure


def committed(books: Books, waiting: Deferred[Any]) -> Any:
    """What a Deferred gives once all is committed."""
    books.pool.commit_all()
    return waiting.result


BILL = [("r1", "chat/gpu/prompt", 3), ("r1", "chat/gpu/completion", 2)]


# -- rows --------------------------------------------------------------------------------------


def test_the_ledger_is_a_ledger_and_an_outbox(books: Books) -> None:
    verifyObject(ILedger, books.ledger)
    verifyObject(IOutbox, books.ledger)


def test_a_row_that_can_t_be_written_is_not_open(books: Books) -> None:
    opening = books.ledger.open(entry("r", key_id=cast(str, None)))
    books.pool.commit_all()
    failure_of(opening).trap(sqlite3.IntegrityError)


def test_a_row_is_open_and_then_settled_with_its_events(books: Books) -> None:
    opened = books.ledger.open(entry("r1"))
    assert not opened.called
    books.pool.commit()
    assert opened.called
    assert books.rows() == [("r1", "open", None, None, None, 0)]
    assert books.bill() == []
    done = books.ledger.settle(entry("r1"), settled())
    books.pool.commit()
    assert done.called
    assert books.rows() == [("r1", "settled", "complete", 3, 2, 1)]
    assert books.bill() == BILL


def test_a_row_says_all_that_is_known_of_its_request(books: Books) -> None:
    books.ledger.open(entry("r1"))
    books.pool.commit()
    books.ledger.settle(entry("r1"), settled(State.DISPUTED, raw='{"prompt_tokens":-1}'))
    books.pool.commit()
    ((*known, owner, opened, finished),) = books.query(
        "SELECT rid, api_key, user_id, path, model, device, status, raw, owner, opened, finished"
        " FROM ledger"
    )
    assert known[:6] == ["r1", "id-alice", "user-7", "/v1/chat/completions", "chat", "gpu"]
    assert known[6:] == [200, '{"prompt_tokens":-1}']
    assert owner == books.owners.me
    assert opened == "2026-01-02T03:04:05.006000+00:00"
    assert finished == "2026-01-02T03:04:12.006000+00:00"


def test_settling_again_changes_nothing(books: Books) -> None:
    books.ledger.open(entry("r1"))
    books.pool.commit_all()
    for counts in (COUNTS, {Kind.PROMPT: 900, Kind.COMPLETION: 900}):
        again = books.ledger.settle(entry("r1"), settled(counts=counts))
        books.pool.commit_all()
        assert again.called
    assert books.rows() == [("r1", "settled", "complete", 3, 2, 1)]
    assert books.bill() == BILL


def test_opening_a_row_again_leaves_it_as_it_is(books: Books) -> None:
    books.ledger.open(entry("r1"))
    books.ledger.settle(entry("r1"), settled())
    books.ledger.open(entry("r1"))
    books.pool.commit_all()
    assert books.rows() == [("r1", "settled", "complete", 3, 2, 1)]


def test_an_event_that_is_there_already_stays_as_it_is(books: Books) -> None:
    for quantity in (3, 900):
        due = Event(
            rid="r1",
            created=FINISHED,
            account=Account("id-alice"),
            product="chat/gpu/prompt",
            quantity=quantity,
        )
        add_events(books.pool.connection, [due])
    assert books.bill() == BILL[:1]


@pytest.mark.parametrize("state", [State.DISPUTED, State.ORPHAN])
def test_what_waits_for_the_operator_is_not_on_the_bill(books: Books, state: State) -> None:
    books.ledger.open(entry("r1"))
    books.ledger.settle(entry("r1"), settled(state))
    books.pool.commit_all()
    assert books.rows()[0][:2] == ("r1", state)
    assert books.bill() == []


def test_a_true_zero_is_on_the_bill(books: Books) -> None:
    books.ledger.open(entry("r1"))
    books.ledger.settle(entry("r1"), settled(counts={Kind.EMBEDDING: 0}))
    books.pool.commit_all()
    assert books.bill() == [("r1", "chat/gpu/embedding", 0)]


def test_the_largest_count_is_billed_as_it_is(books: Books) -> None:
    books.ledger.open(entry("r1"))
    books.ledger.settle(entry("r1"), settled(counts={Kind.PROMPT: 2**63 - 1}))
    books.pool.commit_all()
    assert books.bill() == [("r1", "chat/gpu/prompt", 2**63 - 1)]


def test_a_checkpoint_is_for_open_rows_only(books: Books) -> None:
    for rid in ("r1", "r2"):
        books.ledger.open(entry(rid))
    books.ledger.settle(entry("r1"), settled())
    books.ledger.checkpoint({"r1": {Kind.PROMPT: 1}, "r2": {Kind.COMPLETION: 4}})
    books.pool.commit_all()
    assert books.rows() == [
        ("r1", "settled", "complete", 3, 2, 1),
        ("r2", "open", None, None, 4, 0),
    ]


# -- commits -----------------------------------------------------------------------------------


def test_what_arrives_while_a_commit_runs_is_one_next_commit(books: Books) -> None:
    opened = [books.ledger.open(entry("r0"))]
    assert books.pool.busy
    opened += [books.ledger.open(entry(f"r{number}")) for number in range(1, 100)]
    books.pool.commit()
    assert [each.called for each in opened] == [True] + [False] * 99
    books.pool.commit()
    assert all(each.called for each in opened)
    assert books.pool.commits == [1, 99]
    assert books.commits == [1, 99]
    assert not books.pool.busy


def test_there_is_no_timer_between_commits(books: Books) -> None:
    books.ledger.open(entry("r1"))
    assert books.pool.busy
    books.ledger.open(entry("r2"))
    books.pool.commit()
    assert books.pool.busy  # and the clock stood still


def test_what_arrives_in_one_round_of_the_reactor_is_one_commit(books: Books) -> None:
    books.ledger.open(entry("r1"))
    assert not books.pool.runs
    books.ledger.open(entry("r2"))
    books.clock.round()
    assert books.pool.runs
    books.pool.commit()
    assert books.pool.commits == [2]


def test_the_next_commit_has_what_the_round_brings_in_which_the_last_one_ends(
    books: Books,
) -> None:
    """Its end is told before what is ready in that round is read."""
    books.ledger.open(entry("r1"))
    books.clock.round()
    books.ledger.open(entry("r2"))
    books.pool.commit()
    books.clock.round()
    assert not books.pool.runs
    books.ledger.open(entry("r3"))  # something that was read
    books.clock.round()
    assert books.pool.runs
    books.pool.commit()
    assert books.pool.commits == [1, 2]


def test_operations_are_done_in_their_order(books: Books) -> None:
    order: list[int] = []
    for number in range(10):
        books.writer.write(lambda _: None).addCallback(lambda _, n: order.append(n), number)
    books.pool.commit_all()
    assert order == list(range(10))


def test_an_open_and_a_settle_in_one_commit_are_done_in_this_order(books: Books) -> None:
    books.ledger.open(entry("r1"))
    books.ledger.settle(entry("r1"), settled())
    books.pool.commit_all()
    assert books.pool.commits == [2]
    assert books.rows() == [("r1", "settled", "complete", 3, 2, 1)]


def test_when_idle_waits_for_all_that_was_added(books: Books) -> None:
    assert books.writer.when_idle().called
    books.ledger.open(entry("r1"))
    assert books.pool.busy
    books.ledger.open(entry("r2"))
    idle = books.writer.when_idle()
    assert books.writer.pending == 2
    books.pool.commit()
    assert not idle.called
    books.pool.commit()
    assert idle.called
    assert books.writer.pending == 0


def test_an_idle_writer_has_no_timer(books: Books) -> None:
    books.ledger.open(entry("r1"))
    books.pool.commit_all()
    books.clock.advance(SWEEP_S)
    assert books.clock.getDelayedCalls() == []


# -- commits that fail -------------------------------------------------------------------------


@pytest.mark.parametrize("applied", [False, True], ids=["lost", "applied"])
def test_a_failed_commit_is_repeated_until_it_is_there(books: Books, applied: bool) -> None:
    books.ledger.open(entry("r1"))
    books.pool.commit()
    done = books.ledger.settle(entry("r1"), settled())
    for _ in range(20):
        books.pool.fail(applied=applied)
        assert not books.pool.busy
        books.clock.advance(RETRY_S[1])
    assert not done.called
    books.pool.commit()
    assert done.called
    assert books.rows() == [("r1", "settled", "complete", 3, 2, 1)]
    assert books.bill() == BILL


def test_a_failed_commit_is_repeated_soon_and_then_once_a_second(books: Books) -> None:
    books.writer.write(lambda connection: None)
    pauses: list[float] = []
    for _ in range(8):
        books.pool.fail()
        failed_at = books.clock.seconds()
        while not books.pool.busy:
            books.clock.advance(0.01)
        pauses.append(round(books.clock.seconds() - failed_at, 1))
    assert pauses == [0.1, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    books.pool.commit()


def test_what_arrives_while_a_commit_is_to_be_repeated_goes_with_it(books: Books) -> None:
    one = books.ledger.settle(entry("r1"), settled())
    books.pool.fail()
    two = books.ledger.settle(entry("r2"), settled())
    assert not books.pool.busy
    books.clock.advance(RETRY_S[0])
    books.pool.commit()
    assert one.called
    assert two.called


def test_a_commit_that_fails_changes_nothing_and_leaves_no_transaction(books: Books) -> None:
    books.ledger.open(entry("r1"))
    books.pool.commit()
    trouble = [sqlite3.OperationalError("disk I/O error")]

    def fail_once(_: sqlite3.Connection) -> None:
        if trouble:
            raise trouble.pop()

    done = books.ledger.settle(entry("r1"), settled())
    after = books.writer.write(fail_once)
    books.pool.commit()
    assert books.rows() == [("r1", "open", None, None, None, 0)]
    assert not books.pool.connection.in_transaction
    books.clock.advance(RETRY_S[0])
    books.pool.commit()
    assert done.called
    assert after.called
    assert books.bill() == BILL


@pytest.mark.parametrize(
    "trouble",
    [
        sqlite3.OperationalError("database is locked"),
        sqlite3.DatabaseError("database disk image is malformed"),
        sqlite3.InternalError("unknown operation"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_store_s_trouble_is_not_the_operation_s_fault(books: Books, trouble: Exception) -> None:
    troubles = [trouble]

    def write(_: sqlite3.Connection) -> None:
        if troubles:
            raise troubles.pop()

    done = books.writer.write(write)
    books.pool.commit()
    assert not done.called
    books.clock.advance(RETRY_S[0])
    books.pool.commit()
    assert done.called
    assert done.result is None


@pytest.mark.parametrize(
    "poison",
    [
        sqlite3.IntegrityError("NOT NULL constraint failed"),
        sqlite3.DataError("string or blob too big"),
        OverflowError("Python int too large to convert to SQLite INTEGER"),
        ValueError("a bug of ours"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_operation_that_can_never_be_written_does_not_hold_up_others(
    books: Books, poison: Exception
) -> None:
    def write(_: sqlite3.Connection) -> None:
        raise poison

    before = books.ledger.open(entry("r1"))
    poisoned = books.writer.write(write)
    after = books.ledger.settle(entry("r1"), settled())
    books.pool.commit_all()
    assert before.called
    assert after.called
    assert failure_of(poisoned).value is poison
    assert books.bill() == BILL
    assert not books.writer.failing


def test_an_operation_is_judged_by_its_last_try(books: Books) -> None:
    errors: list[Exception] = [ValueError("at first"), sqlite3.OperationalError("disk I/O error")]

    def fail_at_first(_: sqlite3.Connection) -> None:
        if errors:
            raise errors.pop(0)

    done, trouble = books.writer.write(fail_at_first), books.writer.write(fail_at_first)
    books.pool.commit()
    assert not done.called
    books.clock.advance(RETRY_S[0])
    books.pool.commit()
    assert (done.result, trouble.result) == (None, None)


def test_a_count_that_no_bill_can_hold_leaves_its_row_open(books: Books) -> None:
    books.ledger.open(entry("r1"))
    books.pool.commit()
    done = books.ledger.settle(entry("r1"), settled(counts={Kind.PROMPT: 2**63}))
    books.pool.commit()
    assert failure_of(done).check(OverflowError)
    assert books.rows() == [("r1", "open", None, None, None, 0)]


# -- openings that take too long ---------------------------------------------------------------


def test_an_opening_is_given_up_within_two_seconds(books: Books) -> None:
    opened = books.ledger.open(entry("r1"))
    for _ in range(int((OPEN_TIMEOUT_S - SWEEP_S) / 0.05) - 1):
        books.clock.advance(0.05)
    assert not opened.called
    for _ in range(int(SWEEP_S / 0.05) + 1):
        books.clock.advance(0.05)
    assert books.clock.seconds() == pytest.approx(OPEN_TIMEOUT_S)
    assert failure_of(opened).check(StorageError)
    books.pool.commit_all()


def test_a_row_that_was_given_up_is_closed_with_no_charge(books: Books) -> None:
    opened = books.ledger.open(entry("r1"))
    books.clock.pump([SWEEP_S] * 8)
    assert failure_of(opened).check(StorageError)
    books.pool.commit()  # it was written after all
    assert books.rows() == [("r1", "open", None, None, None, 0)]
    books.pool.commit()
    assert books.rows() == [("r1", "settled", "refused", None, None, 1)]
    assert books.bill() == []
    assert not books.pool.busy


@pytest.mark.parametrize("applied", [False, True], ids=["lost", "applied"])
def test_a_row_that_was_given_up_after_a_try_is_closed_if_it_is_there(
    books: Books, applied: bool
) -> None:
    opened = books.ledger.open(entry("r1"))
    books.pool.fail(applied=applied)
    books.clock.pump([SWEEP_S] * 8)
    assert failure_of(opened).check(StorageError)
    books.pool.fail(applied=applied)
    books.clock.advance(RETRY_S[1])
    books.pool.commit_all()
    closed = [("r1", "settled", "refused", None, None, 1)]
    assert books.rows() == (closed if applied else [])
    assert books.bill() == []


def test_an_opening_that_was_never_tried_leaves_nothing(books: Books) -> None:
    unlock = books.lock()
    opened = books.ledger.open(entry("r1"))
    books.pool.commit()
    books.clock.pump([SWEEP_S] * 8)
    assert failure_of(opened).check(StorageError)
    books.pool.commit()
    unlock()
    books.clock.advance(RETRY_S[1])
    books.pool.commit_all()
    assert books.rows() == []
    assert books.writer.pending == 0


def test_settlements_are_never_given_up(books: Books) -> None:
    books.ledger.open(entry("r1"))
    books.pool.commit()
    done = books.ledger.settle(entry("r1"), settled())
    for _ in range(3600):
        books.pool.fail()
        books.clock.advance(RETRY_S[1])
    books.pool.commit()
    assert done.called
    assert books.bill() == BILL


# -- an outage that lasts ----------------------------------------------------------------------


def test_an_outage_that_lasts_refuses_new_work_at_once(books: Books) -> None:
    books.writer.write(lambda connection: None)
    books.pool.fail()
    books.clock.advance(OPEN_TIMEOUT_S - 0.1)
    waits = books.ledger.open(entry("r1"))
    assert not waits.called
    books.clock.advance(0.1)
    assert failure_of(books.ledger.open(entry("r2"))).check(StorageError)
    books.pool.commit_all()
    assert waits.called
    assert [row[0] for row in books.rows()] == ["r1"]


def test_an_outage_of_an_hour_does_not_fill_the_memory(books: Books) -> None:
    permit = books.forbid()
    refused = 0

    def refuse(_: Failure) -> None:
        nonlocal refused
        refused += 1

    most = 0
    for number in range(3600 * 4):
        books.ledger.open(entry(f"{number:01000}")).addErrback(refuse)
        if books.pool.busy:
            books.pool.commit()
        books.clock.advance(0.25)
        most = max(most, books.writer.pending)
    assert refused > 14_000
    assert most < 20
    permit()
    books.clock.advance(RETRY_S[1])
    books.pool.commit_all()
    assert not books.writer.failing
    assert books.query("SELECT count(*) FROM ledger WHERE state = 'open'") == [(0,)]


@pytest.mark.parametrize("outage", ["lock", "forbid"])
def test_the_end_of_an_outage_is_noticed_though_nobody_asks(books: Books, outage: str) -> None:
    end = getattr(books, outage)()
    opened = books.ledger.open(entry("r1"))
    for _ in range(40):
        if books.pool.busy:
            books.pool.commit()
        books.clock.advance(SWEEP_S)
    assert failure_of(opened).check(StorageError)
    assert books.writer.failing
    end()
    books.clock.advance(RETRY_S[1])
    books.pool.commit_all()
    assert not books.writer.failing
    assert books.writer.pending == 0
    books.clock.advance(SWEEP_S)
    assert books.clock.getDelayedCalls() == []


def test_an_outage_is_told_once_and_its_end_too(books: Books) -> None:
    told: list[str] = []

    class Log(Logger):
        def error(self, format: str | None = None, **fields: object) -> None:
            told.append("failed")

        def info(self, format: str | None = None, **fields: object) -> None:
            told.append("again")

    books.writer.log = Log()
    books.writer.write(lambda connection: None)
    for _ in range(5):
        books.pool.fail()
        books.clock.advance(RETRY_S[1])
    books.pool.commit()
    assert told == ["failed", "again"]


def test_a_writer_that_was_stopped_tries_no_more(books: Books) -> None:
    books.writer.write(lambda connection: None)
    assert books.pool.busy
    books.writer.stop()
    books.pool.fail()
    assert books.clock.getDelayedCalls() == []
    assert not books.pool.busy


def test_a_writer_that_was_stopped_begins_nothing(books: Books) -> None:
    books.writer.write(lambda connection: None)
    books.writer.stop()
    books.writer.write(lambda connection: None)
    assert books.clock.getDelayedCalls() == []
    assert not books.pool.busy


def test_a_commit_that_ends_after_the_writer_was_stopped_is_the_last_one(books: Books) -> None:
    done = books.ledger.open(entry("r1"))
    assert books.pool.busy
    books.ledger.open(entry("r2"))
    books.writer.stop()
    books.pool.commit()
    assert done.called
    assert books.clock.getDelayedCalls() == []
    assert not books.pool.busy


def test_a_number_that_can_t_be_written_before_the_end_is_in_the_log(
    books: Books, logged: list[str]
) -> None:
    books.ledger.settle(entry("r1"), settled(counts={Kind.PROMPT: 3, Kind.COMPLETION: 4}))
    books.pool.fail()
    books.writer.stop()
    assert any("not written: r1 settled: prompt 3, completion 4" in line for line in logged)


# -- a commit that does not come back ----------------------------------------------------------


def hung(books: Books) -> None:
    """A commit that has been running for too long."""
    books.writer.write(lambda connection: None)
    assert books.pool.busy
    for _ in range(round(OPEN_TIMEOUT_S / SWEEP_S)):
        assert not books.writer.failing
        books.clock.advance(SWEEP_S)


def told(logged: Sequence[str]) -> list[str]:
    """What the log says, without its fields."""
    return [line.split(" {")[0] for line in logged]


def test_a_commit_that_hangs_counts_as_failing_and_new_work_is_refused_at_once(
    books: Books,
) -> None:
    hung(books)
    assert books.pool.busy
    assert books.writer.failing
    assert books.writer.hopeless
    assert failure_of(books.ledger.open(entry("r1"))).check(StorageError)
    books.pool.commit_all()
    assert not books.writer.failing
    assert not books.writer.hopeless
    opened = books.ledger.open(entry("r2"))
    books.pool.commit_all()
    assert opened.called
    assert [row[0] for row in books.rows()] == ["r2"]


def test_a_commit_that_hangs_is_told_once_and_its_end_too(books: Books, logged: list[str]) -> None:
    hung(books)
    books.clock.pump([SWEEP_S] * 20)
    books.pool.commit_all()
    assert told(logged) == [
        "ledger: a commit takes longer than 2 s",
        "ledger: writing again",
    ]


def test_a_commit_that_hangs_and_then_fails_is_told_with_its_reason(
    books: Books, logged: list[str]
) -> None:
    hung(books)
    books.pool.fail()
    assert books.writer.failing
    for _ in range(3):
        books.clock.advance(RETRY_S[1])
        books.pool.fail()
    books.clock.advance(RETRY_S[1])
    books.pool.commit_all()
    assert not books.writer.failing
    assert told(logged) == [
        "ledger: a commit takes longer than 2 s",
        "ledger: commit failed, repeating: disk I/O error",
        "ledger: writing again",
    ]


def test_a_commit_that_hangs_for_an_hour_does_not_fill_the_memory(books: Books) -> None:
    books.writer.write(lambda connection: None)
    assert books.pool.busy
    refused: list[Failure] = []
    for number in range(3600 * 4):
        books.ledger.open(entry(f"r{number}")).addErrback(refused.append)
        books.clock.advance(0.25)
    assert len(refused) == 3600 * 4
    assert books.writer.pending < 20
    books.pool.commit_all()
    assert books.rows() == []


def test_each_commit_has_its_own_time(books: Books) -> None:
    for _ in range(10):
        books.writer.write(lambda connection: None)
        books.clock.advance(OPEN_TIMEOUT_S / 2)
        assert not books.writer.failing
        books.pool.commit()
    books.pool.commit_all()


# -- recovery ----------------------------------------------------------------------------------


def of_another_process(books: Books, rid: str, owner: str) -> None:
    """An open row of a process that `owner` names."""
    ours, books.ledger._owners.me = books.owners.me, owner
    books.ledger.open(entry(rid))
    books.pool.commit_all()
    books.ledger._owners.me = ours


def recovered(books: Books) -> Any:
    return committed(books, books.ledger.recover())


def test_open_rows_of_the_dead_are_closed(books: Books) -> None:
    of_another_process(books, "r1", "dead")
    of_another_process(books, "r2", "dead too")
    books.ledger.checkpoint({"r2": {Kind.COMPLETION: 5}})
    books.pool.commit_all()
    assert recovered(books) == {State.ORPHAN: 1, State.ESTIMATED: 1}
    assert books.rows() == [
        ("r1", "orphan", None, None, None, 1),
        ("r2", "estimated", None, None, 5, 1),
    ]
    assert books.bill() == [("r2", "chat/gpu/completion", 5)]
    assert recovered(books) == {}


def test_open_rows_of_the_living_stay_open(books: Books) -> None:
    neighbour = Owners(books.path)
    neighbour.join()
    of_another_process(books, "r1", neighbour.me)
    books.ledger.open(entry("r2"))
    books.pool.commit_all()
    assert recovered(books) == {}
    neighbour.leave()
    assert recovered(books) == {State.ORPHAN: 1}
    assert [row[:2] for row in books.rows()] == [("r1", "orphan"), ("r2", "open")]


def test_a_recovery_that_is_repeated_counts_each_row_once(books: Books) -> None:
    of_another_process(books, "r1", "dead")
    trouble = [sqlite3.OperationalError("disk I/O error")]

    def fail_once(_: sqlite3.Connection) -> None:
        if trouble:
            raise trouble.pop()

    found = books.ledger.recover()
    books.writer.write(fail_once)
    books.pool.commit()
    assert not found.called
    books.clock.advance(RETRY_S[0])
    books.pool.commit_all()
    assert found.result == {State.ORPHAN: 1}


def test_a_process_that_was_taken_for_dead_settles_its_orphans(books: Books) -> None:
    of_another_process(books, "r1", "taken for dead")
    recovered(books)
    books.ledger.settle(entry("r1"), settled())
    books.pool.commit_all()
    assert books.rows() == [("r1", "settled", "complete", 3, 2, 1)]
    assert books.bill() == BILL


# -- the outbox --------------------------------------------------------------------------------


def test_the_outbox_has_what_is_on_the_bill_first_finished_first(outbox: Books) -> None:
    states = [State.SETTLED, State.DISPUTED, State.ESTIMATED, State.ORPHAN, State.SETTLED]
    for number, state in enumerate(states):
        finished = FINISHED - timedelta(seconds=number)
        outbox.ledger.open(entry(f"r{number}"))
        outbox.ledger.settle(entry(f"r{number}"), settled(state, finished=finished))
    outbox.pool.commit_all()
    waiting = committed(outbox, outbox.ledger.undelivered(2))
    found = [(e.rid, e.product, e.quantity, e.created) for e in waiting]
    assert found == [
        (rid, product, quantity, FINISHED - timedelta(seconds=earlier))
        for rid, earlier in (("r4", 4), ("r2", 2))
        for product, quantity in (("chat/gpu/prompt", 3), ("chat/gpu/completion", 2))
    ]
    assert waiting[0].account == Account("id-alice", "user-7")
    assert outbox.bill() == []


def test_rows_that_put_nothing_on_the_bill_do_not_wait(outbox: Books) -> None:
    outbox.ledger.open(entry("r1"))
    outbox.ledger.settle(entry("r1"), settled(outcome=Outcome.REFUSED, counts={}))
    outbox.pool.commit_all()
    assert committed(outbox, outbox.ledger.undelivered(10)) == []
    assert committed(outbox, outbox.ledger.backlog()) == (0, 0.0)


def test_a_long_backlog_is_not_counted_to_its_end(
    outbox: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "COUNTED_BACKLOG", 2)
    monkeypatch.setattr(journal, "utcnow", lambda: FINISHED + timedelta(seconds=60))
    for rid in ("r1", "r2", "r3"):
        outbox.ledger.open(entry(rid))
        outbox.ledger.settle(entry(rid), settled())
    assert committed(outbox, outbox.ledger.backlog()) == (2, 60.0)


@pytest.mark.parametrize("statement", [journal.OPEN_OWNERS, journal.OPEN_ROWS, journal.UNDELIVERED])
def test_no_statement_of_the_ledger_reads_the_rows_of_years(books: Books, statement: str) -> None:
    explained = books.query("EXPLAIN QUERY PLAN " + statement.replace("?", "1"))
    assert all("ledger" not in step or "INDEX" in step for *_, step in explained), explained


def test_what_is_delivered_waits_no_more(outbox: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "utcnow", lambda: FINISHED + timedelta(seconds=60))
    for rid in ("r1", "r2"):
        outbox.ledger.open(entry(rid))
        outbox.ledger.settle(entry(rid), settled())
    assert committed(outbox, outbox.ledger.backlog()) == (2, 60.0)
    outbox.ledger.mark_delivered(["r1"])
    assert committed(outbox, outbox.ledger.backlog()) == (1, 60.0)
    waiting = committed(outbox, outbox.ledger.undelivered(10))
    assert {event.rid for event in waiting} == {"r2"}


def test_a_settlement_is_announced_when_it_is_durable(outbox: Books) -> None:
    told: list[bool] = []
    outbox.ledger.notify = lambda: told.append(True)
    outbox.ledger.open(entry("r1"))
    outbox.pool.commit()
    outbox.ledger.settle(entry("r1"), settled())
    assert told == []
    outbox.pool.commit()
    assert told == [True]


# -- the real pool -----------------------------------------------------------------------------


class RealBooks:
    """A ledger as it is in life: its own thread, the real clock."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "db.sqlite"
        prepare(self.path)
        self.owners = Owners(self.path)
        self.owners.join()
        self.turnstile = Turnstile(self.owners.folder / ".turnstile")
        self.turnstile.open()
        self.pool: adbapi.ConnectionPool = make_pool(self.path, reactor, install)
        self.commits: list[int] = []
        self.ledger = SQLiteLedger(
            self.pool,
            reactor,
            self.owners,
            bills_here=True,
            on_commit=lambda seconds, operations: self.commits.append(operations),
            turnstile=self.turnstile,
        )

    def close(self) -> None:
        self.ledger.writer.stop()
        self.pool.close()
        self.turnstile.close()
        self.owners.leave()


@pytest.fixture
def real(tmp_path: Path) -> Iterator[RealBooks]:
    books = RealBooks(tmp_path)
    yield books
    books.close()


@pytest_twisted.ensureDeferred
async def test_a_hundred_openings_of_one_turn_are_two_commits(real: RealBooks) -> None:
    await gatherResults([real.ledger.open(entry(f"r{number}")) for number in range(100)])
    assert sum(real.commits) == 100
    assert len(real.commits) <= 2


@pytest_twisted.ensureDeferred
async def test_the_writer_s_commits_are_durable(real: RealBooks) -> None:
    def pragmas(connection: Any) -> list[Any]:
        names = ("journal_mode", "synchronous")
        return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    assert await real.pool.runWithConnection(pragmas) == ["wal", 2]


@pytest_twisted.ensureDeferred
async def test_a_locked_file_delays_a_settlement_and_refuses_an_opening(real: RealBooks) -> None:
    await real.ledger.open(entry("r1"))
    other = connect(real.path)
    other.execute("BEGIN EXCLUSIVE")
    asked = reactor.seconds()
    done = real.ledger.settle(entry("r1"), settled())
    with pytest.raises(StorageError):
        await real.ledger.open(entry("r2"))
    assert reactor.seconds() - asked < OPEN_TIMEOUT_S + 0.3
    assert not done.called
    other.execute("ROLLBACK")
    other.close()
    await done
    await real.ledger.writer.when_idle()
    connection = sqlite3.connect(real.path)
    rows = connection.execute("SELECT rid, outcome, delivered, prompt FROM ledger").fetchall()
    connection.close()
    assert rows[0] == ("r1", "complete", 1, 3)
    assert rows[1:] in ([], [("r2", "refused", 1, None)])


@pytest_twisted.ensureDeferred
async def test_what_arrives_while_another_process_has_its_turn_is_one_commit(
    real: RealBooks,
) -> None:
    await real.ledger.open(entry("first"))
    real.commits.clear()
    other = Turnstile(real.owners.folder / ".turnstile")
    other.open()
    with other:
        opened = []
        for number in range(10):
            opened.append(real.ledger.open(entry(f"r{number}")))
            await deferLater(reactor, 0.01)
        assert not any(each.called for each in opened)
    other.close()
    await gatherResults(opened)
    assert real.commits == [10]


@pytest_twisted.ensureDeferred
async def test_while_another_process_does_not_end_its_turn_new_work_is_refused(
    real: RealBooks,
) -> None:
    other = Turnstile(real.owners.folder / ".turnstile")
    other.open()
    with other:
        asked = reactor.seconds()
        with pytest.raises(StorageError):
            await real.ledger.open(entry("r1"))
        assert reactor.seconds() - asked < OPEN_TIMEOUT_S + 0.3
        await deferLater(reactor, 2 * SWEEP_S)
        assert real.ledger.writer.failing
        with pytest.raises(StorageError):
            await real.ledger.open(entry("r2"))
    other.close()
    await real.ledger.open(entry("r3")).addErrback(lambda failure: failure.trap(StorageError))
    await real.ledger.writer.when_idle()
    assert not real.ledger.writer.failing
    await real.ledger.open(entry("r4"))


@pytest_twisted.ensureDeferred
async def test_two_ledgers_share_a_file(real: RealBooks, tmp_path: Path) -> None:
    second = RealBooks(tmp_path)
    try:
        for books in (real, second):
            for number in range(30):
                rid = f"{books.owners.me}-{number}"
                books.ledger.open(entry(rid))
                books.ledger.settle(entry(rid), settled())
        while real.ledger.writer.pending or second.ledger.writer.pending:
            await deferLater(reactor, 0.01)
        connection = sqlite3.connect(real.path)
        counted = connection.execute("SELECT count(*), sum(prompt) FROM ledger").fetchone()
        billed = connection.execute("SELECT count(*), sum(quantity) FROM event_oneoff").fetchone()
        connection.close()
        assert counted == (60, 180)
        assert billed == (120, 300)
    finally:
        second.close()
