"""`--demo`: the real proxy in front of a stand-in LLM server, with a throwaway database.

Everything is on loopback and nothing is kept. Each bill is shown when it is committed.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IListeningPort

from llmproxy import config
from llmproxy.config import Config
from llmproxy.demo import DemoServer, sample_backends
from llmproxy.model import Entry, Event, Settlement, events
from llmproxy.proxy import Proxy, port_of
from llmproxy.storage.journal import SQLiteLedger
from llmproxy.storage.sqlite import connect, prepare

#: (key, expiry): one that has ended, one without end, one with a distant end.
SAMPLE_KEYS = (("token1", "2024-01-01"), ("token2", None), ("token3", "2124-01-01"))
#: A token a time that eyes can follow.
TOKEN_DELAY_S = 0.03
PORT, ADMIN = 8080, "tcp:8081:interface=127.0.0.1"

GREETING = """
Try it, in another terminal:

  curl -N http://127.0.0.1:{port}/v1/chat/completions \\
    -H 'Authorization: Bearer token2' -H 'Content-Type: application/json' \\
    -d '{{"model": "demo-chat", "stream": true,
         "messages": [{{"role": "user", "content": "Tell me about proxies"}}]}}'

The bill shows here. Ctrl-C ends the demo.
"""


def make_demo(reactor: Any) -> Proxy:
    """The demo's service; its folder and its LLM server live as long as it does."""
    folder = Path(tempfile.mkdtemp(prefix="llmproxy-demo-"))
    server: IListeningPort = reactor.listenTCP(
        0, DemoServer(delay=TOKEN_DELAY_S).site(reactor), interface="127.0.0.1"
    )
    settings = _settings(folder, port_of(server))
    _add_sample_keys(folder / "demo.sqlite")
    return _Demo(settings, reactor, folder, server)


def _settings(folder: Path, llm_port: int) -> Config:
    return config.parse(
        {
            "host": "127.0.0.1",
            "port": PORT,
            "admin": {"listen": [ADMIN]},
            "db": {"uri": "sqlite://demo.sqlite"},
            "backends": sample_backends(f"http://127.0.0.1:{llm_port}"),
        },
        folder,
    )


def _add_sample_keys(path: Path) -> None:
    prepare(path)
    connection = connect(path)
    for key, expires in SAMPLE_KEYS:
        connection.execute(
            "INSERT INTO api_key (id, secret, type, expires, comment) VALUES (?, ?, 'LLM', ?, ?)",
            (f"sample-{key}", hashlib.sha256(key.encode()).hexdigest(), expires, key),
        )
    connection.close()


class _Demo(Proxy):
    """A proxy that shows its bills, and takes its folder with it when it goes."""

    def __init__(
        self, settings: Config, reactor: Any, folder: Path, server: IListeningPort
    ) -> None:
        super().__init__(lambda: settings, reactor)
        self._folder = folder
        self._server = server

    async def _start(self) -> None:
        await super()._start()
        _show_bills(self.stores.ledger)
        _show(GREETING.format(port=port_of(self.ports[0])))

    async def _stop(self) -> None:
        await super()._stop()
        self._server.stopListening()
        shutil.rmtree(self._folder, ignore_errors=True)


def _show_bills(ledger: SQLiteLedger) -> None:
    settle = ledger.settle

    def settle_and_show(entry: Entry, settlement: Settlement) -> Deferred[None]:
        due = events(entry, settlement)
        return settle(entry, settlement).addCallback(lambda _: _show(_bill(due)))

    ledger.settle = settle_and_show  # type: ignore[method-assign]


def _show(text: str) -> None:
    """To the terminal: twistd has turned `sys.stdout` into a log by now."""
    print(text, file=sys.__stdout__, flush=True)


def _bill(due: Sequence[Event]) -> str:
    if not due:
        return "bill: nothing to pay"
    lines = [f"bill for request {due[0].rid} (key {due[0].account.key_id}):"]
    return "\n".join([*lines, *(f"  {e.product:<32} {e.quantity:>8}" for e in due)])
