"""A process that is to be relieved: what is in the way of that, and what follows then.

What clients see of a hand-over is in `faults/test_deploys.py`, with real proxies.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from channels import only_ours
from memory import Server, request_bytes
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from twisted.internet.task import Clock, deferLater

from llmproxy import handover
from llmproxy.errors import ConfigError
from llmproxy.handover import Handover, Pidfile, Predecessor
from llmproxy.proxy import stopped
from llmproxy.sharing import Sockets
from llmproxy.systemd import tell_systemd

# The global reactor has no type of its own: it is whichever was installed.
reactor: Any = _reactor

SILENT = "import time; time.sleep(30)"
ENDS = "raise SystemExit(1)"
#: Says that it is ready, and ends when it is told anything.
READY = """
import json, os, socket
told = json.loads(os.environ["LLMPROXY_HANDOVER"])
link = socket.socket(fileno=told["link"])
link.sendall(b'{"kind": "ready", "pid": 77}\\n')
heard = link.recv(100)
open("heard", "w").write(f"{heard} {told['sockets'][0][0]}")
link.recv(100)
"""


class Relieved:
    """A service with one socket."""

    def __init__(self, sockets: Sockets) -> None:
        self.sockets = sockets
        self.cuts = 0

    def cut(self) -> None:
        self.cuts += 1


class Bench:
    """A process that is asked to be relieved by whatever `script` does."""

    def __init__(self, sockets: Sockets) -> None:
        self.service = Relieved(sockets)
        self.relieved: Deferred[None] = Deferred()
        self.handover: Handover | None = None

    def begin(self, script: str, **options: Any) -> Handover:
        self.handover = Handover(
            self.service,
            reactor,
            lambda: self.relieved.callback(None),
            command=[sys.executable, "-c", script],
            **options,
        )
        self.handover.begin()
        return self.handover

    async def close(self) -> None:
        if self.handover is None:
            return
        link, process = self.handover._link, self.handover._process
        if process is not None:
            process.kill()
            process.wait()
        while link is not None and link.transport is not None:
            await deferLater(reactor, 0.01)


@pytest_twisted.async_yield_fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.chdir(tmp_path)
    sockets = Sockets(reactor)
    port = await sockets.open("tcp:0:interface=127.0.0.1", Factory())
    bench = Bench(sockets)
    yield bench
    await bench.close()
    await stopped([port])


async def told(logged: list[str], words: str) -> None:
    while not any(line.startswith(words) for line in logged):
        await deferLater(reactor, 0.01)


@pytest_twisted.ensureDeferred
async def test_one_that_says_nothing_is_given_up_and_told_to_end(
    bench: Bench, logged: list[str]
) -> None:
    handover = bench.begin(SILENT, patience_s=0.3)
    await told(logged, "not handed over: it takes too long")
    assert handover._process is not None
    assert handover._process.wait(5) == -15
    assert not bench.relieved.called
    [port] = [port for _, port in bench.service.sockets._ports]
    assert port in reactor.getReaders()  # it accepts as before


@pytest_twisted.ensureDeferred
async def test_one_that_ends_is_no_reason_not_to_try_again(
    bench: Bench, logged: list[str], tmp_path: Path
) -> None:
    ending = bench.begin(ENDS)
    await told(logged, "not handed over: it has ended")
    assert ending._process is not None
    assert ending._process.wait(5) in (1, -15)
    assert not bench.relieved.called
    handover = bench.begin(READY)
    await bench.relieved
    handover.begin()  # one is enough
    assert sum(line.startswith("a new process is started") for line in logged) == 2
    while not (tmp_path / "heard").exists() or not (tmp_path / "heard").read_text():
        await deferLater(reactor, 0.01)
    assert (tmp_path / "heard").read_text() == ("""b'{"kind":"go"}\\n' tcp:0:interface=127.0.0.1""")


def test_process_1_stays(monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    Handover(Relieved(Sockets(reactor)), reactor, lambda: None, command=["false"]).begin()
    assert logged[-1].startswith("not handed over: as process 1 of a container")


def test_a_unit_that_knows_one_process_only_keeps_it(
    monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Handover(Relieved(Sockets(reactor)), reactor, lambda: None, command=["false"]).begin()
    assert logged[-1].startswith("not handed over: systemd would end the new process")


@pytest_twisted.ensureDeferred
async def test_a_new_process_that_nobody_waits_for_any_more_does_not_serve() -> None:
    ours, theirs = socket.socketpair()
    environment = {handover.VARIABLE: f'{{"link": {theirs.detach()}, "sockets": []}}'}
    predecessor = Predecessor.of(environment, reactor)
    assert predecessor is not None
    assert environment == {}
    ready = Deferred.fromCoroutine(predecessor.makes_room())
    ours.close()
    with pytest.raises(ConfigError, match="gone"):
        await ready


def test_a_pidfile_is_moved_aside_and_back(tmp_path: Path) -> None:
    path = tmp_path / "twistd.pid"
    path.write_text("1")
    options = {"pidfile": str(path)}
    pidfile = Pidfile(options)
    pidfile.move_aside()
    assert (options["pidfile"], path.exists()) == (f"{path}.old", False)
    path.write_text("2")  # the new one's
    pidfile.move_back()
    assert (options["pidfile"], path.read_text()) == (str(path), "1")
    assert [*tmp_path.iterdir()] == [path]


def test_without_a_pidfile_none_is_moved() -> None:
    options = {"pidfile": ""}
    Pidfile(options).move_aside()
    assert options == {"pidfile": ""}


@pytest_twisted.ensureDeferred
async def test_sockets_that_are_not_listened_on_any_more_are_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        unused = other.detach()
    sockets = Sockets(reactor, [("tcp:9:interface=127.0.0.1", unused)])
    sockets.own()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(unused)


@contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.setblocking(False)
        yield systemd


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, abstract: bool) -> None:
    path = f"{tmp_path}/notify"
    with listening(f"\0{path}" if abstract else path) as systemd:
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{path}" if abstract else path)
        tell_systemd("READY=1")
        assert systemd.recv(100) == b"READY=1"


def test_a_systemd_that_does_not_listen_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, logged: list[str]
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/gone")
    tell_systemd("READY=1")
    assert logged[-1].startswith("systemd is not told READY=1: No such file or directory")


# -- connections whose clients are to go ---------------------------------------------------------


@pytest.fixture
def client(clock: Clock) -> Server:
    return Server(clock)


def answer(client: Server) -> bytes:
    """Answer the request that came last; what its client gets."""
    before = len(client.sent)
    request = client.requests[-1]
    request.start(200, [])
    request.end(b"ok")
    return client.sent[before:]


@only_ours
def test_a_client_that_asks_again_is_answered_and_told_to_come_on_another_connection(
    client: Server,
) -> None:
    client.channel.part(5.0)
    client.clock.advance(4)
    client.send(request_bytes())
    client.clock.advance(30)
    assert b"\r\nConnection: close\r\n" in answer(client)
    client.clock.advance(0)
    assert not client.wire.connected


def test_an_answer_that_has_not_begun_is_the_last_one(client: Server) -> None:
    client.send(request_bytes())
    client.channel.part(5.0)
    assert b"\r\nConnection: close\r\n" in answer(client)


@only_ours
def test_after_an_answer_that_could_not_say_so_there_is_another_one(client: Server) -> None:
    client.send(request_bytes())
    client.requests[0].start(200, [])
    client.channel.part(5.0)
    client.requests[0].end(b"ok")
    client.clock.advance(4)
    assert client.wire.connected
    client.send(request_bytes())
    assert b"\r\nConnection: close\r\n" in answer(client)
    client.clock.advance(0)
    assert not client.wire.connected


@only_ours
def test_a_client_that_is_silent_is_let_go(client: Server) -> None:
    client.channel.part(5.0)
    client.clock.advance(4.9)
    assert client.wire.connected
    client.clock.advance(0.2)
    assert not client.wire.connected


@only_ours
def test_a_header_that_is_coming_has_its_time(client: Server) -> None:
    request = request_bytes()
    client.send(request[:10])
    client.channel.part(5.0)
    client.clock.advance(6)
    client.send(request[10:])
    assert b"\r\nConnection: close\r\n" in answer(client)
