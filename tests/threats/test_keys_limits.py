"""Limits of keys: who asks for too much is told so, at once and cheaply, and costs nobody else."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
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
    Close,
    ScriptedBackend,
    Stall,
    Wait,
    chunk,
    head,
    json_answer,
    raw_answer,
    sse_event,
)
from backend import DONE as LAST_EVENT
from callers import ask_all
from clients import HELLO, Clients
from figures import report
from proxy import Answer, ProxyHandle, request_bytes, running_proxy
from tally import LONG
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from llmproxy.model import LARGEST, OwnLimits
from llmproxy.storage.sqlite import connect, prepare

reactor: Any = _reactor
CHAT, MESSAGES, MODELS = "/v1/chat/completions", "/v1/messages", "/v1/models"
ASK = orjson.dumps({"model": "chat", "messages": [{"role": "user", "content": "hi"}]})
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
DONE = json_answer(200, {"choices": [], "usage": USAGE})
GREEDY, MODEST = "token2", "token3"
REQUESTS = 10_000 if LONG else 2_000


def proxy_for(folder: Path, backend: ScriptedBackend, **limits: int) -> Any:
    """A proxy whose keys have these limits."""
    return running_proxy(folder, {"chat": {"url": backend.url}}, limits=limits)


def running(proxy: ProxyHandle) -> dict[str, int]:
    """How many requests of each key count as in flight."""
    assert proxy.proxy._services is not None
    assert proxy.proxy._services.limits is not None
    return proxy.proxy._services.limits.in_flight


async def until_idle(proxy: ProxyHandle) -> None:
    for _ in range(500):
        if not running(proxy):
            return
        await deferLater(reactor, 0.01)
    raise AssertionError(f"still counted: {running(proxy)}")


@pytest.mark.timeout(300 if LONG else 60)
@pytest_twisted.ensureDeferred
async def test_a_key_far_over_its_limit_is_told_so_and_no_other_key_notices(
    tmp_path: Path,
) -> None:
    async with ScriptedBackend(DONE) as backend:
        async with proxy_for(tmp_path, backend, requests_per_minute=300) as proxy:
            modest = [request_bytes("POST", CHAT, ASK, key=MODEST)] * 100
            greedy = [request_bytes("POST", CHAT, ASK, key=GREEDY)] * (REQUESTS // 4)
            (alone,) = await ask_all(proxy, modest)
            began = time.monotonic()
            beside, *flood = await ask_all(proxy, modest, *[greedy] * 4)
            took_s = time.monotonic() - began
            told = [status for each in flood for status in each.statuses]
            served = told.count(200)
            report(
                "a key over its limit",
                requests=len(told),
                served=served,
                others_ms=1000 * alone.median_s,
                others_beside_it_ms=1000 * beside.median_s,
            )
            assert served + told.count(429) == REQUESTS
            assert 300 <= served <= 301 + 5 * took_s
            assert alone.statuses == beside.statuses == [200] * 100
            assert beside.median_s < max(10 * alone.median_s, 0.1)
            refused = flood[0].last
            assert refused.fields["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert len(backend.requests) == len(proxy.rows()) == served + 200
            metrics = (await proxy.get("/metrics", port=proxy.admin_port)).body.decode()
            line = f'limited_requests_total{{limit="requests_per_minute"}} {REQUESTS - served}.0'
            assert line in metrics


@pytest_twisted.ensureDeferred
async def test_a_key_has_no_more_requests_in_flight_than_it_may(tmp_path: Path) -> None:
    gate: Deferred[None] = Deferred()
    async with ScriptedBackend([Wait(gate), DONE]) as backend:
        async with proxy_for(tmp_path, backend, concurrent_requests=2) as proxy:
            clients = [await proxy.open() for _ in range(2)]
            for number, client in enumerate(clients):
                client.send(request_bytes("POST", CHAT, ASK, key=GREEDY))
                await backend.request(number)
            refused = await proxy.post(CHAT, ASK, key=GREEDY)
            assert (refused.status, refused.fields["retry-after"]) == (429, "1")
            told = (await proxy.post(MESSAGES, ASK, key=GREEDY)).json()
            assert (told["type"], told["error"]["type"]) == ("error", "rate_limit_error")
            assert (await proxy.get(MODELS, key=GREEDY)).status == 200
            other = await proxy.open()
            other.send(request_bytes("POST", CHAT, ASK, key=MODEST))
            await backend.request(2)
            gate.callback(None)
            for client in (*clients, other):
                await client.when(lambda received: Answer(received).whole)
                assert client.answer().status == 200
                await client.close()
            assert (await proxy.post(CHAT, ASK, key=GREEDY)).status == 200
            assert len(backend.requests) == len(proxy.rows()) == 4
            assert running(proxy) == {}


@pytest_twisted.ensureDeferred
async def test_requests_one_after_the_other_are_never_two_at_once(tmp_path: Path) -> None:
    async with ScriptedBackend(DONE) as backend:
        async with proxy_for(tmp_path, backend, concurrent_requests=1) as proxy:
            client = await proxy.open()
            wrong = request_bytes("POST", CHAT, b"no JSON")
            good = request_bytes("POST", CHAT, ASK)
            client.send((good + wrong) * 5 + good)
            await client.when(lambda received: received.count(b"X-Request-Id") == 11)
            lines = [x for x in client.received.split(b"\r\n") if b"HTTP/1.1 " in x]
            statuses = [int(line.rpartition(b"HTTP/1.1 ")[2][:3]) for line in lines]
            assert statuses == [200, 400] * 5 + [200]
            await client.close()


@pytest_twisted.ensureDeferred
async def test_the_clients_that_people_use_know_what_it_means(tmp_path: Path) -> None:
    async with ScriptedBackend(DONE) as backend:
        async with proxy_for(tmp_path, backend, requests_per_minute=1) as proxy:
            assert (await proxy.post(CHAT, ASK)).status == 200
            clients = Clients(proxy.url, "token2")
            with pytest.raises(openai.RateLimitError) as limited:
                await clients.ask(
                    lambda client: client.chat.completions.create(model="chat", messages=HELLO)
                )
            assert 50 <= int(limited.value.response.headers["retry-after"]) <= 60
            assert (limited.value.code, limited.value.type) == (
                "rate_limit_exceeded",
                "rate_limit_error",
            )
            with pytest.raises(anthropic.RateLimitError) as told:
                await clients.ask_anthropic(
                    lambda client: client.messages.create(
                        model="chat", max_tokens=5, messages=HELLO
                    )
                )
            assert 50 <= int(told.value.response.headers["retry-after"]) <= 60
            assert len(backend.requests) == 1


@pytest_twisted.ensureDeferred
async def test_a_body_over_the_limit_is_not_even_asked_for(tmp_path: Path) -> None:
    async with ScriptedBackend(DONE) as backend:
        async with proxy_for(tmp_path, backend, requests_per_minute=1) as proxy:
            assert (await proxy.post(CHAT, ASK)).status == 200
            whole = request_bytes("POST", CHAT, ASK, fields={"Expect": "100-continue"})
            answer = await proxy.send(whole.removesuffix(ASK))
            assert answer.status == 429
            assert 50 <= int(answer.fields["retry-after"]) <= 60


ENDINGS: dict[str, Any] = {
    "an error": raw_answer(500, b"no"),
    "a refusal": json_answer(422, {"error": {"message": "no"}}),
    "no answer": Close(),
    "half an answer": [
        head(200, {"Content-Type": "application/json", "Content-Length": "9"}),
        b"{",
        Close(),
    ],
    "another kind": raw_answer(200, b"<html>", {"Content-Type": "text/html"}),
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
@pytest_twisted.ensureDeferred
async def test_whatever_the_backend_does_the_key_may_ask_again(tmp_path: Path, ending: Any) -> None:
    async with ScriptedBackend(ending, DONE) as backend:
        async with proxy_for(tmp_path, backend, concurrent_requests=1) as proxy:
            assert (await proxy.post(CHAT, ASK)).status in (422, 502)
            assert running(proxy) == {}
            assert (await proxy.post(CHAT, ASK)).status == 200


@pytest_twisted.ensureDeferred
async def test_whatever_the_client_sends_it_may_ask_again(tmp_path: Path) -> None:
    async with ScriptedBackend(DONE) as backend:
        async with proxy_for(tmp_path, backend, concurrent_requests=1) as proxy:
            for body in (b"", b"{", b'{"model":"nobody"}', b"[]"):
                assert (await proxy.post(CHAT, body)).status in (400, 404)
            assert (await proxy.post("/v1/audio/translations", b"no form")).status == 415
            begun = await proxy.open()
            begun.send(request_bytes("POST", CHAT, ASK)[:-1])
            while not running(proxy):
                await deferLater(reactor, 0.01)
            assert (await proxy.post(CHAT, ASK)).status == 429
            begun.abort()
            await until_idle(proxy)
            assert (await proxy.post(CHAT, ASK)).status == 200


@pytest.mark.parametrize("on_disconnect", ["drain", "cancel"])
@pytest_twisted.ensureDeferred
async def test_a_request_whose_client_has_left_counts_as_long_as_its_backend_works(
    tmp_path: Path, on_disconnect: str
) -> None:
    gate: Deferred[None] = Deferred()
    async with ScriptedBackend([Wait(gate), DONE], DONE) as backend:
        served = {"chat": {"url": backend.url, "on_disconnect": on_disconnect}}
        limits = {"concurrent_requests": 1}
        async with running_proxy(tmp_path, served, limits=limits) as proxy:
            client = await proxy.open()
            client.send(request_bytes("POST", CHAT, ASK))
            await backend.request()
            client.abort()
            await client.closed
            if on_disconnect == "drain":
                assert (await proxy.post(CHAT, ASK)).status == 429
                gate.callback(None)
            await until_idle(proxy)
            assert (await proxy.post(CHAT, ASK)).status == 200


@pytest_twisted.ensureDeferred
async def test_a_request_that_is_cut_at_the_end_is_counted_no_more(tmp_path: Path) -> None:
    async with ScriptedBackend(Stall()) as backend:
        async with proxy_for(tmp_path, backend, concurrent_requests=1) as proxy:
            client = await proxy.open()
            client.send(request_bytes("POST", CHAT, ASK))
            await backend.request()
            assert running(proxy) == {"id-token2": 1}
        assert running(proxy) == {}
        await client.close()


STREAM = [
    head(200, CHUNKED),
    chunk(sse_event({"choices": [{"delta": {"content": "a"}}]})),
    chunk(sse_event({"choices": [], "usage": USAGE}) + LAST_EVENT),
    LAST_CHUNK,
]


def set_limit(proxy: ProxyHandle, key: str, **limits: int) -> None:
    with closing(connect(proxy.database)) as connection:
        columns, marks = ", ".join(limits), ", ".join("?" * len(limits))
        connection.execute(
            f"INSERT OR REPLACE INTO key_limit (api_key, {columns}) VALUES (?, {marks})",
            (f"id-{key}", *limits.values()),
        )


def rate(answer: Answer) -> list[str | None]:
    named = ("limit", "remaining", "reset")
    return [answer.fields.get(f"x-ratelimit-{name}-requests") for name in named]


@pytest_twisted.ensureDeferred
async def test_a_key_has_the_limits_that_its_record_gives_it_and_is_told_of_them(
    tmp_path: Path,
) -> None:
    async with ScriptedBackend(DONE, DONE, DONE, STREAM, DONE) as backend:
        served = {"chat": {"url": backend.url}}
        async with running_proxy(tmp_path, served, auth_fresh=0) as proxy:
            assert rate(await proxy.post(CHAT, ASK, key=GREEDY)) == [None] * 3
            set_limit(proxy, GREEDY, requests_per_minute=3)
            limit, remaining, reset = rate(await proxy.post(CHAT, ASK, key=GREEDY))
            assert (limit, remaining) == ("3", "2")
            assert 19 < float(str(reset).removesuffix("s")) <= 20
            assert rate(await proxy.post(CHAT, ASK, key=MODEST)) == [None] * 3
            streamed = await proxy.post(CHAT, {**orjson.loads(ASK), "stream": True}, key=GREEDY)
            assert (streamed.status, rate(streamed)[:2]) == (200, ["3", "1"])
            wrong = await proxy.post(CHAT, b"no JSON", key=GREEDY)
            assert (wrong.status, rate(wrong)[:2]) == (400, ["3", "0"])
            refused = await proxy.post(CHAT, ASK, key=GREEDY)
            assert (refused.status, rate(refused)[:2]) == (429, ["3", "0"])
            assert 1 <= int(refused.fields["retry-after"]) <= 20
            set_limit(proxy, GREEDY, requests_per_minute=0)
            assert rate(await proxy.post(CHAT, ASK, key=GREEDY)) == [None] * 3
            assert len(backend.requests) == 5


@pytest_twisted.ensureDeferred
async def test_a_key_may_be_freed_of_a_limit_that_all_have(tmp_path: Path) -> None:
    async with ScriptedBackend(DONE) as backend:
        async with proxy_for(tmp_path, backend, requests_per_minute=1) as proxy:
            set_limit(proxy, GREEDY, requests_per_minute=0)
            told = [(await proxy.post(CHAT, ASK, key=GREEDY)).status for _ in range(5)]
            assert told == [200] * 5
            told = [(await proxy.post(CHAT, ASK, key=MODEST)).status for _ in range(2)]
            assert told == [200, 429]


def test_what_is_no_limit_can_t_be_written_down(tmp_path: Path) -> None:
    prepare(tmp_path / "db.sqlite")
    with closing(connect(tmp_path / "db.sqlite")) as connection:
        for column in OwnLimits._fields:
            for value in (-1, 1.5, "many", getattr(LARGEST, column) + 1, b"1"):
                with pytest.raises(sqlite3.IntegrityError):
                    connection.execute(
                        f"INSERT INTO key_limit (api_key, {column}) VALUES ('k', ?)", (value,)
                    )


def tokens(answer: Answer) -> list[str | None]:
    named = ("limit", "remaining")
    return [answer.fields.get(f"x-ratelimit-{name}-tokens") for name in named]


@pytest_twisted.ensureDeferred
async def test_tokens_are_held_before_a_request_and_put_right_after_it(tmp_path: Path) -> None:
    gate: Deferred[None] = Deferred()
    script: Any = ([Wait(gate), DONE], json_answer(422, {"error": {}}), STREAM, DONE)
    async with ScriptedBackend(*script) as backend:
        async with proxy_for(tmp_path, backend, tokens_per_minute=1000) as proxy:
            long = {**orjson.loads(ASK), "max_tokens": 900}
            waiting = await proxy.open()
            waiting.send(request_bytes("POST", CHAT, orjson.dumps(long)))
            await backend.request()
            refused = await proxy.post(CHAT, long)
            assert (refused.status, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert 40 <= int(refused.fields["retry-after"]) <= 60
            assert tokens(refused)[0] == "1000"
            assert (await proxy.post(CHAT, long, key=MODEST)).status == 422
            gate.callback(None)
            await waiting.when(lambda received: Answer(received).whole)
            (limit, left), status = tokens(waiting.answer()), waiting.answer().status
            assert (status, limit) == (200, "1000")
            assert left is not None
            assert 50 <= int(left) <= 90
            await waiting.close()
            # 5 were used, and what was held for the refusal of the other key's is there again.
            for key in (GREEDY, MODEST):
                again = await proxy.post(CHAT, {**long, "stream": key == GREEDY}, key=key)
                assert again.status == 200
            assert len(backend.requests) == 4


@pytest_twisted.ensureDeferred
async def test_tokens_that_were_held_for_what_was_not_served_are_given_back(
    tmp_path: Path,
) -> None:
    async with ScriptedBackend(Close(), DONE) as backend:
        served = {"chat": {"url": backend.url}, "gone": {"url": "http://127.0.0.1:1"}}
        limits = {"tokens_per_minute": 1000}
        async with running_proxy(tmp_path, served, limits=limits) as proxy:
            long = {**orjson.loads(ASK), "max_tokens": 900}
            for _ in range(3):
                assert (await proxy.post(CHAT, {**long, "model": "gone"})).status == 502
                assert (await proxy.post(CHAT, {**long, "model": "none"})).status == 404
            assert (await proxy.post(CHAT, long)).status == 502  # nobody knows what it took
            assert (await proxy.post(CHAT, long)).status == 429


@pytest_twisted.ensureDeferred
async def test_so_are_those_of_a_request_for_which_there_was_no_place(tmp_path: Path) -> None:
    gate: Deferred[None] = Deferred()
    async with ScriptedBackend([Wait(gate), DONE], DONE) as backend:
        served: Any = {
            "busy": {"url": backend.url, "max_concurrent": 1},
            "chat": {"url": backend.url},
        }
        limits = {"tokens_per_minute": 1000}
        async with running_proxy(tmp_path, served, limits=limits) as proxy:
            long = {**orjson.loads(ASK), "max_tokens": 900}
            first = await proxy.open()
            body = orjson.dumps({**long, "model": "busy"})
            first.send(request_bytes("POST", CHAT, body, key=MODEST))
            await backend.request()
            assert (await proxy.post(CHAT, {**long, "model": "busy"}, key=GREEDY)).status == 429
            assert (await proxy.post(CHAT, long, key=GREEDY)).status == 200
            gate.callback(None)
            await first.when(lambda received: Answer(received).whole)
            await first.close()
