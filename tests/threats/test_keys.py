"""Who gets in: what a key may look like, when it ends, and what is said to those who have none.

Against a real proxy: who is refused gets the one answer that all get who are refused, no backend
hears of it, and nothing of it is in the ledger or the log.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import bson
import orjson
import pytest
import pytest_twisted
from backend import ScriptedBackend, json_answer
from proxy import Answer, ProxyHandle, running_proxy
from tally import Tally
from twisted.internet.defer import Deferred, fail, succeed

from llmproxy import auth
from llmproxy.endpoints import ENDPOINTS, Body, Dialect
from llmproxy.errors import StorageError
from llmproxy.model import Account
from llmproxy.storage.mongo import MongoAccounts

CHAT, MESSAGES, MODELS = "/v1/chat/completions", "/v1/messages", "/v1/models"
ASK = orjson.dumps({"model": "chat", "messages": [{"role": "user", "content": "hi"}]})
DONE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}
HASH = re.compile(r"[0-9a-f]{64}")


@asynccontextmanager
async def served(
    folder: Path, **settings: Any
) -> AsyncIterator[tuple[ProxyHandle, ScriptedBackend]]:
    """A proxy with one backend, for as many wrong keys as a test likes to try."""
    settings = {"failed_keys_per_minute": 0, **settings}
    async with ScriptedBackend(json_answer(200, DONE)) as backend:
        async with running_proxy(folder, {"chat": {"url": backend.url}}, **settings) as proxy:
            yield proxy, backend


def asking(*lines: bytes, path: str = CHAT) -> bytes:
    """A request that is all right but for these header lines."""
    top = [b"POST %b HTTP/1.1" % path.encode(), b"Host: p", b"Content-Type: application/json"]
    return b"\r\n".join([*top, b"Content-Length: %d" % len(ASK), *lines, b"", ASK])


def without_time_and_id(answer: Answer) -> tuple[Any, ...]:
    """All that is told, but for what differs from answer to answer."""
    fields = {k: v for k, v in answer.fields.items() if k not in ("date", "x-request-id")}
    return answer.status, fields, answer.body


# -- how it is spelled -------------------------------------------------------------------------

#: What stands behind `Authorization: `, where it is HTTP at all. `token2` is a key, `token1` was.
VALUES = [
    b"",
    b"Bearer",
    b"Bearer ",
    b"Bearer  token2",
    b"Bearer\ttoken2",
    b"Bearer \ttoken2",
    b"Bearer\xa0token2",
    b"Bearertoken2",
    b"Bearer:token2",
    b"Bearer: token2",
    b"Bearer=token2",
    b"Bearer, token2",
    b"Bearer Bearer token2",
    b"Bearer token2, Bearer token3",
    b"Bearer token2,Bearer token3",
    b"Bearer token2;",
    b'Bearer "token2"',
    b"Bearer <token2>",
    b"Bearer tok en2",
    b"Bearer token2 extra",
    b"Bearer token2\x80",
    b"Bearer tok\xc3\xa9n2",
    b"Bearer \xff\xfe",
    b"\xef\xbb\xbfBearer token2",
    "\uff22earer token2".encode(),
    "Bearer t\u043eken2".encode(),
    b"Bearer Token2",
    b"Bearer TOKEN2",
    b"Bearer token",
    b"Bearer token22",
    b"Bearer oken2",
    b"Bearer 2nekot",
    b"Bearer token1",
    b"Bearer unknown",
    b"Bearer null",
    b"Bearer undefined",
    b"Bearer *",
    b"Bearer %",
    b"Bearer token_",
    b"Bearer token%32",
    b"Bearer dG9rZW4y",
    b"Bearer " + hashlib.sha256(b"token2").hexdigest().encode(),
    b"Bearer " + b"x" * 512,
    b"Bearer " + b"x" * 513,
    b"Bearer " + b"x" * 30_000,
    b"earer token2",
    b"Bearer2 token2",
    b"token2",
    b"token token2",
    b"Token token2",
    b"ApiKey token2",
    b"Basic dG9rZW4yOg==",
    b"Basic dG9rZW4yOnRva2VuMg==",
    b'Digest username="token2", realm="", nonce="", uri="/", response="token2"',
    b"Negotiate token2",
    b"Bearer ' OR '1'='1",
    b"Bearer 'OR'1'='1'--",
    b'Bearer "OR(1=1)--',
    b"Bearer ';DROP/**/TABLE/**/api_key;--",
    b"Bearer token2'||'",
    b"Bearer token2';--",
    b'Bearer {"$gt":""}',
    b'Bearer {"$ne":null}',
    b"Bearer [$ne]=1",
    b"Bearer $where:1",
    b"Bearer {{7*7}}",
    b"Bearer ${jndi:ldap://127.0.0.1/a}",
    b"Bearer ../../etc/passwd",
]
#: Whole header lines.
LINES: Mapping[str, tuple[bytes, ...]] = {
    "none": (),
    "twice the same": (b"Authorization: Bearer token2", b"Authorization: Bearer token2"),
    "two keys": (b"Authorization: Bearer token2", b"Authorization: Bearer token3"),
    "empty, then a key": (b"Authorization:", b"Authorization: Bearer token2"),
    "a key, then empty": (b"Authorization: Bearer token2", b"Authorization:"),
    "wrong, then a key": (b"Authorization: Bearer wrong", b"Authorization: Bearer token2"),
    "another scheme first": (b"Authorization: Basic x", b"Authorization: Bearer token2"),
    "for a proxy": (b"Proxy-Authorization: Bearer token2",),
    "with an underscore": (b"X_Authorization: Bearer token2",),
    "a cookie": (b"Cookie: Authorization=Bearer token2; api_key=token2; token=token2",),
    "other names": (b"Api-Key: token2", b"X-Auth-Token: token2", b"X-Goog-Api-Key: token2"),
    "forwarded": (b"X-Forwarded-Authorization: Bearer token2", b"X-Original-Authorization: token2"),
    "two x-api-keys": (b"X-Api-Key: token2", b"X-Api-Key: token2"),
    "a wrong x-api-key": (b"X-Api-Key: wrong",),
    "x-api-key with a scheme": (b"X-Api-Key: Bearer token2",),
    "x-api-key beside another scheme": (b"Authorization: Basic x", b"X-Api-Key: token2"),
    "x-api-key beside a wrong key": (b"Authorization: Bearer wrong", b"X-Api-Key: token2"),
    "x-api-key beside nothing": (b"Authorization:", b"X-Api-Key: token2"),
}


def odd_requests() -> Iterator[tuple[str, tuple[bytes, ...]]]:
    """Header lines that bring no valid key, with a name for each."""
    for value in VALUES:
        yield repr(value)[:40], (b"Authorization: " + value,)
    yield from LINES.items()


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest_twisted.ensureDeferred
async def test_whatever_is_no_key_gets_one_and_the_same_answer(
    tmp_path: Path, path: str, logged: list[str]
) -> None:
    tally = Tally(f"odd keys on {path}")
    async with served(tmp_path) as (proxy, backend):
        usual = without_time_and_id(await proxy.send(asking(path=path)))
        assert usual[0] == 401
        assert usual[1]["www-authenticate"] == "Bearer"
        for name, lines in odd_requests():
            answer = await proxy.send(asking(*lines, path=path))
            tally.add(
                name, without_time_and_id(answer) == usual, answer.raw[:300].decode("latin-1")
            )
        assert backend.received == 0
        assert proxy.rows() == []
        assert (await proxy.post(path, ASK)).status == 200
    tally.check(at_least=80)
    said = "\n".join(logged)
    assert "invalid_api_key" in said
    assert not re.search(r"token[0-9]|DROP|dG9rZW4y", said.replace("id-token2", ""))


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"Authorization: Bearer token2\x00", 400),
        (b"Authorization: Bearer \x00token2", 400),
        (b"Authorization: Bearer tok\x01en2", 400),
        (b"Authorization: Bearer\x0btoken2", 400),
        (b"Authorization: Bearer token2\x7f", 400),
        (b"Authorization: Bearer tok\ren2", 400),
        (b"Authorization: Bearer tok\nen2", 400),
        (b"Authorization: Bearer\r\n token2", 400),
        (b"Authorization : Bearer token2", 400),
        (b" Authorization: Bearer token2", 400),
        (b"Authorization\x00: Bearer token2", 400),
        (b"Authorization Bearer token2", 400),
        (b"Authorization: Bearer " + b"x" * 40_000, 431),
        (b"Authorization: Bearer " + b"x" * 2**20, 431),
        (b"X-Api-Key: " + b"x" * 2**20, 431),
        (b"Authorization: Bearer token\r\nX-Injected: 2", 401),
    ],
    ids=lambda value: repr(value)[:45],
)
@pytest_twisted.ensureDeferred
async def test_a_key_that_is_no_http_is_refused_before_anybody_looks_for_it(
    tmp_path: Path, line: bytes, status: int
) -> None:
    async with served(tmp_path) as (proxy, backend):
        answer = await proxy.send(asking(line))
        assert answer.status == status
        assert answer.json()["error"]["type"] in ("invalid_request_error", "authentication_error")
        assert backend.received == 0
        assert proxy.rows() == []


@pytest.mark.parametrize(
    "query",
    [b"api_key=token2", b"key=token2", b"access_token=token2", b"Authorization=Bearer%20token2"],
)
@pytest_twisted.ensureDeferred
async def test_a_key_in_the_url_opens_nothing_and_is_written_down_nowhere(
    tmp_path: Path, query: bytes, logged: list[str]
) -> None:
    secret = b"canary-" + query.replace(b"token2", b"in-the-url")
    async with served(tmp_path) as (proxy, backend):
        for target in (CHAT, MESSAGES, MODELS, "/v1/nothing"):
            for text in (query, secret):
                full = f"{target}?{text.decode()}"
                if target == MODELS:
                    answer = await proxy.get(full, key=None)
                else:
                    answer = await proxy.post(full, ASK, key=None)
                assert answer.status == (404 if target == "/v1/nothing" else 401)
                assert b"canary" not in answer.raw
                assert b"token2" not in answer.raw
        assert backend.received == 0
        assert (
            await proxy.send(
                asking(b"Authorization: Bearer token2", path=f"{CHAT}?{secret.decode()}")
            )
        ).status == 200
        (seen,) = backend.requests
        assert b"canary" not in seen.raw
        metrics = await proxy.get("/metrics", port=proxy.admin_port)
        stored = b"".join(f.read_bytes() for f in tmp_path.iterdir() if f.is_file())
    everything = "\n".join(logged).encode() + metrics.raw + stored
    assert b"refused" in everything
    assert b"canary" not in everything


@pytest_twisted.ensureDeferred
async def test_x_api_key_is_taken_on_anthropic_s_paths_and_for_the_list_of_models_only(
    tmp_path: Path,
) -> None:
    taken = {path for path, each in ENDPOINTS.items() if each.dialect is Dialect.ANTHROPIC}
    async with served(tmp_path) as (proxy, backend):
        for path, endpoint in ENDPOINTS.items():
            answer = await proxy.send(asking(b"X-Api-Key: token2", path=path))
            assert (answer.status == 401) == (path not in taken), path
            assert endpoint.body is Body.JSON or answer.status == 401
        assert (await proxy.get(MODELS, key=None, x_api_key="token2")).status == 200
        assert {seen.target for seen in backend.requests} == taken


# -- what the database sees --------------------------------------------------------------------

INJECTIONS = [
    "'OR'1'='1'--",
    "';DROP/**/TABLE/**/api_key;--",
    '"OR(1=1)--',
    "token_",
    "token%",
    "*",
    '{"$gt":""}',
    '{"$ne":null}',
    "[$ne]=1",
    "$where:sleep(1000)",
    "token2\\u0000",
    "0" * 64,
    hashlib.sha256(b"token2").hexdigest(),
]


@pytest_twisted.ensureDeferred
async def test_sqlite_sees_nothing_of_a_key_but_its_hash(tmp_path: Path) -> None:
    statements: list[str] = []
    async with served(tmp_path) as (proxy, _):
        pool = proxy.proxy.stores.accounts._pool  # type: ignore[attr-defined]
        await pool.runWithConnection(lambda one: one.set_trace_callback(statements.append))
        for key in [*INJECTIONS, "token2"]:
            answer = await proxy.post(CHAT, ASK, key=key)
            assert answer.status == (200 if key == "token2" else 401), key
        await pool.runWithConnection(lambda one: one.set_trace_callback(None))
        assert proxy.query("SELECT count(*) FROM api_key") == [(3,)]
    hashes = [hashlib.sha256(key.encode()).hexdigest() for key in [*INJECTIONS, "token2"]]
    assert (
        len({said.replace(f"'{h}'", "?") for said, h in zip(statements, hashes, strict=True)}) == 1
    )


@pytest_twisted.ensureDeferred
async def test_a_key_that_is_nearly_right_is_as_wrong_as_any(tmp_path: Path) -> None:
    key = "sk-0123456789abcdefABCDEF-and-more-of-it"
    near = {key[:end] for end in range(1, len(key))} | {key[start:] for start in range(1, len(key))}
    near |= {key + more for more in ("0", "-", key)} | {key.upper(), key.lower(), key[:20] + "x"}
    near |= {key[:at] + "~" + key[at + 1 :] for at in range(len(key))}
    async with served(tmp_path) as (proxy, backend):
        put_key(proxy, key, None)
        for each in sorted(near):
            assert (await proxy.post(CHAT, ASK, key=each)).status == 401, each
        assert backend.received == 0
        assert (await proxy.post(CHAT, ASK, key=key)).status == 200


class MongoPool:
    """Where commands go that would go to a MongoDB; the server has an answer for them all."""

    read_concern = None

    def __init__(self, *replies: Any) -> None:
        self.commands: list[Any] = []
        self._replies = replies or ({"ok": 1.0, "cursor": {"firstBatch": []}},)

    def ask(self, database: str, command: Any, *, timeout_s: float) -> Deferred[Any]:
        self.commands.append(command)
        return succeed(self._replies[min(len(self.commands), len(self._replies)) - 1])


def replace_store(proxy: ProxyHandle, accounts: Any) -> None:
    """Look keys up there from now on."""
    assert proxy.proxy._services is not None
    proxy.proxy._services.authenticator._accounts = accounts


@pytest_twisted.ensureDeferred
async def test_mongodb_sees_nothing_of_a_key_but_its_hash(tmp_path: Path) -> None:
    pool: Any = MongoPool()
    async with served(tmp_path) as (proxy, _):
        replace_store(proxy, MongoAccounts(pool))
        for key in INJECTIONS:
            assert (await proxy.post(CHAT, ASK, key=key)).status == 401
    hashes = [hashlib.sha256(key.encode()).hexdigest() for key in INJECTIONS]
    assert [command["filter"].pop("secret") for command in pool.commands] == hashes
    for command in pool.commands:
        del command["filter"]["$or"]  # the time
    assert len({bson.encode(command) for command in pool.commands}) == 1


@pytest_twisted.ensureDeferred
async def test_whatever_comes_a_store_is_asked_for_64_hexadecimal_digits_or_not_at_all(
    tmp_path: Path,
) -> None:
    asked: list[str] = []

    class Accounts:
        def find(self, secret_hash: str, now: datetime) -> Deferred[Account | None]:
            asked.append(secret_hash)
            return succeed(None)

    async with served(tmp_path) as (proxy, _):
        replace_store(proxy, Accounts())
        for _, lines in odd_requests():
            assert (await proxy.send(asking(*lines))).status == 401
    assert len(asked) > 25
    assert all(HASH.fullmatch(each) for each in asked)


# -- when it ends ------------------------------------------------------------------------------


def put_key(proxy: ProxyHandle, key: str, expires: object, kind: object = "LLM") -> None:
    """A key as an operator may have written it into the database."""
    connection = sqlite3.connect(proxy.database)
    with connection:
        connection.execute(
            "INSERT INTO api_key (id, secret, type, expires) VALUES (?, ?, ?, ?)",
            (f"id-{key}", hashlib.sha256(key.encode()).hexdigest(), kind, expires),
        )
    connection.close()


@pytest_twisted.ensureDeferred
async def test_a_key_ends_by_the_proxy_s_clock_and_at_its_very_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = datetime(2030, 6, 1, 12, tzinfo=UTC)
    async with served(tmp_path, auth_fresh=0) as (proxy, backend):
        put_key(proxy, "noon", "2030-06-01 12:00:00")
        put_key(proxy, "noon-in-warsaw", "2030-06-01T14:00:00+02:00")
        for off, status in [
            (timedelta(microseconds=-1), 200),
            (timedelta(0), 401),
            (timedelta(microseconds=1), 401),
            (timedelta(hours=-1), 200),
            (timedelta(hours=1), 401),
            (timedelta(days=-1), 200),
        ]:
            monkeypatch.setattr(auth, "utcnow", lambda off=off: end + off)
            for key in ("noon", "noon-in-warsaw"):
                assert (await proxy.post(CHAT, ASK, key=key)).status == status, off
        assert len(backend.requests) == len(proxy.rows()) == 6


UNREADABLE = ["", " ", "never", "null", "0", 0, 1, 4102444800, 2.5, b"2124-01-01", "01.06.2124"]
UNREADABLE += ["2124-13-01", "2124-01-01T25:00", "2124", "tomorrow", "9" * 400, "2124-01-01; --"]


@pytest_twisted.ensureDeferred
async def test_what_can_not_be_read_opens_nothing(tmp_path: Path) -> None:
    async with served(tmp_path) as (proxy, backend):
        for number, expires in enumerate(UNREADABLE):
            put_key(proxy, f"odd-{number}", expires)
            assert (await proxy.post(CHAT, ASK, key=f"odd-{number}")).status == 401, expires
        for number, kind in enumerate([None, "", "llm", "LLM ", "ADMIN", 0, b"LLM", "LLM\x00"]):
            put_key(proxy, f"kind-{number}", None, kind)
            assert (await proxy.post(CHAT, ASK, key=f"kind-{number}")).status == 401, kind
        assert backend.received == 0
        put_key(proxy, "good", None)
        assert (await proxy.post(CHAT, ASK, key="good")).status == 200


# -- when the store does not know --------------------------------------------------------------

WRONG = [
    {},
    {"ok": 0.0, "errmsg": "no", "code": 1},
    {"ok": 1.0},
    {"ok": 1.0, "cursor": None},
    {"ok": 1.0, "cursor": {}},
    {"ok": 1.0, "cursor": {"firstBatch": None}},
    {"ok": 1.0, "cursor": {"firstBatch": 7}},
    {"ok": 1.0, "cursor": {"firstBatch": 0}},
    {"ok": 1.0, "cursor": {"firstBatch": ""}},
    {"ok": 1.0, "cursor": {"firstBatch": {}}},
    {"ok": 1.0, "cursor": {"firstBatch": "yes"}},
    {"ok": 1.0, "cursor": {"firstBatch": [None]}},
    {"ok": 1.0, "cursor": {"firstBatch": [["_id", "x"]]}},
    {"ok": 1.0, "cursor": {"firstBatch": [{"user_id": "no id"}]}},
    {"ok": 1.0, "cursor": {"firstBatch": {"_id": "x"}}},
]


@pytest_twisted.ensureDeferred
async def test_a_store_that_answers_nonsense_lets_nobody_in_and_accuses_nobody(
    tmp_path: Path,
) -> None:
    async with served(tmp_path, auth_fresh=0) as (proxy, backend):
        pool: Any = MongoPool(*WRONG)
        replace_store(proxy, MongoAccounts(pool))
        for number, reply in enumerate(WRONG):
            answer = await proxy.post(CHAT, ASK, key=f"key-{number}")
            assert answer.status == 503, reply
            assert answer.fields["retry-after"] == "2"
        assert backend.received == 0
        assert len(pool.commands) == len(WRONG)


@pytest_twisted.ensureDeferred
async def test_a_store_that_fails_or_is_silent_costs_503_in_two_seconds_and_nothing_else(
    tmp_path: Path,
) -> None:
    class Accounts:
        def find(self, secret_hash: str, now: datetime) -> Deferred[Account | None]:
            if secret_hash == hashlib.sha256(b"silent").hexdigest():
                return Deferred()
            return fail(StorageError("it is down"))

    async with served(tmp_path) as (proxy, backend):
        assert (await proxy.post(CHAT, ASK)).status == 200
        assert proxy.proxy._services is not None
        accounts = proxy.proxy._services.authenticator._accounts
        for key in ("silent", "failing"):
            replace_store(proxy, Accounts())
            began = proxy.proxy._services.monotonic()
            answer = await proxy.post(CHAT, ASK, key=key)
            assert proxy.proxy._services.monotonic() - began < 2
            assert (answer.status, answer.fields["retry-after"]) == (503, "2")
            assert (await proxy.post(CHAT, ASK)).status == 200  # known, so it goes on working
        replace_store(proxy, accounts)
        assert len(backend.requests) == 3
