"""A stand-in LLM server in a process of its own, whose log knows what it did: for `test_kill`.

    python synced_backend.py LOG  -->  prints its port, and serves until its stdin ends

The text of a request is `MARKER PROMPT TOKENS MILLISECONDS`: it says what it costs and how long a
token takes. Each line of the log is on the disk before anything that follows from it is sent:

    asked MARKER UNIX_TIME     before the answer begins
    told MARKER PROMPT TOKENS  before the usage is sent
    made MARKER TOKENS         afterwards: how many tokens were generated, whole or not
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable
from pathlib import Path

import orjson
from speech import BY_PATH, Speech


class Gone(Exception):
    """The client has closed the connection."""


class Log:
    """Lines on the disk; those that come while one fsync runs share the next one."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        self._lines: list[str] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._more = asyncio.Event()

    def add(self, *words: object) -> Awaitable[None]:
        """Write a line; the result is there once it is durable."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.append(" ".join(map(str, words)) + "\n")
        self._waiting.append(written)
        self._more.set()
        return written

    async def run(self) -> None:
        """Write what comes."""
        while await self._more.wait():
            self._more.clear()
            lines, self._lines = self._lines, []
            waiting, self._waiting = self._waiting, []
            await asyncio.to_thread(self._write, "".join(lines).encode())
            for written in waiting:
                if not written.done():
                    written.set_result(None)

    def _write(self, data: bytes) -> None:
        os.write(self._file, data)
        os.fdatasync(self._file)


class Answering:
    """One request's answer."""

    def __init__(
        self, log: Log, speech: Speech, body: dict[str, object], link: asyncio.StreamReader
    ) -> None:
        self.marker, *numbers = speech.heard(body).split()
        self.prompt, self.tokens, delay_ms = map(int, numbers)
        self._delay_s = delay_ms / 1000
        self._log, self._speech, self._link = log, speech, link
        self._made = 0

    async def run(self, out: asyncio.StreamWriter, *, stream: bool) -> None:
        """Answer. Raises Gone."""
        await self._log.add("asked", self.marker, time.time())
        try:
            await (self._stream(out) if stream else self._whole(out))
        finally:
            self._log.add("made", self.marker, self._made)

    async def _token(self) -> None:
        await asyncio.sleep(self._delay_s)
        if self._link.at_eof() or self._link.exception() is not None:
            raise Gone
        self._made += 1

    async def _whole(self, out: asyncio.StreamWriter) -> None:
        for _ in range(self.tokens):
            await self._token()
        await self._log.add("told", self.marker, self.prompt, self.tokens)
        body = self._speech.json(self.prompt, self.tokens)
        out.write(_head("application/json", b"Content-Length: %d" % len(body)) + body)
        await out.drain()

    async def _stream(self, out: asyncio.StreamWriter) -> None:
        out.write(_head("text/event-stream", b"Transfer-Encoding: chunked"))
        out.write(b"".join(map(_chunk, self._speech.begin(self.prompt))))
        for _ in range(self.tokens):
            await self._token()
            out.write(_chunk(self._speech.token(None)))
            await out.drain()
        await self._log.add("told", self.marker, self.prompt, self.tokens)
        ending = self._speech.end(self.prompt, self.tokens)
        out.write(b"".join(map(_chunk, ending)) + b"0\r\n\r\n")
        await out.drain()


def _head(content_type: str, framing: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n%b\r\n\r\n" % (content_type.encode(), framing)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def _request(link: asyncio.StreamReader) -> tuple[str, bytes]:
    head = (await link.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = 0
    if (at := head.find("content-length:")) >= 0:
        length = int(head[at + 15 :].split()[0])
    return head.split()[1], await link.readexactly(length)


async def _serve(log: Log, link: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
    try:
        while True:
            path, raw = await _request(link)
            if path not in BY_PATH:
                out.write(_head("application/json", b"Content-Length: 2") + b"{}")
                continue
            body = orjson.loads(raw)
            answering = Answering(log, BY_PATH[path], body, link)
            await answering.run(out, stream=body.get("stream", False))
    except (Gone, asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        out.close()


async def main(path: Path) -> None:
    log = Log(path)
    writing = asyncio.create_task(log.run())
    server = await asyncio.start_server(
        lambda link, out: _serve(log, link, out), "127.0.0.1", 0, backlog=1024
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await log.add("stopped")
    writing.cancel()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
