"""Links to media: a backend is made to fetch nothing unless its operator wants it to."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import orjson
import pytest_twisted
from backend import ScriptedBackend, json_answer
from proxy import running_proxy
from tally import Tally
from test_media import FORMS, HARMLESS, REMOTE, filled

from llmproxy.endpoints import ENDPOINTS, Dialect

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "input_tokens": 3, "output_tokens": 2}
ANSWER = json_answer(200, {"usage": USAGE})
DATA = "data:image/png;base64,iVBORw0KGgo="
METADATA = "http://169.254.169.254/latest/meta-data/iam/security-credentials/"


def body_of(form: dict[str, Any], url: str) -> bytes:
    return orjson.dumps({"model": "chat", **filled(form, url)})


@pytest_twisted.ensureDeferred
async def test_links_are_refused_and_nobody_sees_them(tmp_path: Path) -> None:
    verdicts = Tally("links to media")
    async with ScriptedBackend() as backend:
        async with running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy:
            for (path, form, name), url in product(FORMS, REMOTE):
                answer = await proxy.post(path, body_of(form, url))
                error = answer.json()["error"]
                told = (
                    f"{name!r} would have" in error["message"] and "'data:' URL" in error["message"]
                )
                if ENDPOINTS[path].dialect is Dialect.OPENAI:
                    told = told and error["param"] == name
                passed = answer.status == 400 and told and url not in str(error)
                verdicts.add(f"{path} {form} {url}", passed, f"{answer.status} {error}")
            assert backend.requests == []
            assert proxy.rows() == []
    verdicts.check(at_least=300)


@pytest_twisted.ensureDeferred
async def test_content_in_the_request_and_what_is_no_link_pass_byte_for_byte(
    tmp_path: Path,
) -> None:
    bodies = [(path, body_of(form, DATA)) for path, form, _ in FORMS]
    bodies += [(path, orjson.dumps({"model": "chat", **body})) for path, body in HARMLESS]
    async with ScriptedBackend([ANSWER]) as backend:
        async with running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy:
            for path, raw in bodies:
                assert (await proxy.post(path, raw)).status == 200, raw
            for (path, raw), seen in zip(bodies, backend.requests, strict=True):
                stored = b',"store":false}' if path == "/v1/responses" else b"}"
                assert seen.body == raw[:-1] + stored


@pytest_twisted.ensureDeferred
async def test_where_links_are_allowed_they_are_passed_on_and_not_fetched_here(
    tmp_path: Path,
) -> None:
    async with ScriptedBackend([ANSWER]) as backend, ScriptedBackend() as elsewhere:
        named: dict[str, dict[str, Any]] = {
            "chat": {"url": backend.url, "media_urls": True},
            "strict": {"url": backend.url},
        }
        async with running_proxy(tmp_path, named) as proxy:
            sent = []
            for path, form, _ in FORMS:
                if path != "/v1/responses":
                    for url in (METADATA, f"{elsewhere.url}/cat.png"):
                        sent.append(body_of(form, url))
                        assert (await proxy.post(path, sent[-1])).status == 200
            assert [seen.body for seen in backend.requests] == sent
            assert elsewhere.connections == []
            part = {"type": "image_url", "image_url": {"url": METADATA}}
            ask = {"model": "strict", "messages": [{"role": "user", "content": [part]}]}
            assert (await proxy.post("/v1/chat/completions", ask)).status == 400
            assert len(backend.requests) == len(sent)
