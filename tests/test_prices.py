"""What requests cost: the price that applies at a moment, and amounts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from backend import ScriptedBackend, json_answer
from hypothesis import given
from hypothesis import strategies as st
from proxy import running_proxy

from llmproxy import config
from llmproxy.config import Config
from llmproxy.errors import ConfigError
from llmproxy.model import MAX_COUNT, Kind, Price
from llmproxy.prices import PriceList, cost, shown

START = datetime(2026, 7, 1, tzinfo=UTC)
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}


def prices(*entries: dict[str, Any], currency: str = "EUR") -> Config:
    return config.parse({"prices": {"currency": currency, "models": {"m": list(entries)}}})


def found(settings: Config, moment: datetime, model: str = "m") -> Price | None:
    return PriceList(settings.prices).at(model, moment)


def prompt_price(settings: Config, moment: datetime) -> int | None:
    price = found(settings, moment)
    return price and price.prompt


def test_a_price_holds_from_its_moment_to_the_next_one() -> None:
    settings = prices(
        {"valid_from": "2026-08-01", "prompt": 3},
        {"valid_from": START, "prompt": 2},
    )
    second = timedelta(seconds=1)
    assert prompt_price(settings, START - second) is None
    assert prompt_price(settings, START) == 2
    assert prompt_price(settings, START + timedelta(days=31) - second) == 2
    assert prompt_price(settings, START + timedelta(days=31)) == 3


def test_a_price_without_a_moment_holds_since_ever() -> None:
    settings = prices({"prompt": 1}, {"valid_from": START, "prompt": 2})
    assert prompt_price(settings, datetime(1970, 1, 1, tzinfo=UTC)) == 1
    assert prompt_price(settings, START) == 2


def test_a_model_without_a_price_has_none() -> None:
    assert found(prices({"prompt": 1}), START, "other") is None


def test_a_price_has_the_same_id_everywhere_and_another_one_has_another() -> None:
    one = found(prices({"prompt": 1, "completion": 2}), START)
    same = found(prices({"completion": 2, "prompt": 1, "valid_from": "2026-01-01"}), START)
    assert one == same
    others = [
        found(prices({"prompt": 1, "completion": 2}, currency="USD"), START),
        found(prices({"prompt": 2, "completion": 1}), START),
        found(prices({"prompt": 1, "completion": 2, "embedding": 1}), START),
    ]
    ids = {price.id for price in [one, *others] if price}
    assert len(ids) == 4
    assert all(0 <= each <= MAX_COUNT for each in ids)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"prompt": -1}, 'prices.models."m[0]".prompt: expected a whole number'),
        ({"prompt": 0.5}, 'prices.models."m[0]".prompt: expected a whole number'),
        ({"prompts": 1}, 'prices.models."m[0]".prompts: unknown setting; did you mean prompt?'),
        ({"valid_from": "soon"}, 'prices.models."m[0]".valid_from: expected a time like'),
        (7, 'prices.models."m[0]": expected a table'),
    ],
)
def test_a_price_that_makes_no_sense_is_refused(entry: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prices(entry)
    assert str(caught.value).startswith(told)


def test_two_prices_of_one_moment_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^prices\.models\.m: two prices are valid"):
        prices({"valid_from": START}, {"valid_from": "2026-07-01T02:00:00+02:00"})


def test_a_currency_is_a_code() -> None:
    with pytest.raises(ConfigError, match=r"^prices\.currency: expected a currency's code"):
        prices(currency="euro")


@pytest.mark.parametrize(
    ("pico", "text"),
    [(0, "0.000000"), (1, "0.000001"), (10**6, "0.000001"), (10**6 + 1, "0.000002"),
     (10**12, "1.000000"), (123 * 10**12 + 456, "123.000001")],
)  # fmt: skip
def test_an_amount_is_shown_in_micro_units_rounded_up(pico: int, text: str) -> None:
    assert shown(pico) == text


counts = st.dictionaries(st.sampled_from(list(Kind)), st.integers(0, MAX_COUNT))
amounts = st.integers(0, 10**15)


@given(st.lists(counts), st.builds(Price, st.just(1), st.just("EUR"), *[amounts] * 4))
def test_what_is_added_up_first_costs_the_same(rows: list[dict[Kind, int]], price: Price) -> None:
    total = {kind: sum(row.get(kind, 0) for row in rows) for kind in Kind}
    assert cost(total, price) == sum(cost(row, price) for row in rows)


@pytest_twisted.ensureDeferred
async def test_a_request_has_the_price_of_its_time_and_a_reload_brings_the_next(
    tmp_path: Path,
) -> None:
    async with ScriptedBackend(json_answer(200, {"usage": USAGE})) as backend:
        models = {"m": [{"prompt": 150_000, "completion": 600_000}]}
        named = {"currency": "EUR", "models": models}
        async with running_proxy(
            tmp_path, {"m": {"url": backend.url}, "free": {"url": backend.url}}, prices=named
        ) as proxy:
            for model in ("m", "free"):
                await proxy.post("/v1/chat/completions", {"model": model, "messages": []})
            models["m"] = [{"prompt": 1}]
            proxy.proxy.reload()
            await proxy.post("/v1/chat/completions", {"model": "m", "messages": []})
        shown_prices = proxy.query(
            "SELECT model, currency, p.prompt, p.completion"
            " FROM ledger LEFT JOIN price p ON p.id = price ORDER BY rid"
        )
    assert shown_prices == [
        ("m", "EUR", 150_000, 600_000),
        ("free", None, None, None),
        ("m", "EUR", 1, 0),
    ]
