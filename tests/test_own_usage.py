"""`GET /v1/usage`: a key sees what it has used itself, by day and model, and nobody else's."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
import pytest_twisted
from backend import ScriptedBackend, json_answer
from memory import Server
from proxy import Answer, request_bytes, running_proxy
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from zope.interface import implementer

from llmproxy.budgets import Budgets
from llmproxy.config import Config, KeyLimits
from llmproxy.errors import BadRequest, StorageError
from llmproxy.exchange import Services
from llmproxy.limits import Limits
from llmproxy.model import (
    MAX_COUNT,
    Account,
    Amount,
    Counts,
    Kind,
    OwnLimits,
    Price,
    Spending,
    Used,
    utcnow,
)
from llmproxy.resource import make_root
from llmproxy.storage import ISpending, IUsage
from llmproxy.storage.memory import MemoryShares
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
    return dict(orjson.loads(report(used, TODAY, TODAY, "all", {}, {})))


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
    answer = orjson.loads(report([], TODAY, TODAY, "all", limits, None))
    assert answer["limits"] == limits | {"requests_per_minute": None}
    assert answer["remaining"] is None


# -- the path ----------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_a_key_sees_what_it_was_billed_and_no_other_key_s(tmp_path: Path) -> None:
    async with ScriptedBackend(DONE) as backend:
        served = {"chat": {"url": backend.url}, "free": {"url": backend.url}}
        limits = {"requests_per_minute": 600, "tokens_total": 100, "cost_per_month": 10}
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
            assert shown["remaining"] == {"tokens_total": 85, "cost_per_month": 7}
            assert shown["limits"] == {
                "requests_per_minute": 600,
                "concurrent_requests": None,
                "tokens_per_minute": None,
                "tokens_per_day": None,
                "tokens_per_month": None,
                "tokens_total": 100,
                "cost_per_day": None,
                "cost_per_month": 10,
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


# -- what is left ------------------------------------------------------------------------------


SPENT = Spending(utcnow().date(), Amount(1, 10), Amount(2, 20), Amount(3, 30), held=Amount(9, 9))


@implementer(IUsage)
class NoUsage:
    """Nothing is on the bill of any day."""

    def of(self, key_id: str, since: date, until: date) -> Deferred[Sequence[Used]]:
        return succeed([])


@implementer(ISpending)
class Purse:
    """`answer` is what each key has used."""

    def __init__(self) -> None:
        self.answer = succeed(SPENT)
        self.asked: list[str] = []

    def of(self, key_id: str, running: Mapping[str, Counts]) -> Deferred[Spending]:
        assert running == {}
        self.asked.append(key_id)
        return self.answer


class Site:
    """A key with limits of its own, under those of all, at a site without a socket."""

    def __init__(self, own: OwnLimits | None = None, **limits: int) -> None:
        self.clock = Clock()
        self.config = Config(limits=KeyLimits(**limits))
        self.limits = Limits(
            self.config.limits,
            MemoryShares(),
            "me",
            self.clock,
            self.clock.seconds,
            lambda setting: None,
        )
        self.authenticator = self
        self._account = Account("alice", limits=own)
        self.purse = Purse()
        self.budgets = Budgets(
            self.config.limits, self.purse, self.clock, self.clock.seconds, lambda setting: None
        )
        root = make_root(cast(Services, self), 0, NoUsage())
        self._server = Server(self.clock, root)

    async def authenticate(self, *args: object) -> Account:
        return self._account

    def ask(self) -> None:
        self._server.connect()
        self._server.send(request_bytes("GET", "/v1/usage"))

    def is_waiting(self) -> bool:
        return self._server.sent == b""

    def told(self) -> Any:
        """What is left, as the last answer has it."""
        answer = Answer(self._server.sent)
        assert answer.status == 200
        return answer.json()["remaining"]


def test_a_key_is_told_what_is_left_of_its_own_budgets_and_of_those_of_all() -> None:
    site = Site(OwnLimits(cost_per_day=15, tokens_total=2), tokens_per_day=3, tokens_total=9)
    site.ask()
    assert site.told() == {"tokens_per_day": 2, "tokens_total": 0, "cost_per_day": 5}
    assert site.purse.asked == ["alice"]


def test_nobody_is_asked_for_a_key_without_a_budget() -> None:
    site = Site(OwnLimits(requests_per_minute=15), tokens_per_minute=10)
    site.ask()
    assert (site.told(), site.purse.asked) == ({}, [])


def test_where_it_can_t_be_known_what_is_left_the_rest_is_told() -> None:
    site = Site(tokens_total=9)
    site.ask()
    assert site.told() == {"tokens_total": 6}
    site.purse.answer = fail(StorageError("gone"))
    site.ask()
    assert site.told() is None
    site.purse.answer = succeed(SPENT)
    site.clock.advance(1)
    site.ask()
    assert site.told() == {"tokens_total": 6}


def test_a_key_waits_for_it_a_second_and_no_longer() -> None:
    site = Site(tokens_total=9)
    site.purse.answer = Deferred()
    site.ask()
    site.clock.advance(0.9)
    assert site.is_waiting()
    site.clock.advance(0.1)
    assert site.told() is None
    site.ask()
    assert (site.told(), site.purse.asked) == (None, ["alice"])
