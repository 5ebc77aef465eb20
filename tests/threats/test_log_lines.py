"""Who writes into our log through a request gets one line, and can't make up another's fields."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import pytest_twisted
from backend import ScriptedBackend, json_answer, raw_answer
from proxy import request_bytes, running_proxy
from twisted.logger import globalLogPublisher

from llmproxy import logs

CHAT = "/v1/chat/completions"
#: Each of these ends a line, or moves the cursor, for somebody.
ENDS = (
    "\r\n",
    "\n",
    "\r",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x85",
    "\u2028",
    "\u2029",
    "\x00",
    "\x1b[2K\x1b[1A",
)
FORGED = "2026-11-23T15:00:00.123Z INFO llmproxy.exchange  complete forged key=other status=200"
LINE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]{12}Z (DEBUG|INFO|WARNING|ERROR) [\w.\[\]]+  \S.*")


class Log:
    """What the proxy logs, at DEBUG."""

    def __init__(self, log_format: str) -> None:
        self.format = log_format
        self._stream = io.StringIO()
        self._observer = logs.observer(self._stream, log_format, "DEBUG")

    def __enter__(self) -> Log:
        globalLogPublisher.addObserver(self._observer)
        return self

    def __exit__(self, *exc_info: object) -> None:
        globalLogPublisher.removeObserver(self._observer)

    def lines(self) -> list[str]:
        """Its lines: they must be the same, whatever one takes for the end of a line."""
        text = self._stream.getvalue()
        assert text.splitlines() == text.split("\n")[:-1]
        return text.splitlines()


@pytest.fixture(params=["text", "json"])
def log(request: pytest.FixtureRequest) -> Iterator[Log]:
    with Log(request.param) as log:
        yield log


def requests(end: str) -> Iterator[bytes]:
    """A forged line in each place that a client can write to."""
    forged = f"m{end}{FORGED}"
    raw = forged.encode()
    quoted = "".join(f"%{byte:02x}" for byte in raw)
    asked = {"model": "m", "messages": []}
    whole = request_bytes("POST", CHAT, orjson.dumps(asked), fields={"X-Put": "here"})
    yield request_bytes("POST", CHAT, json.dumps({**asked, "model": forged}).encode())
    yield request_bytes("POST", CHAT, json.dumps({**asked, forged: 1}).encode())
    yield request_bytes("POST", f"/v1/{quoted}")
    yield request_bytes("POST", f"{CHAT}?{quoted}", orjson.dumps(asked))
    yield request_bytes("GET", f"/v1/models/{quoted}")
    yield request_bytes("POST", "/v1/here").replace(b"here", raw.replace(b" ", b"+"))
    for name in (b"X-Put", b"User-Agent", b"X-Request-ID", b"Forwarded", b"Host", b"Accept"):
        yield whole.replace(b"X-Put: here", name + b": " + raw)
    yield whole.replace(b"POST", raw.replace(b" ", b"+"), 1)
    yield whole.replace(b"Bearer token2", b"Bearer " + raw)


@pytest_twisted.ensureDeferred
async def test_a_client_can_not_end_a_line_of_the_log(tmp_path: Path, log: Log) -> None:
    refusal = json_answer(400, {"error": {"message": "\n".join([FORGED, *ENDS])}})
    sent = 0
    async with ScriptedBackend([refusal]) as backend:
        async with running_proxy(tmp_path, {"m": {"url": backend.url}}) as proxy:
            for end in ENDS:
                for data in requests(end):
                    answer = await proxy.send(data)
                    assert 400 <= answer.status < 500
                    sent += 1
    check(log, sent)


@pytest.mark.parametrize("end", ENDS)
@pytest_twisted.ensureDeferred
async def test_a_backend_can_not_either(tmp_path: Path, log: Log, end: str) -> None:
    forged = f"{end}{FORGED}"
    body = json.dumps({"error": {"message": forged, "type": forged, "code": forged}}).encode()
    scripts = [
        [raw_answer(status, body, {"Content-Type": kind})]
        for status in (200, 301, 400, 401, 429, 500)
        for kind in ("application/json", "text/html", f"text/{FORGED}")
    ]
    scripts.append([raw_answer(200, forged.encode(), {"Content-Type": "text/event-stream"})])
    scripts.append([b"HTTP/1.1 200 " + forged.encode() + b"\r\n\r\n"])
    async with ScriptedBackend(*scripts) as backend:
        async with running_proxy(tmp_path, {"m": {"url": backend.url}}) as proxy:
            for _ in scripts:
                await proxy.post(CHAT, {"model": "m", "messages": []})
            await proxy.settled(len(scripts))
    check(log, len(scripts))


def check(log: Log, requests: int) -> None:
    """At most one line tells of each request, and no line is more than it seems."""
    lines = log.lines()
    assert all(line.isprintable() for line in lines)
    if log.format == "json":
        told = [str(json.loads(line)["message"]) for line in lines]
    else:
        assert [line for line in lines if not LINE.fullmatch(line)] == []
        told = [line.split("  ", 1)[1] for line in lines]
    about = [
        line for line in told if re.match(r"(complete|refused|backend_failed|truncated) ", line)
    ]
    assert 0 < len(about) <= requests
    assert not [line for line in told if line.startswith(("complete forged", "2026-11-23"))]


@pytest_twisted.ensureDeferred
async def test_a_model_s_name_is_one_field(tmp_path: Path, log: Log) -> None:
    async with running_proxy(tmp_path, {}) as proxy:
        for name in ("m status=200 code=None", 'm" status=200 x="', "a b", "plain"):
            await proxy.post(CHAT, {"model": name, "messages": []})
    if log.format == "json":
        refused = [each for each in map(json.loads, log.lines()) if "code" in each]
        assert [each["status"] for each in refused] == [404] * 4
        return
    refused = [line for line in log.lines() if "  refused " in line]
    assert len(refused) == 4
    for line in refused:
        words = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', line)
        assert [name for name, _ in words] == ["key", "model", "path", "status", "code", "ms"]
        assert dict(words)["status"] == "404"
    assert "model=plain " in refused[-1]
