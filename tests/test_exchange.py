"""The way of a request over real sockets: each ending, and the one row that it leaves."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_twisted
from backend import (
    CHUNKED,
    DONE,
    Close,
    Reset,
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
from proxy import Answer, request_bytes, running_proxy
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from llmproxy import rewrite
from llmproxy.admission import Admission
from llmproxy.forward import Admitted
from llmproxy.storage.sqlite import connect
from llmproxy.survey import Survey

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
ASK = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
COMPLETION = {"id": "c", "object": "chat.completion", "choices": [], "usage": USAGE}


def delta(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


TEXT = [delta("Hel"), delta("lo")]
STREAM: list[Any] = [*TEXT, {"choices": [], "usage": USAGE}, DONE]
SHOWN = b"".join([*(sse_event(each) for each in TEXT), DONE])
ASK_STREAM = {**ASK, "stream": True}


def proxy_for(folder: Path, backend: ScriptedBackend, **more: Any) -> Any:
    """A proxy whose model `chat` is served by `backend`; `more`: its options, or `settings`."""
    settings = more.pop("settings", {})
    return running_proxy(folder, {"chat": {"url": backend.url, **more}}, **settings)


@pytest_twisted.ensureDeferred
async def test_a_whole_answer_is_passed_on_and_billed(tmp_path: Path) -> None:
    async with ScriptedBackend([json_answer(200, COMPLETION)]) as backend:
        async with proxy_for(tmp_path, backend) as proxy:
            answer = await proxy.post(CHAT, ASK)
            assert answer.status == 200
            assert answer.body == orjson.dumps(COMPLETION)
            assert proxy.rows() == [("settled", "complete", 3, 2)]
            assert proxy.bill() == {"chat/gpu/prompt": 3, "chat/gpu/completion": 2}


@pytest.mark.parametrize(
    ("content", "surveyed"),
    [("x" * 100_000, False), ("x" * 300_000, True), ([{"x": {}}] * 1_500, True)],
    ids=["a long text", "a longer one", "many values"],
)
@pytest_twisted.ensureDeferred
async def test_a_body_is_read_as_a_whole_where_that_takes_little(
    tmp_path: Path, content: Any, surveyed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Any] = []

    def plan(endpoint: Any, raw: bytes, survey: Any = None) -> rewrite.JSONRequest:
        plans.append(survey)
        return read(endpoint, raw, survey)

    read = rewrite.plan
    monkeypatch.setattr(rewrite, "plan", plan)
    body = orjson.dumps({"model": "chat", "messages": content})
    async with ScriptedBackend([json_answer(200, COMPLETION)]) as backend:
        async with proxy_for(tmp_path, backend) as proxy:
            assert (await proxy.post(CHAT, body)).status == 200
            assert backend.requests[0].body == body
            assert [survey is not None for survey in plans] == [surveyed]


@pytest_twisted.ensureDeferred
async def test_a_stream_is_passed_on_without_the_usage_that_was_not_asked_for(
    tmp_path: Path,
) -> None:
    async with ScriptedBackend([sse_answer(STREAM)]) as backend:
        async with proxy_for(tmp_path, backend) as proxy:
            answer = await proxy.post(CHAT, ASK_STREAM)
            assert answer.whole
            assert answer.body == SHOWN
            assert backend.requests[0].json()["stream_options"] == {"include_usage": True}
            assert proxy.rows() == [("settled", "complete", 3, 2)]


@pytest_twisted.ensureDeferred
async def test_the_end_of_a_stream_waits_for_its_bill(tmp_path: Path) -> None:
    async with ScriptedBackend([sse_answer(STREAM)]) as backend:
        async with proxy_for(tmp_path, backend) as proxy:
            ledger = proxy.proxy.stores.ledger
            commit: Deferred[None] = Deferred()
            settle = ledger.settle
            ledger.settle = lambda *a: commit.addCallback(lambda _: settle(*a))
            client = await proxy.open()
            client.send(request_bytes("POST", CHAT, orjson.dumps(ASK_STREAM)))
            await client.when(lambda received: b"lo" in Answer(received).body)
            assert b"[DONE]" not in client.received
            assert proxy.rows() == [("open", None, None, None)]
            commit.callback(None)
            await client.when(lambda received: Answer(received).whole)
            assert client.answer().body.endswith(DONE)
            assert proxy.rows() == [("settled", "complete", 3, 2)]
            await client.close()


@pytest_twisted.ensureDeferred
async def test_no_request_is_sent_before_its_row_is_open(tmp_path: Path) -> None:
    async with ScriptedBackend([json_answer(200, COMPLETION)]) as backend:
        async with proxy_for(tmp_path, backend) as proxy:
            ledger = proxy.proxy.stores.ledger
            opened: Deferred[None] = Deferred()
            open_row = ledger.open
            ledger.open = lambda entry: opened.addCallback(lambda _: open_row(entry))
            client = await proxy.open()
            client.send(request_bytes("POST", CHAT, orjson.dumps(ASK)))
            await proxy.get("/v1/models")  # a round trip later there is still nothing
            assert backend.requests == []
            opened.callback(None)
            await client.when(lambda received: Answer(received).whole)
            assert len(backend.requests) == 1
            await client.close()


@pytest.mark.parametrize("ending", [Close(), Reset()], ids=["closed", "reset"])
@pytest_twisted.ensureDeferred
async def test_a_stream_that_breaks_off_is_never_a_clean_end(tmp_path: Path, ending: Any) -> None:
    begun = head(200, CHUNKED) + b"".join(chunk(sse_event(each)) for each in TEXT)
    told: Deferred[None] = Deferred()
    async with ScriptedBackend([begun, Wait(told), ending]) as backend:
        async with proxy_for(tmp_path, backend) as proxy:
            client = await proxy.open()
            client.send(request_bytes("POST", CHAT, orjson.dumps(ASK_STREAM)))
            await client.when(lambda received: b"lo" in received)
            told.callback(None)
            await client.closed
            answer = client.answer()
            assert not answer.whole
            assert b'"error"' in answer.body.split(b"\n\n")[-2]
            assert proxy.rows() == [("estimated", "truncated", None, 2)]
            assert proxy.bill() == {"chat/gpu/completion": 2}


@pytest.mark.parametrize(
    ("events", "row"),
    [
        ([], ("settled", "backend_failed", None, None)),
        (TEXT, ("estimated", "backend_failed", None, 2)),
        ([*TEXT, STREAM[2]], ("settled", "backend_failed", 3, 2)),
    ],
    ids=["nothing", "some text", "text and usage"],
)
@pytest_twisted.ensureDeferred
async def test_an_error_in_a_stream_is_passed_on_and_what_came_before_it_is_billed(
    tmp_path: Path, events: list[Any], row: Any
) -> None:
    error = {"error": {"message": "out of memory", "code": 500}}
    async with ScriptedBackend([sse_answer([*events, error, DONE])]) as backend:
        async with proxy_for(tmp_path, backend) as proxy:
            answer = await proxy.post(CHAT, ASK_STREAM)
            assert answer.whole
            assert answer.body.endswith(sse_event(error) + DONE)
            assert proxy.rows() == [row]


@pytest_twisted.ensureDeferred
async def test_a_stream_that_falls_silent_is_ended_with_an_error(tmp_path: Path) -> None:
    begun = head(200, CHUNKED) + b"".join(chunk(sse_event(each)) for each in TEXT)
    async with ScriptedBackend([begun, Stall()]) as backend:
        async with proxy_for(tmp_path, backend, timeout=0.2) as proxy:
            answer = await proxy.post(CHAT, ASK_STREAM)
            assert not answer.whole
            assert b"gateway_timeout" in answer.body
            assert proxy.rows() == [("estimated", "stalled", None, 2)]


@pytest_twisted.ensureDeferred
async def test_a_backend_that_never_answers_gives_504_and_an_orphan(tmp_path: Path) -> None:
    async with ScriptedBackend([Stall()]) as backend:
        async with proxy_for(tmp_path, backend, timeout=0.2) as proxy:
            answer = await proxy.post(CHAT, ASK)
            assert answer.status == 504
            assert answer.json()["error"]["code"] == "gateway_timeout"
            assert proxy.rows() == [("orphan", "backend_failed", None, None)]
            assert proxy.bill() == {}


@pytest_twisted.ensureDeferred
async def test_a_backend_that_is_not_there_gives_502_and_no_charge(tmp_path: Path) -> None:
    async with ScriptedBackend() as gone:
        url = gone.url
    async with running_proxy(tmp_path, {"chat": {"url": url}}) as proxy:
        answer = await proxy.post(CHAT, ASK)
        assert answer.status == 502
        assert proxy.rows() == [("settled", "backend_failed", None, None)]
        assert proxy.bill() == {}


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (json_answer(400, {"error": {"message": "no", "code": "theirs"}}), 400, "theirs"),
        (json_answer(422, {"error": {"message": "no", "code": "theirs"}}), 422, "theirs"),
        (json_answer(401, {"error": {"message": "our token"}}), 502, "bad_gateway"),
        (json_answer(403, {"error": {"message": "our token"}}), 502, "bad_gateway"),
        (json_answer(500, {"error": {"message": "secret"}}), 502, "bad_gateway"),
        (json_answer(503, {"error": {"message": "secret"}}), 502, "bad_gateway"),
        (raw_answer(302, b"", {"Location": "http://127.0.0.1:1/"}), 502, "bad_gateway"),
        (
            json_answer(500, {"error": "This model's maximum context length is 4096 tokens"}),
            400,
            "context_length_exceeded",
        ),
    ],
    ids=["400", "422", "401", "403", "500", "503", "302", "context"],
)
@pytest_twisted.ensureDeferred
async def test_a_refusal_is_mapped_and_never_charged(
    tmp_path: Path, script: bytes, status: int, code: str
) -> None:
    async with ScriptedBackend([script]) as backend, proxy_for(tmp_path, backend) as proxy:
        answer = await proxy.post(CHAT, ASK)
        assert answer.status == status
        assert answer.json()["error"]["code"] == code
        assert b"secret" not in answer.raw
        assert b"our token" not in answer.raw
        assert proxy.rows() == [("settled", "refused", None, None)]
        assert proxy.bill() == {}
        assert len(backend.requests) == 1


@pytest_twisted.ensureDeferred
async def test_too_many_requests_are_passed_on_with_retry_after(tmp_path: Path) -> None:
    script = json_answer(429, {"error": {"message": "slow down"}}, {"Retry-After": "7"})
    async with ScriptedBackend([script]) as backend, proxy_for(tmp_path, backend) as proxy:
        answer = await proxy.post(CHAT, ASK)
        assert (answer.status, answer.fields["retry-after"]) == (429, "7")


@pytest.mark.parametrize(
    "script",
    [
        raw_answer(200, b"<html>", {"Content-Type": "text/html"}),
        json_answer(201, COMPLETION),
        [head(200, {"Content-Type": "application/json"}), b'{"half', Close()],
        raw_answer(
            200, b"\x1f\x8b", {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        ),
    ],
    ids=["html", "201", "half a JSON", "gzip"],
)
@pytest_twisted.ensureDeferred
async def test_an_answer_that_is_no_result_is_masked_and_left_to_the_operator(
    tmp_path: Path, script: Any
) -> None:
    steps = script if isinstance(script, list) else [script]
    async with ScriptedBackend(steps) as backend, proxy_for(tmp_path, backend) as proxy:
        answer = await proxy.post(CHAT, ASK)
        assert answer.status == 502
        [(state, _, *_)] = proxy.rows()
        assert state == "orphan"
        assert proxy.bill() == {}


@pytest_twisted.ensureDeferred
async def test_an_answer_with_odd_numbers_is_passed_on_and_left_to_the_operator(
    tmp_path: Path,
) -> None:
    odd = b'{"logprob":-Infinity,"usage":{"prompt_tokens":3,"completion_tokens":NaN}}'
    script = raw_answer(200, odd, {"Content-Type": "application/json"})
    async with ScriptedBackend([script]) as backend, proxy_for(tmp_path, backend) as proxy:
        assert (await proxy.post(CHAT, ASK)).body == odd
        [(state, raw)] = proxy.rows("state, raw")
        assert state == "disputed"
        assert "NaN" in raw
        assert proxy.bill() == {}


@pytest_twisted.ensureDeferred
async def test_absurd_usage_is_disputed_and_its_text_is_kept(tmp_path: Path) -> None:
    odd = {**COMPLETION, "usage": {"prompt_tokens": -1, "completion_tokens": 2.5}}
    async with ScriptedBackend([json_answer(200, odd)]) as backend:
        async with proxy_for(tmp_path, backend) as proxy:
            answer = await proxy.post(CHAT, ASK)
            assert answer.status == 200
            [(state, raw)] = proxy.rows("state, raw")
            assert state == "disputed"
            assert "-1" in raw
            assert proxy.bill() == {}


@pytest_twisted.ensureDeferred
async def test_a_client_that_leaves_is_billed_the_exact_number_when_drained(
    tmp_path: Path,
) -> None:
    begun = head(200, CHUNKED) + chunk(sse_event(TEXT[0]))
    rest = b"".join(chunk(sse_event(each)) for each in STREAM[1:]) + b"0\r\n\r\n"
    left: Deferred[None] = Deferred()
    async with ScriptedBackend([begun, Wait(left), rest]) as backend:
        async with proxy_for(tmp_path, backend) as proxy:
            client = await proxy.open()
            client.send(request_bytes("POST", CHAT, orjson.dumps(ASK_STREAM)))
            await client.when(lambda received: b"Hel" in received)
            client.abort()
            await client.closed
            await proxy.get("/v1/models")
            left.callback(None)
            assert await proxy.settled() == [("settled", "client_gone", 3, 2)]
            assert proxy.bill() == {"chat/gpu/prompt": 3, "chat/gpu/completion": 2}


@pytest_twisted.ensureDeferred
async def test_a_client_that_leaves_closes_the_backend_when_so_configured(
    tmp_path: Path,
) -> None:
    running = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    begun = head(200, CHUNKED) + chunk(sse_event({**TEXT[0], "usage": running}))
    options = {"on_disconnect": "cancel", "usage": "continuous"}
    async with ScriptedBackend([begun, Stall()]) as backend:
        async with proxy_for(tmp_path, backend, **options) as proxy:
            client = await proxy.open()
            client.send(request_bytes("POST", CHAT, orjson.dumps(ASK_STREAM)))
            await client.when(lambda received: b"Hel" in received)
            assert b"usage" not in client.received
            client.abort()
            await client.closed
            await backend.requests[0].connection.when_closed(0.2)
            assert await proxy.settled() == [("settled", "client_gone", 3, 1)]


@pytest_twisted.ensureDeferred
async def test_a_drained_stream_is_stopped_at_its_cap(tmp_path: Path) -> None:
    begun = head(200, CHUNKED) + chunk(sse_event(TEXT[0]))
    left: Deferred[None] = Deferred()
    more = b"".join(chunk(sse_event(delta("x"))) for _ in range(10))
    async with ScriptedBackend([begun, Wait(left), more, Stall()]) as backend:
        async with proxy_for(tmp_path, backend, drain_max_tokens=4) as proxy:
            client = await proxy.open()
            client.send(request_bytes("POST", CHAT, orjson.dumps(ASK_STREAM)))
            await client.when(lambda received: b"Hel" in received)
            client.abort()
            await client.closed
            await proxy.get("/v1/models")
            left.callback(None)
            [(state, outcome, prompt, completion)] = await proxy.settled()
            assert (state, outcome, prompt) == ("estimated", "client_gone", None)
            assert 5 < completion <= 11


@pytest_twisted.ensureDeferred
async def test_a_client_that_leaves_before_the_answer_is_drained_too(tmp_path: Path) -> None:
    left: Deferred[None] = Deferred()
    async with ScriptedBackend([Wait(left), json_answer(200, COMPLETION)]) as backend:
        async with proxy_for(tmp_path, backend) as proxy:
            client = await proxy.open()
            client.send(request_bytes("POST", CHAT, orjson.dumps(ASK)))
            await backend.request()
            client.abort()
            await client.closed
            await proxy.get("/v1/models")
            left.callback(None)
            assert await proxy.settled() == [("settled", "client_gone", 3, 2)]


@pytest_twisted.ensureDeferred
async def test_keep_alive_comments_go_out_before_the_first_token_only(tmp_path: Path) -> None:
    go_on: Deferred[None] = Deferred()
    rest = b"".join(chunk(sse_event(each)) for each in STREAM) + b"0\r\n\r\n"
    async with ScriptedBackend([head(200, CHUNKED), Wait(go_on), rest]) as backend:
        async with proxy_for(tmp_path, backend, settings={"keepalive_interval": 0.05}) as proxy:
            client = await proxy.open()
            client.send(request_bytes("POST", CHAT, orjson.dumps(ASK_STREAM)))
            await client.when(lambda received: received.count(b": keep-alive\n\n") >= 2)
            go_on.callback(None)
            await client.when(lambda received: Answer(received).whole)
            body = client.answer().body
            assert body.lstrip(b": keep-alive\n\n").startswith(b"data: ")
            assert body.replace(b": keep-alive\n\n", b"") == SHOWN
            await client.close()


# -- who gets in, and what is asked -------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "shape"),
    [(CHAT, ("error", "type", "authentication_error")), (MESSAGES, ("type", None, "error"))],
)
@pytest_twisted.ensureDeferred
async def test_a_wrong_key_is_refused_in_the_paths_dialect(
    tmp_path: Path, path: str, shape: tuple[str, str | None, str]
) -> None:
    async with ScriptedBackend() as backend, proxy_for(tmp_path, backend) as proxy:
        answers = [
            await proxy.post(path, ASK, key="wrong"),
            await proxy.post(path, ASK, key="token1"),
            await proxy.post(path, ASK, key=None),
        ]
        for answer in answers:
            assert answer.status == 401
            assert answer.fields["www-authenticate"] == "Bearer"
            assert answer.fields["x-request-id"]
            found = answer.json()[shape[0]]
            assert (found if shape[1] is None else found[shape[1]]) == shape[2]
        assert backend.received == 0
        assert proxy.rows() == []


@pytest_twisted.ensureDeferred
async def test_an_anthropic_key_opens_the_anthropic_paths_only(tmp_path: Path) -> None:
    message = {"type": "message", "usage": {"input_tokens": 4, "output_tokens": 6}}
    async with ScriptedBackend([json_answer(200, message)]) as backend:
        async with proxy_for(tmp_path, backend) as proxy:
            assert (await proxy.post(MESSAGES, ASK, key=None, x_api_key="token2")).status == 200
            assert (await proxy.post(CHAT, ASK, key=None, x_api_key="token2")).status == 401
            assert proxy.bill() == {"chat/gpu/prompt": 4, "chat/gpu/completion": 6}


@pytest_twisted.ensureDeferred
async def test_the_backend_gets_its_own_credentials_and_nothing_of_the_clients(
    tmp_path: Path,
) -> None:
    sent = {
        "Cookie": "canary",
        "X-Api-Key": "canary",
        "X-Forwarded-For": "canary",
        "Proxy-Authorization": "canary",
        "Accept-Encoding": "gzip",
        "Connection": "keep-alive, x-canary",
        "X-Canary": "canary",
        "X-Request-ID": "canary",
    }
    async with ScriptedBackend([json_answer(200, COMPLETION, {"Set-Cookie": "c=1"})]) as backend:
        async with proxy_for(tmp_path, backend, token="theirs", model="real/name") as proxy:
            answer = await proxy.send(
                request_bytes("POST", CHAT, orjson.dumps({**ASK, "temperature": 0.10}), fields=sent)
            )
            assert answer.status == 200
            assert "set-cookie" not in answer.fields
            assert answer.fields["x-request-id"] != "canary"
            seen = backend.requests[0]
            assert b"canary" not in seen.raw
            assert b"token2" not in seen.raw
            assert seen.header("Authorization") == "Bearer theirs"
            assert seen.header("Accept-Encoding") is None
            assert seen.json()["model"] == "real/name"
            assert b"theirs" not in answer.raw


CODES = {400: "invalid_request_error", 404: "not_found", 405: "method_not_allowed"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/chat/completion", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("POST", "/v1/chat%2fcompletions", 404),
        ("POST", "/v1/%63hat/completions", 404),
        ("POST", "//v1/chat/completions", 404),
        ("POST", "/v1/../v1/chat/completions", 404),
        ("POST", "/v1/chat", 404),
        ("POST", "/", 404),
        ("POST", "x/v1/chat/completions", 400),
        ("POST", "/metrics", 404),
        ("POST", "/v1/load_lora_adapter", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
    ],
)
@pytest_twisted.ensureDeferred
async def test_only_the_exact_paths_are_there(
    tmp_path: Path, method: str, path: str, status: int
) -> None:
    async with ScriptedBackend() as backend, proxy_for(tmp_path, backend) as proxy:
        body = orjson.dumps(ASK) if method == "POST" else b""
        answer = await proxy.send(request_bytes(method, path, body))
        assert answer.status == status
        assert answer.json()["error"]["code"] == CODES[status]
        assert backend.received == 0
        assert proxy.rows() == []


@pytest_twisted.ensureDeferred
async def test_each_request_has_one_line_with_what_is_known_of_it(
    tmp_path: Path, logged: list[str]
) -> None:
    scripts = [json_answer(200, COMPLETION)], [json_answer(401, {})]
    async with ScriptedBackend(*scripts) as backend, proxy_for(tmp_path, backend) as proxy:
        secret = {"messages": [{"role": "user", "content": "a secret canary"}]}
        await proxy.post(CHAT, {**ASK, **secret})
        await proxy.post(CHAT, {**ASK, **secret})
        await proxy.post(CHAT, {**ASK, **secret, "model": "other"})
        await proxy.post(CHAT, ASK, key="canary-key")
        await proxy.get("/v1/models", key="canary-key")
        await proxy.get("/nothing?key=canary-key")
        rids = [rid for (rid,) in proxy.rows("rid")]
    lines = [line for line in logged if line.startswith(("complete ", "refused "))]
    known = f"key=id-token2 model=chat path={CHAT}"
    wanted = [
        f"complete {rids[0]} {known} status=200 backend_status=200 state=settled prompt=3",
        f"refused {rids[1]} {known} status=502 backend_status=401 state=settled",
        f"key=id-token2 model=other path={CHAT} status=404 code=model_not_found",
        f"key=None model=None path={CHAT} status=401 code=invalid_api_key",
        "key=None model=None path=/v1/models status=401",
        "key=None model=None path=/nothing status=404",
    ]
    for line, part in zip(lines, wanted, strict=True):
        assert part in line
    assert "canary" not in "".join(logged)


@pytest_twisted.ensureDeferred
async def test_a_client_that_leaves_before_any_answer_is_counted_apart(tmp_path: Path) -> None:
    left: Deferred[None] = Deferred()
    script: list[Any] = [Wait(left), json_answer(200, COMPLETION)]
    async with ScriptedBackend(script) as backend, proxy_for(tmp_path, backend) as proxy:
        client = await proxy.open()
        client.send(request_bytes("POST", CHAT, orjson.dumps(ASK)))
        await backend.request()
        client.abort()
        await client.closed
        await proxy.get("/v1/models")
        left.callback(None)
        await proxy.settled()
        metrics = (await proxy.get("/metrics", port=proxy.admin_port)).body.decode()
        assert f'llmproxy_requests_total{{method="POST",path="{CHAT}",status="499"}} 1' in metrics


@pytest_twisted.ensureDeferred
async def test_the_body_of_a_client_that_has_left_is_read_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: Deferred[None] = Deferred()
    ended: Deferred[None] = Deferred()

    def steps(survey: Survey) -> Iterator[None]:
        begun.callback(None)
        try:
            for _ in range(100_000):
                yield
        except GeneratorExit:
            ended.callback(None)
            raise

    monkeypatch.setattr(Survey, "steps", steps)
    monkeypatch.setattr("llmproxy.steps.TURN_S", 0)
    body = orjson.dumps({**ASK, "user": "x" * 300_000})
    async with ScriptedBackend() as backend, proxy_for(tmp_path, backend) as proxy:
        client = await proxy.open()
        client.send(request_bytes("POST", CHAT, body))
        await begun
        client.abort()
        await ended.addTimeout(5, reactor)
        assert proxy.rows() == []


@pytest_twisted.ensureDeferred
async def test_an_unknown_model_is_not_found(tmp_path: Path) -> None:
    async with ScriptedBackend() as backend, proxy_for(tmp_path, backend) as proxy:
        answer = await proxy.post(CHAT, {**ASK, "model": "other"})
        assert answer.status == 404
        assert answer.json()["error"]["code"] == "model_not_found"
        assert proxy.rows() == []


@pytest.mark.parametrize(
    ("body", "fields", "status"),
    [
        (b"{", {}, 400),
        (orjson.dumps(ASK), {"Content-Type": "text/plain"}, 415),
        (orjson.dumps(ASK), {"Content-Encoding": "gzip"}, 415),
        (b" " * 2000, {}, 413),
        (b'{"model":"chat","model":"chat2"}', {}, 400),
        (b'{"model":"chat","stream":"true"}', {}, 400),
    ],
    ids=["half", "type", "coding", "large", "twice", "stream"],
)
@pytest_twisted.ensureDeferred
async def test_a_body_that_is_not_understood_is_refused(
    tmp_path: Path, body: bytes, fields: dict[str, str], status: int
) -> None:
    async with ScriptedBackend() as backend:
        async with proxy_for(tmp_path, backend, settings={"max_json_body": 1000}) as proxy:
            answer = await proxy.send(request_bytes("POST", CHAT, body, fields=fields))
            assert answer.status == status
            assert backend.received == 0
            assert proxy.rows() == []


@pytest_twisted.ensureDeferred
async def test_a_body_is_invited_only_after_the_key_and_the_size_were_checked(
    tmp_path: Path,
) -> None:
    async with ScriptedBackend([json_answer(200, COMPLETION)]) as backend:
        async with proxy_for(tmp_path, backend, settings={"max_json_body": 1000}) as proxy:
            for key, length, status in (("wrong", 10, 401), ("token2", 5000, 413)):
                asked = request_bytes(
                    "POST",
                    CHAT,
                    key=key,
                    fields={"Expect": "100-continue", "Content-Length": str(length)},
                )
                answer = await proxy.send(asked)
                assert answer.status == status
            body = orjson.dumps(ASK)
            client = await proxy.open()
            fields = {"Expect": "100-continue", "Content-Length": str(len(body))}
            client.send(request_bytes("POST", CHAT, fields=fields))
            await client.when(lambda received: received.endswith(b"\r\n\r\n"))
            assert client.received == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.received = b""
            client.send(body)
            await client.when(lambda received: Answer(received).whole)
            assert client.answer().status == 200
            await client.close()


@pytest_twisted.ensureDeferred
async def test_pipelined_requests_are_answered_in_order_and_billed_each(tmp_path: Path) -> None:
    async with ScriptedBackend([json_answer(200, COMPLETION)]) as backend:
        async with proxy_for(tmp_path, backend) as proxy:
            client = await proxy.open()
            good = request_bytes("POST", CHAT, orjson.dumps(ASK))
            bad = request_bytes("POST", CHAT, orjson.dumps(ASK), key="wrong")
            client.send(good + bad + good)
            await client.when(lambda received: received.count(b"HTTP/1.1 ") == 3)
            await client.when(lambda received: received.count(b'"usage"') == 2)
            found = [part[:3] for part in client.received.split(b"HTTP/1.1 ")[1:]]
            assert found == [b"200", b"401", b"200"]
            assert proxy.rows() == [("settled", "complete", 3, 2)] * 2
            await client.close()


@pytest_twisted.ensureDeferred
async def test_a_preflight_is_answered_for_browsers(tmp_path: Path) -> None:
    async with (
        ScriptedBackend() as backend,
        proxy_for(tmp_path, backend, settings={"http_origin": "https://app.example"}) as proxy,
    ):
        answer = await proxy.send(request_bytes("OPTIONS", CHAT, key=None))
        assert answer.status == 204
        assert answer.fields["access-control-allow-origin"] == "https://app.example"
        assert "POST" in answer.fields["access-control-allow-methods"]
        assert "Authorization" in answer.fields["access-control-allow-headers"]
        assert "X-Request-ID" in answer.fields["access-control-expose-headers"]


@pytest_twisted.ensureDeferred
async def test_models_are_listed_for_a_valid_key_only(tmp_path: Path) -> None:
    backends: dict[str, dict[str, Any]] = {
        "chat": {"url": "http://127.0.0.1:1", "max_model_len": 4096},
        "org/other": {"url": "http://127.0.0.1:1", "device": "a100"},
    }
    async with running_proxy(tmp_path, backends) as proxy:
        assert (await proxy.get("/v1/models", key="wrong")).status == 401
        listed = (await proxy.get("/v1/models")).json()
        assert listed["object"] == "list"
        first, second = listed["data"]
        assert first["id"] == "chat"
        assert first["object"] == "model"
        assert isinstance(first["created"], int)
        assert first["owned_by"]
        assert (first["device"], first["max_model_len"]) == ("gpu", 4096)
        assert (second["id"], second["device"]) == ("org/other", "a100")
        for path in ("/v1/models/org/other", "/v1/models/org%2Fother"):
            assert (await proxy.get(path)).json() == second
        assert (await proxy.get("/v1/models/none")).json()["error"]["code"] == "model_not_found"


@pytest_twisted.ensureDeferred
async def test_a_body_is_kept_no_longer_than_it_can_be_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []  # what can make the body once more, and therefore has it
    admit = Admission.admit

    async def admit_and_note(*args: Any) -> Admitted:
        admitted = await admit(*args)
        kept.append(weakref.ref(admitted.order))
        return admitted

    monkeypatch.setattr(Admission, "admit", admit_and_note)
    hold: Deferred[None] = Deferred()
    begun: Script = [head(200, CHUNKED), chunk(sse_event(TEXT[0])), Wait(hold), Close()]
    async with ScriptedBackend(begun) as backend:
        async with proxy_for(tmp_path, backend) as proxy:
            client = await proxy.open()
            client.send(request_bytes("POST", CHAT, orjson.dumps(ASK_STREAM)))
            await client.when(lambda received: b"Hel" in received)
            assert [each() for each in kept] == [None]
            hold.callback(None)
            await client.closed


@pytest_twisted.ensureDeferred
async def test_a_request_that_we_can_not_make_leaves_a_closed_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush_logged_errors: Any
) -> None:
    def broken(*args: Any, **options: Any) -> bytes:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(rewrite, "body_for", broken)
    async with ScriptedBackend([json_answer(200, COMPLETION)]) as backend:
        async with proxy_for(tmp_path, backend) as proxy:
            assert (await proxy.post(CHAT, ASK)).status == 500
            assert proxy.rows() == [("settled", "refused", None, None)]
            assert backend.received == 0
    assert len(flush_logged_errors(RuntimeError)) == 1


@pytest_twisted.ensureDeferred
async def test_an_alias_is_the_model_and_the_bill_has_its_name(tmp_path: Path) -> None:
    async with ScriptedBackend([json_answer(200, COMPLETION)]) as backend:
        named = {"chat": {"url": backend.url, "aliases": ["gpt-4o"]}}
        async with running_proxy(tmp_path, named) as proxy:
            assert (await proxy.post(CHAT, ASK | {"model": "gpt-4o"})).status == 200
            assert backend.requests[0].json()["model"] == "chat"
            assert proxy.bill() == {"chat/gpu/prompt": 3, "chat/gpu/completion": 2}
            ids = [each["id"] for each in (await proxy.get("/v1/models")).json()["data"]]
            assert ids == ["chat", "gpt-4o"]
            assert (await proxy.get("/v1/models/gpt-4o")).json()["id"] == "gpt-4o"


@pytest_twisted.ensureDeferred
async def test_a_key_for_some_models_gets_and_sees_no_others(tmp_path: Path) -> None:
    async with ScriptedBackend([json_answer(200, COMPLETION)]) as backend:
        named = {name: {"url": backend.url} for name in ("chat", "other")}
        async with running_proxy(tmp_path, named) as proxy:
            with contextlib.closing(connect(proxy.database)) as connection:
                connection.execute("INSERT INTO key_model VALUES ('id-token2', 'chat')")
            assert (await proxy.post(CHAT, ASK)).status == 200
            refused = await proxy.post(CHAT, ASK | {"model": "other"})
            unknown = await proxy.post(CHAT, ASK | {"model": "none"})
            assert refused.status == 404
            assert refused.json() == unknown.json()  # it does not tell that there is one
            assert (await proxy.get("/v1/models/other")).status == 404
            ids = [each["id"] for each in (await proxy.get("/v1/models")).json()["data"]]
            assert ids == ["chat"]
            assert (await proxy.post(CHAT, ASK | {"model": "other"}, key="token3")).status == 200
            assert len(backend.requests) == 2


@pytest_twisted.ensureDeferred
async def test_metrics_and_readiness_are_on_the_admin_site_only(tmp_path: Path) -> None:
    async with ScriptedBackend([json_answer(200, COMPLETION)]) as backend:
        async with proxy_for(tmp_path, backend) as proxy:
            await proxy.post(CHAT, ASK)
            metrics = (await proxy.get("/metrics", port=proxy.admin_port)).body.decode()
            for line in (
                'llmproxy_requests_total{method="POST",path="/v1/chat/completions",status="200"} 1',
                'llmproxy_backend_requests_total{model="chat",status="200"} 1',
                'llmproxy_tokens_total{model="chat",type="prompt"} 3',
                'llmproxy_tokens_total{model="chat",type="completion"} 2',
                'llmproxy_ledger_rows_total{state="open"} 1',
                'llmproxy_ledger_rows_total{state="settled"} 1',
            ):
                assert line in metrics
            assert (await proxy.get("/healthz", port=proxy.admin_port)).status == 200
            assert (await proxy.get("/metrics")).status == 404
