"""What users send and what they get is in memory while it passes, and in no temporary file."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_twisted
from backend import DONE, LAST_CHUNK, ScriptedBackend, Wait, chunk, head, json_answer, sse_event
from clients import wav
from proxy import request_bytes, running_proxy
from twisted.internet.defer import Deferred

#: More than fits anywhere on the way: Twisted's own server would put so much into a file.
LONG = b"what somebody says " * 20_000
ANSWER = "an answer"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
BOUNDARY = "b0undary"


def chat(**more: Any) -> tuple[str, bytes, str]:
    """Path, body and its type."""
    messages = [{"role": "user", "content": LONG.decode()}]
    body = orjson.dumps({"model": "m", "messages": messages, **more})
    return "/v1/chat/completions", body, "application/json"


def audio() -> tuple[str, bytes, str]:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="'
    model = f'{head}model"\r\n\r\nm\r\n'.encode()
    file = f'{head}file"; filename="a.wav"\r\n\r\n'.encode() + wav(1) + LONG
    body = model + file + f"\r\n--{BOUNDARY}--\r\n".encode()
    return "/v1/audio/transcriptions", body, f"multipart/form-data; boundary={BOUNDARY}"


def whole(waits: Wait, **answer: Any) -> list[Any]:
    return [waits, json_answer(200, {"text": ANSWER, **answer})]


def stream(waits: Wait) -> list[Any]:
    delta = {"choices": [{"index": 0, "delta": {"content": ANSWER}}]}
    first = head(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"})
    last = sse_event({"choices": [], "usage": USAGE}) + DONE
    return [first + chunk(sse_event(delta)), waits, chunk(last) + LAST_CHUNK]


def files() -> set[str]:
    """The files that this process has open, those without a name too."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISREG(os.fstat(int(descriptor)).st_mode):
                found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:
            pass  # it was the one that lists the folder
    return found


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (chat(), lambda waits: whole(waits, usage=USAGE)),
        (chat(stream=True), stream),
        (audio(), lambda waits: whole(waits, duration=1.0)),
    ],
    ids=["whole", "stream", "audio"],
)
@pytest_twisted.ensureDeferred
async def test_no_file_is_opened_for_what_passes(
    tmp_path: Path, asked: tuple[str, bytes, str], answered: Any
) -> None:
    path, body, content_type = asked
    gate: Deferred[None] = Deferred()
    async with ScriptedBackend(answered(Wait(gate))) as backend:
        async with running_proxy(tmp_path, {"m": {"url": backend.url}}) as proxy:
            before = files()
            client = await proxy.open()
            client.send(request_bytes("POST", path, body, fields={"Content-Type": content_type}))
            request = await backend.request()
            assert files() == before
            gate.callback(None)
            await client.when(lambda received: b"200 OK" in received and client.answer().whole)
            assert files() == before
            await client.close()
            await proxy.settled()
    assert LONG in request.body
    assert ANSWER.encode() in client.received
