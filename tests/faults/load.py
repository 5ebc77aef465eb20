"""Many clients at once, each with a key of its own, that note what they asked and what they got."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from speech import ALL, Speech


@dataclass
class Asked:
    """A request, and what came of it.

    generation: which run of the proxy it was sent to. rid: its X-Request-ID, if a header came.
    finished: the answer came to its own end, body and framing. began_at, ended_at: when it was sent
    and when that was (Unix time). ms: how long the backend takes for each token. closes: the answer
    said that it is the connection's last.
    """

    marker: str
    client: int
    generation: int
    speech: Speech
    stream: bool
    prompt: int
    tokens: int
    sent: bool = False
    rid: str | None = None
    status: int | None = None
    body: bytes = field(default=b"", repr=False)
    finished: bool = False
    closes: bool = False
    ms: int = 0
    began_at: float = 0.0
    ended_at: float = 0.0

    @property
    def text(self) -> str:
        return f"{self.marker} {self.prompt} {self.tokens}"

    @property
    def added_s(self) -> float:
        """How much longer it took than the backend's tokens do."""
        return self.ended_at - self.began_at - self.tokens * self.ms / 1000


class Broken(Exception):
    """The connection ended before the answer did."""


@dataclass
class Plan:
    """What clients ask for. `pick` gives (speech, stream, tokens, milliseconds for each)."""

    random: random.Random
    models: Sequence[str] = ("m",)
    max_tokens: int = 24
    max_ms: int = 120

    def pick(self) -> tuple[Speech, bool, int, int]:
        speech = self.random.choice(ALL)
        stream = speech.streams and self.random.random() < 0.75
        tokens = self.random.randint(1, self.max_tokens) if speech.streams else 1
        return speech, stream, tokens, self.random.randint(5, self.max_ms)


class Load:
    """`clients` connections to `port`, each with one request after the other.

    States: stopped; running in a generation, which ends for a client when its connection breaks.
    """

    def __init__(self, port: int, clients: int, plan: Plan) -> None:
        self.port = port
        self.asked: list[Asked] = []
        self.generation = -1
        self._clients = clients
        self._plan = plan
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin a generation."""
        self.generation += 1
        self._tasks = [asyncio.create_task(self._client(n)) for n in range(self._clients)]

    async def wait(self) -> None:
        """Wait until every client's connection has broken."""
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result

    async def stop(self) -> None:
        """Hang up, all of them."""
        for task in self._tasks:
            task.cancel()
        await self.wait()

    @property
    def connected(self) -> int:
        """How many clients' connections have not broken."""
        return sum(not task.done() for task in self._tasks)

    @property
    def known(self) -> int:
        """How many clients have had an answer, so that their keys are known."""
        return len({each.client for each in self.asked if each.finished})

    @staticmethod
    def key(client: int) -> str:
        """The key of one of the clients."""
        return f"key-{client}"

    async def _client(self, number: int) -> None:
        await asyncio.sleep(self._plan.random.random() * 0.1)  # not all in one moment
        out = None
        try:
            link, out = await asyncio.open_connection("127.0.0.1", self.port)
            while True:
                await self._ask(number, link, out)
        except (Broken, asyncio.IncompleteReadError, OSError):
            pass
        finally:
            if out is not None:
                out.transport.abort()

    async def _ask(
        self, number: int, link: asyncio.StreamReader, out: asyncio.StreamWriter
    ) -> Asked:
        speech, stream, tokens, ms = self._plan.pick()
        marker = f"{self.generation}-{number}-{len(self.asked)}"
        prompt = self._plan.random.randint(1, 999)
        asked = Asked(marker, number, self.generation, speech, stream, prompt, tokens, ms=ms)
        self.asked.append(asked)
        body = speech.request(
            self._plan.random.choice(self._plan.models), f"{asked.text} {ms}", stream=stream
        )
        head = (
            f"POST {speech.path} HTTP/1.1\r\nHost: p\r\nAuthorization: Bearer {self.key(number)}"
            f"\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        asked.began_at = time.time()
        out.write(head.encode() + body)
        asked.sent = True
        await _answer(asked, link)
        return asked


async def _answer(asked: Asked, link: asyncio.StreamReader) -> None:
    lines = (await link.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    asked.status = int(lines[0].split()[1])
    pairs = (line.split(": ", 1) for line in lines[1:] if line)
    fields = {name.lower(): value for name, value in pairs}
    asked.rid = fields["x-request-id"]
    asked.closes = fields.get("connection") == "close"
    if "content-length" in fields:
        asked.body = await link.readexactly(int(fields["content-length"]))
    else:
        await _chunks(asked, link)
    last = asked.speech.last if asked.stream and asked.status == 200 else b"}"
    asked.finished = asked.body.endswith(last)
    asked.ended_at = time.time()


async def _chunks(asked: Asked, link: asyncio.StreamReader) -> None:
    while True:
        size = int(await link.readuntil(b"\r\n"), 16)
        data = (await link.readexactly(size + 2))[:-2]
        if not size:
            return
        asked.body += data


async def until(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Wait for it; how many seconds it took. Raises TimeoutError."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise TimeoutError(f"{what} took longer than {timeout_s} s")
        await asyncio.sleep(0.01)
    return time.monotonic() - began
