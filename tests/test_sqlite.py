"""The SQLite file: made, taken over from the earlier llmproxy, and asked for keys."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_twisted
from backend import ScriptedBackend, json_answer
from hypothesis import given
from hypothesis import strategies as st
from proxy import reactor, running_proxy
from twisted.enterprise import adbapi
from twisted.internet.defer import gatherResults

from llmproxy.errors import StorageError
from llmproxy.model import BUDGETS, MAX_BUDGET, Account, OwnLimits
from llmproxy.storage.sqlite import (
    SQLiteAccounts,
    connect,
    from_text,
    journal_id,
    make_pool,
    prepare,
    to_text,
)

SCHEMA = files("llmproxy").joinpath("schema.sql").read_text()
NOW = datetime(2026, 6, 15, 12, 0, 0, tzinfo=UTC)
#: What the earlier llmproxy had: no unique index, and a secret that is called a blob.
OLD = """
CREATE TABLE event_oneoff (
    id INTEGER PRIMARY KEY, created TEXT, api_key TEXT, product TEXT, quantity INTEGER, rid TEXT
);
CREATE TABLE api_key (id TEXT PRIMARY KEY, secret BLOB, type TEXT, expires TEXT, comment TEXT);
PRAGMA user_version = 1;
"""
ASK = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
COMPLETION = {"id": "c", "object": "chat.completion", "choices": [], "usage": USAGE}


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def query(path: Path, statement: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchall()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "db.sqlite"


@pytest.fixture
def pool(path: Path) -> Iterator[adbapi.ConnectionPool]:
    prepare(path)
    pool = make_pool(path, reactor)
    yield pool
    pool.close()


def old_database(path: Path, events: int = 0, duplicates: int = 0) -> None:
    """A file of the earlier llmproxy: the keys token1 and token2, and bills."""
    rows = [
        ("2024-05-06 07:08:09.123456+00:00", "old-2", f"chat/gpu/{kind}", 10 + n, f"rid-{n}")
        for n in range(events)
        for kind in ("prompt", "completion")
    ]
    rows += rows[: 2 * duplicates]
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(OLD)
        connection.executemany(
            "INSERT INTO event_oneoff (created, api_key, product, quantity, rid)"
            " VALUES (?, ?, ?, ?, ?)",
            rows,
        )
        for key, expires in (("token1", "2024-01-01 00:00:00"), ("token2", None)):
            connection.execute(
                "INSERT INTO api_key VALUES (?, ?, 'LLM', ?, 'a comment')",
                (f"old-{key[-1]}", hashed(key), expires),
            )
        connection.commit()


# -- the schema --------------------------------------------------------------------------------


def test_a_new_file_has_the_schema_and_wal(path: Path) -> None:
    prepare(path)
    tables = query(path, "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")
    assert tables == [
        ("api_key",),
        ("attempt",),
        ("event_oneoff",),
        ("journal",),
        ("key_limit",),
        ("key_model",),
        ("key_share",),
        ("ledger",),
        ("price",),
        ("usage_day",),
    ]
    assert query(path, "PRAGMA journal_mode") == [("wal",)]


def test_a_new_file_is_closed_to_others(path: Path) -> None:
    before = os.umask(0o022)
    try:
        prepare(path)
        connection = connect(path)
        connection.execute("DELETE FROM ledger")
        files = list(path.parent.glob(f"{path.name}*"))
        modes = [stat.S_IMODE(file.stat().st_mode) for file in files]
        connection.close()
    finally:
        os.umask(before)
    assert len(files) == 3
    assert set(modes) == {0o640}


def test_a_ledger_of_an_earlier_version_gets_new_columns_once_and_keeps_its_rows(
    path: Path,
) -> None:
    prepare(path)
    with closing(connect(path)) as connection:
        connection.execute("DROP TRIGGER usage_row")
        connection.execute("DROP INDEX ledger_held")
        for column in ("price", "held_tokens", "held_cost"):
            connection.execute(f"ALTER TABLE ledger DROP COLUMN {column}")
        connection.execute("DROP TABLE price")
        connection.execute("DROP TABLE journal")
        connection.execute(
            "INSERT INTO ledger (rid, state, owner, opened, api_key, path, model, device)"
            " VALUES ('r', 'orphan', 'o', 't', 'k', 'p', 'm', 'd')"
        )
    starting = [threading.Thread(target=prepare, args=(path,)) for _ in range(8)]
    for each in starting:
        each.start()
    for each in starting:
        each.join()
    found = query(path, "SELECT rid, price, held_tokens, held_cost FROM ledger")
    assert found == [("r", None, None, None)]
    assert len(query(path, "SELECT id FROM journal")) == 1


def test_a_file_has_a_name_of_its_own_for_ever(path: Path) -> None:
    prepare(path)
    name = journal_id(path)
    assert re.fullmatch("[0-9a-f]{16}", name)
    prepare(path)
    assert journal_id(path) == name
    other = path.with_name("other.sqlite")
    prepare(other)
    assert journal_id(other) != name
    with pytest.raises(StorageError, match=r"nobody\.sqlite"):
        journal_id(path.with_name("nobody.sqlite"))


def test_keys_limits_of_an_earlier_version_get_budgets_that_are_checked(path: Path) -> None:
    prepare(path)
    with closing(connect(path)) as connection:
        for column in BUDGETS:
            connection.execute(f"ALTER TABLE key_limit DROP COLUMN {column}")
        connection.execute("INSERT INTO key_limit VALUES ('k', 1, 2, 3)")
    prepare(path)
    assert query(path, "SELECT * FROM key_limit") == [("k", 1, 2, 3, *(None for _ in BUDGETS))]
    with closing(connect(path)) as connection:
        for column in BUDGETS:
            for value in (-1, 1.5, "many", MAX_BUDGET + 1):
                with pytest.raises(sqlite3.IntegrityError):
                    connection.execute(f"UPDATE key_limit SET {column} = ?", (value,))
            connection.execute(f"UPDATE key_limit SET {column} = ?", (MAX_BUDGET,))


def test_preparing_again_changes_nothing(path: Path) -> None:
    prepare(path)
    with closing(connect(path)) as connection:
        connection.execute("INSERT INTO api_key (id) VALUES ('kept')")
    before = query(path, "SELECT sql FROM sqlite_schema ORDER BY name")
    prepare(path)
    assert query(path, "SELECT sql FROM sqlite_schema ORDER BY name") == before
    assert query(path, "SELECT id FROM api_key") == [("kept",)]


def test_a_request_has_one_event_of_each_product(path: Path) -> None:
    prepare(path)
    insert = "INSERT INTO event_oneoff (product, rid) VALUES (?, ?)"
    with closing(connect(path)) as connection:
        connection.execute(insert, ("p", "r"))
        connection.execute(insert, ("p", "r2"))
        connection.execute(insert, ("p2", "r"))
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute(insert, ("p", "r"))


@pytest_twisted.ensureDeferred
async def test_connections_commit_durably(pool: adbapi.ConnectionPool) -> None:
    def pragmas(connection: Any) -> list[Any]:
        names = ("journal_mode", "synchronous", "busy_timeout")
        return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    assert await pool.runWithConnection(pragmas) == ["wal", 2, 1000]


@pytest_twisted.ensureDeferred
async def test_jobs_are_done_in_their_order_in_one_thread(pool: adbapi.ConnectionPool) -> None:
    def job(connection: Any, number: int, *, named: str) -> Any:
        return number, named, threading.get_ident(), connection.in_transaction

    jobs = [pool.runWithConnection(job, number, named="x") for number in range(20)]
    results = await gatherResults(jobs)
    (thread,) = {thread for *_, thread, _ in results}
    assert thread != threading.get_ident()
    assert results == [(number, "x", thread, False) for number in range(20)]
    assert await pool.runQuery("SELECT 1") == [(1,)]  # the usual ways go through it, too
    assert await pool.runWithConnection(job, 1, named="y") == (1, "y", thread, False)


@pytest_twisted.ensureDeferred
async def test_a_job_that_fails_leaves_nothing_to_the_next(pool: adbapi.ConnectionPool) -> None:
    def fail(connection: Any) -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO api_key (id) VALUES ('half')")
        raise ValueError("a bug of ours")

    with pytest.raises(ValueError, match="a bug of ours"):
        await pool.runWithConnection(fail)
    assert await pool.runWithConnection(lambda connection: connection.in_transaction) is False
    with pytest.raises(sqlite3.OperationalError):
        await pool.runQuery("SELECT nonsense")
    assert await pool.runQuery("SELECT count(*) FROM api_key") == [(0,)]


@pytest_twisted.ensureDeferred
async def test_a_pool_without_a_connection_fails_its_jobs_and_tries_again(path: Path) -> None:
    pool = make_pool(path.parent / "later" / "db.sqlite", reactor)
    try:
        jobs = [pool.runQuery("SELECT 1") for _ in range(3)]
        for job in jobs:
            with pytest.raises(sqlite3.OperationalError, match="unable to open"):
                await job
        (path.parent / "later").mkdir()
        assert await pool.runQuery("SELECT 1") == [(1,)]
    finally:
        pool.close()


@pytest_twisted.ensureDeferred
async def test_a_pool_that_is_closed_has_no_thread_left(path: Path) -> None:
    prepare(path)
    before = threading.active_count()
    for used in (True, False):
        pool = make_pool(path, reactor)
        if used:
            await pool.runQuery("SELECT 1")
        pool.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "unable to open"),
        (lambda path: path.write_text("no database, " * 100), "not a database"),
        (lambda path: shutil.rmtree(path.parent), "unable to open"),
    ],
    ids=["folder", "text", "no folder"],
)
def test_what_is_no_database_is_refused_by_its_name(tmp_path: Path, make: Any, said: str) -> None:
    path = tmp_path / "folder" / "db.sqlite"
    path.parent.mkdir()
    make(path)
    with pytest.raises(StorageError) as refused:
        prepare(path)
    assert str(path) in str(refused.value)
    assert said in str(refused.value)


def test_a_file_that_stays_locked_is_refused_by_its_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmproxy.storage.sqlite.PREPARE_TIMEOUT_S", 0.1)
    monkeypatch.setattr("llmproxy.storage.sqlite.BUSY_TIMEOUT_S", 0.1)
    with closing(connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageError, match="locked"):
            prepare(path)


def test_a_file_that_is_locked_for_a_moment_is_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmproxy.storage.sqlite.BUSY_TIMEOUT_S", 0.0)
    with closing(connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        # The module's own clock: threads of others sleep too.
        clock = SimpleNamespace(
            monotonic=time.monotonic, sleep=lambda seconds: other.execute("ROLLBACK")
        )
        monkeypatch.setattr("llmproxy.storage.sqlite.time", clock)
        prepare(path)
    assert query(path, "SELECT count(*) FROM ledger") == [(0,)]


#: Waits for a moment, so that all that are started begin together.
PREPARE = """
import sys, time
from pathlib import Path
from llmproxy.storage.sqlite import prepare

time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
prepare(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_processes_that_start_together_all_find_a_file(path: Path, old: bool) -> None:
    if old:
        old_database(path, events=2, duplicates=2)
    moment = str(time.time() + 0.7)
    command = [sys.executable, "-c", PREPARE, str(path), moment]
    started = [subprocess.Popen(command) for _ in range(6)]
    assert [process.wait() for process in started] == [0] * 6
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


# -- the earlier llmproxy's database -----------------------------------------------------------


@pytest.mark.parametrize("duplicates", [0, 1, 50])
def test_an_earlier_database_is_taken_over_without_loss(path: Path, duplicates: int) -> None:
    old_database(path, events=50, duplicates=duplicates)
    events = query(path, "SELECT * FROM event_oneoff ORDER BY id")
    keys = query(path, "SELECT * FROM api_key ORDER BY id")
    assert len(events) == 100 + 2 * duplicates
    for _ in range(2):
        prepare(path)
        assert query(path, "SELECT * FROM event_oneoff ORDER BY id") == events
        assert query(path, "SELECT * FROM api_key ORDER BY id") == keys
        assert query(path, "PRAGMA user_version") == [(1,)]


def test_a_database_with_old_duplicates_gets_no_new_ones(path: Path) -> None:
    old_database(path, events=3, duplicates=3)
    prepare(path)
    add = "INSERT OR IGNORE INTO event_oneoff (product, quantity, rid) VALUES ('p', 7, 'new')"
    with closing(connect(path)) as connection:
        connection.execute(add)
        connection.execute(add)
    assert query(path, "SELECT count(*) FROM event_oneoff WHERE rid = 'new'") == [(1,)]


@pytest.mark.parametrize("duplicates", [0, 2])
@pytest_twisted.ensureDeferred
async def test_the_proxy_serves_with_an_earlier_database(tmp_path: Path, duplicates: int) -> None:
    old_database(tmp_path / "db.sqlite", events=2, duplicates=duplicates)
    async with (
        ScriptedBackend([json_answer(200, COMPLETION)]) as backend,
        running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy,
    ):
        answer = await proxy.post("/v1/chat/completions", ASK)
        refused = await proxy.post("/v1/chat/completions", ASK, key="token1")
    assert (answer.status, refused.status) == (200, 401)
    news = "SELECT api_key, product, quantity FROM event_oneoff WHERE rid NOT LIKE 'rid-%'"
    assert query(tmp_path / "db.sqlite", news) == [
        ("old-2", "chat/gpu/prompt", 3),
        ("old-2", "chat/gpu/completion", 2),
    ]
    olds = "SELECT count(*) FROM event_oneoff WHERE rid LIKE 'rid-%'"
    assert query(tmp_path / "db.sqlite", olds) == [(4 + 2 * duplicates,)]


@pytest.mark.parametrize("old", ["new", "old", "old with duplicates"])
@pytest_twisted.ensureDeferred
async def test_the_schema_can_be_loaded_by_hand_before_a_start(tmp_path: Path, old: str) -> None:
    path = tmp_path / "db.sqlite"
    if old != "new":
        old_database(path, events=2, duplicates=2 if "duplicates" in old else 0)
    for _ in range(2):
        loaded = subprocess.run(
            ["sqlite3", str(path)], input=SCHEMA, text=True, capture_output=True, check=False
        )
        assert ("UNIQUE" in loaded.stderr) == ("duplicates" in old), loaded.stderr
    async with (
        ScriptedBackend([json_answer(200, COMPLETION)]) as backend,
        running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy,
    ):
        answer = await proxy.post("/v1/chat/completions", ASK)
        assert answer.status == 200
        assert proxy.rows() == [("settled", "complete", 3, 2)]


# -- keys --------------------------------------------------------------------------------------


def add_key(path: Path, expires: object = None, **fields: object) -> None:
    row = {"id": "id-1", "secret": hashed("key"), "type": "LLM", "expires": expires} | fields
    with closing(connect(path)) as connection:
        connection.execute(
            f"INSERT INTO api_key ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})",
            list(row.values()),
        )


async def found(pool: adbapi.ConnectionPool, key: str = "key") -> Account | None:
    return await SQLiteAccounts(pool).find(hashed(key), NOW)


VALID = [
    (None, None),
    ("2026-06-15 12:00:01", datetime(2026, 6, 15, 12, 0, 1, tzinfo=UTC)),
    ("2026-06-15T12:00:01", datetime(2026, 6, 15, 12, 0, 1, tzinfo=UTC)),
    ("2026-06-15T12:00:00.000001Z", datetime(2026, 6, 15, 12, 0, 0, 1, tzinfo=UTC)),
    ("2026-06-15T12:00:01+00:00", datetime(2026, 6, 15, 12, 0, 1, tzinfo=UTC)),
    # Text order would say no: it is 11 o'clock there and 13 o'clock here.
    ("2026-06-15T11:00:00-02:00", datetime(2026, 6, 15, 13, 0, 0, tzinfo=UTC)),
    ("2026-06-15 12:01", datetime(2026, 6, 15, 12, 1, tzinfo=UTC)),
    ("2026-06-16", datetime(2026, 6, 16, tzinfo=UTC)),
    ("20260616", datetime(2026, 6, 16, tzinfo=UTC)),
    ("2124-01-01", datetime(2124, 1, 1, tzinfo=UTC)),
    ("9999-12-31 23:59:59", datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
]


@pytest.mark.parametrize(("expires", "moment"), VALID, ids=repr)
@pytest_twisted.ensureDeferred
async def test_a_key_is_valid_before_its_end_however_it_is_spelled(
    path: Path, pool: adbapi.ConnectionPool, expires: str | None, moment: datetime | None
) -> None:
    add_key(path, expires)
    assert await found(pool) == Account("id-1", expires=moment)


ENDED = [
    "2026-06-15 12:00:00",
    "2026-06-15T12:00:00Z",
    # Text order would say yes: it is 13 o'clock there and 11 o'clock here.
    "2026-06-15T13:00:00+02:00",
    "2026-06-15",
    "2024-01-01",
    "0001-01-01",
    "0001-01-01T00:00:00+14:00",
    "",
    " ",
    "never",
    "tomorrow",
    "2026-13-01",
    "15.06.2126",
    "4102444800",
    b"2124-01-01",
    "2124-01-01 ",
    "NULL",
]


@pytest.mark.parametrize("expires", ENDED, ids=repr)
@pytest_twisted.ensureDeferred
async def test_a_key_is_not_valid_after_its_end_nor_if_that_can_t_be_read(
    path: Path, pool: adbapi.ConnectionPool, expires: object
) -> None:
    add_key(path, expires)
    assert await found(pool) is None


@pytest.mark.parametrize("kind", ["llm", "ADMIN", "", None, "LLM "])
@pytest_twisted.ensureDeferred
async def test_a_key_of_another_type_is_no_key(
    path: Path, pool: adbapi.ConnectionPool, kind: str | None
) -> None:
    add_key(path, type=kind)
    assert await found(pool) is None


@pytest_twisted.ensureDeferred
async def test_only_the_hash_of_a_key_finds_it(path: Path, pool: adbapi.ConnectionPool) -> None:
    add_key(path)
    add_key(path, id="id-2", secret="key")
    add_key(path, id="id-3", secret=None)
    accounts = SQLiteAccounts(pool)
    for secret in ("key", hashed("key").upper(), hashed("key")[:-1], "", "%"):
        if secret != "key":
            assert await accounts.find(secret, NOW) is None
    assert await found(pool) == Account("id-1")
    assert await found(pool, "another") is None


@pytest_twisted.ensureDeferred
async def test_a_key_has_each_limit_of_its_row(path: Path, pool: adbapi.ConnectionPool) -> None:
    add_key(path, id="id-1")
    own = OwnLimits(1, 2, 3, 4, 5, 6, 7, 8, 0)
    with closing(connect(path)) as connection:
        marks = ", ".join("?" * len(own))
        connection.execute(
            f"INSERT INTO key_limit (api_key, {', '.join(own._fields)}) VALUES ('id-1', {marks})",
            own,
        )
    assert await found(pool) == Account("id-1", limits=own)


@pytest_twisted.ensureDeferred
async def test_a_key_without_an_id_can_t_be_billed_and_is_none(
    path: Path, pool: adbapi.ConnectionPool
) -> None:
    add_key(path, id=None)
    assert await found(pool) is None


@pytest_twisted.ensureDeferred
async def test_of_two_records_of_a_key_the_valid_one_counts(
    path: Path, pool: adbapi.ConnectionPool
) -> None:
    add_key(path, "2024-01-01")
    add_key(path, id="id-2")
    assert await found(pool) == Account("id-2")


@pytest_twisted.ensureDeferred
async def test_a_file_that_can_t_be_read_is_no_verdict_on_a_key(
    path: Path, pool: adbapi.ConnectionPool
) -> None:
    add_key(path)
    with closing(connect(path)) as connection:
        connection.execute("ALTER TABLE api_key RENAME TO hidden")
    with pytest.raises(StorageError) as failed:
        await found(pool)
    assert hashed("key") not in str(failed.value)


# -- times -------------------------------------------------------------------------------------


@given(
    st.datetimes(
        min_value=datetime(2, 1, 1), max_value=datetime(9998, 1, 1), timezones=st.timezones()
    )
    | st.datetimes(timezones=st.just(UTC))
)
def test_times_as_text_are_iso_8601_in_utc(moment: datetime) -> None:
    assert to_text(moment) == moment.astimezone(UTC).isoformat(timespec="microseconds")


def test_times_as_text_have_the_order_of_times() -> None:
    moments = [
        NOW,
        NOW.replace(microsecond=1),
        NOW.replace(microsecond=100_000),
        NOW.replace(second=1),
        NOW.replace(year=2027),
    ]
    assert sorted(map(to_text, reversed(moments))) == list(map(to_text, moments))
    assert [from_text(to_text(moment)) for moment in moments] == moments
