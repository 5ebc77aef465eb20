"""More connections than there is room for, and more than there are file descriptors."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import socket
import ssl
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_twisted
from backend import ScriptedBackend, Wait, json_answer
from certificates import make_certificate
from memory import ADDRESS, Server, Wire
from memory import request_bytes as plain_request
from proxy import Client, ProxyHandle, request_bytes, running_proxy
from server_process import get_status
from twisted.internet import reactor as _reactor
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import UNIXClientEndpoint, connectProtocol
from twisted.internet.task import Clock, deferLater
from twisted.internet.threads import deferToThread

from llmproxy.channel import IDLE_TIMEOUT_S, MAX_REFUSED, REFUSED_S
from llmproxy.connections import Connections
from llmproxy.proxy import BACKLOG

reactor: Any = _reactor

CHAT = "/v1/chat/completions"
ASK = request_bytes("POST", CHAT, orjson.dumps({"model": "chat", "messages": []}))
COMPLETION = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
GET = request_bytes("GET", "/v1/models")


async def counted(proxy: ProxyHandle, name: str) -> float:
    exposition = (await proxy.get("/metrics", port=proxy.admin_port)).body.decode()
    (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", exposition, re.MULTILINE)
    return float(value)


def limited(limit: str) -> str:
    return f'llmproxy_limited_connections_total{{limit="{limit}"}}'


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await deferLater(reactor, 0.01)


# --- a connection too many --------------------


@pytest_twisted.ensureDeferred
async def test_when_all_connections_are_busy_a_new_one_is_told_so(tmp_path: Path) -> None:
    gate: Deferred[None] = Deferred()
    async with (
        ScriptedBackend([Wait(gate), json_answer(200, COMPLETION)]) as backend,
        running_proxy(
            tmp_path,
            {"chat": {"url": backend.url}},
            max_connections=2,
            max_connections_per_address=100,
        ) as proxy,
    ):
        busy = [await proxy.open() for _ in range(2)]
        for client in busy:
            client.send(ASK)
        await until(lambda: len(backend.requests) == 2)
        for data in (b"", GET):
            late = await proxy.open()
            late.send(data)
            await late.when(lambda received: False)
            answer = late.answer()
            assert (answer.status, answer.clean) == (503, True)
            assert answer.fields["retry-after"] == "2"
            assert answer.fields["connection"] == "close"
            assert answer.json()["error"]["code"] == "service_unavailable"
        gate.callback(None)
        for client in busy:
            await client.when(lambda received: b"choices" in received)
        assert (await proxy.get("/v1/models")).status == 200
        assert await counted(proxy, limited("max_connections")) == 2
        assert await counted(proxy, limited("idle")) == 1
        assert len(backend.requests) == 2


@pytest_twisted.ensureDeferred
async def test_idle_connections_make_room_the_oldest_first(tmp_path: Path) -> None:
    async with (
        ScriptedBackend([json_answer(200, COMPLETION)]) as backend,
        running_proxy(
            tmp_path,
            {"chat": {"url": backend.url}},
            max_connections=3,
            max_connections_per_address=100,
        ) as proxy,
    ):
        clients: list[Client] = [await proxy.open() for _ in range(3)]
        await until(lambda: len(proxy.proxy._site.connections) == 3)  # type: ignore[union-attr]
        clients[0].send(GET)  # now it has been idle for the shortest time
        await clients[0].when(lambda received: received.endswith(b"}"))
        clients[2].send(b"GET / HT")  # that is no request yet
        late = [await proxy.open() for _ in range(2)]
        for each in late:
            each.send(GET)
            await each.when(lambda received: received.endswith(b"}"))
        await until(lambda: clients[1].closed.called and clients[2].closed.called)
        assert not clients[0].closed.called
        assert await counted(proxy, "llmproxy_connections") == 3
        assert await counted(proxy, limited("idle")) == 2
        for each in (clients[0], *late):
            await each.close()
        await until(lambda: not proxy.proxy._site.connections)  # type: ignore[union-attr]
        assert await counted(proxy, "llmproxy_connections") == 0


@pytest_twisted.ensureDeferred
async def test_one_address_has_no_more_than_its_share(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    async with (
        ScriptedBackend([json_answer(200, COMPLETION)]) as backend,
        running_proxy(
            tmp_path,
            {"chat": {"url": backend.url}},
            host=None,
            port=None,
            listen=["tcp:0:interface=127.0.0.1", f"unix:{path}"],
            max_connections=100,
            max_connections_per_address=2,
        ) as proxy,
    ):
        clients = [await proxy.open() for _ in range(2)]
        late = await proxy.open()
        late.send(GET)
        await late.when(lambda received: False)
        answer = late.answer()
        assert (answer.status, answer.clean) == (429, True)
        assert answer.fields["retry-after"] == "2"
        assert not any(each.closed.called for each in clients)
        others: list[Client] = [
            await connectProtocol(UNIXClientEndpoint(reactor, str(path)), Client())
            for _ in range(5)
        ]
        for each in (*others, *clients):
            each.send(GET)
            await each.when(lambda received: b"HTTP/1.1 200" in received)
        assert await counted(proxy, limited("max_connections_per_address")) == 1
        for each in (*others, *clients):
            await each.close()
        assert (await proxy.get("/v1/models")).status == 200


@pytest.mark.filterwarnings("ignore:Passing pyOpenSSL:DeprecationWarning")  # Twisted does
@pytest_twisted.ensureDeferred
async def test_over_tls_there_is_no_handshake_for_one_too_many(tmp_path: Path) -> None:
    file = make_certificate(tmp_path)
    async with (
        ScriptedBackend([json_answer(200, COMPLETION)]) as backend,
        running_proxy(
            tmp_path,
            {"chat": {"url": backend.url}},
            cert=str(file),
            key=str(file),
            max_connections=10,
            max_connections_per_address=1,
        ) as proxy,
    ):
        trusting = ssl.create_default_context(cafile=str(file))

        def handshake() -> bytes:
            with (
                socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as plain,
                trusting.wrap_socket(plain, server_hostname="localhost") as client,
            ):
                client.send(GET)
                return client.recv(100)

        holder = await proxy.open()
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await deferToThread(handshake)
        await holder.close()
        assert (await deferToThread(handshake)).startswith(b"HTTP/1.1 200")


# --- in memory --------------------


@pytest.mark.parametrize(
    ("addresses", "let_in"),
    [
        ([IPv4Address("TCP", "192.0.2.1", n) for n in range(3)], 2),
        ([IPv4Address("TCP", f"192.0.2.{n}", 1) for n in range(3)], 3),
        ([IPv6Address("TCP", f"2001:db8:0:1::{n:x}", 1) for n in range(3)], 2),
        ([IPv6Address("TCP", f"2001:db8:0:{n:x}::1", 1) for n in range(3)], 3),
        ([IPv6Address("TCP", f"::ffff:192.0.2.{n}", 1) for n in range(3)], 3),
        ([IPv6Address("TCP", "fe80::1%eth0", n) for n in range(3)], 2),
        ([UNIXAddress(None)] * 3, 3),
    ],
)
def test_what_counts_as_one_address(clock: Clock, addresses: list[Any], let_in: int) -> None:
    server = Server(clock)
    server.leave()
    server.site.room = Connections(100, 2)
    server.site.connections = server.site.room.all
    for address in addresses:
        server.connect(address)
    assert len(server.site.connections) == let_in
    assert len(server.site.refused) == 3 - let_in
    held: list[Any] = [*server.site.connections, *server.site.refused]
    for channel in held:
        channel.abort()
    clock.advance(0)


def test_a_flood_that_is_refused_holds_little(clock: Clock) -> None:
    server = Server(clock)
    server.leave()
    server.site.room = Connections(0)
    wires = []
    for _ in range(MAX_REFUSED + 10):
        wires.append(Wire(clock))
        wires[-1].stuck = True
        refused = server.site.buildProtocol(ADDRESS)
        wires[-1].attach(refused)
    assert len(server.site.refused) == MAX_REFUSED
    assert [wire.aborted for wire in wires] == [False] * MAX_REFUSED + [True] * 10
    assert {wire.value()[:12] for wire in wires[:MAX_REFUSED]} == {b"HTTP/1.1 503"}
    assert not any(wire.value() for wire in wires[MAX_REFUSED:])
    refused.dataReceived(plain_request())  # nobody looks at it
    clock.advance(REFUSED_S)
    clock.advance(0)
    assert all(wire.aborted for wire in wires)
    assert server.site.refused == set()
    assert clock.getDelayedCalls() == []


def test_who_is_served_is_not_idle_and_is_again_after_it(clock: Clock) -> None:
    server = Server(clock)
    room = server.site.room
    assert list(room.resting) == [server.channel]
    server.send(plain_request(b"/1", b"", b"Content-Length: 3") + b"ab")
    assert not room.resting
    server.requests[0].answer(200, [], b"ok")
    assert not room.resting  # its body is still to come
    server.send(b"c")
    assert list(room.resting) == [server.channel]
    clock.advance(IDLE_TIMEOUT_S)
    clock.advance(0)
    assert (room.resting, room.all) == ({}, set())


# --- those that wait to be accepted --------------------


def backlog_of(port: Any) -> int:
    """How many may wait: of a socket that listens, TCP_INFO has it in `tcpi_sacked`."""
    info = port.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("8B6I", info)[13])


@pytest_twisted.ensureDeferred
async def test_thousands_may_wait_to_be_accepted_unless_the_endpoint_says_how_many(
    tmp_path: Path,
) -> None:
    local = "tcp:0:interface=127.0.0.1"
    somaxconn = int(Path("/proc/sys/net/core/somaxconn").read_text())
    async with running_proxy(
        tmp_path, {}, host=None, port=None, listen=[local, f"{local}:backlog=7"]
    ) as proxy:
        assert [backlog_of(port) for port in proxy.proxy.ports] == [min(BACKLOG, somaxconn), 7]


# --- no descriptors --------------------


def cpu_s(pid: int) -> float:
    """The processor time that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_process_without_descriptors_goes_on_waits_and_recovers(tmp_path: Path) -> None:
    from ports import free_port

    port, admin_port = free_port(), free_port()
    (tmp_path / "config.toml").write_text(
        f'host = "127.0.0.1"\nport = {port}\n'
        f'[admin]\nlisten = ["tcp:{admin_port}:interface=127.0.0.1"]\n'
    )
    # More connections than descriptors: that is what other processes on a machine can bring about.
    program = (
        "from llmproxy import connections; connections.bounds = lambda *_: (1000, 1000);"
        "from llmproxy.__main__ import main; main()"
    )
    log = (tmp_path / "log").open("w+")
    few = 64
    with subprocess.Popen(
        [sys.executable, "-c", program, "-c", "config.toml"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (few, few)),
    ) as process:
        try:
            asyncio.run(_without_descriptors(process.pid, port, admin_port, few))
            assert process.poll() is None
        finally:
            process.terminate()
            process.wait(15)
            log.seek(0)
            said = log.read()
            log.close()
    assert said.count("new connections have to wait: Too many open files") == 1
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if " refused " not in line]) < 6, said
    assert process.returncode == 0


async def _without_descriptors(pid: int, port: int, admin_port: int, few: int) -> None:
    deadline = time.monotonic() + 20
    while await asyncio.to_thread(get_status, f"http://127.0.0.1:{admin_port}/healthz") != 200:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)

    async def asks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n")
        return await asyncio.wait_for(reader.readuntil(b"}}"), 6)

    first = await asyncio.open_connection("127.0.0.1", port)
    assert b" 401 " in await asks(*first)
    crowd = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2 * few)]
    await asyncio.sleep(0.2)
    used, began = cpu_s(pid), time.monotonic()
    for _ in range(10):
        assert b" 401 " in await asks(*first)  # who is in is served
        await asyncio.sleep(0.1)
    assert cpu_s(pid) - used < 0.5 * (time.monotonic() - began)
    late = await asyncio.open_connection("127.0.0.1", port)
    for _, writer in crowd:
        writer.close()
    assert b" 401 " in await asks(*late)  # within its 6 s
    for _, writer in (first, late):
        writer.close()
