"""One backend connection after the other serves many clients: each gets its own answer, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_twisted
from backend import (
    DONE,
    Close,
    Pause,
    Reset,
    ScriptedBackend,
    Seen,
    json_answer,
    sse_answer,
    sse_event,
)
from proxy import Answer, ProxyHandle, reactor, request_bytes, running_proxy
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater

CHAT = "/v1/chat/completions"
LATE_S = 0.01


def usage(number: int) -> dict[str, int]:
    return {"prompt_tokens": number, "completion_tokens": 1}


def answer_of(name: str, number: int, *, stream: bool) -> bytes:
    """An answer that says whose it is."""
    if not stream:
        return json_answer(200, {"choices": [], "id": name, "usage": usage(number)})
    text = {"choices": [{"index": 0, "delta": {"content": name}}]}
    return sse_answer([text, {"choices": [], "usage": usage(number)}, DONE])


def ask(name: str, *, stream: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": name}]
    return {"model": "m", "messages": messages, "stream": stream}


def shown(name: str, number: int, *, stream: bool) -> bytes:
    """The body that its client gets."""
    if not stream:
        return orjson.dumps({"choices": [], "id": name, "usage": usage(number)})
    return sse_event({"choices": [{"index": 0, "delta": {"content": name}}]}) + DONE


def evil(stream: bool) -> bytes:
    return answer_of("evil", 666, stream=stream)


Steps = Sequence[Any]
#: What a backend does that should send `whole` and nothing else.
MORE: dict[str, Callable[[bytes], Steps]] = {
    "an answer behind it": lambda whole: [whole + evil(False)],
    "a stream behind it": lambda whole: [whole + evil(True)],
    "a byte behind it": lambda whole: [whole + b"x"],
    "an empty line behind it": lambda whole: [whole + b"\r\n"],
    "an answer": lambda whole: [whole, Pause(0), evil(False)],
    "a stream": lambda whole: [whole, Pause(0), evil(True)],
    "an answer, later": lambda whole: [whole, Pause(LATE_S), evil(False), Close()],
    "an interim answer": lambda whole: [whole, Pause(0), b"HTTP/1.1 100 Continue\r\n\r\n"],
    "half an answer": lambda whole: [whole, Pause(0), evil(False)[:-5]],
    "an empty line": lambda whole: [whole, Pause(0), b"\r\n"],
    "a reset": lambda whole: [whole, Reset()],
    "another before it": lambda whole: [evil(False), Pause(0), whole],
}


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
@pytest_twisted.ensureDeferred
async def test_what_comes_behind_an_answer_reaches_no_other_client(
    tmp_path: Path, stream: bool
) -> None:
    def script(seen: Seen) -> Steps:
        name = seen.json()["messages"][0]["content"]
        whole = answer_of(name, 1, stream=stream)
        return MORE[name](whole) if name in MORE else [whole]

    async with ScriptedBackend(script) as backend:
        async with running_proxy(tmp_path, {"m": {"url": backend.url}}) as proxy:
            for name in MORE:
                answer = await proxy.post(CHAT, ask(name, stream=stream))
                # Of what comes first nobody can tell that it is not the answer.
                if name != "another before it":
                    assert answer.body == shown(name, 1, stream=stream)
                await deferLater(reactor, 2 * LATE_S)
                for _ in range(2):
                    answer = await proxy.post(CHAT, ask("good", stream=stream))
                    assert answer.body == shown("good", 1, stream=stream), name
            assert len(proxy.rows()) == 3 * len(MORE)


async def converse(proxy: ProxyHandle, client: int, count: int, *, stream: bool) -> None:
    """One client's requests, one after the other, on its own connection."""
    link = await proxy.open()
    for turn in range(count):
        number = client * count + turn
        link.received = b""
        body = orjson.dumps(ask(f"answer-{number}-", stream=stream))
        link.send(request_bytes("POST", CHAT, body))
        await link.when(lambda received: Answer(received).whole)
        assert link.answer().body == shown(f"answer-{number}-", number, stream=stream)
    await link.close()


@pytest_twisted.ensureDeferred
async def test_clients_at_once_get_each_its_own_answer_on_connections_that_all_use(
    tmp_path: Path,
) -> None:
    clients, count = 16, 20

    def script(seen: Seen) -> Sequence[Any]:
        body = seen.json()
        name = body["messages"][0]["content"]
        whole = answer_of(name, int(name.split("-")[1]), stream=body["stream"])
        cut = int(name.split("-")[1]) * 7 % len(whole)
        return [whole[:cut], Pause(0), whole[cut:]]

    async with ScriptedBackend(script) as backend:
        async with running_proxy(tmp_path, {"m": {"url": backend.url}}) as proxy:
            talks = [
                Deferred.fromCoroutine(converse(proxy, client, count, stream=client % 2 == 0))
                for client in range(clients)
            ]
            await gatherResults(talks, consumeErrors=True)
            prompts = sorted(prompt for (prompt,) in proxy.rows("prompt"))
            assert prompts == list(range(clients * count))
            assert len(backend.connections) <= 2 * clients
            assert set(proxy.rows("state, outcome")) == {("settled", "complete")}
