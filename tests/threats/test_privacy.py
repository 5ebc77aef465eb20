"""What users say, and the keys they say it with, are nowhere but where they belong.

A real process serves every kind of ending, with its log at DEBUG, and is killed. Then everything is
searched that it has left on the disk, has open, and has said.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from load import Load, until
from rig import Rig
from speech import CHAT

PROMPT, ANSWER, AUDIO, FILENAME, FIELD = (
    f"canary-{word}-7d1f" for word in ("prompt", "answer", "audio", "filename", "field")
)
WRONG, QUERY, TOKEN = (f"canary-{word}-7d1f" for word in ("wrong-key", "query-key", "token"))
#: What a user or an operator would not want to find anywhere; our own prefix finds new ones too.
CANARIES = [b"canary-", Load.key(0).encode()]
#: Models, and how the backend behaves that serves them.
ENDINGS = (
    *("whole", "stream", "cut_stream", "cut_body", "silent", "error_event", "absurd", "html"),
    *("refusal", "server_error", "redirect"),
)
STREAMS = ("stream", "cut_stream", "silent", "error_event")
CHAT_PATH, AUDIO_PATH = CHAT.path, "/v1/audio/transcriptions"
BOUNDARY = "b0undary"


# -- the backend ---------------------------------------------------------------------------------


def reply(model: str) -> Iterator[bytes]:
    """What the backend sends; it ends with a closed connection. All of it speaks of the prompt."""
    said = {"content": ANSWER, "heard": PROMPT}
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    chunk = _event({"choices": [{"index": 0, "delta": {"content": ANSWER}}]})
    whole = orjson.dumps({"choices": [{"message": said}], "usage": usage})
    match model:
        case "whole":
            yield _head(200, "application/json", len(whole)) + whole
        case "stream":
            yield _head(200, "text/event-stream") + chunk + _event({"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        case "cut_stream":
            yield _head(200, "text/event-stream") + chunk
        case "cut_body":
            yield _head(200, "application/json", len(whole) + 9) + whole
        case "silent":
            yield _head(200, "text/event-stream") + chunk
            yield b""
        case "error_event":
            yield _head(200, "text/event-stream") + chunk + _event({"error": {"message": PROMPT}})
        case "absurd":
            odd = orjson.dumps({"choices": [said], "usage": {"prompt_tokens": -1}})
            yield _head(200, "application/json", len(odd)) + odd
        case "html":
            yield _head(200, "text/html") + f"<html>{PROMPT}{TOKEN}</html>".encode()
        case "refusal" | "server_error" | "redirect":
            status = {"refusal": 400, "server_error": 500, "redirect": 307}[model]
            body = orjson.dumps({"error": {"message": f"can't do {PROMPT} with {TOKEN}"}})
            yield _head(status, "application/json", len(body)) + body
        case _:
            body = orjson.dumps({"text": ANSWER, "duration": 2.5, "language": "en"})
            yield _head(200, "application/json", len(body)) + body


def _event(data: object) -> bytes:
    return b"data: %s\n\n" % orjson.dumps(data)


def _head(status: int, kind: str, length: int | None = None) -> bytes:
    framing = "Connection: close" if length is None else f"Content-Length: {length}"
    place = f"http://elsewhere/{PROMPT}"
    lines = [f"HTTP/1.1 {status} {ANSWER}", f"Content-Type: {kind}", f"Location: {place}", framing]
    return "\r\n".join([*lines, "", ""]).encode()


@asynccontextmanager
async def backend(heard: list[bytes]) -> AsyncIterator[str]:
    """Its URL."""

    async def serve(link: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            head = await link.readuntil(b"\r\n\r\n")
            data = head
            if not head.startswith(b"GET /health"):
                while not data.endswith((b"}", b"\r\n0\r\n\r\n", b"--\r\n")):
                    data += await link.read(65536) or _raise(OSError())
                heard.append(data)
            named = [name for name in ENDINGS if f'"model":"{name}"'.encode() in data]
            for piece in reply(named[0] if named else "audio"):
                out.write(piece)
                if not piece:
                    await link.read()
        out.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def _raise(error: Exception) -> bytes:
    raise error


# -- the clients ---------------------------------------------------------------------------------


def request(path: str, body: bytes, key: str | None, *fields: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: p", "Connection: close", *fields]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    if path != AUDIO_PATH:
        lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def ask(model: str, **more: Any) -> bytes:
    turns = [{"role": "user", "content": PROMPT}]
    return orjson.dumps({"model": model, "messages": turns, "user": PROMPT, **more})


def form(boundary: str = BOUNDARY) -> bytes:
    parts = {
        'name="model"': "audio",
        'name="prompt"': PROMPT,
        f'name="{FIELD}"': FIELD,
        f'name="file"; filename="{FILENAME}.wav"': AUDIO * 20_000,  # what a temporary file is for
    }
    begin = f"--{boundary}\r\nContent-Disposition: form-data; "
    body = "".join(f"{begin}{name}\r\n\r\n{value}\r\n" for name, value in parts.items())
    return f"{body}--{boundary}--\r\n".encode()


def requests() -> Iterator[bytes]:
    """Every kind of request, good and bad."""
    good = Load.key(0)
    for model in ENDINGS:
        yield request(CHAT_PATH, ask(model, stream=model in STREAMS), good)
    yield request(CHAT_PATH, ask("whole"), WRONG)
    yield request(CHAT_PATH, ask("whole"), None, f"x-api-key: {WRONG}")
    yield request(f"{CHAT_PATH}?api_key={QUERY}", ask("whole"), good, f"User-Agent: {PROMPT}")
    yield request(f"{CHAT_PATH}?key={QUERY}", ask("whole"), None, f"X-Request-ID: {PROMPT}")
    for broken in (
        ask("whole")[:-1],
        ask("whole") + b"}",
        ask("none"),
        b'{"%s":1' % PROMPT.encode(),
    ):
        yield request(CHAT_PATH, broken, good)
    yield request(CHAT_PATH, ask("whole", stream=PROMPT, stream_options={PROMPT: 1}), good)
    yield request(CHAT_PATH, b'{"%b":1,"%b":2,"model":"whole"}' % ((PROMPT.encode(),) * 2), good)
    kind = f"Content-Type: multipart/form-data; boundary={BOUNDARY}"
    for body in (form(), form()[:-40], form("another")):
        yield request(AUDIO_PATH, body, good, kind)


async def send(port: int, data: bytes, *, leaves: bool) -> bytes:
    """What came back, up to the connection's end; or, of who leaves, up to the first bytes."""
    link, out = await asyncio.open_connection("127.0.0.1", port)
    try:
        out.write(data)
        if leaves:
            return await link.read(10)
        return await asyncio.wait_for(link.read(-1), 10)
    except OSError:
        return b""
    finally:
        out.transport.abort()


# -- where it is looked --------------------------------------------------------------------------


def left_open(pid: int) -> Iterator[tuple[str, bytes]]:
    """The files that the process has open, those too that are deleted."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if link.is_file():
                yield f"{link} -> {os.readlink(link)}", link.read_bytes()


def on_disk(folders: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                yield str(path), path.read_bytes()


def assert_clean(found: Iterable[tuple[str, bytes]]) -> int:
    """No canary is in it; how many places were searched."""
    places = 0
    for name, data in found:
        places += 1
        for canary in CANARIES:
            at = data.find(canary)
            assert at < 0, f"{name}: {data[max(0, at - 200) : at + 200]!r}"
    return places


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as page:
        return bytes(page.read())


@pytest.mark.timeout(60)
def test_no_prompt_answer_or_key_is_left_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary, secrets, place = (tmp_path / name for name in ("tmp", "secrets", "place"))
    for folder in (temporary, secrets, place):
        folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    (secrets / "token").write_text(TOKEN)
    rig = Rig(place, clients=1, command=["-m", "llmproxy"])
    heard: list[bytes] = []

    async def story() -> None:
        async with backend(heard) as url:
            models = (*ENDINGS, "audio")
            text = rig.configuration(*[url] * len(models), models=models)
            more = f'timeout = 0.5\ntoken_file = "{secrets / "token"}"\n'
            text = text.replace('device = "gpu"\n', f'device = "gpu"\n{more}')
            # JSON has all fields of an event, and not only those of its text.
            rig.config.write_text(f'log_level = "DEBUG"\nlog_format = "json"\n{text}')
            async with rig.running() as process:
                await _talk(rig)
                await until(lambda: not rig.open_rows(), 10, "the last settlement")
                _look(rig, process, temporary)
        # Killed in the middle of its life: all that a crash leaves is there.
        assert_clean(on_disk([place, temporary]))

    asyncio.run(story())
    assert any(PROMPT.encode() in each for each in heard)
    assert any(AUDIO.encode() in each and FILENAME.encode() in each for each in heard)
    _is_a_run_of_everything(rig)


async def _talk(rig: Rig) -> None:
    for data in requests():
        await send(rig.port, data, leaves=False)
    for model in STREAMS:
        data = request(CHAT_PATH, ask(model, stream=True), Load.key(0))
        await send(rig.port, data, leaves=True)


def _look(rig: Rig, process: subprocess.Popen[bytes], temporary: Path) -> None:
    assert assert_clean(left_open(process.pid)) >= 4  # the log, the database and what goes with it
    assert assert_clean(on_disk([rig.folder, temporary])) >= 4
    assert list(temporary.iterdir()) == []  # so it may be full
    admin = f"http://127.0.0.1:{rig.admin_port}"
    assert_clean((page, fetch(admin + page)) for page in ("/metrics", "/readyz", "/healthz"))
    proc = Path(f"/proc/{process.pid}")
    assert_clean((name, (proc / name).read_bytes()) for name in ("cmdline", "environ", "comm"))


def _is_a_run_of_everything(rig: Rig) -> None:
    """The search means something: the endings were there, and the database knows the keys' hash."""
    outcomes = {outcome for (outcome,) in rig.query("SELECT outcome FROM ledger")}
    assert outcomes >= {"complete", "truncated", "stalled", "refused", "backend_failed"}
    assert {"settled", "disputed"} <= {s for (s,) in rig.query("SELECT state FROM ledger")}
    digest = hashlib.sha256(Load.key(0).encode()).hexdigest()
    assert rig.query("SELECT secret FROM api_key") == [(digest,)]
    assert rig.output().count("404") >= 1
