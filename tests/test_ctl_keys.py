"""`llmproxyctl user`, and the tool as a whole: errors, exit codes, the store."""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path

import pytest
from ctl_tool import MONGODB, Tool

from llmproxy.ctl import main
from llmproxy.model import BUDGETS, MAX_BUDGET

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(tmp_path, capsys)


def add_key(tool: Tool, secret: str, expires: str | None = None, kind: str = "LLM") -> None:
    tool.query(
        "INSERT INTO api_key VALUES (?, ?, ?, ?, ?)", f"id-{secret}", secret, kind, expires, "c"
    )


def test_a_made_key_is_printed_alone_and_only_its_hash_is_stored(tool: Tool) -> None:
    key = tool.run("user", "create", "-t", "for Ann").removesuffix("\n")
    assert re.fullmatch(r"[A-Za-z0-9_-]{86}", key)
    ((key_id, secret, kind, expires, comment),) = tool.query("SELECT * FROM api_key")
    assert secret == hashlib.sha256(key.encode()).hexdigest()
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", key_id)
    assert (kind, expires, comment) == ("LLM", None, "for Ann")
    assert key not in tool.err
    assert secret[:16] in tool.err


def test_no_two_keys_are_the_same(tool: Tool) -> None:
    assert tool.run("user", "create") != tool.run("user", "create")


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("2124-01-01", "2124-01-01T00:00:00+00:00"),
        ("2124-01-01T10:00:00", "2124-01-01T10:00:00+00:00"),
        ("2124-01-01 10:00:00+02:00", "2124-01-01T08:00:00+00:00"),
        ("2124-01-01T10:00Z", "2124-01-01T10:00:00+00:00"),
    ],
)
def test_an_end_is_stored_in_utc(tool: Tool, given: str, stored: str) -> None:
    tool.run("user", "create", "-e", given)
    assert tool.query("SELECT expires FROM api_key") == [(stored,)]
    assert f"it expires at {stored}" in tool.err


def test_an_end_in_the_past_is_pointed_out(tool: Tool) -> None:
    tool.run("user", "create", "-e", "2020-01-01")
    assert "EXPIRED" in tool.err


@pytest.mark.parametrize("end", ["tomorrow", "2124-13-01", "", "0001-01-01T00:00+14:00"])
def test_an_end_that_is_no_time_is_refused(tool: Tool, end: str) -> None:
    tool.run("user", "create", "-e", end, code=2)
    assert "not a time in ISO 8601" in tool.err
    assert tool.query("SELECT * FROM api_key") == []


def test_keys_are_listed_with_their_status_compared_as_time(tool: Tool) -> None:
    now = datetime.now(UTC)
    east = (now + timedelta(hours=1)).astimezone(UTC).replace(tzinfo=None)
    ends = {
        "a0": None,
        "a1": "2124-01-01",
        "a2": "2024-01-01 10:00:00",
        "a3": f"{(east + timedelta(hours=14)).isoformat(timespec='seconds')}+14:00",
        "a4": f"{(east - timedelta(hours=14)).isoformat(timespec='seconds')}-10:00",
        "a5": "soon",
    }
    for secret, end in ends.items():
        add_key(tool, secret, end)
    keys = {key["hash"]: key for key in tool.json("user", "list")}
    assert {name: key["status"] for name, key in keys.items()} == {
        "a0": "active",
        "a1": "active",
        "a2": "expired",
        "a3": "active",
        "a4": "expired",
        "a5": "expired",
    }
    assert [keys[name]["expires"] for name in ("a0", "a1", "a2", "a5")] == [
        None,
        "2124-01-01T00:00:00+00:00",
        "2024-01-01T10:00:00+00:00",
        "???",
    ]


def test_a_list_shows_only_the_hashes_that_begin_with_the_prefix(tool: Tool) -> None:
    for secret in ("ab1", "ab2", "cd3"):
        add_key(tool, secret)
    assert [key["hash"] for key in tool.json("user", "list", "AB")] == ["ab1", "ab2"]
    assert len(tool.run("user", "list", "f").splitlines()) == 1


def test_a_table_shows_short_hashes_and_no_control_characters(tool: Tool) -> None:
    add_key(tool, "ab" * 32)
    tool.run("user", "update", "ab", "-t", "Ann\x1b[2J\n")
    table = tool.run("user", "list")
    assert table.splitlines()[1].split()[0] == "ab" * 8
    assert r"Ann\x1b[2J\n" in table


def test_the_keys_of_other_services_are_left_alone(tool: Tool) -> None:
    add_key(tool, "ab1", kind="VM")
    assert tool.json("user", "list") == []
    tool.run("user", "delete", "ab", code=1)


def test_an_update_changes_what_is_named_and_nothing_else(tool: Tool) -> None:
    add_key(tool, "ab1", "2030-01-01")
    add_key(tool, "cd1", "2030-01-01")
    read = "SELECT expires, comment FROM api_key ORDER BY secret"
    tool.run("user", "update", "a", "-t", "new")
    assert tool.query(read) == [("2030-01-01", "new"), ("2030-01-01", "c")]
    tool.run("user", "update", "a", "--expires", "2031-01-01")
    assert tool.query(read)[0] == ("2031-01-01T00:00:00+00:00", "new")
    tool.run("user", "update", "a", "-e", "never")
    assert tool.query(read) == [(None, "new"), ("2030-01-01", "c")]
    assert "does not expire" in tool.err


def test_an_update_without_a_change_is_refused(tool: Tool) -> None:
    add_key(tool, "ab1")
    tool.run("user", "update", "ab", code=2)
    assert "nothing to change" in tool.err


def test_a_deleted_key_is_gone_and_its_id_is_told(tool: Tool) -> None:
    add_key(tool, "ab1")
    add_key(tool, "ac1")
    tool.run("user", "delete", "ab")
    assert tool.query("SELECT secret FROM api_key") == [("ac1",)]
    assert "id-ab1" in tool.err


@pytest.mark.parametrize("command", [("delete",), ("update", "-t", "x")])
def test_a_prefix_must_name_one_key(tool: Tool, command: tuple[str, ...]) -> None:
    add_key(tool, "ab1")
    add_key(tool, "ab2")
    before = tool.query("SELECT * FROM api_key")
    tool.run("user", *command, "ab", code=1)
    assert "2 keys' hashes begin with ab: give more digits" in tool.err
    tool.run("user", *command, "c", code=1)
    assert "no key's hash begins with c" in tool.err
    assert tool.query("SELECT * FROM api_key") == before


@pytest.mark.parametrize("prefix", ["", "%", "_", "xyz", "a' OR 1", "a" * 65, "٣"])
def test_a_prefix_that_is_not_hex_is_refused(tool: Tool, prefix: str) -> None:
    add_key(tool, "ab1")
    tool.run("user", "delete", prefix, code=2)
    assert len(tool.query("SELECT * FROM api_key")) == 1


@pytest.mark.parametrize("command", ["create", "list"])
def test_keys_in_mongodb_are_not_ours(tool: Tool, tmp_path: Path, command: str) -> None:
    tool.configure(MONGODB)
    assert tool.run("user", command, code=2) == ""
    assert "managed in MongoDB (mongodb://u:***@localhost/db)" in tool.err
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_a_database_of_the_earlier_software_is_opened_without_loss(
    tool: Tool, tmp_path: Path
) -> None:
    old = sqlite3.connect(tmp_path / "db.sqlite")
    old.executescript(
        "CREATE TABLE api_key(id TEXT PRIMARY KEY, secret TEXT, type TEXT, expires TEXT,"
        " comment TEXT);"
        "CREATE TABLE event_oneoff(id INTEGER PRIMARY KEY, created TEXT, api_key TEXT,"
        " product TEXT, quantity INTEGER, rid TEXT);"
        "INSERT INTO api_key VALUES ('i', 'abc', 'LLM', '2124-01-01', 'old');"
        "INSERT INTO event_oneoff VALUES (1, '2024', 'i', 'p', 5, 'r');"
        "INSERT INTO event_oneoff VALUES (2, '2024', 'i', 'p', 5, 'r');"
    )
    old.close()
    assert [key["comment"] for key in tool.json("user", "list")] == ["old"]
    assert tool.query("SELECT count(*) FROM event_oneoff") == [(2,)]


def test_a_new_database_is_announced_once(tool: Tool, tmp_path: Path) -> None:
    tool.run("user", "list")
    assert tool.err == f"made a new database: {tmp_path}/db.sqlite\n"
    tool.run("user", "list")
    assert tool.err == ""


def test_a_database_that_can_not_be_opened_is_one_line(tool: Tool, tmp_path: Path) -> None:
    tool.configure('[db]\nuri = "sqlite://nowhere/db.sqlite"\n')
    tool.run("user", "list", code=1)
    assert tool.err == (
        f"llmproxyctl: database {tmp_path}/nowhere/db.sqlite: unable to open database file\n"
    )


def test_a_file_that_is_no_database_is_one_line(tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "db.sqlite").write_text("x" * 5000)
    tool.run("user", "create", code=1)
    assert tool.err == f"llmproxyctl: database {tmp_path}/db.sqlite: file is not a database\n"


def test_a_locked_database_is_one_line(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmproxy.ctl.common.BUSY_TIMEOUT_S", 0.0)
    other = tool.store()
    other.execute("BEGIN IMMEDIATE")
    assert tool.run("user", "create", code=1) == ""
    other.close()
    assert tool.err.endswith("db.sqlite: database is locked\n")


def test_a_bad_configuration_is_a_line_for_each_mistake(tool: Tool) -> None:
    tool.configure("port = 'x'\nprot = 1")
    tool.run("user", "list", code=1)
    first, second = tool.err.splitlines()
    assert first.startswith("llmproxyctl: port: expected")
    assert second == "llmproxyctl: prot: unknown setting; did you mean port?"


def test_certificates_need_not_be_readable_by_the_operator(tool: Tool) -> None:
    tool.configure('cert = "/nowhere/c"\nkey = "/nowhere/k"')
    tool.run("user", "list")


def test_the_configuration_is_found_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMPROXY_CONFIG", str(tmp_path / "none.toml"))
    assert main(["user", "list"]) == 1
    assert f"{tmp_path}/none.toml: can't be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["user"], ["user", "make"], ["nothing"], ["usage"]])
def test_a_command_that_is_not_understood_ends_with_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert "usage: llmproxyctl" in capsys.readouterr().err


def test_help_and_version_end_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0


def test_a_reader_who_leaves_early_gets_no_traceback(tool: Tool) -> None:
    command = [sys.executable, "-m", "llmproxy.ctl", "-c", str(tool.path), "user", "list"]
    buffered = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=buffered
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        error = process.stderr.read()
    assert process.wait() == 1
    assert "Traceback" not in error
    assert "BrokenPipe" not in error


def test_the_sample_keys_load_twice_and_are_expired_endless_and_long() -> None:
    connection = sqlite3.connect(":memory:")
    connection.executescript(files("llmproxy").joinpath("schema.sql").read_text())
    for _ in range(2):
        connection.executescript((ROOT / "sample.sql").read_text())
    rows = connection.execute("SELECT secret, type, expires FROM api_key ORDER BY id").fetchall()
    now = connection.execute("SELECT datetime('now')").fetchone()[0]
    connection.close()
    assert [secret for secret, _, _ in rows] == [
        hashlib.sha256(f"token{number}".encode()).hexdigest() for number in (1, 2, 3)
    ]
    assert {kind for _, kind, _ in rows} == {"LLM"}
    assert rows[0][2] <= now
    assert [expires for _, _, expires in rows[1:]] == [None, "2124-01-01"]


def test_the_sample_keys_are_listed_with_their_status(tool: Tool) -> None:
    connection = tool.store()
    connection.executescript((ROOT / "sample.sql").read_text())
    connection.close()
    assert [key["status"] for key in tool.json("user", "list")] == ["expired", "active", "active"]


def models(tool: Tool) -> list[str | None]:
    return [key["models"] for key in tool.json("user", "list")]


def test_a_key_can_be_limited_to_models(tool: Tool) -> None:
    tool.run("user", "create", "--model", "llama", "-m", "qwen", "-m", "llama")
    tool.run("user", "create")
    assert models(tool) == ["llama, qwen", None]
    digits = tool.json("user", "list")[0]["hash"]
    tool.run("user", "update", digits, "--model", "other")
    assert models(tool) == ["other", None]
    tool.run("user", "update", digits, "--all-models", "-m", "x", code=2)
    tool.run("user", "update", digits, "--all-models")
    assert models(tool) == [None, None]


def test_the_limits_of_a_deleted_key_go_with_it(tool: Tool) -> None:
    tool.run("user", "create", "--model", "llama", "--concurrent-requests", "3")
    tool.query("INSERT INTO key_share SELECT id, 0, 0, '{}' FROM api_key")
    tool.run("user", "delete", tool.json("user", "list")[0]["hash"])
    for table in ("key_model", "key_limit", "key_share"):
        assert tool.query(f"SELECT * FROM {table}") == []


def limits(tool: Tool) -> list[tuple[int | None, int | None]]:
    keys = tool.json("user", "list")
    return [(key["requests_per_minute"], key["concurrent_requests"]) for key in keys]


def test_a_key_can_have_limits_of_its_own(tool: Tool) -> None:
    tool.run("user", "create", "--requests-per-minute", "60", "--concurrent-requests", "0")
    tool.run("user", "create")
    assert limits(tool) == [(60, 0), (None, None)]
    digits = tool.json("user", "list")[0]["hash"]
    tool.run("user", "update", digits, "--requests-per-minute", "1000000")
    assert limits(tool) == [(1_000_000, 0), (None, None)]
    tool.run("user", "update", digits, "--concurrent-requests", "default")
    assert limits(tool) == [(1_000_000, None), (None, None)]
    tool.run("user", "update", digits, "--comment", "c")
    assert limits(tool) == [(1_000_000, None), (None, None)]


@pytest.mark.parametrize("value", ["-1", "1.5", "1000001", "many", "", "9" * 30, "٣"])
def test_what_is_no_limit_is_refused_by_the_option_s_name(tool: Tool, value: str) -> None:
    tool.run("user", "create", f"--requests-per-minute={value}", code=2)
    assert "--requests-per-minute" in tool.err
    assert tool.query("SELECT count(*) FROM api_key") == [(0,)]


@pytest.mark.parametrize("name", BUDGETS)
def test_a_key_can_have_budgets_of_its_own(tool: Tool, name: str) -> None:
    option = f"--{name.replace('_', '-')}"
    tool.run("user", "create", option, "25_000_000")
    tool.run("user", "create", option, "0")
    assert [key[name] for key in tool.json("user", "list")] == [25_000_000, 0]
    digits = tool.json("user", "list")[0]["hash"]
    tool.run("user", "update", digits, option, str(MAX_BUDGET))
    assert [key[name] for key in tool.json("user", "list")] == [MAX_BUDGET, 0]
    tool.run("user", "update", digits, option, "default")
    assert [key[name] for key in tool.json("user", "list")] == [None, 0]
    for value in ("-1", "25.00", str(MAX_BUDGET + 1), "_1", "1__0", "none", "", "٣"):
        tool.run("user", "update", digits, f"{option}={value}", code=2)
        assert f"argument {option}: not a whole number, 0 to {MAX_BUDGET}" in tool.err
    assert [key[name] for key in tool.json("user", "list")] == [None, 0]


def test_a_table_has_all_limits_of_a_key_in_one_column(tool: Tool) -> None:
    add_key(tool, "ab1")
    add_key(tool, "cd1")
    tool.run("user", "update", "ab", "--cost-total", "0", "--requests-per-minute", "60")
    first, limited, free = tool.run("user", "list").splitlines()
    assert first.split() == ["HASH", "ID", "STATUS", "EXPIRES", "MODELS", "LIMITS", "COMMENT"]
    assert limited.split("  ")[-2].strip() == "requests_per_minute=60, cost_total=0"
    assert free.split() == ["cd1", "id-cd1", "active", "-", "-", "-", "c"]


def test_columns_for_programs_stay_where_they_are(tool: Tool) -> None:
    first = tool.run("user", "list", "--format", "csv").splitlines()[0]
    before = "hash,id,status,expires,models,requests_per_minute,concurrent_requests,"
    assert first == f"{before}tokens_per_minute,comment,{','.join(BUDGETS)}"


def totals(tool: Tool) -> list[tuple[int | None, int | None]]:
    return [(key["cost_total"], key["tokens_total"]) for key in tool.json("user", "list")]


def test_credit_is_added_to_what_a_key_has(tool: Tool) -> None:
    add_key(tool, "ab1")
    add_key(tool, "cd1")
    tool.run("user", "update", "ab", "--requests-per-minute", "60")
    assert tool.run("user", "credit", "ab", "--cost", "25_000_000") == "cost_total 25000000\n"
    assert tool.err == "key ab1: cost_total was default\n"
    told = tool.run("user", "credit", "ab", "--cost", "-5000000", "--tokens", "7")
    assert told == "cost_total 20000000\ntokens_total 7\n"
    assert tool.err == "key ab1: cost_total was 25000000\nkey ab1: tokens_total was default\n"
    assert totals(tool) == [(20_000_000, 7), (None, None)]
    assert tool.json("user", "list")[0]["requests_per_minute"] == 60
    assert tool.run("user", "credit", "cd", "--tokens=0") == "tokens_total 0\n"
    assert totals(tool) == [(20_000_000, 7), (None, 0)]


def test_credit_is_added_to_what_is_there_by_then(tool: Tool) -> None:
    add_key(tool, "ab1")
    other = tool.store()
    other.execute("BEGIN IMMEDIATE")
    other.execute("INSERT INTO key_limit (api_key, tokens_total) VALUES ('id-ab1', 5)")
    argv = ["-c", str(tool.path), "user", "credit", "ab", "--tokens", "7"]
    waiting = threading.Thread(target=main, args=(argv,))
    waiting.start()
    waiting.join(0.3)  # by now it waits for the lock
    other.execute("COMMIT")
    other.close()
    waiting.join()
    assert totals(tool) == [(None, 12)]


def test_credit_ends_at_nothing_and_at_the_largest_number(tool: Tool) -> None:
    add_key(tool, "ab1")
    tool.run("user", "update", "ab", "--cost-total", "5")
    tool.run("user", "credit", "ab", "--tokens", "1", "--cost", "-6", code=1)
    assert f"cost_total would be -1; it may be 0 to {MAX_BUDGET}" in tool.err
    tool.run("user", "credit", "ab", "--cost", f"{MAX_BUDGET}", code=1)
    assert f"cost_total would be {MAX_BUDGET + 5}; it may be 0 to {MAX_BUDGET}" in tool.err
    assert totals(tool) == [(5, None)]
    tool.run("user", "credit", "ab", "--cost", "-5")
    assert totals(tool) == [(0, None)]


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        ((), "nothing to add: give --cost or --tokens"),
        (("--cost", "25.00"), "argument --cost: not a whole number"),
        (("--tokens", str(MAX_BUDGET + 1)), "argument --tokens: not a whole number"),
        (("--tokens", "default"), "argument --tokens: not a whole number"),
    ],
)
def test_what_is_no_credit_is_refused(tool: Tool, argv: tuple[str, ...], error: str) -> None:
    add_key(tool, "ab1")
    tool.run("user", "credit", "ab", *argv, code=2)
    assert error in tool.err
    assert totals(tool) == [(None, None)]


def test_credit_in_mongodb_is_not_ours(tool: Tool) -> None:
    tool.configure(MONGODB)
    assert tool.run("user", "credit", "ab", "--cost", "1", code=2) == ""
    assert "managed in MongoDB" in tool.err
