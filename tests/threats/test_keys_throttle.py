"""Who tries key after key: slowed down by his address, while his neighbours' keys go on working."""

from __future__ import annotations

import gc
import hashlib
import secrets
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_twisted
from backend import ScriptedBackend, json_answer
from callers import ask_all
from figures import report
from proxy import Answer, Client, ProxyHandle, request_bytes, running_proxy
from tally import LONG
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, fail
from twisted.internet.endpoints import (
    TCP4ClientEndpoint,
    UNIXClientEndpoint,
    connectProtocol,
    serverFromString,
)

from llmproxy import auth
from llmproxy.errors import StorageError
from llmproxy.model import Account
from llmproxy.storage.memory import MemoryAccounts

reactor: Any = _reactor
CHAT, MESSAGES, MODELS = "/v1/chat/completions", "/v1/messages", "/v1/models"
ASK = orjson.dumps({"model": "chat", "messages": [{"role": "user", "content": "hi"}]})
DONE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}
FLOOD = 100_000 if LONG else 2_000


class Accounts(MemoryAccounts):
    """Keys that end never. `asked`: how often. `down`: it fails instead."""

    def __init__(self, *keys: str) -> None:
        hashes = {key: hashlib.sha256(key.encode()).hexdigest() for key in keys}
        super().__init__({hashes[key]: Account(f"id-{key}") for key in keys})
        self.asked = 0
        self.down = False

    def find(self, secret_hash: str, now: datetime) -> Deferred[Account | None]:
        self.asked += 1
        return fail(StorageError("down")) if self.down else super().find(secret_hash, now)


def accounts_of(proxy: ProxyHandle) -> Accounts:
    """Keys in memory, in the place of the proxy's own."""
    accounts = Accounts("token2", "token3")
    assert proxy.proxy._services is not None
    proxy.proxy._services.authenticator._accounts = accounts
    return accounts


async def post_from(proxy: ProxyHandle, address: str, key: str) -> Answer:
    """A request that comes from another address of this machine."""
    there = TCP4ClientEndpoint(reactor, "127.0.0.1", proxy.port, bindAddress=(address, 0))
    return await post_on(await connectProtocol(there, Client()), key)


async def post_on(client: Client, key: str) -> Answer:
    client.send(request_bytes("POST", CHAT, ASK, key=key))
    await client.when(lambda received: Answer(received).whole)
    await client.close()
    return client.answer()


@pytest_twisted.ensureDeferred
async def test_who_tries_too_many_keys_waits_and_those_beside_him_do_not(tmp_path: Path) -> None:
    async with ScriptedBackend(json_answer(200, DONE)) as backend:
        served = {"chat": {"url": backend.url}}
        settings = {"auth_fresh": 0, "failed_keys_per_minute": 5}
        async with running_proxy(tmp_path, served, **settings) as proxy:
            accounts = accounts_of(proxy)
            assert (await proxy.post(CHAT, ASK)).status == 200
            for key in ("a key with spaces", "x" * 513, None, *["odd\xe9"] * 20):
                assert (await proxy.post(CHAT, ASK, key=key)).status == 401
            for number in range(5):
                assert (await proxy.post(CHAT, ASK, key=f"guess-{number}")).status == 401
            assert accounts.asked == 6
            for path in (CHAT, MESSAGES):
                answer = await proxy.post(path, ASK, key="guess-5")
                assert answer.status == 429
                assert 1 <= int(answer.fields["retry-after"]) <= 12
                assert "www-authenticate" not in answer.fields
                assert answer.json()["error"]["type"] == "rate_limit_error"
            assert (await proxy.post(CHAT, ASK, key="guess-6")).json()["error"]["code"] == (
                "rate_limit_exceeded"
            )
            assert (await proxy.get(MODELS, key="guess-7")).status == 429
            assert accounts.asked == 6  # nobody has looked for those
            assert (await proxy.post(CHAT, ASK)).status == 200  # it was valid before
            assert (await proxy.post(CHAT, ASK, key="token3")).status == 429  # nobody knows yet
            assert (await post_from(proxy, "127.0.0.2", "token3")).status == 200
            assert (await post_from(proxy, "127.0.0.2", "guess-8")).status == 401
            assert (await proxy.post(CHAT, ASK, key="token3")).status == 200  # now it is known
            assert (await proxy.post(CHAT, ASK, key=None)).status == 401
            assert len(backend.requests) == len(proxy.rows()) == 4
            metrics = (await proxy.get("/metrics", port=proxy.admin_port)).body
            line = b'llmproxy_limited_requests_total{limit="failed_keys_per_minute"} 5.0'
            assert line in metrics


@pytest_twisted.ensureDeferred
async def test_one_wrong_key_again_and_again_is_one_look_up_a_second(tmp_path: Path) -> None:
    async with running_proxy(tmp_path, {}, failed_keys_per_minute=10) as proxy:
        accounts = accounts_of(proxy)
        told = await ask_all(proxy, [request_bytes("POST", CHAT, ASK, key="old")] * 50)
        assert told[0].statuses == [401] * 50
        assert accounts.asked < 10  # once, but for seconds that passed meanwhile


@pytest_twisted.ensureDeferred
async def test_a_store_that_is_down_is_nobody_s_failure(tmp_path: Path) -> None:
    settings = {"auth_fresh": 0, "failed_keys_per_minute": 1}
    async with running_proxy(tmp_path, {}, **settings) as proxy:
        accounts = accounts_of(proxy)
        accounts.down = True
        for number in range(20):
            assert (await proxy.post(CHAT, ASK, key=f"guess-{number}")).status == 503
        accounts.down = False
        assert (await proxy.post(CHAT, ASK, key="guess")).status == 401
        assert (await proxy.post(CHAT, ASK, key="guess")).status == 429


@pytest.mark.parametrize(
    ("first", "same", "other"),
    [
        ("TCP4 192.0.2.7", "TCP4 192.0.2.7", "TCP4 192.0.2.8"),
        ("TCP6 2001:db8::1", "TCP6 2001:db8::ffff:2", "TCP6 2001:db8:0:1::1"),
    ],
    ids=["IPv4", "IPv6"],
)
@pytest_twisted.ensureDeferred
async def test_behind_a_proxy_that_tells_it_the_client_s_own_address_counts(
    tmp_path: Path, first: str, same: str, other: str
) -> None:
    async with running_proxy(tmp_path, {}, failed_keys_per_minute=1) as proxy:
        endpoint = serverFromString(reactor, "haproxy:tcp:0:interface=127.0.0.1")
        port = await endpoint.listen(proxy.proxy._site)

        async def status_for(client: str, key: str) -> int:
            connected = await proxy.open(port.getHost().port)
            me = "192.0.2.1" if "TCP4" in client else "2001:db8::5"
            connected.send(f"PROXY {client} {me} 1234 80\r\n".encode())
            return (await post_on(connected, key)).status

        assert await status_for(first, "guess-1") == 401
        assert await status_for(same, "guess-2") == 429
        assert await status_for(other, "guess-2") == 401
        await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_unix_socket_is_no_address(tmp_path: Path) -> None:
    async with running_proxy(tmp_path, {}, failed_keys_per_minute=1) as proxy:
        path = str(tmp_path / "socket")
        port = reactor.listenUNIX(path, proxy.proxy._site)
        for number in range(10):
            client = await connectProtocol(UNIXClientEndpoint(reactor, path), Client())
            assert (await post_on(client, f"guess-{number}")).status == 401
        await port.stopListening()


@pytest.mark.timeout(600 if LONG else 60)
@pytest.mark.parametrize("per_minute", [0, 60])
@pytest_twisted.ensureDeferred
async def test_a_flood_of_random_keys_costs_no_memory_and_no_good_key_its_time(
    tmp_path: Path, per_minute: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "CACHE_SIZE", FLOOD // 10)
    good = [request_bytes("POST", CHAT, ASK)] * 100

    def guesses(count: int) -> Any:
        return (request_bytes("POST", CHAT, ASK, key=secrets.token_hex(20)) for _ in range(count))

    async with ScriptedBackend(json_answer(200, DONE)) as backend:
        served = {"chat": {"url": backend.url}}
        settings = {"failed_keys_per_minute": per_minute}
        async with running_proxy(tmp_path, served, **settings) as proxy:
            accounts_of(proxy)
            (alone,) = await ask_all(proxy, good)
            (first,) = await ask_all(proxy, guesses(FLOOD // 4))  # the cache is full now
            gc.collect()
            before = sys.getallocatedblocks()
            among, second = await ask_all(proxy, good, guesses(FLOOD))
            second.seconds.clear()
            gc.collect()
            grown = sys.getallocatedblocks() - before
        report(
            f"random keys, {per_minute or 'any number'} a minute",
            keys=FLOOD // 4 + FLOOD,
            good_key_ms=1000 * alone.median_s,
            good_key_in_the_flood_ms=1000 * among.median_s,
            blocks_grown=grown,
        )
        refused = {401} if not per_minute else {401, 429}
        assert set(first.statuses + second.statuses) == refused
        assert alone.statuses == among.statuses == [200] * 100
        assert among.median_s < max(10 * alone.median_s, 0.1)
        assert grown < 2 * FLOOD  # a key that was kept would take several
