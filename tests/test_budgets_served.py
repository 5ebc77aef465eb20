"""Budgets as users meet them: a real proxy, a real SQLite file, and a credit that runs out."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import openai
import orjson
import pytest
import pytest_twisted
from backend import (
    CHUNKED,
    LAST_CHUNK,
    Connection,
    Flood,
    ScriptedBackend,
    Stall,
    chunk,
    head,
    json_answer,
    sse_event,
)
from clients import Clients
from proxy import Answer, ProxyHandle, request_bytes, running_proxy
from twisted.internet import reactor
from twisted.internet.defer import DeferredList, ensureDeferred
from twisted.internet.task import deferLater

from llmproxy.budgets import LEASE
from llmproxy.storage.sqlite import connect

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
ASK: Any = {"model": "chat", "messages": [{"role": "user", "content": "hello"}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
COMPLETION = {"choices": [{"message": {"content": "hi"}}], "usage": USAGE}
WHOLE = json_answer(200, COMPLETION)
OUT = "insufficient_quota"
#: A token of a prompt costs 1 micro-unit, one of an answer 2.
PRICES = {"models": {"chat": {"prompt": 1_000_000, "completion": 2_000_000}}}


def token(n: int, continuous: bool) -> bytes:
    running = {"prompt_tokens": 7, "completion_tokens": n, "total_tokens": 7 + n}
    usage = {"usage": running} if continuous else {}
    return chunk(sse_event({"choices": [{"index": 0, "delta": {"content": "x"}}], **usage}))


@dataclass
class Tokens:
    """Streams `count` tokens, as fast as they are taken, in pieces of `piece`."""

    count: int
    continuous: bool = False
    piece: int = 8

    async def run(self, connection: Connection) -> None:
        for start in range(0, self.count, self.piece):
            last = min(start + self.piece, self.count)
            connection.write(b"".join(token(n + 1, self.continuous) for n in range(start, last)))
            await deferLater(reactor, 0.001)
            await connection.flushed()


def answer_of(count: int, **options: Any) -> list[Any]:
    usage = {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count}
    end = chunk(sse_event({"choices": [], "usage": usage})) + chunk(b"data: [DONE]\n\n")
    return [head(200, CHUNKED), Tokens(count, **options), end + LAST_CHUNK]


@asynccontextmanager
async def served(
    folder: Path, script: Any, *, usage: str = "final", **limits: int
) -> AsyncIterator[tuple[ProxyHandle, ScriptedBackend]]:
    async with ScriptedBackend(script) as backend:
        backends = {"chat": {"url": backend.url, "usage": usage}}
        async with running_proxy(folder, backends, limits=limits, prices=PRICES) as proxy:
            yield proxy, backend


def set_own(proxy: ProxyHandle, key: str, **limits: int) -> None:
    """Give a key limits of its own, as an operator does while the proxy runs."""
    connection = connect(proxy.database)
    connection.execute("DELETE FROM key_limit WHERE api_key = ?", (f"id-{key}",))
    columns, marks = ", ".join(limits), ", ".join("?" * len(limits))
    connection.execute(
        f"INSERT INTO key_limit (api_key, {columns}) VALUES (?, {marks})",
        (f"id-{key}", *limits.values()),
    )
    connection.close()


async def stream(proxy: ProxyHandle, key: str = "token2", **more: Any) -> Answer:
    """All that a client gets up to the end of its connection, or of the answer."""
    client = await proxy.open()
    body = orjson.dumps({**ASK, "stream": True, **more})
    client.send(request_bytes("POST", CHAT, body, key=key, fields={"Connection": "close"}))
    await client.closed
    return client.answer()


def content(answer: Answer) -> int:
    return answer.body.count(b'"content":"x"')


def last_error(answer: Answer) -> str | None:
    """The code of the error that a stream ended with."""
    found = re.search(rb"data: (\{[^\n]+\})\n\n\Z", answer.body)
    error = orjson.loads(found.group(1)).get("error") if found else None
    return str(error["code"]) if error else None


@pytest_twisted.ensureDeferred
async def test_a_key_that_has_used_up_its_credit_is_refused_in_its_dialect(tmp_path: Path) -> None:
    async with served(tmp_path, [WHOLE], tokens_total=9) as (proxy, backend):
        for _ in range(2):
            assert (await proxy.post(CHAT, ASK)).status == 200
        refused = await proxy.post(CHAT, ASK)
        assert (refused.status, refused.json()["error"]["code"]) == (402, OUT)
        assert "tokens_total" in refused.json()["error"]["message"]
        assert "retry-after" not in refused.fields
        other = await proxy.post(MESSAGES, {**ASK, "max_tokens": 5})
        assert (other.status, other.json()["error"]["type"]) == (402, "billing_error")
        streamed = await proxy.post(CHAT, {**ASK, "stream": True})
        assert (streamed.status, streamed.json()["error"]["code"]) == (402, OUT)
        assert len(backend.requests) == len(proxy.rows()) == 2
        assert (await proxy.post(CHAT, ASK, key="token3")).status == 200  # has its own credit
        metrics = (await proxy.get("/metrics", port=proxy.admin_port)).body
        assert b'llmproxy_limited_requests_total{limit="tokens_total"} 3' in metrics


@pytest_twisted.ensureDeferred
async def test_a_budget_of_money_is_used_up_by_what_requests_cost(tmp_path: Path) -> None:
    async with served(tmp_path, [WHOLE], cost_per_day=14) as (proxy, _):
        statuses = [(await proxy.post(CHAT, ASK)).status for _ in range(3)]
        assert statuses == [200, 200, 402]  # 7 each
        refused = await proxy.post(CHAT, ASK)
        assert 0 < int(refused.fields["retry-after"]) <= 86400


@pytest_twisted.ensureDeferred
async def test_a_top_up_lets_a_key_in_again_and_another_limit_out(tmp_path: Path) -> None:
    async with served(tmp_path, [WHOLE]) as (proxy, _):
        assert (await proxy.post(CHAT, ASK)).status == 200
        set_own(proxy, "token2", tokens_total=5)
        await deferLater(reactor, 1.1)
        assert (await proxy.post(CHAT, ASK)).status == 402  # what it used before counts
        set_own(proxy, "token2", tokens_total=6)
        await deferLater(reactor, 1.1)
        assert (await proxy.post(CHAT, ASK)).status == 200


@pytest.mark.parametrize("usage", ["continuous", "final"])
@pytest_twisted.ensureDeferred
async def test_a_stream_that_runs_out_ends_with_an_error_and_an_exact_bill(
    tmp_path: Path, usage: str
) -> None:
    credit, script = 1000, answer_of(5000, continuous=usage == "continuous")
    async with served(tmp_path, script, usage=usage, tokens_total=credit) as (proxy, _):
        answer = await stream(proxy)
        assert answer.status == 200
        assert last_error(answer) == OUT
        assert not answer.whole
        given = content(answer)
        [(state, outcome, prompt, completion)] = proxy.rows()
        exact = usage == "continuous"
        assert (state, outcome) == ("settled" if exact else "estimated", "out_of_budget")
        assert completion == given
        assert prompt == (7 if exact else None)
        assert credit <= (prompt or 0) + completion <= credit + LEASE + 8
        assert (await proxy.post(CHAT, ASK)).status == 402


@pytest_twisted.ensureDeferred
async def test_a_stream_with_credit_enough_is_as_it_would_be_without(tmp_path: Path) -> None:
    async with served(tmp_path, answer_of(1000), tokens_total=10_000) as (proxy, _):
        answer = await stream(proxy)
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert content(answer) == 1000
        assert proxy.rows() == [("settled", "complete", 7, 1000)]


@pytest_twisted.ensureDeferred
async def test_many_streams_share_a_credit_and_none_is_refused_while_there_is_some(
    tmp_path: Path,
) -> None:
    count, credit = 24, 20_000
    async with served(tmp_path, answer_of(1500), tokens_total=credit) as (proxy, backend):
        _, answers = zip(
            *await DeferredList([ensureDeferred(stream(proxy)) for _ in range(count)]), strict=True
        )
        assert [each.status for each in answers] == [200] * count
        cut = [each for each in answers if last_error(each) == OUT]
        assert len(cut) > count / 2
        assert all(content(each) == 1500 for each in answers if each not in cut)
        rows = proxy.rows()
        used = sum((prompt or 0) + completion for _, _, prompt, completion in rows)
        assert credit <= used <= credit + count * (LEASE + 8 + 7)
        assert used - 7 * (count - len(cut)) == sum(map(content, answers))
        assert (await proxy.post(CHAT, ASK)).status == 402
        assert len(backend.requests) == count


@pytest_twisted.ensureDeferred
async def test_a_client_that_leaves_is_drained_no_further_than_its_credit(tmp_path: Path) -> None:
    async with served(tmp_path, answer_of(50_000), tokens_total=1000) as (proxy, _):
        client = await proxy.open()
        client.send(request_bytes("POST", CHAT, orjson.dumps({**ASK, "stream": True})))
        await client.when(lambda received: b'"content"' in received)
        client.abort()
        [(state, outcome, prompt, completion)] = await proxy.settled()
        assert (state, outcome, prompt) == ("estimated", "client_gone", None)
        assert 1000 <= completion <= 1000 + LEASE + 8


@pytest_twisted.ensureDeferred
async def test_openai_s_client_has_the_text_and_then_the_error(tmp_path: Path) -> None:
    got: list[str] = []

    def read(client: openai.OpenAI) -> None:
        for part in client.chat.completions.create(stream=True, **ASK):
            got.append(part.choices[0].delta.content)

    async with served(tmp_path, answer_of(5000), tokens_total=300) as (proxy, _):
        clients = Clients(proxy.url, "token2")
        with pytest.raises(openai.APIError) as ended:
            await clients.ask(read)
        assert ended.value.code == OUT
        assert [(len(got),)] == proxy.query("SELECT completion FROM ledger")
        with pytest.raises(openai.APIStatusError) as refused:
            await clients.ask(read)
        assert (refused.value.status_code, refused.value.code) == (402, OUT)


def named(name: str, **data: Any) -> bytes:
    return chunk(b"event: %s\ndata: %s\n\n" % (name.encode(), orjson.dumps({"type": name, **data})))


@pytest_twisted.ensureDeferred
async def test_anthropic_s_client_has_the_text_and_then_the_error(tmp_path: Path) -> None:
    usage = {"input_tokens": 7, "output_tokens": 0}
    message = {"id": "m", "type": "message", "role": "assistant", "content": [], "model": "chat"}
    begun = named("message_start", message={**message, "stop_reason": None, "usage": usage})
    text = {"type": "text", "text": ""}
    block = named("content_block_start", index=0, content_block=text)
    more = named("content_block_delta", index=0, delta={"type": "text_delta", "text": "x"})
    script = [head(200, CHUNKED), begun + block, Flood(more, 5000), Stall()]
    got: list[str] = []

    def read(client: anthropic.Anthropic) -> None:
        with client.messages.stream(max_tokens=9999, **ASK) as messages:
            got.extend(messages.text_stream)

    async with served(tmp_path, script, tokens_total=300) as (proxy, _):
        clients = Clients(proxy.url, "token2")
        with pytest.raises(anthropic.APIStatusError) as ended:
            await clients.ask_anthropic(read)
        assert ended.value.body == {
            "type": "error",
            "error": {
                "type": "billing_error",
                "message": "This API key has used up its budget: tokens_total is 300.",
            },
        }
        [(state, outcome, prompt, completion)] = proxy.rows()
        assert (state, outcome, prompt, completion) == ("estimated", "out_of_budget", 7, len(got))
        with pytest.raises(anthropic.APIStatusError) as refused:
            await clients.ask_anthropic(read)
        assert refused.value.status_code == 402


@pytest_twisted.ensureDeferred
async def test_a_key_without_a_budget_is_not_bounded_and_holds_nothing(tmp_path: Path) -> None:
    async with served(tmp_path, answer_of(600)) as (proxy, _):
        assert content(await stream(proxy)) == 600
        assert proxy.query("SELECT held_tokens, held_cost FROM ledger") == [(None, None)]
        assert proxy.query("SELECT readings FROM journal") == [(0,)]


@pytest_twisted.ensureDeferred
async def test_what_is_held_is_in_the_row(tmp_path: Path) -> None:
    async with served(tmp_path, [WHOLE], tokens_total=10_000) as (proxy, _):
        await proxy.post(CHAT, {**ASK, "max_tokens": 100})
        await proxy.post(CHAT, ASK)
        size = len(orjson.dumps({**ASK, "max_tokens": 100})) // 4 + 1
        first, _ = proxy.query("SELECT held_tokens, held_cost FROM ledger ORDER BY rid")
        assert first == (size + 100, size + 200)


@pytest_twisted.ensureDeferred
async def test_free_answers_need_credit_too_and_take_none(tmp_path: Path) -> None:
    counted = json_answer(200, {"input_tokens": 9})
    async with served(tmp_path, [counted], tokens_total=1) as (proxy, _):
        for _ in range(3):
            assert (await proxy.post("/v1/messages/count_tokens", ASK)).status == 200
