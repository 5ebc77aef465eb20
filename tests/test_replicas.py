"""Several servers of one model, over real sockets: who gets requests, and who when one fails."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from backend import (
    CHUNKED,
    DONE,
    Close,
    Script,
    ScriptedBackend,
    Stall,
    Wait,
    chunk,
    head,
    json_answer,
    raw_answer,
    sse_answer,
    sse_event,
)
from ports import free_port
from proxy import ProxyHandle, request_bytes, running_proxy
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.task import deferLater

reactor: Any = _reactor
CHAT = "/v1/chat/completions"
ASK = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
WHOLE = json_answer(200, {"choices": [], "usage": USAGE})
STREAM = sse_answer([{"choices": [], "usage": USAGE}, DONE])


def nowhere() -> str:
    """Where nobody listens."""
    return f"http://127.0.0.1:{free_port()}"


@contextlib.asynccontextmanager
async def proxy_of(
    folder: Path, *servers: ScriptedBackend | str, limits: Any = None, **more: Any
) -> AsyncIterator[ProxyHandle]:
    """A proxy whose model `chat` is served by all of these."""
    urls = [each if isinstance(each, str) else each.url for each in servers]
    settings: dict[str, Any] = {} if limits is None else {"limits": limits}
    async with running_proxy(folder, {"chat": {"urls": urls, **more}}, **settings) as proxy:
        yield proxy


async def leave(backend: ScriptedBackend) -> None:
    """End it once it was seen to be up."""
    await deferLater(reactor, 0.1)
    await backend.stop()


def attempts(proxy: ProxyHandle) -> list[Any]:
    return proxy.query("SELECT number, server, outcome, status FROM attempt ORDER BY rid, number")


def value(exposition: bytes, line: str) -> float:
    """The number behind a metric and its labels."""
    found = [each for each in exposition.decode().splitlines() if each.startswith(f"{line} ")]
    return float(found[0].split()[-1])


@pytest_twisted.ensureDeferred
async def test_requests_are_shared_by_all_servers_and_each_has_its_own_token_and_name(
    tmp_path: Path,
) -> None:
    async with ScriptedBackend(WHOLE) as one, ScriptedBackend(WHOLE) as two:
        replicas = [
            {"url": one.url, "token": "own", "model": "m1"},
            {"url": two.url},
        ]
        named = {"chat": {"replicas": replicas, "token": "shared", "policy": "round_robin"}}
        async with running_proxy(tmp_path, named) as proxy:
            for _ in range(4):
                assert (await proxy.post(CHAT, ASK)).status == 200
            assert proxy.bill() == {"chat/gpu/prompt": 12, "chat/gpu/completion": 8}
            assert {server for _, server, _, _ in attempts(proxy)} == {one.url, two.url}
        for backend, token, name in ((one, "own", "m1"), (two, "shared", "chat")):
            assert len(backend.requests) == 2
            for seen in backend.requests:
                assert seen.header("authorization") == f"Bearer {token}"
                assert seen.json()["model"] == name


@pytest_twisted.ensureDeferred
async def test_a_request_goes_to_the_server_that_has_least_to_do(tmp_path: Path) -> None:
    hold: Deferred[None] = Deferred()
    busy: Script = [Wait(hold), WHOLE]
    async with ScriptedBackend(busy, WHOLE) as one, ScriptedBackend(busy, WHOLE) as two:
        async with proxy_of(tmp_path, one, two) as proxy:
            client = await proxy.open()
            client.send(request_bytes("POST", CHAT, b'{"model":"chat","messages":[]}'))
            await deferLater(reactor, 0.1)
            occupied, free = (one, two) if one.requests else (two, one)
            free._scripts = (WHOLE,)
            for _ in range(3):
                await proxy.post(CHAT, ASK)
            assert (len(occupied.requests), len(free.requests)) == (1, 3)
            hold.callback(None)
            await client.close()
            await proxy.settled(4)


@pytest.mark.parametrize("stream", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_server_that_is_not_there_costs_a_client_nothing(
    tmp_path: Path, stream: bool
) -> None:
    async with (
        ScriptedBackend() as first,
        ScriptedBackend(STREAM if stream else WHOLE) as backend,
    ):
        gone = first.url
        async with proxy_of(tmp_path, first, backend, policy="round_robin") as proxy:
            await leave(first)
            for _ in range(4):
                answer = await proxy.post(CHAT, ASK | {"stream": stream})
                assert (answer.status, answer.whole) == (200, True)
            assert proxy.rows() == [("settled", "complete", 3, 2)] * 4
            assert proxy.bill() == {"chat/gpu/prompt": 12, "chat/gpu/completion": 8}
            assert len(backend.requests) == 4
            assert (1, gone, "backend_failed", None) in attempts(proxy)
            assert (2, backend.url, "complete", 200) in attempts(proxy)
            metrics = (await proxy.get("/metrics", port=proxy.admin_port)).body
            failed = [each for each in attempts(proxy) if each[2] == "backend_failed"]
            assert value(metrics, 'llmproxy_failovers_total{model="chat"}') == len(failed)


@pytest_twisted.ensureDeferred
async def test_when_no_server_is_there_the_client_is_told_once(tmp_path: Path) -> None:
    async with proxy_of(tmp_path, nowhere(), nowhere(), nowhere()) as proxy:
        answer = await proxy.post(CHAT, ASK)
        assert answer.status == 502
        assert proxy.rows() == [("settled", "backend_failed", None, None)]
        assert [number for number, *_ in attempts(proxy)] == [1, 2, 3]


BROKEN: list[Any] = [
    pytest.param([Close()], None, id="no answer"),
    pytest.param([json_answer(503, {})], 503, id="503"),
    pytest.param([raw_answer(200, b"x", {"Content-Type": "text/html"})], 200, id="HTML"),
]


@pytest.mark.parametrize(("script", "status"), BROKEN)
@pytest_twisted.ensureDeferred
async def test_what_may_have_been_begun_is_not_repeated(
    tmp_path: Path, script: Any, status: int | None
) -> None:
    async with ScriptedBackend(script) as one, ScriptedBackend(script) as two:
        async with proxy_of(tmp_path, one, two) as proxy:
            assert (await proxy.post(CHAT, ASK)).status == 502
            assert len(one.requests) + len(two.requests) == 1
            assert [each[3] for each in attempts(proxy)] == [status]


@pytest.mark.parametrize(("script", "status"), BROKEN)
@pytest_twisted.ensureDeferred
async def test_the_operator_may_have_it_repeated_and_one_attempt_is_billed(
    tmp_path: Path, script: Any, status: int | None
) -> None:
    async with ScriptedBackend(script) as bad, ScriptedBackend(WHOLE) as good:
        more = {"retry_begun": True, "policy": "round_robin"}
        async with proxy_of(tmp_path, bad, good, **more) as proxy:
            for _ in range(2):
                assert (await proxy.post(CHAT, ASK)).status == 200
            assert proxy.rows() == [("settled", "complete", 3, 2)] * 2
            assert [each[3] for each in attempts(proxy)].count(status) >= 1
            assert len(good.requests) == 2


@pytest_twisted.ensureDeferred
async def test_an_answer_that_has_begun_is_never_repeated(tmp_path: Path) -> None:
    script: Script = [head(200, CHUNKED), chunk(sse_event({"choices": []})), Close()]
    async with ScriptedBackend(script) as one, ScriptedBackend(script) as two:
        async with proxy_of(tmp_path, one, two, retry_begun=True) as proxy:
            answer = await proxy.post(CHAT, ASK | {"stream": True})
            assert not answer.whole
            assert len(one.requests) + len(two.requests) == 1


@pytest.mark.parametrize("status", [400, 404, 422, 429])
@pytest_twisted.ensureDeferred
async def test_a_client_s_own_errors_close_no_server_off(tmp_path: Path, status: int) -> None:
    refusing: Script = [json_answer(status, {"error": {"message": "no"}})]
    async with ScriptedBackend(refusing) as one, ScriptedBackend(refusing) as two:
        more = {"retry_begun": True, "circuit_failures": 1, "policy": "round_robin"}
        async with proxy_of(tmp_path, one, two, **more) as proxy:
            for _ in range(6):
                assert (await proxy.post(CHAT, ASK)).status == status
            assert (len(one.requests), len(two.requests)) == (3, 3)


@pytest_twisted.ensureDeferred
async def test_a_server_that_fails_is_left_alone_and_tried_again_after_a_pause(
    tmp_path: Path,
) -> None:
    async with (
        ScriptedBackend([json_answer(500, {})], [json_answer(500, {})], WHOLE) as sick,
        ScriptedBackend(WHOLE) as well,
    ):
        more = {"circuit_failures": 2, "circuit_pause": 0.3, "policy": "round_robin"}
        async with proxy_of(tmp_path, sick, well, **more) as proxy:
            statuses = [(await proxy.post(CHAT, ASK)).status for _ in range(8)]
            assert sorted(statuses) == [200] * 6 + [502] * 2
            assert len(sick.requests) == 2
            metrics = (await proxy.get("/metrics", port=proxy.admin_port)).body
            at = f'{{model="chat",server="{sick.url}"}}'
            assert value(metrics, f"llmproxy_server_circuit_open{at}") == 1
            await deferLater(reactor, 0.4)
            for _ in range(4):
                assert (await proxy.post(CHAT, ASK)).status == 200
            assert len(sick.requests) == 4
            metrics = (await proxy.get("/metrics", port=proxy.admin_port)).body
            assert value(metrics, f"llmproxy_server_circuit_open{at}") == 0


@pytest_twisted.ensureDeferred
async def test_a_conversation_stays_with_its_server(tmp_path: Path) -> None:
    async with ScriptedBackend(WHOLE) as one, ScriptedBackend(WHOLE) as two:
        async with proxy_of(tmp_path, one, two, policy="prefix") as proxy:
            for number in range(6):
                turns: list[Any] = [{"role": "user", "content": f"conversation {number}"}]
                for _ in range(3):
                    await proxy.post(CHAT, {"model": "chat", "messages": turns})
                    turns = [*turns, {"role": "assistant", "content": "x"}, turns[0]]
        assert len(one.requests) + len(two.requests) == 18
        for backend in (one, two):
            firsts = [seen.json()["messages"][0]["content"] for seen in backend.requests]
            assert all(firsts.count(first) == 3 for first in firsts)


@pytest_twisted.ensureDeferred
async def test_a_form_goes_to_another_server_if_none_of_it_was_sent(tmp_path: Path) -> None:
    boundary = "b"
    form = (
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nchat\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        b"xyz\r\n--b--\r\n"
    )
    said = json_answer(200, {"text": "hello", "duration": 2.0, "segments": []})
    async with ScriptedBackend() as gone, ScriptedBackend(said) as backend:
        async with proxy_of(tmp_path, gone, backend, policy="round_robin") as proxy:
            await leave(gone)
            for _ in range(2):
                fields = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
                data = request_bytes("POST", "/v1/audio/transcriptions", form, fields=fields)
                answer = await proxy.send(data)
                assert answer.status == 200, answer.body
            assert proxy.bill() == {"chat/gpu/transcription": 4}
            assert (1, gone.url, "backend_failed", None) in attempts(proxy)
            assert all(b"xyz" in seen.body for seen in backend.requests)


@pytest_twisted.ensureDeferred
async def test_a_server_that_is_down_from_the_start_is_not_asked(tmp_path: Path) -> None:
    async with ScriptedBackend(WHOLE) as backend:
        async with proxy_of(tmp_path, nowhere(), backend, policy="round_robin") as proxy:
            await deferLater(reactor, 0.1)
            for _ in range(3):
                assert (await proxy.post(CHAT, ASK)).status == 200
            assert {server for _, server, _, _ in attempts(proxy)} == {backend.url}
            ready = (await proxy.get("/readyz", port=proxy.admin_port)).json()["backends"]
            assert sorted(ready.values()) == ["down", "up"]
            assert ready[f"chat at {backend.url}"] == "up"


# -- the queue -----------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_who_finds_no_place_waits_and_keys_take_turns(tmp_path: Path) -> None:
    hold: Deferred[None] = Deferred()
    slow: Script = [Wait(hold), WHOLE]
    async with ScriptedBackend(slow, WHOLE) as backend:
        more = {"max_concurrent": 1, "queue_size": 3}
        async with proxy_of(tmp_path, backend, **more) as proxy:
            first = await proxy.open()
            first.send(request_bytes("POST", CHAT, b'{"model":"chat","messages":[]}'))
            await backend.request(0)
            greedy = [proxy_post(proxy, f"greedy {n}", "token2") for n in range(2)]
            await deferLater(reactor, 0.1)
            modest = proxy_post(proxy, "modest", "token3")
            await deferLater(reactor, 0.1)
            full = await proxy.post(CHAT, ASK)
            assert (full.status, full.fields["retry-after"]) == (429, "5")
            assert full.json()["error"]["code"] == "rate_limit_exceeded"
            metrics = (await proxy.get("/metrics", port=proxy.admin_port)).body
            assert value(metrics, 'llmproxy_queue_length{model="chat"}') == 3
            assert value(metrics, 'llmproxy_limited_requests_total{limit="max_concurrent"}') == 1
            assert len(backend.requests) == 1
            hold.callback(None)
            await first.close()
            done = await DeferredList([*greedy, modest])
            assert [answer.status for _, answer in done] == [200] * 3
            order = [seen.json()["messages"][0]["content"] for seen in backend.requests[1:]]
            assert order.index("modest") == 1
            await proxy.settled(4)


def proxy_post(proxy: ProxyHandle, text: str, key: str) -> Deferred[Any]:
    body = {"model": "chat", "messages": [{"role": "user", "content": text}]}
    return Deferred.fromCoroutine(proxy.post(CHAT, body, key=key))


@pytest_twisted.ensureDeferred
async def test_who_waits_too_long_or_leaves_takes_no_place(tmp_path: Path) -> None:
    async with ScriptedBackend([Stall()], WHOLE) as backend:
        more = {"max_concurrent": 1, "queue_size": 3, "queue_timeout": 0.3}
        async with proxy_of(tmp_path, backend, **more, on_disconnect="cancel") as proxy:
            first = await proxy.open()
            first.send(request_bytes("POST", CHAT, b'{"model":"chat","messages":[]}'))
            await backend.request(0)
            leaving = await proxy.open()
            leaving.send(request_bytes("POST", CHAT, b'{"model":"chat","messages":[]}'))
            await deferLater(reactor, 0.05)
            await leaving.close()
            assert (await proxy.post(CHAT, ASK)).status == 429
            await first.close()
            await proxy.settled(1)
            assert (await proxy.post(CHAT, ASK)).status == 200
            assert len(backend.requests) == 2
            assert len(proxy.rows()) == 2
