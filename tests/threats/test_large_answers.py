"""A large answer that is no stream: read in parts, so that nobody waits, and not changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_twisted
from backend import JSON, ScriptedBackend, raw_answer
from proxy import request_bytes, running_proxy
from speech import CHAT, EMBEDDINGS, Speech

from llmproxy import forward
from llmproxy.jsonbytes import parse_object
from llmproxy.parts import BLOCK

MIB = 1024 * 1024
USED = {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}
COHERE = {"meta": {"billed_units": {"input_tokens": 4}}}
ROW = [n / 7 for n in range(1000)]


def of_vectors() -> dict[str, Any]:
    return {"data": [{"index": n, "embedding": ROW} for n in range(150)], **USED}


def of_text() -> dict[str, Any]:
    text = '"usage":{"prompt_tokens":9}\\u00e9\u2028' * 50_000
    return {**USED, "choices": [{"index": 0, "message": {"content": text}}]}


def of_values(count: int) -> dict[str, Any]:
    return {"choices": [{"logprobs": [{"token": "x"}] * count}], **USED}


def of_fields(count: int) -> dict[str, Any]:
    return {**{str(number): "x" * (BLOCK - 9) for number in range(count)}, **USED}


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes were parsed in one go, each time."""
    sizes: list[int] = []

    def counting(body: bytes) -> dict[str, Any]:
        sizes.append(len(body))
        return parse_object(body)

    monkeypatch.setattr("llmproxy.meter.parse_object", counting)
    return sizes


async def bodies(folder: Path, speech: Speech, body: bytes) -> tuple[Any, ...]:
    """The row of an answer, which must have passed as it was."""
    async with ScriptedBackend([raw_answer(200, body, JSON)]) as backend:
        async with running_proxy(folder, {"m": {"url": backend.url}}) as proxy:
            ask = speech.request("m", "hi", stream=False)
            answer = await proxy.send(request_bytes("POST", speech.path, ask))
            assert (answer.status, answer.body == body) == (200, True)
            [row] = proxy.rows("state, coalesce(prompt, embedding), completion")
            return row


@pytest.mark.parametrize(
    ("speech", "answer", "row"),
    [
        (EMBEDDINGS, of_vectors(), ("settled", 3, None)),
        (CHAT, of_text(), ("settled", 3, 2)),
        (CHAT, of_values(200_000), ("settled", 3, 2)),
        (CHAT, of_fields(20), ("settled", 3, 2)),
        (EMBEDDINGS, {**of_text(), "usage": None, **COHERE}, ("settled", 4, None)),
        (CHAT, {**of_text(), "usage": {"prompt_tokens": -1}}, ("disputed", None, None)),
        (CHAT, {**of_text(), "usage": None}, ("disputed", None, None)),
    ],
    ids=["vectors", "text", "many values", "many fields", "Cohere's", "absurd usage", "no usage"],
)
@pytest_twisted.ensureDeferred
async def test_a_large_answer_is_never_read_in_one_go(
    tmp_path: Path, parsed: list[int], speech: Speech, answer: dict[str, Any], row: tuple[Any, ...]
) -> None:
    body = orjson.dumps(answer)
    assert len(body) > forward.LARGE
    assert await bodies(tmp_path, speech, body) == row
    assert len(parsed) == 1
    assert parsed[0] < BLOCK


FORM = (
    b'--X\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
    b'--X\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\na\r\n--X--\r\n'
)


@pytest.mark.parametrize("told", [{"duration": 1.5}, {"usage": {"seconds": 2}}])
@pytest_twisted.ensureDeferred
async def test_the_transcript_of_a_long_audio_is_billed_by_its_duration(
    tmp_path: Path, told: dict[str, Any]
) -> None:
    body = orjson.dumps({"text": "x" * 2 * MIB, **told})
    fields = {"Content-Type": "multipart/form-data; boundary=X"}
    ask = request_bytes("POST", "/v1/audio/transcriptions", FORM, fields=fields)
    async with ScriptedBackend([raw_answer(200, body, JSON)]) as backend:
        async with running_proxy(tmp_path, {"m": {"url": backend.url}}) as proxy:
            assert (await proxy.send(ask)).status == 200
            assert proxy.rows("state, transcription") == [("settled", 2)]


@pytest_twisted.ensureDeferred
async def test_a_large_answer_that_is_no_json_is_disputed(tmp_path: Path) -> None:
    body = orjson.dumps(of_text())[:-1]
    assert await bodies(tmp_path, CHAT, body) == ("disputed", None, None)
