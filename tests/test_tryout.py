"""`--demo`: what it prints can be pasted, streams an answer, and shows the bill."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_twisted
from proxy import Answer, ProxyHandle, reactor, request_bytes

from llmproxy import tryout
from llmproxy.proxy import Proxy


@asynccontextmanager
async def demo() -> AsyncIterator[ProxyHandle]:
    proxy: Proxy = tryout.make_demo(reactor)
    proxy.startService()
    try:
        await proxy.started
        database = proxy.config.db.sqlite_path
        assert database is not None
        yield ProxyHandle(proxy, database)
    finally:
        await proxy.stopService()


async def paste(handle: ProxyHandle, printed: str) -> Answer:
    """What the printed `curl` would do."""
    start = printed.index("curl ")
    line = printed[start : printed.index("\n\n", start)].replace("\\\n", " ")
    _, _, url, *options = shlex.split(line)
    pairs = list(zip(options[::2], options[1::2], strict=True))
    fields = dict(value.split(": ", 1) for option, value in pairs if option == "-H")
    (body,) = (value.encode() for option, value in pairs if option == "-d")
    assert url.startswith(handle.url + "/")
    path = url.removeprefix(handle.url)
    return await handle.send(request_bytes("POST", path, body, key=None, fields=fields))


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any that are free."""
    monkeypatch.setattr(tryout, "PORT", 0)
    monkeypatch.setattr(tryout, "ADMIN", "tcp:0:interface=127.0.0.1")
    monkeypatch.setattr(tryout, "TOKEN_DELAY_S", 0.0)


@pytest_twisted.ensureDeferred
async def test_the_printed_line_streams_an_answer_and_its_bill_shows(ports: None, capfd: Any):
    async with demo() as handle:
        printed = capfd.readouterr().out
        answer = await paste(handle, printed)
        assert answer.status == 200
        assert answer.body.endswith(b"data: [DONE]\n\n")
        bill = handle.bill()
        shown = capfd.readouterr().out
    assert set(bill) == {"demo-chat/demo/prompt", "demo-chat/demo/completion"}
    for product, quantity in bill.items():
        (line,) = (line for line in shown.splitlines() if product in line)
        assert line.split() == [product, str(quantity)]


@pytest_twisted.ensureDeferred
async def test_nothing_of_the_demo_is_kept(ports: None, capfd: Any):
    async with demo() as handle:
        assert handle.database.exists()
    assert not handle.database.parent.exists()
