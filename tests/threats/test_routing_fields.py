"""Where a request goes is told by the name of a configured model, and by nothing else in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
import pytest_twisted
from backend import ScriptedBackend, json_answer
from proxy import ProxyHandle, request_bytes, running_proxy
from tally import Tally

from llmproxy import policy
from llmproxy.endpoints import ENDPOINTS, Body, Dialect

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {
    "model": "chat",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 5,
}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
COMPLETION = json_answer(200, {"choices": [], "usage": USAGE})

#: What stands in the place of a model's name, and is none of ours.
NO_MODELS: list[Any] = [
    *(None, True, 0, 1.5, [], {}, ["chat"], {"model": "chat"}, [["chat"]]),
    *("", " ", "other", "Chat", "CHAT", " chat", "chat ", "chat\t", "\nchat", "chat\n", "chat\0"),
    *("../chat", "chat/../chat", "./chat", "chat/", "/chat", "chat/v1/models", "..", "%63hat"),
    *("http://169.254.169.254/", "//elsewhere/chat", "file:///etc/passwd", "chat@elsewhere"),
    *("chat?api_base=http://a", "chat#x", "chat;x", "chat:latest", "chat\r\nHost: elsewhere"),
    *("\u200bchat", "chat\u00ad", "\uff43hat", "\u0441hat", "chat\u0301", "\u202echat", "*"),
    *("' OR '1'='1", '{"$gt":""}', "%s", "{model}", "${jndi:ldap://a}", "x" * 257, "x" * 2**20),
]
#: Fields by which somebody might hope to send a request elsewhere.
FIELDS = [
    "X-Backend",
    "X-Forwarded-Host",
    "X-Original-URL",
    "X-Rewrite-URL",
    "X-Model",
    "X-Override-Bootstrap-Host",
    "X-Data-Parallel-Rank",
    "Forwarded",
]


def form(model: str) -> bytes:
    head = 'Content-Disposition: form-data; name="model"\r\n\r\n'
    return f"--b\r\n{head}{model}\r\n--b--\r\n".encode()


async def statuses(proxy: ProxyHandle, model: Any) -> dict[str, int]:
    """What each way of asking for this model is answered with."""
    found = {}
    for path, endpoint in ENDPOINTS.items():
        if endpoint.body is Body.JSON:
            body, fields = orjson.dumps({**ASK, "model": model}), {}
        else:
            fields = {"Content-Type": "multipart/form-data; boundary=b"}
            body = form(model if isinstance(model, str) else orjson.dumps(model).decode())
        answer = await proxy.send(request_bytes("POST", path, body, fields=fields))
        shape = answer.json()["error"]
        assert shape["message"]
        assert ("type" in answer.json()) == (endpoint.dialect is Dialect.ANTHROPIC)
        found[path] = answer.status
    if isinstance(model, str) and 0 < len(model) < 1000:
        name = quote(model, safe="")
        found["/v1/models/"] = (await proxy.get(f"/v1/models/{name}")).status
    return found


@pytest_twisted.ensureDeferred
async def test_a_model_that_is_not_there_is_asked_of_nobody(tmp_path: Path) -> None:
    verdicts = Tally("names of models")
    async with ScriptedBackend() as backend:
        async with running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy:
            for model in NO_MODELS:
                for path, status in (await statuses(proxy, model)).items():
                    verdicts.add(f"{path} {model!r:.40}", status in (400, 404), f"{status}")
            assert backend.requests == []
            assert proxy.rows() == []
    verdicts.check(at_least=400)


@pytest_twisted.ensureDeferred
async def test_no_field_sends_a_request_elsewhere(tmp_path: Path) -> None:
    async with ScriptedBackend([COMPLETION]) as backend, ScriptedBackend() as elsewhere:
        async with running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy:
            for name in policy.REFUSED:
                answer = await proxy.post(CHAT, {**ASK, name: elsewhere.url})
                assert answer.status == 400, name
                assert answer.json()["error"]["param"] == name
                answer = await proxy.post(CHAT, {**ASK, name.upper(): elsewhere.url})
                assert answer.status == 400, name
            assert backend.requests == []
            assert proxy.rows() == []
            host = elsewhere.url.removeprefix("http://")
            for name in FIELDS:
                raw = orjson.dumps(ASK)
                answer = await proxy.send(
                    request_bytes("POST", CHAT, raw, fields={name: elsewhere.url, "Host": host})
                )
                assert answer.status == 200
            assert len(backend.requests) == len(FIELDS)
            for seen in backend.requests:
                assert elsewhere.url.encode() not in seen.raw
                assert host not in (seen.header("host") or "")
            assert elsewhere.connections == []


@pytest_twisted.ensureDeferred
async def test_what_is_no_route_passes_as_it_is(tmp_path: Path) -> None:
    async with ScriptedBackend([COMPLETION]) as backend, ScriptedBackend() as elsewhere:
        async with running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy:
            body = {
                **ASK,
                "user": elsewhere.url,
                "metadata": {"api_base": elsewhere.url, "model": "other"},
                "extra_body": {"base_url": elsewhere.url},
                "url": elsewhere.url,
                "bootstrap_host": None,
            }
            answer = await proxy.post(CHAT, body)
            assert answer.status == 200
            assert backend.requests[0].line == b"POST /v1/chat/completions HTTP/1.1"
            assert backend.requests[0].body == orjson.dumps(body)
            assert elsewhere.connections == []


@pytest_twisted.ensureDeferred
async def test_a_form_with_audio_has_no_other_route_either(tmp_path: Path) -> None:
    fields = {"Content-Type": "multipart/form-data; boundary=b"}
    async with ScriptedBackend() as backend:
        async with running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy:
            for name in policy.REFUSED_IN_FORMS:
                head = f'Content-Disposition: form-data; name="{name}"\r\n\r\n'
                raw = f"--b\r\n{head}http://169.254.169.254/\r\n".encode() + form("chat")
                path = "/v1/audio/transcriptions"
                answer = await proxy.send(request_bytes("POST", path, raw, fields=fields))
                assert answer.status == 400, name
                assert answer.json()["error"]["param"] == name
            assert backend.requests == []
            assert proxy.rows() == []
