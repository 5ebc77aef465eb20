"""The clients that people use, run in threads against a server in this process."""

from __future__ import annotations

import io
import wave
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import anthropic
import openai
import orjson
import treq
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.web.client import Agent
from twisted.web.http_headers import Headers

from llmproxy.demo import DemoServer

reactor: Any = _reactor
T = TypeVar("T")

BACKEND_TOKEN = "backend-token"
#: What the demo server says is the time.
NOW = 1_700_000_000.5
HELLO: Any = [{"role": "user", "content": "Hello over there"}]  # 3 tokens
HELLO_ANSWER = "Answer 1: you said <Hello over there> which is 3 words."  # 11 tokens
MESSAGE: dict[str, Any] = {"model": "demo-chat", "max_tokens": 100, "messages": HELLO}


@dataclass(frozen=True)
class Reply:
    """An answer as plain HTTP has it."""

    status: int
    headers: Headers
    body: bytes

    def json(self) -> Any:
        """The body, parsed."""
        return orjson.loads(self.body)

    def header(self, name: str) -> str | None:
        """The header's first value."""
        values = self.headers.getRawHeaders(name)
        return values[0] if values else None


class Clients:
    """Clients of one server. `ask` and `ask_anthropic` run `call` in a thread; none retries."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self.token = token

    def ask(self, call: Callable[[openai.OpenAI], T], token: str | None = None) -> Deferred[T]:
        """What `call` makes of an OpenAI client."""

        def asked() -> T:
            with openai.OpenAI(
                base_url=f"{self.url}/v1", api_key=token or self.token, max_retries=0, timeout=10
            ) as client:
                return call(client)

        return deferToThread(asked)

    def ask_anthropic(
        self, call: Callable[[anthropic.Anthropic], T], **credentials: str
    ) -> Deferred[T]:
        """What `call` makes of an Anthropic client; `credentials`: `api_key` or `auth_token`."""

        def asked() -> T:
            with anthropic.Anthropic(
                base_url=self.url, max_retries=0, timeout=10, **self._credentials(credentials)
            ) as client:
                return call(client)

        return deferToThread(asked)

    def _credentials(self, given: Mapping[str, str]) -> dict[str, Any]:
        # What is not given would be taken from the environment.
        return {"auth_token": None, "api_key": None, **(given or {"api_key": self.token})}

    async def request(self, method: str, path: str, **options: Any) -> Reply:
        """A request by treq, on a connection of its own; with the token, unless told otherwise."""
        headers = {"Authorization": [f"Bearer {self.token}"]}
        headers.update(options.pop("headers", {}))
        url = f"{self.url}{path}"
        agent = Agent(reactor)
        response = await treq.request(method, url, headers=Headers(headers), agent=agent, **options)
        return Reply(response.code, response.headers, await response.content())

    async def get(self, path: str) -> Reply:
        """A GET."""
        return await self.request("GET", path)

    async def post(self, path: str, body: object) -> Reply:
        """A POST; `body` is bytes, or what becomes JSON."""
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        headers = {"Content-Type": ["application/json"]}
        return await self.request("POST", path, data=data, headers=headers)


@asynccontextmanager
async def listening(server: DemoServer) -> AsyncIterator[Clients]:
    """The server at a free port, and clients for it."""
    port = reactor.listenTCP(0, server.site(reactor), interface="127.0.0.1")
    yield Clients(f"http://127.0.0.1:{port.getHost().port}", server.token or "")
    await port.stopListening()


def wav(seconds: float) -> bytes:
    """Silence, in 16 bits at 8 kHz."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(b"\0\0" * int(seconds * 8000))
    return file.getvalue()
