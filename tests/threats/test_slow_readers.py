"""Clients that take their answers slowly, or not at all: little is kept for each, none stays for
ever, and all are billed.

A real process, whose memory is looked at all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from backend import CHUNKED, DONE, LAST_CHUNK, chunk, head, json_answer, sse_event
from figures import report
from load import Load, until
from proxy import Answer, request_bytes
from rig import Rig
from speech import CHAT
from tally import LONG

KIB = 1024
COUNT = 1000 if LONG else 90
#: How long a client may leave untaken what waits for it.
PATIENCE_S = 10.0 if LONG else 3.0
#: An answer is longer than all that kernel and proxy keep of it.
TEXT = chunk(sse_event({"choices": [{"index": 0, "delta": {"content": "x" * 8000}}]}))
TIMES = 64
USED = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": TIMES}}
#: What a client may cost: what waits in its transport, one read of its backend's, and its objects.
EACH = 96 * KIB
ASK = request_bytes("POST", CHAT.path, CHAT.request("m", "hi", stream=True), key=Load.key(0))


async def answer(link: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
    """One connection of a backend that sends as fast as it is taken."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            request = await link.readuntil(b"\r\n\r\n")
            if request.startswith(b"GET"):
                out.write(json_answer(200, {}))
                continue
            length = request.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            await link.readexactly(int(length))
            out.write(head(200, CHUNKED))
            for _ in range(TIMES):
                out.write(TEXT)
                await out.drain()
            out.write(chunk(sse_event(USED)) + chunk(DONE) + LAST_CHUNK)
    out.close()


@contextlib.asynccontextmanager
async def backend() -> AsyncIterator[str]:
    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=COUNT)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def rss(process: subprocess.Popen[bytes]) -> int:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096


class Peak:
    """The most memory that a process has used since `before`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.before = self.highest = rss(process)
        self._process = process

    async def watch(self) -> None:
        while True:
            self.highest = max(self.highest, rss(self._process))
            await asyncio.sleep(0.02)


class Reader:
    """A client that takes little. Its kernel takes as little as it can be told to; and as the
    segments for it are small, so is what the proxy's kernel keeps for it."""

    def __init__(self, port: int, way: str) -> None:
        self.received = b""
        self._port, self._way = port, way

    async def run(self) -> None:
        """Ask, take what this one takes, and leave once the proxy has cut it off."""
        loop = asyncio.get_running_loop()
        with socket.socket() as link:
            link.setblocking(False)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
            await loop.sock_connect(link, ("127.0.0.1", self._port))
            await loop.sock_sendall(link, ASK)
            if self._way == "half-close":
                self.received += await loop.sock_recv(link, 1)  # it has been sent on by now
                link.shutdown(socket.SHUT_WR)
            for _ in range(int(2 * PATIENCE_S)):
                if self._way == "a byte a second":
                    self.received += await loop.sock_recv(link, 1)
                await asyncio.sleep(1)
            with contextlib.suppress(ConnectionError):
                while data := await loop.sock_recv(link, 64 * KIB):
                    self.received += data


WAYS = ("never", "a byte a second", "half-close")


@contextlib.asynccontextmanager
async def watched(peak: Peak) -> AsyncIterator[None]:
    watching = asyncio.create_task(peak.watch())
    yield
    watching.cancel()


async def ask_as_usual(port: int) -> float:
    """How long a client waits that takes its answer."""
    began = time.monotonic()
    link, out = await asyncio.open_connection("127.0.0.1", port, limit=KIB * KIB)
    out.write(ASK)
    got = await link.readuntil(LAST_CHUNK)
    out.close()
    whole = Answer(got)
    assert (whole.status, whole.whole) == (200, True)
    assert whole.body.endswith(DONE)
    return time.monotonic() - began


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path, clients=1, command=["-m", "llmproxy"])
    yield rig
    assert "Traceback" not in rig.output()


@pytest.mark.timeout(240)
def test_readers_that_take_little_are_bounded_in_memory_cut_off_and_billed(rig: Rig) -> None:
    async def scene() -> None:
        async with backend() as url:
            text = rig.configuration(url)
            rig.config.write_text(f"timeout_read = {PATIENCE_S}\n{text}")
            async with rig.running() as process:
                await ask_as_usual(rig.port)
                peak = Peak(process)
                readers = [Reader(rig.port, WAYS[n % len(WAYS)]) for n in range(COUNT)]
                async with watched(peak):
                    began = time.monotonic()
                    reading = asyncio.gather(*(reader.run() for reader in readers))
                    waits = [await ask_as_usual(rig.port) for _ in range(5)]
                    await until(lambda: closed(rig) == COUNT + 6, 60, "all rows to be closed")
                    took = time.monotonic() - began
                    await reading  # so all were cut off
                grown = peak.highest - peak.before
                assert grown < COUNT * EACH + 4 * KIB * KIB
                assert not any(DONE in reader.received for reader in readers)
                assert max(waits) < PATIENCE_S
                rows = rig.query("SELECT state, outcome, prompt, completion FROM ledger")
                assert set(rows) == {
                    ("settled", "client_gone", 3, TIMES),
                    ("settled", "complete", 3, TIMES),
                }
                outcomes = Counter(row[1] for row in rows)
                assert outcomes["complete"] == 6
                report(
                    "slow readers",
                    clients=COUNT,
                    kib_each=round(grown / COUNT / KIB, 1),
                    cut_after_s=round(took, 1),
                )

    asyncio.run(scene())


def closed(rig: Rig) -> int:
    return int(rig.query("SELECT count(*) FROM ledger WHERE state <> 'open'")[0][0])
