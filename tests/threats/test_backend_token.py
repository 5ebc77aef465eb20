"""A backend's token is in our request to that backend, and nowhere else that anybody can look."""

from __future__ import annotations

import base64
import gc
import io
import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_twisted
from backend import (
    CHUNKED,
    DONE,
    LAST_CHUNK,
    Pause,
    Reset,
    ScriptedBackend,
    Seen,
    Stall,
    Wait,
    chunk,
    head,
    json_answer,
    raw_answer,
    sse_event,
)
from load import Load
from ports import free_port
from proxy import ProxyHandle, request_bytes, running_proxy
from rig import Rig
from server_process import get_status
from twisted.internet.defer import Deferred
from twisted.logger import globalLogPublisher

from llmproxy import headers, logs

CHAT, AUDIO = "/v1/chat/completions", "/v1/audio/transcriptions"
TOKEN = "canary-TOKEN.of/the~backend"
BEARER = f"Authorization: Bearer {TOKEN}"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}


def has_token(data: bytes | str) -> bool:
    """The token itself, or in a coding that hides it from nobody."""
    text = data.encode() if isinstance(data, str) else data
    token = TOKEN.encode()
    shapes = (token, base64.b64encode(token).rstrip(b"="), token.hex().encode())
    return any(shape in text for shape in shapes)


#: What a backend does, and the status that the client gets.
DEEDS: dict[str, tuple[list[Any], int]] = {
    "good": ([json_answer(200, {"choices": [], "usage": USAGE})], 200),
    "no usage": ([json_answer(200, {"choices": []})], 200),
    "a 400 that quotes it": ([json_answer(400, {"error": f"not with {BEARER}"})], 502),
    "a 422 that quotes it": ([json_answer(422, {"detail": {"headers": [BEARER]}})], 502),
    "a 429 that quotes it": ([json_answer(429, {"error": TOKEN}, {"Retry-After": "1"})], 502),
    "a 401": ([json_answer(401, {"error": f"wrong token {TOKEN}"})], 502),
    "a 403": ([raw_answer(403, TOKEN.encode())], 502),
    "a 500": ([raw_answer(500, f"Traceback: {BEARER}".encode())], 502),
    "a long context": ([raw_answer(500, f"maximum context {TOKEN}".encode())], 400),
    "a redirect": ([raw_answer(302, b"", {"Location": f"http://127.0.0.1:1/?{TOKEN}"})], 502),
    "a page": ([raw_answer(200, BEARER.encode(), {"Content-Type": "text/html"})], 502),
    "no HTTP": ([f"{BEARER}\r\n\r\n".encode(), Pause(0)], 502),
    "a broken header": ([f"HTTP/1.1 200 {TOKEN}\r\n{TOKEN}\r\n\r\n".encode(), Pause(0)], 502),
    "a field of its own": ([json_answer(200, {"usage": USAGE}, {"X-Echo": BEARER})], 200),
    "a reset": ([Reset()], 502),
}


def script(seen: Seen) -> list[Any]:
    if seen.target == AUDIO:
        return [json_answer(200, {"text": "hello", "duration": 1.5})]
    if seen.json()["model"] == "silent":
        return [Stall()]
    return DEEDS[seen.json()["messages"][0]["content"]][0]


def ask(text: str) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}]}


def backends(url: str) -> dict[str, dict[str, Any]]:
    soon = {"token": TOKEN, "timeout": 0.1}
    return {
        "m": {"url": url, "token": TOKEN},
        "gone": {"url": f"http://127.0.0.1:{free_port()}", "token": TOKEN},
        "silent": {"url": url, **soon},
        "tls": {"url": url.replace("http:", "https:"), **soon},
    }


@pytest.fixture
def written() -> Iterator[Callable[[], str]]:
    """All that the log would be, as text and as JSON, with what the libraries say."""
    streams = [io.StringIO(), io.StringIO()]
    observers = [
        logs.observer(stream, form, "DEBUG")
        for stream, form in zip(streams, ("text", "json"), strict=True)
    ]
    for each in observers:
        globalLogPublisher.addObserver(each)
    yield lambda: "".join(stream.getvalue() for stream in streams)
    for each in observers:
        globalLogPublisher.removeObserver(each)


async def admin_pages(proxy: ProxyHandle) -> bytes:
    pages = ("/metrics", "/healthz", "/readyz", "/")
    return b"".join([(await proxy.get(page, port=proxy.admin_port)).raw for page in pages])


@pytest_twisted.ensureDeferred
async def test_it_is_in_no_answer_log_metric_or_file(
    tmp_path: Path, written: Callable[[], str], logged: list[str]
) -> None:
    async with ScriptedBackend(script) as backend:
        async with running_proxy(tmp_path, backends(backend.url), log_level="DEBUG") as proxy:
            for text, (_, status) in DEEDS.items():
                answer = await proxy.post(CHAT, ask(text))
                assert answer.status == status, text
                assert not has_token(answer.raw), text
            for model, status in (("gone", 502), ("tls", 502), ("silent", 504), ("none", 404)):
                answer = await proxy.post(CHAT, {**ask("good"), "model": model})
                assert answer.status == status
                assert not has_token(answer.raw)
            assert not has_token((await proxy.get("/v1/models")).raw)
            assert not has_token(await admin_pages(proxy))
            rows = [raw for (raw,) in proxy.rows("raw")]
            assert len(rows) == len(DEEDS) + 3
        assert all(seen.header("authorization") == f"Bearer {TOKEN}" for seen in backend.requests)
    assert len(written().splitlines()) > 2 * len(DEEDS)
    assert not has_token(written())
    assert not any(map(has_token, logged))
    assert not any(has_token(path.read_bytes()) for path in tmp_path.iterdir() if path.is_file())


@pytest.mark.parametrize(
    ("module", "name", "level"),
    [(headers, "for_client", "forward"), (headers, "for_backend", "exchange")],
    ids=["reading the answer", "writing the request"],
)
@pytest_twisted.ensureDeferred
async def test_it_is_in_no_traceback(
    tmp_path: Path,
    written: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    flush_logged_errors: Any,
    module: Any,
    name: str,
    level: str,
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError(f"a fault of ours, given {len(args)} things")

    async with ScriptedBackend(script) as backend:
        async with running_proxy(tmp_path, backends(backend.url), log_level="DEBUG") as proxy:
            monkeypatch.setattr(module, name, broken)
            answer = await proxy.post(CHAT, ask("good"))
            assert answer.status == 500
            assert answer.json()["error"]["code"] == "internal_error"
            assert not has_token(answer.raw)
    assert "a fault of ours" in written()
    assert "Traceback" in written()
    assert level in written()
    assert not has_token(written())
    [failure] = flush_logged_errors(RuntimeError)
    assert not has_token(failure.getTraceback())
    assert not has_token(failure.getTraceback(detail="verbose"))


def reprs() -> dict[str, list[str]]:
    """What each object of ours that is alive says of itself, by its class."""
    found: dict[str, list[str]] = {}
    for each in gc.get_objects():
        kind = type(each)
        if str(getattr(kind, "__module__", "")).startswith("llmproxy"):
            found.setdefault(kind.__name__, []).append(f"{each!r} {each}")
    return found


@pytest_twisted.ensureDeferred
async def test_it_is_in_no_repr_of_an_object_that_is_alive(tmp_path: Path) -> None:
    gate: Deferred[None] = Deferred()
    text = sse_event({"choices": [{"index": 0, "delta": {"content": "x"}}]})
    end = chunk(sse_event({"choices": [], "usage": USAGE})) + chunk(DONE) + LAST_CHUNK
    streams: list[Any] = [head(200, CHUNKED), chunk(text), Wait(gate), end]
    async with ScriptedBackend([json_answer(200, {"usage": USAGE})], streams) as backend:
        async with running_proxy(tmp_path, backends(backend.url)) as proxy:
            await proxy.post(CHAT, ask("good"))
            client = await proxy.open()
            body = orjson.dumps({**ask("good"), "stream": True})
            client.send(request_bytes("POST", CHAT, body))
            await client.when(lambda received: b"data:" in received)
            told = reprs()
            gate.callback(None)
            await client.when(lambda received: received.endswith(LAST_CHUNK))
            await client.close()
    alive = "Backend Config Order Lines Route Upstream BackendAgent Connection Exchange Forward"
    assert set(alive.split()) <= told.keys()
    assert not [name for name, texts in told.items() if any(map(has_token, texts))]


# --- a process of its own -----------------------------------------------------------------------


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def told_of(pid: int) -> bytes:
    """What anybody on the machine, or whoever inspects the container, is told of a process."""
    return b"".join(
        Path(f"/proc/{pid}/{name}").read_bytes()
        for name in ("cmdline", "environ", "comm", "status")
    )


def post(port: int, model: str) -> bytes:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{CHAT}",
        data=orjson.dumps({**ask("x 3 2 0"), "model": model}),
        headers={"Authorization": f"Bearer {Load.key(0)}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return bytes(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.read()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def page(rig: Rig, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{rig.admin_port}{path}", timeout=5) as response:
        return bytes(response.read())


def test_it_is_in_nothing_that_a_process_shows(tmp_path: Path) -> None:
    rig = Rig(tmp_path, clients=1, command=["-m", "llmproxy"], workers=2)
    token_file = tmp_path / "token"
    token_file.write_text(f"{TOKEN}\n")
    with rig.backend() as url:
        urls = (url, url, f"http://127.0.0.1:{free_port()}")
        text = rig.configuration(*urls, models=("m", "of_file", "gone"))
        text = text.replace('device = "gpu"', f'device = "gpu"\ntoken = {json.dumps(TOKEN)}')
        of_file = f'[backends.of_file]\nurl = "{url}"\ndevice = "gpu"\n'
        text = 'log_level = "DEBUG"\nlog_format = "json"\n' + text.replace(
            f"{of_file}token = {json.dumps(TOKEN)}\n", f'{of_file}token_file = "{token_file}"\n'
        )
        assert "token_file" in text
        rig.config.write_text(text)
        process = rig.start()
        try:
            health = f"http://127.0.0.1:{rig.admin_port}/healthz"
            wait_for(lambda: get_status(health) == 200, rig.output())
            seen = b"".join(post(rig.port, model) for model in ("m", "of_file", "gone"))
            assert seen.count(b'"completion_tokens":2') == 2
            for broken in (f"token = [{TOKEN!r}]", f'token = "{TOKEN}', f'tokem = "{TOKEN}"'):
                before = rig.output().count("not reloaded")
                rig.config.write_text(f"{text}{broken}\n")
                process.send_signal(signal.SIGHUP)
                wait_for(lambda b=before: rig.output().count("not reloaded") > b, broken)  # type: ignore[misc]
            pids = [process.pid, *children(process.pid)]
            assert len(pids) == 3
            seen += b"".join(map(told_of, pids)) + page(rig, "/metrics") + page(rig, "/readyz")
            process.terminate()
            assert process.wait(15) == 0
        finally:
            process.kill()
            process.wait()
    assert not has_token(seen)
    assert rig.output().count("\n") > 10
    assert not has_token(rig.output())
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and has_token(path.read_bytes())]
    assert sorted(kept) == sorted([rig.config, token_file])
