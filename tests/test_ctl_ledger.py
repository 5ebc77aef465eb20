"""`llmproxyctl ledger` and `llmproxyctl usage`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from ctl_tool import MONGODB, Tool

from llmproxy.ctl import ledger
from llmproxy.model import MAX_COUNT, State

FINISHED = "2026-03-01T10:00:05.000000+00:00"
EVENTS = "SELECT created, api_key, product, quantity, rid FROM event_oneoff ORDER BY product"
CHAT = ("--prompt", "3", "--completion", "4")


@pytest.fixture
def tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(tmp_path, capsys)


def row_of(tool: Tool, rid: str) -> dict[str, Any]:
    rows = [
        json.loads(line)
        for line in tool.run("ledger", "export", "--format", "jsonl").split("\n")
        if line
    ]
    return next(row for row in rows if row["rid"] == rid)


def rids(tool: Tool, *options: str) -> list[str]:
    return [row["rid"] for row in tool.json("ledger", "list", *options)]


def add_each_state(tool: Tool) -> None:
    for number, state in enumerate(State):
        tool.add_row(f"r{number}-{state}", state=state)


def test_a_list_shows_what_could_not_be_billed_exactly(tool: Tool) -> None:
    add_each_state(tool)
    assert rids(tool) == ["r2-estimated", "r3-disputed", "r4-orphan"]


def test_a_list_shows_the_states_that_are_asked_for(tool: Tool) -> None:
    add_each_state(tool)
    for number, state in enumerate(State):
        assert rids(tool, "--state", state) == [f"r{number}-{state}"]
    assert rids(tool, "--state", "open", "--state", "orphan") == ["r0-open", "r4-orphan"]
    tool.run("ledger", "list", "--state", "paid", code=2)


def test_a_list_is_bounded_by_time(tool: Tool) -> None:
    for hour in (9, 10, 11):
        tool.add_row(f"r{hour}", state="orphan", opened=f"2026-03-01T{hour:02}:00:00.000000+00:00")
    assert rids(tool, "--since", "2026-03-01T10:00") == ["r10", "r11"]
    assert rids(tool, "--until", "2026-03-01T10:00Z") == ["r9"]
    assert rids(tool, "--since", "2026-03-01T12:00+02:00", "--until", "2026-03-01 11:00") == ["r10"]
    assert rids(tool, "--since", "2026-03-02") == []


def test_a_list_keeps_the_newest_rows_and_says_so(tool: Tool) -> None:
    for number in range(5):
        tool.add_row(f"r{number}", state="orphan")
    assert rids(tool, "--limit", "2") == ["r3", "r4"]
    assert "only the newest 2 rows" in tool.err
    assert len(rids(tool, "--limit", "5")) == 5
    assert tool.err == ""


def test_a_table_has_a_line_for_each_row(tool: Tool) -> None:
    tool.add_row("r1", state="disputed", prompt=1, raw="\x1b[2J", model="a\x1b[2J")
    heading, line = tool.run("ledger", "list").splitlines()
    assert heading.split()[:3] == ["RID", "STATE", "OPENED"]
    assert line.split()[:2] == ["r1", "disputed"]
    assert "\x1b" not in line


def test_a_list_as_csv_has_all_columns(tool: Tool) -> None:
    tool.add_row("r1", state="disputed", raw='{"usage": "1,\n2"}', prompt=7)
    (row,) = csv.DictReader(io.StringIO(tool.run("ledger", "list", "--format", "csv")))
    assert (row["rid"], row["raw"], row["prompt"]) == ("r1", '{"usage": "1,\n2"}', "7")
    assert row["completion"] == ""


@pytest.mark.parametrize("state", ["disputed", "orphan"])
def test_resolving_settles_the_row_and_puts_it_on_the_bill(tool: Tool, state: str) -> None:
    tool.add_row("r1", state=state, delivered=0, completion=99, raw="absurd", outcome="complete")
    tool.run("ledger", "resolve", "r1", *CHAT)
    row = row_of(tool, "r1")
    assert (row["state"], row["prompt"], row["completion"]) == ("settled", 3, 4)
    assert (row["delivered"], row["raw"], row["finished"]) == (1, "absurd", FINISHED)
    assert tool.query(EVENTS) == [
        (FINISHED, "key1", "llama/H100/completion", 4, "r1"),
        (FINISHED, "key1", "llama/H100/prompt", 3, "r1"),
    ]


def test_a_row_without_an_end_ends_when_it_is_resolved(tool: Tool) -> None:
    tool.add_row("r1", state="orphan", finished=None, outcome=None)
    tool.run("ledger", "resolve", "r1", *CHAT)
    finished = row_of(tool, "r1")["finished"]
    assert finished > "2026-03-01T10:00:05"
    assert {created for created, *_ in tool.query(EVENTS)} == {finished}


def test_resolving_twice_bills_once(tool: Tool) -> None:
    tool.add_row("r1", state="orphan")
    tool.run("ledger", "resolve", "r1", *CHAT)
    tool.run("ledger", "resolve", "r1", "--prompt", "9", "--completion", "9", code=1)
    assert "r1 is settled already" in tool.err
    assert [quantity for _, _, _, quantity, _ in tool.query(EVENTS)] == [4, 3]


def test_an_event_that_is_there_already_stays(tool: Tool) -> None:
    tool.add_row("r1", state="orphan")
    tool.query(
        "INSERT INTO event_oneoff (created, api_key, product, quantity, rid)"
        " VALUES ('c', 'key1', 'llama/H100/prompt', 8, 'r1')"
    )
    tool.run("ledger", "resolve", "r1", *CHAT)
    assert [quantity for _, _, _, quantity, _ in tool.query(EVENTS)] == [4, 8]


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("open", "is still in flight"),
        ("settled", "is settled already"),
        ("estimated", "on the bill already"),
    ],
)
def test_only_disputed_and_orphan_rows_are_resolved(tool: Tool, state: str, reason: str) -> None:
    tool.add_row("r1", state=state, prompt=1)
    before = row_of(tool, "r1")
    tool.run("ledger", "resolve", "r1", *CHAT, code=1)
    assert reason in tool.err
    assert row_of(tool, "r1") == before
    assert tool.query(EVENTS) == []


def test_an_unknown_id_is_refused(tool: Tool) -> None:
    tool.run("ledger", "resolve", "r1", *CHAT, code=1)
    assert tool.err.endswith("llmproxyctl: no row has the id r1\n")


@pytest.mark.parametrize(
    ("path", "options", "needed"),
    [
        ("/v1/chat/completions", ("--prompt", "1"), "--prompt N --completion N"),
        ("/v1/messages", ("--embedding", "1"), "--prompt N --completion N"),
        ("/v1/responses", (*CHAT, "--embedding", "1"), "--prompt N --completion N"),
        ("/v1/embeddings", CHAT, "--embedding N"),
        ("/v1/rerank", ("--transcription", "1"), "--embedding N"),
        ("/v1/audio/translations", ("--embedding", "1"), "--transcription N"),
        ("/v1/messages/count_tokens", CHAT, "--nothing"),
    ],
)
def test_the_numbers_must_be_those_of_such_a_request(
    tool: Tool, path: str, options: tuple[str, ...], needed: str
) -> None:
    tool.add_row("r1", state="orphan", path=path)
    tool.run("ledger", "resolve", "r1", *options, code=1)
    assert tool.err == f"llmproxyctl: a request to {path} is billed by {needed}\n"
    assert row_of(tool, "r1")["state"] == "orphan"


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/v1/embeddings", "embedding"), ("/v1/audio/transcriptions", "transcription")],
)
def test_embeddings_and_audio_have_one_number(tool: Tool, path: str, kind: str) -> None:
    tool.add_row("r1", state="disputed", path=path)
    tool.run("ledger", "resolve", "r1", f"--{kind}", str(MAX_COUNT))
    assert tool.query(EVENTS) == [(FINISHED, "key1", f"llama/H100/{kind}", MAX_COUNT, "r1")]


@pytest.mark.parametrize("number", ["-1", "1.5", "x", "", str(MAX_COUNT + 1), "٣"])
def test_a_number_that_no_bill_holds_is_refused(tool: Tool, number: str) -> None:
    tool.add_row("r1", state="orphan")
    tool.run("ledger", "resolve", "r1", f"--prompt={number}", "--completion", "1", code=2)
    assert row_of(tool, "r1")["state"] == "orphan"


def test_zero_is_a_number_that_can_be_billed(tool: Tool) -> None:
    tool.add_row("r1", state="orphan")
    tool.run("ledger", "resolve", "r1", "--prompt", "0", "--completion", "0")
    assert [quantity for _, _, _, quantity, _ in tool.query(EVENTS)] == [0, 0]


def test_nothing_closes_a_row_without_a_bill(tool: Tool) -> None:
    tool.add_row("r1", state="orphan", delivered=0, prompt=5)
    tool.run("ledger", "resolve", "r1", "--nothing")
    row = row_of(tool, "r1")
    assert (row["state"], row["prompt"], row["delivered"]) == ("settled", None, 1)
    assert tool.query(EVENTS) == []


@pytest.mark.parametrize("options", [(), (*CHAT, "--nothing")])
def test_either_numbers_or_nothing_must_be_given(tool: Tool, options: tuple[str, ...]) -> None:
    tool.run("ledger", "resolve", "r1", *options, code=2)
    assert "give either the numbers or --nothing" in tool.err


def test_a_failure_in_the_middle_leaves_all_as_it_was(
    tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool.add_row("r1", state="orphan")
    before = row_of(tool, "r1")

    def fail(*arguments: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(ledger, "add_events", fail)
    with pytest.raises(RuntimeError, match="planted"):
        tool.run("ledger", "resolve", "r1", *CHAT)
    assert row_of(tool, "r1") == before


def test_with_mongodb_a_resolved_row_waits_in_the_journal_for_delivery(
    tool: Tool, tmp_path: Path
) -> None:
    tool.configure(MONGODB)
    tool.add_row("r1", state="disputed", delivered=0, user_id="ann")
    tool.run("ledger", "resolve", "r1", *CHAT)
    assert "the proxy delivers it to MongoDB" in tool.err
    row = row_of(tool, "r1")
    assert (row["state"], row["delivered"], row["user_id"]) == ("settled", 0, "ann")
    assert tool.query(EVENTS) == []
    assert (tmp_path / "ledger.sqlite").exists()


def test_with_mongodb_a_row_closed_with_nothing_has_no_delivery(tool: Tool) -> None:
    tool.configure(MONGODB)
    tool.add_row("r1", state="disputed", delivered=0)
    tool.run("ledger", "resolve", "r1", "--nothing")
    assert row_of(tool, "r1")["delivered"] == 1


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5])
def test_an_export_holds_every_row_once(
    tool: Tool, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(ledger, "PAGE_ROWS", 2)
    for number in range(rows):
        tool.add_row(f"r{number}", prompt=number)
    lines = tool.run("ledger", "export", "--format", "jsonl").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == list(range(rows))
    table = csv.DictReader(io.StringIO(tool.run("ledger", "export", "--format", "csv")))
    assert [row["rid"] for row in table] == [f"r{number}" for number in range(rows)]


def test_an_export_is_bounded_by_time(tool: Tool) -> None:
    for day in (1, 2, 3):
        tool.add_row(f"r{day}", opened=f"2026-03-0{day}T10:00:00.000000+00:00")
    out = tool.run(
        "ledger", "export", "--format", "jsonl", "--since", "2026-03-02", "--until", "2026-03-03"
    )
    assert [json.loads(line)["rid"] for line in out.splitlines()] == ["r2"]


def add_usage(tool: Tool) -> None:
    other = {"api_key": "key2", "model": "qwen", "finished": "2026-03-02T00:00:00.000000+00:00"}
    tool.add_row("r1", prompt=1, completion=10)
    tool.add_row("r2", prompt=2, completion=20, state="estimated")
    tool.add_row("r3", prompt=100, completion=100, state="disputed")
    tool.add_row("r4", prompt=100, completion=100, state="orphan")
    tool.add_row("r5", prompt=100, completion=100, state="open", finished=None)
    tool.add_row("r6", embedding=5, **other)
    tool.add_row("r7", transcription=7, **other)


@pytest.mark.parametrize(
    ("by", "first", "second"),
    [("key", "key1", "key2"), ("model", "llama", "qwen"), ("day", "2026-03-01", "2026-03-02")],
)
def test_usage_sums_what_was_billed(tool: Tool, by: str, first: str, second: str) -> None:
    add_usage(tool)
    nothing: dict[str, Any] = {"prompt": 0, "completion": 0, "embedding": 0, "transcription": 0}
    nothing |= {"cost": None, "currency": None}
    assert tool.json("usage", "--by", by) == [
        nothing | {by: first, "requests": 2, "prompt": 3, "completion": 30},
        nothing | {by: second, "requests": 2, "embedding": 5, "transcription": 7},
    ]


def test_usage_is_bounded_by_the_end_of_a_request(tool: Tool) -> None:
    add_usage(tool)
    assert [row["day"] for row in tool.json("usage", "--by", "day", "--since", "2026-03-02")] == [
        "2026-03-02"
    ]
    assert [row["day"] for row in tool.json("usage", "--by", "day", "--until", "2026-03-02")] == [
        "2026-03-01"
    ]


def test_usage_does_not_overflow(tool: Tool) -> None:
    for number in range(3):
        tool.add_row(f"r{number}", prompt=MAX_COUNT)
    assert tool.json("usage", "--by", "key")[0]["prompt"] == 3 * MAX_COUNT


def test_usage_as_table_and_csv(tool: Tool) -> None:
    add_usage(tool)
    assert tool.run("usage", "--by", "key").splitlines() == [
        "KEY   REQUESTS  PROMPT  COMPLETION  EMBEDDING  TRANSCRIPTION  COST  CURRENCY",
        "key1         2       3          30          0              0     -         -",
        "key2         2       0           0          5              7     -         -",
    ]
    assert tool.run("usage", "--by", "key", "--format", "csv").splitlines() == [
        "key,requests,prompt,completion,embedding,transcription,cost,currency",
        "key1,2,3,30,0,0,,",
        "key2,2,0,0,5,7,,",
    ]


def test_usage_works_on_the_journal_with_mongodb(tool: Tool) -> None:
    tool.configure(MONGODB)
    add_usage(tool)
    assert [row["requests"] for row in tool.json("usage", "--by", "key")] == [2, 2]


def add_prices(tool: Tool) -> None:
    prices = {1: ("EUR", 150_000, 600_000), 2: ("EUR", 300_000, 0), 3: ("USD", 1, 1)}
    for number, price in prices.items():
        tool.query("INSERT INTO price VALUES (?, ?, ?, ?, 0, 0)", number, *price)


def test_usage_shows_what_it_costs_at_the_price_of_each_request(tool: Tool) -> None:
    add_prices(tool)
    tool.add_row("r1", prompt=10, completion=10, price=1)  # 7.5 micro-units
    tool.add_row("r2", prompt=10, price=2)  # 3.0
    tool.add_row("r3", prompt=10, price=2, state="disputed")  # is not billed
    tool.add_row("r4", prompt=1_000_000, price=3)
    tool.add_row("r5", prompt=7)
    found = tool.json("usage", "--by", "key")
    assert [(row["currency"], row["cost"], row["requests"]) for row in found] == [
        (None, None, 1),
        ("EUR", "0.000011", 2),
        ("USD", "0.000001", 1),
    ]


def test_costs_do_not_overflow(tool: Tool) -> None:
    tool.query("INSERT INTO price VALUES (1, 'EUR', 1000000000000000, 0, 0, 0)")
    for number in range(3):
        tool.add_row(f"r{number}", prompt=MAX_COUNT, price=1)
    (row,) = tool.json("usage", "--by", "key")
    assert row["cost"] == f"{3 * MAX_COUNT * 1000}.000000"


def test_rows_are_exported_with_what_they_cost(tool: Tool) -> None:
    add_prices(tool)
    tool.add_row("r1", prompt=10, completion=10, price=1)
    tool.add_row("r2", prompt=10, completion=10, price=1, state="disputed")
    assert (row_of(tool, "r1")["cost"], row_of(tool, "r1")["currency"]) == ("0.000008", "EUR")
    assert row_of(tool, "r2")["cost"] is None
    tool.run("ledger", "resolve", "r2", *CHAT)
    assert row_of(tool, "r2")["cost"] == "0.000003"
