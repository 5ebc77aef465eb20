"""A real proxy in this process: real sockets, a real SQLite file, the test's own configuration.

async with running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy:
    answer = await proxy.post("/v1/chat/completions", {...})
    assert proxy.bill() == {"chat/gpu/prompt": 3, ...}
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import orjson
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.interfaces import ITCPTransport
from twisted.internet.protocol import Protocol
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from llmproxy import config
from llmproxy.proxy import Proxy, port_of
from llmproxy.storage.sqlite import connect, prepare

# The global reactor has no type of its own: it is whichever was installed.
reactor: Any = _reactor

KEY = "token2"
EXPIRED = "token1"
BASE: Mapping[str, Any] = {
    "host": "127.0.0.1",
    "port": 0,
    "drain_deadline": 0.5,
    "admin": {"listen": ["tcp:0:interface=127.0.0.1"]},
}


@dataclass
class Answer:
    """An HTTP answer as it came: `raw` is all of it, `clean` tells that the connection was not
    reset, and `whole` that the body came to its own end."""

    raw: bytes
    clean: bool = True
    status: int = 0
    fields: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False

    def __post_init__(self) -> None:
        top, found, rest = self.raw.partition(b"\r\n\r\n")
        if not found:
            return
        line, *lines = top.decode("latin-1").split("\r\n")
        self.status = int(line.split()[1])
        self.fields = {k.lower(): v for k, v in (x.split(": ", 1) for x in lines)}
        if self.fields.get("transfer-encoding") == "chunked":
            self.body, self.whole = dechunk(rest)
        else:
            size = int(self.fields.get("content-length", 0))
            self.body, self.whole = rest[:size], len(rest) >= size

    def json(self) -> Any:
        return orjson.loads(self.body)


def dechunk(data: bytes) -> tuple[bytes, bool]:
    """The body in a chunked coding, and whether its last chunk has come."""
    body = b""
    while data:
        size, found, rest = data.partition(b"\r\n")
        if not found:
            break
        length = int(size, 16)
        if length == 0:
            return body, rest.startswith(b"\r\n")
        body += rest[:length]
        data = rest[length + 2 :]
    return body, False


class Client(Protocol):
    """A raw connection: `received` is all that came, `closed` fires at its end."""

    def __init__(self) -> None:
        self.received = b""
        self.clean = True
        self.closed: Deferred[None] = Deferred()
        self._waiters: list[tuple[Any, Deferred[None]]] = []

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        self._check()

    def connectionLost(self, reason: Failure | None = None) -> None:
        self.clean = reason is None or "ConnectionDone" in str(reason.type)
        closed, self.closed = self.closed, Deferred()
        self.closed.callback(None)
        closed.callback(None)
        self._check(over=True)

    def send(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)

    def abort(self) -> None:
        """Hang up with a reset."""
        cast(ITCPTransport, self.transport).abortConnection()

    def close(self) -> Deferred[None]:
        """Hang up in order; fires when the connection has ended."""
        if self.transport is not None:
            self.transport.loseConnection()
        return self.closed

    def when(self, condition: Any) -> Deferred[None]:
        """Fires when `condition(received)` is true, or the connection has ended."""
        waiter: Deferred[None] = Deferred()
        self._waiters.append((condition, waiter))
        self._check(over=self.closed.called)
        return waiter

    def _check(self, over: bool = False) -> None:
        waiting, self._waiters = self._waiters, []
        for condition, waiter in waiting:
            if over or condition(self.received):
                waiter.callback(None)
            else:
                self._waiters.append((condition, waiter))

    def answer(self) -> Answer:
        return Answer(self.received, self.clean)


def request_bytes(
    method: str,
    path: str,
    body: bytes = b"",
    *,
    key: str | None = KEY,
    fields: Mapping[str, str] | None = None,
    version: str = "HTTP/1.1",
) -> bytes:
    """A request as its bytes; `fields` come last, and replace the usual ones."""
    usual = {"Host": "proxy"}
    if key is not None:
        usual["Authorization"] = f"Bearer {key}"
    if body or method == "POST":
        usual |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    lines = [f"{name}: {value}" for name, value in (usual | dict(fields or {})).items()]
    return "\r\n".join([f"{method} {path} {version}", *lines, "", ""]).encode("latin-1") + body


class ProxyHandle:
    """A running proxy, as tests use it."""

    def __init__(self, proxy: Proxy, database: Path) -> None:
        self.proxy = proxy
        self.database = database

    @property
    def port(self) -> int:
        return port_of(self.proxy.ports[0])

    @property
    def admin_port(self) -> int:
        return port_of(self.proxy.admin_ports[0])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def open(self, port: int | None = None) -> Client:
        """A raw connection to the proxy."""
        endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", port or self.port)
        client: Client = await connectProtocol(endpoint, Client())
        return client

    async def send(self, data: bytes, *, port: int | None = None) -> Answer:
        """Send bytes, and take what comes until the connection ends or the answer is whole."""
        client = await self.open(port)
        client.send(data)
        await client.when(lambda received: Answer(received).whole)
        answer = client.answer()
        await client.close()
        return answer

    async def post(
        self, path: str, body: object, *, key: str | None = KEY, **fields: str
    ) -> Answer:
        """POST JSON (or bytes); `fields` are header fields, with `_` for `-`."""
        raw = body if isinstance(body, bytes) else orjson.dumps(body)
        named = {name.replace("_", "-"): value for name, value in fields.items()}
        return await self.send(request_bytes("POST", path, raw, key=key, fields=named))

    async def get(
        self, path: str, *, key: str | None = KEY, port: int | None = None, **fields: str
    ) -> Answer:
        """GET, from the public site or from `port`."""
        named = {name.replace("_", "-"): value for name, value in fields.items()}
        return await self.send(request_bytes("GET", path, key=key, fields=named), port=port)

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """Ask the database directly."""
        connection = sqlite3.connect(self.database)
        try:
            return connection.execute(statement).fetchall()
        finally:
            connection.close()

    def rows(self, columns: str = "state, outcome, prompt, completion") -> list[tuple[Any, ...]]:
        """The ledger, in the order of its requests."""
        return self.query(f"SELECT {columns} FROM ledger ORDER BY rid")

    def bill(self) -> dict[str, int]:
        """Sums by product."""
        return dict(self.query("SELECT product, sum(quantity) FROM event_oneoff GROUP BY product"))

    async def settled(self, count: int = 1, timeout_s: float = 5.0) -> list[tuple[Any, ...]]:
        """The ledger, once it has `count` rows and none is open."""
        for _ in range(int(timeout_s / 0.01)):
            rows = self.rows()
            if len(rows) >= count and all(row[0] != "open" for row in rows):
                break
            await deferLater(reactor, 0.01)
        return self.rows()


def add_keys(database: Path) -> None:
    """token1 (expired), token2 (no end), token3 (2124)."""
    prepare(database)
    connection = connect(database)
    for key, expires in (("token1", "2024-01-01"), ("token2", None), ("token3", "2124-01-01")):
        connection.execute(
            "INSERT OR IGNORE INTO api_key (id, secret, type, expires) VALUES (?, ?, 'LLM', ?)",
            (f"id-{key}", hashlib.sha256(key.encode()).hexdigest(), expires),
        )
    connection.close()


@contextlib.asynccontextmanager
async def running_proxy(
    folder: Path, backends: Mapping[str, Mapping[str, Any]], **settings: Any
) -> AsyncIterator[ProxyHandle]:
    """A proxy with these backends (`device` is "gpu" unless given) and settings; None: without
    one of `BASE`."""
    database = folder / "db.sqlite"
    add_keys(database)
    named = {name: {"device": "gpu", **backend} for name, backend in backends.items()}
    usual = {**BASE, "db": {"uri": f"sqlite://{database}"}}
    given = {name: each for name, each in (usual | settings).items() if each is not None}
    mapping = {**given, "backends": named}
    proxy = Proxy(lambda: config.parse(mapping, folder), reactor)
    proxy.startService()
    try:
        await proxy.started
        yield ProxyHandle(proxy, database)
    finally:
        await proxy.stopService()
