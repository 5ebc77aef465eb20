"""`llmproxyctl backends`: asked of a real proxy, and of none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from backend import ScriptedBackend, json_answer
from ctl_tool import Tool
from ports import free_port
from proxy import running_proxy
from twisted.internet import reactor as _reactor
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from llmproxy import config
from llmproxy.ctl.backends import admin_url
from llmproxy.ctl.common import CommandError

reactor: Any = _reactor


@pytest.fixture
def tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(tmp_path, capsys)


@pytest_twisted.ensureDeferred
async def test_each_server_is_shown_as_the_proxy_sees_it(tmp_path: Path, tool: Tool) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    async with ScriptedBackend(json_answer(500, {})) as backend:
        chat = {"urls": [gone, backend.url], "circuit_failures": 1, "device": "d"}
        async with running_proxy(tmp_path, {"chat": chat, "one": {"url": backend.url}}) as proxy:
            tool.configure(
                f'[admin]\nlisten = ["tcp:{proxy.admin_port}:interface=127.0.0.1"]\n'
                f'[backends.chat]\nurls = ["{gone}", "{backend.url}"]\ndevice = "d"\n'
                f'[backends.one]\nurl = "{backend.url}"\ndevice = "d"\n'
            )
            await deferLater(reactor, 0.1)
            body = {"model": "chat", "messages": []}
            assert (await proxy.post("/v1/chat/completions", body)).status == 502
            shown = await deferToThread(tool.json, "backends")
            table = await deferToThread(tool.run, "backends")
    assert [tuple(row.values()) for row in shown] == [
        ("chat", gone, "down", 0, "closed", 0),
        ("chat", backend.url, "up", 0, "open", 0),
        ("one", backend.url, "up", 0, "closed", 0),
    ]
    assert table.splitlines()[0].split() == [
        "MODEL", "SERVER", "STATE", "IN_FLIGHT", "CIRCUIT", "WAITING",
    ]  # fmt: skip


def test_a_proxy_that_does_not_run_is_told(tool: Tool) -> None:
    tool.run("backends", "--url", f"http://127.0.0.1:{free_port()}", code=1)
    assert "Connection refused" in tool.err
    tool.run("backends", "--url", "no url", code=1)


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        (["tcp:8081:interface=127.0.0.1"], "http://127.0.0.1:8081"),
        (["unix:/run/x.sock", "tcp:9000"], "http://127.0.0.1:9000"),
        (["tcp:port=9000:interface=\\:\\:1:backlog=9"], "http://[::1]:9000"),
        (["tcp:9000:backlog=9:interface=10.0.0.1"], "http://10.0.0.1:9000"),
    ],
)
def test_the_admin_site_is_found_in_the_configuration(listen: list[str], url: str) -> None:
    assert admin_url(config.parse({"admin": {"listen": listen}})) == url


@pytest.mark.parametrize("listen", [[], ["unix:/run/x.sock"]])
def test_an_admin_site_without_a_port_must_be_named(listen: list[str]) -> None:
    with pytest.raises(CommandError, match="--url"):
        admin_url(config.parse({"admin": {"listen": listen}}))
