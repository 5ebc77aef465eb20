"""`stream` and its options: no spelling of them hides the usage from the bill.

The backend is always asked for it in a stream; the client gets it only if it asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
import pytest_twisted
from backend import DONE, ScriptedBackend, json_answer, sse_answer, sse_event
from proxy import running_proxy

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
HEAD = b'{"model":"chat","messages":[{"role":"user","content":"hi"}],"prompt":"hi","input":"hi"'
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
TEXT: list[Any] = [
    {"choices": [{"index": 0, "delta": {"content": word}, "text": word}]} for word in ("Hel", "lo")
]
LAST: dict[str, Any] = {"choices": [], "usage": USAGE}
STREAM = [*TEXT, LAST, DONE]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
@pytest_twisted.ensureDeferred
async def test_stream_is_true_or_false(tmp_path: Path, path: str) -> None:
    async with ScriptedBackend() as backend:
        async with running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy:
            for value in (b'"true"', b'"false"', b"1", b"0", b"null", b"[]", b"{}", b"1.0", b'""'):
                answer = await proxy.post(path, HEAD + b',"stream":' + value + b"}")
                error = answer.json()["error"]
                assert answer.status == 400, value
                assert error["message"] == "'stream' must be true or false."
            for more in (b',"Stream":true}', b',"stream":false,"stream":true}'):
                assert (await proxy.post(path, HEAD + more)).status == 400
            assert backend.requests == []
            assert proxy.rows() == []


class Options(NamedTuple):
    """What the client sends after `"stream":true`, what of it the backend gets, and whether the
    client is shown the usage."""

    sent: bytes
    got: dict[str, Any]
    shown: bool = False


FORCED = {"include_usage": True}
ASKED = Options(b',"stream_options":{"include_usage":true}', FORCED, True)
OPTIONS = [
    Options(b"", FORCED),
    Options(b',"stream_options":null', FORCED),
    Options(b',"stream_options":{}', FORCED),
    Options(b',"stream_options":{"include_usage":false}', FORCED),
    Options(b',"stream_options":{"include_usage":null}', FORCED),
    Options(b',"stream_options":{"include_usage":0}', FORCED),
    Options(b',"stream_options":{"include_usage":"true"}', FORCED),
    Options(b',"stream_options":{"x":1.0,"include_usage":false}', {"x": 1.0, **FORCED}),
    Options(
        b',"stream_options":{"include_obfuscation":false}', {**FORCED, "include_obfuscation": False}
    ),
    Options(b',"stream_options":{"continuous_usage_stats":true}', FORCED),
    Options(b',"stream_\\u006fptions":{"include_us\\u0061ge":false}', FORCED),
    ASKED,
    Options(b',"stream_options":{"include_usage":true,"x":[]}', {**FORCED, "x": []}, True),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest_twisted.ensureDeferred
async def test_usage_is_always_asked_for_and_shown_to_who_asked(tmp_path: Path, path: str) -> None:
    async with ScriptedBackend([sse_answer(STREAM)]) as backend:
        async with running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy:
            for sent, got, shown in OPTIONS:
                answer = await proxy.post(path, HEAD + b',"stream":true' + sent + b"}")
                assert answer.whole
                events = STREAM if shown else [*TEXT, DONE]
                assert answer.body == b"".join(map(sse_event, events)), sent
                seen = orjson.loads(backend.requests[-1].body)
                assert seen["stream_options"] == got, sent
                assert backend.requests[-1].body.startswith(HEAD + b',"stream":true,"stream_')
            assert proxy.rows() == [("settled", "complete", 3, 2)] * len(OPTIONS)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest_twisted.ensureDeferred
async def test_running_counts_are_shown_to_who_asked_for_them(tmp_path: Path, path: str) -> None:
    running = [
        {**event, "usage": {**USAGE, "completion_tokens": n}} for n, event in enumerate(TEXT)
    ]
    asked = b',"stream_options":{"include_usage":true,"continuous_usage_stats":true}'
    async with ScriptedBackend([sse_answer([*running, LAST, DONE])]) as backend:
        named = {"chat": {"url": backend.url, "usage": "continuous"}}
        async with running_proxy(tmp_path, named) as proxy:
            for sent, events in (
                (b"", [*TEXT, DONE]),
                (asked, [*running, LAST, DONE]),
            ):
                answer = await proxy.post(path, HEAD + b',"stream":true' + sent + b"}")
                assert answer.body == b"".join(map(sse_event, events))
                options = orjson.loads(backend.requests[-1].body)["stream_options"]
                assert options == {"include_usage": True, "continuous_usage_stats": True}
            assert proxy.rows() == [("settled", "complete", 3, 2)] * 2


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest_twisted.ensureDeferred
async def test_options_that_can_be_read_in_two_ways_are_refused(tmp_path: Path, path: str) -> None:
    async with ScriptedBackend() as backend:
        async with running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy:
            for options in (
                *(b"[]", b"true", b'"include_usage"', b"0"),
                b'{"include_usage":true,"include_usage":false}',
                b'{"include_usage":true,"include_us\\u0061ge":false}',
                b'{"Include_Usage":false}',
            ):
                body = HEAD + b',"stream":true,"stream_options":' + options + b"}"
                answer = await proxy.post(path, body)
                assert answer.status == 400, options
                assert answer.json()["error"]["param"].startswith("stream_options")
            twice = b',"stream":true,"stream_options":{},"stream_options":{"include_usage":false}}'
            assert (await proxy.post(path, HEAD + twice)).status == 400
            assert backend.requests == []


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest_twisted.ensureDeferred
async def test_a_whole_answer_has_its_usage_whatever_the_options(tmp_path: Path, path: str) -> None:
    whole = {"choices": [], "usage": USAGE}
    async with ScriptedBackend([json_answer(200, whole)]) as backend:
        async with running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy:
            for stream in (b"", b',"stream":false'):
                for options in OPTIONS:
                    body = HEAD + stream + options.sent + b"}"
                    answer = await proxy.post(path, body)
                    assert answer.json() == whole
                    assert backend.requests[-1].body == body  # it is for the backend to judge
            rows = 2 * len(OPTIONS)
            assert proxy.rows() == [("settled", "complete", 3, 2)] * rows
