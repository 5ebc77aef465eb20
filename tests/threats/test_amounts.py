"""How much one request may ask for; and however much it is, all of it is billed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from backend import DONE, ScriptedBackend, json_answer, sse_answer
from proxy import running_proxy

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
HELLO: list[Any] = [{"role": "user", "content": "hi"}]
ASK: dict[str, Any] = {"model": "chat", "messages": HELLO}
PROMPTS: dict[str, Any] = {"model": "chat", "prompt": ["one", "two"]}
WRONG_LENGTHS: list[Any] = [101, 10**9, 10**40, -1, -2, "5", 1.0, True, []]
LIMITS = {"max_choices": 4, "max_batch": 3, "max_tokens": 100}

TOO_MUCH: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {**ASK, "n": 1_000_000}, "n"),
    (CHAT, {**ASK, "n": 2**63}, "n"),
    (CHAT, {**ASK, "n": 10**30}, "n"),
    (CHAT, {**ASK, "n": 5}, "n"),
    (CHAT, {**ASK, "n": -1}, "n"),
    (CHAT, {**ASK, "n": "3"}, "n"),
    (CHAT, {**ASK, "n": True}, "n"),
    (CHAT, {**ASK, "n": 2.0}, "n"),
    (CHAT, {**ASK, "N": 2}, "n"),
    (CHAT, {**ASK, "n_cmpl": 5}, "n_cmpl"),
    (COMPLETIONS, {**PROMPTS, "best_of": 1_000_000}, "best_of"),
    (COMPLETIONS, {**PROMPTS, "best_of": 1.5}, "best_of"),
    (COMPLETIONS, {**PROMPTS, "n": 3}, "n"),
    (COMPLETIONS, {"model": "chat", "prompt": ["a"] * 10_000}, "prompt"),
    (COMPLETIONS, {"model": "chat", "prompt": [[1]] * 5, "echo": True, "logprobs": 5}, "prompt"),
    (EMBEDDINGS, {"model": "chat", "input": ["a"] * 4}, "input"),
    ("/v1/rerank", {"model": "chat", "query": "a", "documents": ["a"] * 4}, "documents"),
    ("/v1/score", {"model": "chat", "text_1": "a", "text_2": ["a"] * 4}, "text_2"),
    *(
        (path, {**ASK, "input": "x", "prompt": "x", name: value}, name)
        for path, name in (
            (CHAT, "max_tokens"),
            (CHAT, "max_completion_tokens"),
            (CHAT, "n_predict"),
            (COMPLETIONS, "max_tokens"),
            ("/v1/responses", "max_output_tokens"),
            ("/v1/messages", "max_tokens"),
        )
        for value in WRONG_LENGTHS
    ),
]


@pytest_twisted.ensureDeferred
async def test_what_is_too_much_is_asked_of_nobody(tmp_path: Path) -> None:
    async with ScriptedBackend() as backend:
        async with running_proxy(tmp_path, {"chat": {"url": backend.url, **LIMITS}}) as proxy:
            for path, body, name in TOO_MUCH:
                raw = as_json(body)
                answer = await proxy.post(path, raw)
                error = answer.json()["error"]
                assert answer.status == 400, raw
                assert f"'{name}'" in error["message"] or "prompts" in error["message"], raw
                assert error.get("param", name) == name
            assert backend.requests == []
            assert proxy.rows() == []


def as_json(body: dict[str, Any]) -> bytes:
    """With numbers of any size, which orjson does not write."""
    return json.dumps(body).encode()


@pytest_twisted.ensureDeferred
async def test_by_default_a_million_answers_are_too_many_and_a_long_answer_is_not(
    tmp_path: Path,
) -> None:
    whole = json_answer(200, {"usage": {"prompt_tokens": 1, "completion_tokens": 2}})
    async with ScriptedBackend([whole]) as backend:
        async with running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy:
            assert (await proxy.post(CHAT, {**ASK, "n": 1_000_000})).status == 400
            assert (await proxy.post(CHAT, {**ASK, "n": 129})).status == 400
            assert backend.requests == []
            assert (await proxy.post(CHAT, {**ASK, "n": 128})).status == 200
            assert (await proxy.post(CHAT, {**ASK, "max_tokens": 10**9})).status == 200
            assert len(proxy.rows()) == 2


# --- all of it is billed ----------------------------------------------------------------------

TOTAL = {"prompt_tokens": 7, "completion_tokens": 60, "total_tokens": 67}
BILL = {"chat/gpu/prompt": 7, "chat/gpu/completion": 60}
SEVERAL: list[tuple[str, dict[str, Any], int]] = [
    (CHAT, {**ASK, "n": 3}, 3),
    (COMPLETIONS, {**PROMPTS, "n": 3}, 6),
    (COMPLETIONS, {**PROMPTS, "best_of": 3, "n": 1, "echo": True, "logprobs": 2}, 2),
]


def choice(path: str, index: int, streamed: bool) -> dict[str, Any]:
    if path == COMPLETIONS:
        return {"index": index, "text": "word"}
    return {"index": index, "delta" if streamed else "message": {"content": "word"}}


@pytest.mark.parametrize(("path", "body", "count"), SEVERAL)
@pytest_twisted.ensureDeferred
async def test_all_answers_of_a_request_are_billed(
    tmp_path: Path, path: str, body: dict[str, Any], count: int
) -> None:
    choices = [choice(path, index, False) for index in range(count)]
    whole = json_answer(200, {"choices": choices, "usage": TOTAL})
    async with ScriptedBackend([whole]) as backend:
        async with running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy:
            assert (await proxy.post(path, body)).json()["choices"] == choices
            assert proxy.rows() == [("settled", "complete", 7, 60)]
            assert proxy.bill() == BILL


@pytest.mark.parametrize("usage", ["final", "continuous"])
@pytest.mark.parametrize(("path", "body", "count"), SEVERAL)
@pytest_twisted.ensureDeferred
async def test_all_answers_of_a_stream_are_billed(
    tmp_path: Path, path: str, body: dict[str, Any], count: int, usage: str
) -> None:
    events: list[Any] = []
    for step in range(1, 4):
        for index in range(count):
            event: dict[str, Any] = {"choices": [choice(path, index, True)]}
            if usage == "continuous":  # vLLM's: of this choice alone
                event["usage"] = {"prompt_tokens": 7, "completion_tokens": step}
            events.append(event)
    events += [{"choices": [], "usage": TOTAL}, DONE]
    async with ScriptedBackend([sse_answer(events)]) as backend:
        named = {"chat": {"url": backend.url, "usage": usage}}
        async with running_proxy(tmp_path, named) as proxy:
            answer = await proxy.post(path, {**body, "stream": True})
            assert answer.whole
            assert answer.body.count(b"word") == 3 * count
            assert b"usage" not in answer.body
            assert proxy.rows() == [("settled", "complete", 7, 60)]
            assert proxy.bill() == BILL


@pytest_twisted.ensureDeferred
async def test_a_batch_is_billed_as_the_backend_counts_it(tmp_path: Path) -> None:
    whole = json_answer(200, {"data": [], "usage": {"prompt_tokens": 4096, "total_tokens": 4096}})
    async with ScriptedBackend([whole]) as backend:
        async with running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy:
            body = {"model": "chat", "input": ["a b"] * 2048}
            assert (await proxy.post(EMBEDDINGS, body)).status == 200
            assert proxy.bill() == {"chat/gpu/embedding": 4096}
            body["input"] = ["a b"] * 2049
            assert (await proxy.post(EMBEDDINGS, body)).status == 400
            assert len(proxy.rows()) == 1
