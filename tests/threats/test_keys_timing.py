"""How long a refusal takes says nothing about how near a guess was.

What is done for each guess is compared line by line. And it is timed, in the long form often enough
to tell how likely the difference would be if there were none (the Mann-Whitney U test). A key that
has expired may take longer than one that never was: its holder learns of it what he knew.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist, median
from types import FrameType
from typing import Any

import orjson
import pytest
import pytest_twisted
from backend import ScriptedBackend, json_answer
from figures import report
from proxy import Answer, ProxyHandle, request_bytes, running_proxy
from tally import LONG
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

import llmproxy
from llmproxy.auth import Authenticator, key_of
from llmproxy.endpoints import Dialect
from llmproxy.errors import InvalidKey
from llmproxy.model import Account
from llmproxy.storage.memory import MemoryAccounts

CHAT = "/v1/chat/completions"
ASK = orjson.dumps({"model": "chat", "messages": [{"role": "user", "content": "hi"}]})
DONE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}
KEY = "sk-" + "0123456789abcdef" * 3
PACKAGE = str(Path(llmproxy.__file__).parent)
TIMES = 10_000 if LONG else 300


def nearly_right() -> str:
    """A key whose first 40 characters are right."""
    return KEY[:40] + secrets.token_hex(20)[: len(KEY) - 40]


def at_random() -> str:
    """A key of the same length that is wrong all over."""
    return secrets.token_hex(40)[: len(KEY)]


# -- what is done ------------------------------------------------------------------------------


def lines_run(key: bytes, authenticator: Authenticator) -> list[tuple[str, int]]:
    """The lines of ours that run until a key is refused, in their order."""
    lines: list[tuple[str, int]] = []

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        lines.append((frame.f_code.co_qualname, frame.f_lineno))
        return trace

    refused: list[Any] = []
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        sent = key_of({b"authorization": b"Bearer " + key}, Dialect.OPENAI)
        if authenticator.known(sent) is None:
            asked = Deferred.fromCoroutine(authenticator.authenticate(sent))
            asked.addErrback(refused.append)
    finally:
        sys.settrace(before)
    assert refused[0].check(InvalidKey)
    return lines


def test_the_same_is_done_for_a_key_that_is_nearly_right_and_for_any_other() -> None:
    hashes = {hashlib.sha256(KEY.encode()).hexdigest(): Account("id")}
    authenticator = Authenticator(MemoryAccounts(hashes), Clock(), fresh_s=1, stale_max_s=1)
    usual = lines_run(at_random().encode(), authenticator)
    assert len(usual) > 20
    for end in range(1, len(KEY)):
        assert lines_run(KEY[:end].encode(), authenticator) == usual
        assert lines_run((KEY[:end] + "~" + KEY[end + 1 :]).encode(), authenticator) == usual


# -- how long it takes -------------------------------------------------------------------------


def probability(one: list[float], other: list[float]) -> float:
    """Of a difference as large as this between samples of one distribution: the two-sided p value
    of the Mann-Whitney U test. Times of a nanosecond's resolution have next to no ties."""
    ranked = sorted([(value, 0) for value in one] + [(value, 1) for value in other])
    ranks = sum(rank for rank, (_, which) in enumerate(ranked, 1) if not which)
    n, m = len(one), len(other)
    u = ranks - n * (n + 1) / 2
    sigma = (n * m * (n + m + 1) / 12) ** 0.5
    return 2 * NormalDist().cdf(-abs(u - n * m / 2) / sigma)


def test_the_statistic_tells_a_difference_and_tells_none_where_there_is_none() -> None:
    chance = random.Random(7)
    same = [[chance.gauss(100, 10) for _ in range(2000)] for _ in range(2)]
    assert probability(*same) > 0.01
    assert probability(same[0], [value + 2 for value in same[1]]) < 0.001
    # Ranks by hand: U = 2 of 3 * 3, sigma = sqrt(3 * 3 * 7 / 12).
    assert probability([1, 2, 5], [3, 4, 6]) == pytest.approx(0.2752, abs=1e-4)


async def timed(proxy: ProxyHandle, keys: Iterator[tuple[str, str]]) -> dict[str, list[float]]:
    """How long each request took, by the kind of its key. All are refused."""
    took: dict[str, list[float]] = {}
    client = await proxy.open()
    for kind, key in keys:
        raw = request_bytes("POST", CHAT, ASK, key=key)
        client.received = b""
        began = time.perf_counter()
        client.send(raw)
        await client.when(lambda received: Answer(received).whole)
        took.setdefault(kind, []).append(time.perf_counter() - began)
        assert client.answer().status == 401
    await client.close()
    return took


def mixed(expired: list[str]) -> Iterator[tuple[str, str]]:
    """As many keys of each kind, each of them once, in a random order."""
    kinds = ["unknown", "nearly right", "expired"] * len(expired)
    random.shuffle(kinds)
    left = iter(expired)
    for kind in kinds:
        made = {"unknown": at_random(), "nearly right": nearly_right()}
        yield kind, made.get(kind) or next(left)


async def add(proxy: ProxyHandle, keys: list[str], expires: str | None) -> None:
    """Put keys into the database."""
    rows = [(key, hashlib.sha256(key.encode()).hexdigest(), expires) for key in keys]

    def insert(transaction: Any) -> None:
        transaction.executemany(
            "INSERT INTO api_key (id, secret, type, expires) VALUES (?, ?, 'LLM', ?)", rows
        )

    await proxy.proxy.stores.accounts._pool.runInteraction(insert)  # type: ignore[attr-defined]


@pytest.mark.timeout(600 if LONG else 60)
@pytest_twisted.ensureDeferred
async def test_a_refusal_takes_as_long_for_a_key_that_is_nearly_right(tmp_path: Path) -> None:
    async with ScriptedBackend(json_answer(200, DONE)) as backend:
        served = {"chat": {"url": backend.url}}
        settings = {"auth_fresh": 0, "failed_keys_per_minute": 0}  # each is looked up
        async with running_proxy(tmp_path, served, **settings) as proxy:
            expired = [at_random() for _ in range(TIMES)]
            await add(proxy, [KEY], None)
            await add(proxy, expired, "2001-01-01")
            assert (await proxy.post(CHAT, ASK, key=KEY)).status == 200
            took = await timed(proxy, mixed(expired))
    unknown = took["unknown"]
    for kind in ("nearly right", "expired"):
        report(
            f"refusals of keys: {kind} beside unknown",
            requests=TIMES,
            unknown_us=1e6 * median(unknown),
            it_us=1e6 * median(took[kind]),
            p=probability(took[kind], unknown),
        )
    assert 0.5 < median(took["nearly right"]) / median(unknown) < 2
    if LONG:
        assert abs(median(took["nearly right"]) - median(unknown)) < 20e-6
