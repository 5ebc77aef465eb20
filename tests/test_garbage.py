"""What a request and a connection leave behind is freed at once, without a search for garbage."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import pytest_twisted
from backend import DONE, ScriptedBackend, json_answer, sse_answer
from proxy import Client, ProxyHandle, request_bytes, running_proxy

from llmproxy import garbage, reactor
from llmproxy.site import VARIABLE

CHAT = "/v1/chat/completions"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
TEXT = {"choices": [{"index": 0, "delta": {"content": "Hello"}}]}
ANSWERS = {
    False: json_answer(200, {"choices": [], "usage": USAGE}),
    True: sse_answer([TEXT, {"choices": [], "usage": USAGE}, DONE]),
}


@pytest.fixture
def kept_garbage() -> Iterator[None]:
    """The collector keeps what it finds in `gc.garbage`."""
    yield
    gc.set_debug(0)
    gc.garbage.clear()


def ours() -> Counter[str]:
    """The types of ours among the garbage, but for what hangs on Twisted's connecting endpoints."""
    kinds = (type(each) for each in gc.garbage)
    found = Counter(kind.__qualname__ for kind in kinds if kind.__module__.startswith("llmproxy"))
    for kind in (reactor.Connector, reactor.Client):
        del found[kind.__qualname__]
    return found


async def ask(client: Client, stream: bool) -> None:
    client.received = b""
    body = orjson.dumps({"model": "chat", "stream": stream, "messages": []})
    client.send(request_bytes("POST", CHAT, body))
    end = b"0\r\n\r\n" if stream else b"}}"
    await client.when(lambda received: received.endswith(end))


async def once(proxy: ProxyHandle, stream: bool) -> None:
    client = await proxy.open()
    for _ in range(3):
        await ask(client, stream)
    await client.close()


@pytest.mark.skipif(
    os.environ.get(VARIABLE) == "twisted",
    reason="Twisted's channel and its connection know each other",
)
@pytest.mark.usefixtures("kept_garbage")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("servers", [1, 2])
@pytest_twisted.ensureDeferred
async def test_requests_and_connections_leave_nothing_to_collect(
    tmp_path: Path, stream: bool, servers: int
) -> None:
    async with ScriptedBackend([ANSWERS[stream]]) as one, ScriptedBackend([ANSWERS[stream]]) as two:
        urls = [one.url, two.url][:servers]
        async with running_proxy(tmp_path, {"chat": {"urls": urls}}) as proxy:
            await leaves_nothing(proxy, stream)


async def leaves_nothing(proxy: ProxyHandle, stream: bool) -> None:
    await once(proxy, stream)
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.garbage.clear()
    for _ in range(5):
        await once(proxy, stream)
    proxy.proxy.backends.close()  # the idle connections to the backend
    await once(proxy, stream)
    gc.collect()
    assert ours() == Counter()


def test_the_collector_is_told_to_look_less_often() -> None:
    before = gc.get_threshold()
    try:
        garbage.collect_rarely()
        assert gc.get_threshold() == garbage.THRESHOLDS
        assert gc.isenabled()
    finally:
        gc.set_threshold(*before)
