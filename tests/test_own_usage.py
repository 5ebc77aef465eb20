"""`GET /v1/usage`: a key sees what it has used itself, by day and model, and nobody else's."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_twisted
from backend import ScriptedBackend, json_answer
from proxy import request_bytes, running_proxy

from llmproxy.errors import BadRequest
from llmproxy.model import MAX_COUNT, Kind, Price, Used, utcnow
from llmproxy.usage_report import MOST_DAYS, period, report

TODAY = date(2026, 3, 5)
CHAT = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
DONE = json_answer(200, {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
PRICES = {"currency": "EUR", "models": {"chat": [{"prompt": 100_000, "completion": 500_000}]}}


# -- the days ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "since", "until"),
    [
        (b"", "2026-03-01", "2026-03-06"),
        (b"since=2026-02-27", "2026-02-27", "2026-03-06"),
        (b"until=2026-03-01", "2026-02-01", "2026-03-01"),
        (b"since=2024-02-29&until=2025-03-01", "2024-02-29", "2025-03-01"),
        (b"since=2026-03-05&until=2026-03-06&limit=3", "2026-03-05", "2026-03-06"),
    ],
)
def test_days_are_those_asked_for_else_the_month_s(query: bytes, since: str, until: str) -> None:
    assert period(query, TODAY) == (date.fromisoformat(since), date.fromisoformat(until))


@pytest.mark.parametrize(
    ("query", "name"),
    [
        (b"since=yesterday", "since"),
        (b"since=", "since"),
        (b"since=20260301", "since"),
        (b"since=2026-W10-1", "since"),
        (b"since=2026-02-30", "since"),
        (b"since=2026-03-01T00:00", "since"),
        (b"since=2026-03-01&since=2026-03-02", "since"),
        ("since=2026-03-0٣".encode(), "since"),
        (b"until=9999-12-31", "until"),
        (b"since=0001-01-01", "since"),
        (b"since=2026-03-02&until=2026-03-02", "until"),
        (b"since=2026-03-02&until=2026-03-01", "until"),
        (b"since=2025-03-04", "until"),
        (b"\xff&since=\xff", "since"),
    ],
)
def test_what_is_no_such_time_is_refused_by_its_name(query: bytes, name: str) -> None:
    with pytest.raises(BadRequest) as refused:
        period(query, TODAY)
    assert refused.value.param == name


def test_a_year_can_be_had_at_once() -> None:
    since, until = period(b"since=2024-01-01&until=2025-01-01", TODAY)
    assert (until - since).days == MOST_DAYS


# -- the answer --------------------------------------------------------------------------------


def told(used: Sequence[Used]) -> dict[str, Any]:
    return dict(orjson.loads(report(used, TODAY, TODAY, "all", {})))


def used(prompt: int, price: Price | None, requests: int = 1) -> Used:
    return Used("2026-03-05", "m", requests, {**dict.fromkeys(Kind, 0), Kind.PROMPT: prompt}, price)


def test_prices_of_one_currency_are_one_line_and_are_rounded_once() -> None:
    cheap, dear = Price(1, "EUR", 1, 0, 0, 0), Price(2, "EUR", 3, 0, 0, 0)
    other = Price(3, "USD", 1, 0, 0, 0)
    answer = told([used(5, None, 4), used(1, cheap), used(1, dear), used(1_000_001, other)])
    costs = [(x["currency"], x["cost"], x["prompt_tokens"], x["requests"]) for x in answer["data"]]
    assert costs == [
        (None, None, 5, 4),
        ("EUR", "0.000001", 2, 2),
        ("USD", "0.000002", 1_000_001, 1),
    ]
    assert [x["currency"] for x in answer["totals"]] == [None, "EUR", "USD"]


def test_a_sum_that_is_too_large_is_the_largest() -> None:
    huge = [used(MAX_COUNT, Price(n, "EUR", n, 0, 0, 0)) for n in range(3)]
    assert told(huge)["totals"][0]["prompt_tokens"] == MAX_COUNT


def test_no_rate_is_no_limit_but_a_budget_of_nothing_is_one() -> None:
    limits = {"requests_per_minute": 0, "tokens_per_day": 0, "cost_total": None, "tokens_total": 9}
    answer = orjson.loads(report([], TODAY, TODAY, "all", limits))
    assert answer["limits"] == limits | {"requests_per_minute": None}


# -- the path ----------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_key_sees_what_it_was_billed_and_no_other_key_s(tmp_path: Path) -> None:
    async with ScriptedBackend(DONE) as backend:
        served = {"chat": {"url": backend.url}, "free": {"url": backend.url}}
        limits = {"requests_per_minute": 600}
        async with running_proxy(tmp_path, served, prices=PRICES, limits=limits) as proxy:
            for model in ("chat", "chat", "free"):
                assert (await proxy.post("/v1/chat/completions", {**CHAT, "model": model})).status
            await proxy.post("/v1/chat/completions", CHAT, key="token3")
            answer = await proxy.get("/v1/usage")
            today = utcnow().date()
            line = {
                "object": "usage",
                "day": str(today),
                "embedding_tokens": 0,
                "audio_seconds": 0,
            }
            chat = {
                "model": "chat",
                "requests": 2,
                "prompt_tokens": 6,
                "completion_tokens": 4,
                "cost": "0.000003",
                "currency": "EUR",
            }
            free = {
                "model": "free",
                "requests": 1,
                "prompt_tokens": 3,
                "completion_tokens": 2,
                "cost": None,
                "currency": None,
            }
            shown = answer.json()
            assert (answer.status, shown["scope"]) == (200, "all")
            assert shown["since"] == str(today.replace(day=1))
            assert shown["data"] == [line | chat, line | free]
            assert shown["limits"] == {
                "requests_per_minute": 600,
                "concurrent_requests": None,
                "tokens_per_minute": None,
                "tokens_per_day": None,
                "tokens_per_month": None,
                "tokens_total": None,
                "cost_per_day": None,
                "cost_per_month": None,
                "cost_total": None,
            }
            assert [x["requests"] for x in shown["totals"]] == [1, 2]
            before = await proxy.get("/v1/usage?since=2026-01-01&until=2026-01-02")
            assert (before.json()["data"], before.json()["totals"]) == ([], [])
            assert (await proxy.get("/v1/usage", key="token3")).json()["data"][0]["requests"] == 1
            headed = await proxy.send(
                request_bytes("HEAD", "/v1/usage", fields={"Connection": "close"})
            )
            assert (headed.status, headed.body) == (200, b"")


@pytest_twisted.ensureDeferred
async def test_who_is_nobody_sees_nothing(tmp_path: Path) -> None:
    async with running_proxy(tmp_path, {}) as proxy:
        for key in (None, "token1", "guess"):
            assert (await proxy.get("/v1/usage", key=key)).status == 401
        refused = await proxy.get("/v1/usage?since=tomorrow")
        assert (refused.status, refused.json()["error"]["param"]) == (400, "since")
        assert (await proxy.get("/v1/usage/all")).status == 404
        assert (await proxy.post("/v1/usage", {})).status == 405
        metrics = (await proxy.get("/metrics", port=proxy.admin_port)).body.decode()
        assert 'requests_total{method="GET",path="/v1/usage",status="401"} 3.0' in metrics


@pytest_twisted.ensureDeferred
async def test_sums_that_can_t_be_read_are_told_so_and_hold_up_no_key(tmp_path: Path) -> None:
    async with running_proxy(tmp_path, {}) as proxy:
        assert (await proxy.get("/v1/usage")).status == 200
        with closing(sqlite3.connect(proxy.database)) as operator:
            operator.execute("ALTER TABLE usage_day RENAME TO gone")
        failed = await proxy.get("/v1/usage")
        assert (failed.status, failed.fields["retry-after"]) == (503, "2")
        assert (await proxy.get("/v1/models", key="token3")).status == 200
