"""Clients that are slow in four ways, sixty at a time in each, beside one that is not.

The ways are those of slowhttptest (a package of Debian's, github.com/shekyan/slowhttptest): headers
that drip, bodies that drip, a header of many ranges, answers that nobody takes. It is run where it
is there, and always in the long form; clients of our own do the same with a key, which gets them
further.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import orjson
import pytest
from channels import only_ours
from load import Load
from rig import Rig
from tally import LONG, Tally

EACH = 60
SECONDS = 30.0 if LONG else 2.0
#: How long the good client may wait for an answer, on a machine that is busy with all of them.
PATIENCE_S = 2.0
PATH = "/v1/chat/completions"
TOOL = shutil.which("slowhttptest")


def head(method: str = "POST", *fields: str) -> bytes:
    usual = [f"{method} {PATH} HTTP/1.1", "Host: a", f"Authorization: Bearer {Load.key(0)}"]
    return "\r\n".join([*usual, "Content-Type: application/json", *fields, ""]).encode()


@contextlib.asynccontextmanager
async def connection(
    port: int, buffer: int = 2**17
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    plain = socket.socket()
    try:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        plain.setblocking(False)
        await asyncio.get_running_loop().sock_connect(plain, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=plain, limit=buffer)
    except BaseException:  # its end, most often: it is cancelled
        plain.close()
        raise
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def drip(port: int, first: bytes, piece: bytes) -> None:
    async with connection(port) as (_, writer):
        writer.write(first)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.2)


async def slow_headers(port: int) -> None:
    await drip(port, head(), b"X: y\r\n")


async def slow_body(port: int) -> None:
    await drip(port, head("POST", "Content-Length: 8192") + b"\r\n", b" ")


async def many_ranges(port: int) -> None:
    ranges = ",".join(f"5-{n}" for n in range(1500))
    while True:
        async with connection(port) as (reader, writer):
            writer.write(head("HEAD", f"Range: bytes=0-,{ranges}") + b"\r\n")
            await reader.read(100)
        await asyncio.sleep(0.2)


async def slow_read(port: int) -> None:
    async with connection(port, buffer=1) as (reader, writer):
        for _ in range(1000):
            writer.write(head("GET").replace(PATH.encode(), b"/v1/models") + b"\r\n")
        while True:
            await asyncio.sleep(1)
            await reader.read(1)


WAYS: dict[str, Callable[[int], Coroutine[Any, Any, None]]] = {
    "slow headers": slow_headers,
    "slow body": slow_body,
    "many ranges": many_ranges,
    "slow read": slow_read,
}


class Good:
    """A client that asks for a completion again and again, and notes how long each takes."""

    def __init__(self, port: int) -> None:
        self.took: list[float] = []
        self.statuses: set[bytes] = set()
        self._port = port

    async def run(self, seconds: float) -> None:
        body = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "good 3 2 5"}]})
        request = head("POST", f"Content-Length: {len(body)}") + b"\r\n" + body
        until = time.monotonic() + seconds
        async with connection(self._port) as (reader, writer):
            while (began := time.monotonic()) < until:
                writer.write(request)
                top = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
                size = int(re.search(rb"(?i)content-length: (\d+)", top)[1])  # type: ignore[index]
                await reader.readexactly(size)
                self.took.append(time.monotonic() - began)
                self.statuses.add(top.split()[1])
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def proxy(folder: Path) -> AsyncIterator[int]:
    """The port of a proxy in a process of its own."""
    rig = Rig(folder, clients=1, command=["-m", "llmproxy"])
    with rig.backend() as url:
        rig.configure(url)
        async with rig.running():
            yield rig.port
    assert rig.open_rows() == 0


def judge(suite: str, ways: dict[str, bool], good: Good) -> None:
    verdicts = Tally(suite)
    for way, passed in ways.items():
        verdicts.add(way, passed)
    slowest = max(good.took)
    verdicts.add("the good client", good.statuses == {b"200"}, f"{good.statuses}")
    verdicts.add("in time", slowest < PATIENCE_S, f"{slowest:.1f} s")
    verdicts.check()
    assert len(good.took) > 10 * SECONDS


async def were_there(crowd: list[asyncio.Task[None]]) -> bool:
    """Whether they all did what they were to do, until they were told to stop or were cut off."""
    for task in crowd:
        task.cancel()
    ended = await asyncio.gather(*crowd, return_exceptions=True)
    expected = (asyncio.CancelledError, ConnectionError)
    return all(isinstance(each, expected) for each in ended)


@only_ours
def test_slow_clients_with_a_key_slow_nobody_else(tmp_path: Path) -> None:
    async def play() -> tuple[dict[str, bool], Good]:
        async with proxy(tmp_path) as port:
            good = Good(port)
            crowds = {
                way: [asyncio.create_task(act(port)) for _ in range(EACH)]
                for way, act in WAYS.items()
            }
            await asyncio.sleep(0.2)
            await good.run(SECONDS)
            cut_off = all(task.done() for task in crowds["slow headers"])
            verdicts = {way: await were_there(crowd) for way, crowd in crowds.items()}
            return verdicts | ({"cut off after 10 s": cut_off} if LONG else {}), good

    judge("slow clients", *asyncio.run(play()))


MODES = {"slow headers": "-H", "slow body": "-B", "many ranges": "-R", "slow read": "-X"}


async def slowhttptest(mode: str, port: int) -> bool:
    """Whether it finds that the server serves others all the time."""
    assert TOOL is not None
    flags = ["-c", EACH, "-r", EACH, "-i", 1, "-l", int(SECONDS), "-p", 3]
    url = f"http://127.0.0.1:{port}{PATH}"
    running = await asyncio.create_subprocess_exec(
        TOOL, mode, *map(str, flags), "-u", url, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await running.communicate()
    plain = re.sub(rb"\x1b\[[0-9;]*[A-Za-z]", b"", said)  # without its colours
    found = re.findall(rb"service available: *(YES|NO)", plain)
    return bool(found) and set(found) == {b"YES"}


def test_slowhttptest_slows_nobody_else(tmp_path: Path) -> None:
    if TOOL is None:
        assert not LONG, "this needs slowhttptest: apt-get install slowhttptest"
        pytest.skip("slowhttptest is not there: apt-get install slowhttptest")

    async def play() -> tuple[dict[str, bool], Good]:
        async with proxy(tmp_path) as port:
            good = Good(port)
            attacks = [asyncio.create_task(slowhttptest(mode, port)) for mode in MODES.values()]
            await good.run(SECONDS)
            verdicts = await asyncio.gather(*attacks)
            return dict(zip(MODES, verdicts, strict=True)), good

    judge("slowhttptest", *asyncio.run(play()))
