"""A key that is taken away: for how long it goes on working, and what becomes of its streams."""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_twisted
import server_process
from backend import (
    CHUNKED,
    DONE,
    LAST_CHUNK,
    ScriptedBackend,
    Seen,
    Wait,
    chunk,
    head,
    json_answer,
    sse_event,
)
from ports import free_port
from proxy import Answer, Client, add_keys, request_bytes, running_proxy
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol

reactor: Any = _reactor
ROOT = Path(__file__).resolve().parent.parent.parent
CHAT = "/v1/chat/completions"
ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
TEXT = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in ("Hel", "lo")]
#: How many clients share the key, and how many of their last requests are looked at.
CLIENTS, LAST = 8, 200


def revoke(database: Path, key_id: str) -> float:
    """Take a key away; when that was."""
    connection = sqlite3.connect(database, timeout=10)
    with connection:
        assert connection.execute("DELETE FROM api_key WHERE id = ?", (key_id,)).rowcount == 1
    connection.close()
    return time.time()


class Caller:
    """A client that asks again and again; `told`: when each request was sent, and its status."""

    def __init__(self, client: Client, key: str) -> None:
        self._client = client
        self._raw = request_bytes("POST", CHAT, orjson.dumps(ASK), key=key)
        self.told: list[tuple[float, int]] = []
        self.stopped = False

    async def run(self) -> None:
        """Ask until `stopped`."""
        while not self.stopped:
            sent_at = time.time()
            self._client.received = b""
            self._client.send(self._raw)
            await self._client.when(lambda received: Answer(received).whole)
            answer = self._client.answer()
            assert answer.whole, answer.raw
            self.told.append((sent_at, answer.status))
        await self._client.close()


def script(gate: Deferred[None]) -> Any:
    """A stream's end waits for the gate; what is no stream is answered at once."""

    def answer(request: Seen) -> Any:
        if not request.json().get("stream"):
            return [json_answer(200, {"choices": [], "usage": USAGE})]
        begun = head(200, CHUNKED) + b"".join(chunk(sse_event(each)) for each in TEXT)
        last = chunk(sse_event({"choices": [], "usage": USAGE})) + chunk(DONE) + LAST_CHUNK
        return [begun, Wait(gate), last]

    return answer


async def connect(port: int) -> Client:
    endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", port)
    client: Client = await connectProtocol(endpoint, Client())
    return client


@pytest.mark.timeout(60)
@pytest_twisted.ensureDeferred
async def test_under_load_a_revoked_key_is_refused_after_a_second_and_its_stream_is_billed(
    tmp_path: Path,
) -> None:
    port, admin_port, database = free_port(), free_port(), tmp_path / "db.sqlite"
    add_keys(database)
    gate: Deferred[None] = Deferred()
    async with ScriptedBackend(script(gate)) as backend:
        (tmp_path / "config.toml").write_text(
            f'host = "127.0.0.1"\nport = {port}\nworkers = 2\n'
            f'[admin]\nlisten = ["tcp:{admin_port}:interface=127.0.0.1"]\n'
            f'[backends.m]\nurl = "{backend.url}"\ndevice = "gpu"\n'
        )
        with server_process.running(
            [sys.executable, "-m", "llmproxy"],
            admin_port=admin_port,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        ):
            stream = await connect(port)
            stream.send(request_bytes("POST", CHAT, orjson.dumps({**ASK, "stream": True})))
            await stream.when(lambda received: b"lo" in received)
            revoked = [Caller(await connect(port), "token2") for _ in range(CLIENTS)]
            other = Caller(await connect(port), "token3")
            runs = [Deferred.fromCoroutine(each.run()) for each in (*revoked, other)]
            await pause(0.3)
            gone_at = revoke(database, "id-token2")
            await pause(1.1)
            for _ in range(1000):  # 10 s
                if sum(at > gone_at + 1 for each in revoked for at, _ in each.told) >= LAST:
                    break
                await pause(0.01)
            for each in (*revoked, other):
                each.stopped = True
            await DeferredList(runs, fireOnOneErrback=True)
            gate.callback(None)
            await stream.when(lambda received: Answer(received).whole)
            assert stream.answer().body.endswith(DONE)
            await stream.close()
    told = sorted(pair for each in revoked for pair in each.told)
    assert {status for at, status in told if at < gone_at - 0.1} == {200}
    last = [status for at, status in told if at > gone_at + 1]
    assert len(last) >= LAST
    assert set(last) == {401}
    assert {status for _, status in other.told} == {200}
    assert_all_is_billed(database, told, other.told)


def assert_all_is_billed(database: Path, *told: list[tuple[float, int]]) -> None:
    """A row for each answer, and for the stream."""
    served = sum(status == 200 for each in told for _, status in each)
    connection = sqlite3.connect(database)
    rows = connection.execute(
        "SELECT count(*) FROM ledger WHERE state = 'settled' AND prompt = 3 AND completion = 2"
    ).fetchall()
    assert rows == [(served + 1,)]
    assert connection.execute("SELECT count(*) FROM ledger").fetchall() == rows
    connection.close()


def pause(seconds: float) -> Deferred[None]:
    waiting: Deferred[None] = Deferred()
    reactor.callLater(seconds, waiting.callback, None)
    return waiting


@pytest_twisted.ensureDeferred
async def test_without_a_cache_the_very_next_request_is_refused(tmp_path: Path) -> None:
    answer = json_answer(200, {"choices": [], "usage": USAGE})
    async with ScriptedBackend(answer) as backend:
        served = {"m": {"url": backend.url}}
        async with running_proxy(tmp_path, served, auth_fresh=0) as proxy:
            for _ in range(5):
                assert (await proxy.post(CHAT, ASK)).status == 200
            revoke(proxy.database, "id-token2")
            for _ in range(5):
                assert (await proxy.post(CHAT, ASK)).status == 401
            assert (await proxy.post(CHAT, ASK, key="token3")).status == 200
            assert len(backend.requests) == len(proxy.rows()) == 6


@pytest_twisted.ensureDeferred
async def test_the_stream_of_a_key_that_expires_goes_on_to_its_end_and_is_billed(
    tmp_path: Path,
) -> None:
    gate: Deferred[None] = Deferred()
    async with ScriptedBackend(script(gate)) as backend:
        async with running_proxy(tmp_path, {"m": {"url": backend.url}}, auth_fresh=0) as proxy:
            client = await proxy.open()
            client.send(request_bytes("POST", CHAT, orjson.dumps({**ASK, "stream": True})))
            await client.when(lambda received: b"lo" in received)
            connection = sqlite3.connect(proxy.database)
            with connection:
                connection.execute("UPDATE api_key SET expires = '2001-01-01'")
            connection.close()
            assert (await proxy.post(CHAT, ASK)).status == 401
            gate.callback(None)
            await client.when(lambda received: Answer(received).whole)
            assert client.answer().body.endswith(DONE)
            assert proxy.rows() == [("settled", "complete", 3, 2)]
            await client.close()
