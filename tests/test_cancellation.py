"""The sweep: an exchange is disturbed at its first wait, at its second, and so on to its end.

Everything that an exchange waits for is a step of this test: a look-up, a commit, a connection, a
piece of the request or of the answer. Whenever the client leaves, or the proxy stops: one row at
most, settled once, and nothing left behind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import orjson
import pytest
from backend import CHUNKED, DONE, JSON, LAST_CHUNK, chunk, head, raw_answer, sse_event
from memory import Backend, Server, request_bytes
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from zope.interface import implementer

from llmproxy import config
from llmproxy.auth import Authenticator
from llmproxy.backends import Backends
from llmproxy.budgets import Budgets
from llmproxy.checkpoints import Checkpoints
from llmproxy.config import KeyLimits, Prices
from llmproxy.exchange import Services
from llmproxy.limits import Limits
from llmproxy.metrics import Metrics
from llmproxy.model import (
    Account,
    Amount,
    Attempt,
    Counts,
    Entry,
    Outcome,
    Price,
    Settlement,
    Share,
    Spending,
    State,
    utcnow,
)
from llmproxy.prices import PriceList
from llmproxy.resource import make_root
from llmproxy.storage import IAccounts, ILedger, IShares, ISpending
from llmproxy.storage.memory import MemoryAccounts, MemoryLedger, MemoryShares, MemoryStore
from llmproxy.upstream import Upstream

T = TypeVar("T")
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
COMPLETION = orjson.dumps({"choices": [], "usage": USAGE})
BILL = {"m/gpu/prompt": 3, "m/gpu/completion": 2}


@dataclass(frozen=True)
class Case:
    """A request in pieces, its answer in pieces, and what is billed for it when it is whole."""

    request: list[bytes]
    answer: list[bytes]
    end: bytes
    bill: dict[str, int]


def _asked(stream: bool) -> list[bytes]:
    body = orjson.dumps({"model": "m", "messages": [], "stream": stream})
    data = request_bytes(
        b"/v1/chat/completions", body, b"Authorization: Bearer k", b"Content-Type: application/json"
    )
    top = len(data) - len(body)
    return [data[:20], data[20:top], data[top:-5], data[-5:]]


def _uploaded() -> list[bytes]:
    def field(disposition: bytes, value: bytes) -> bytes:
        return b"--X\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (disposition, value)

    body = [
        field(b'name="model"', b"m"),
        field(b'name="file"; filename="a"', bytes(2000))[:-1000],
        bytes(998) + b"\r\n",
        b"--X--\r\n",
    ]
    fields = b"Authorization: Bearer k", b"Content-Type: multipart/form-data; boundary=X"
    length = b"Content-Length: %d" % sum(map(len, body))
    return [request_bytes(b"/v1/audio/transcriptions", b"", length, *fields), *body]


def _event(text: str) -> bytes:
    return chunk(sse_event({"choices": [{"index": 0, "delta": {"content": text}}]}))


HEARD = orjson.dumps({"text": "hello", "duration": 1.5})
CASES = {
    "whole": Case(
        _asked(False),
        [*(raw_answer(200, COMPLETION, JSON)[i : i + 40] for i in range(0, 130, 40))],
        COMPLETION,
        BILL,
    ),
    "stream": Case(
        _asked(True),
        [
            head(200, CHUNKED),
            _event("Hel"),
            _event("lo"),
            chunk(sse_event({"choices": [], "usage": USAGE})),
            chunk(DONE),
            LAST_CHUNK,
        ],
        LAST_CHUNK,
        BILL,
    ),
    "form": Case(
        _uploaded(), [raw_answer(200, HEARD, JSON)], b'{"text":"hello"}', {"m/gpu/transcription": 2}
    ),
}


class Gate:
    """What is waited for, until its step comes."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def later(self, act: Callable[[], Deferred[T]]) -> Deferred[T]:
        """What `act` gives, when its step has come; the work is done even if nobody waits."""
        done: Deferred[T] = Deferred(lambda _: None)

        def tell(result: T) -> None:
            if not done.called:
                done.callback(result)

        def go() -> None:
            act().addCallback(tell)

        self.waiting.append(go)
        return done


@implementer(IAccounts)
class SlowAccounts:
    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        secret = hashlib.sha256(b"k").hexdigest()
        self._accounts = MemoryAccounts({secret: Account(key_id="1")})

    def find(self, secret_hash: str, now: datetime) -> Deferred[Account | None]:
        return self._gate.later(lambda: self._accounts.find(secret_hash, now))


@implementer(ILedger)
class SlowLedger:
    """`settled` are the ids, once for each time that a row was to be settled."""

    def __init__(self, gate: Gate, clock: Clock, store: MemoryStore) -> None:
        self._gate = gate
        owners: Any = type("Owners", (), {"me": "me", "is_dead": staticmethod(lambda owner: False)})
        self._ledger = MemoryLedger(store, owners, bills_here=True)
        self.settled: list[str] = []

    def note(self, attempt: Attempt) -> Deferred[None]:
        return self._ledger.note(attempt)

    def know(self, prices: Iterable[Price]) -> Deferred[None]:
        return self._ledger.know(prices)

    def open(self, entry: Entry) -> Deferred[None]:
        return self._gate.later(lambda: self._ledger.open(entry))

    def settle(self, entry: Entry, settlement: Settlement) -> Deferred[None]:
        self.settled.append(entry.rid)
        return self._gate.later(lambda: self._ledger.settle(entry, settlement))

    def checkpoint(self, running: Mapping[str, Counts]) -> Deferred[None]:
        return self._ledger.checkpoint(running)


@implementer(IShares)
class SlowShares:
    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.memory = MemoryShares()

    def change(self, key_id: str, change: Callable[[Share], Share]) -> Deferred[Share]:
        return self._gate.later(lambda: self.memory.change(key_id, change))


@implementer(ISpending)
class SlowSpending:
    """Nobody has used anything."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def of(self, key_id: str, running: Mapping[str, Counts]) -> Deferred[Spending]:
        nothing = Amount()
        spending = Spending(utcnow().date(), nothing, nothing, nothing)
        return self._gate.later(lambda: succeed(spending))


class World:
    """One client, one request, one backend, and stores whose every answer is a step."""

    def __init__(self, folder: Path, case: Case, on_disconnect: str) -> None:
        self.case = case
        self.clock = Clock()
        self.gate = Gate()
        self.store = MemoryStore()
        self.ledger = SlowLedger(self.gate, self.clock, self.store)
        self.backend = Backend(self.clock)
        self.backend.hold = Deferred()
        served = {"url": "http://b:1", "device": "gpu", "on_disconnect": on_disconnect}
        settings = config.parse({"backends": {"m": served}}, folder)
        backends = Backends(lambda one: Upstream(one, self.backend.agent), self.clock)
        backends.swap(settings.backends)
        metrics = Metrics("0", ["m"])
        alone = KeyLimits(concurrent_requests=1, tokens_per_minute=1000, tokens_total=1000)
        self.shares = SlowShares(self.gate)
        seconds = self.clock.seconds
        self.limits = Limits(alone, self.shares, "me", self.clock, seconds, metrics.limited)
        spending = SlowSpending(self.gate)
        budgets = Budgets(alone, spending, self.clock, seconds, metrics.limited)
        self.services = Services(
            config=settings,
            clock=self.clock,
            monotonic=self.clock.seconds,
            authenticator=Authenticator(
                SlowAccounts(self.gate),
                self.clock,
                fresh_s=1,
                stale_max_s=0,
            ),
            backends=backends,
            ledger=self.ledger,
            checkpoints=Checkpoints(self.ledger, self.clock),
            metrics=metrics,
            prices=PriceList(Prices()),
            limits=self.limits,
            budgets=budgets,
        )
        self.server = Server(self.clock, make_root(self.services, 0), metrics)
        self._request = list(case.request)
        self._answer = list(case.answer)
        self._connected = False

    @property
    def is_told(self) -> bool:
        """The client has the end of its answer."""
        return self.server.sent.endswith(self.case.end)

    def step(self) -> bool:
        """The next thing happens; False: nothing can happen any more."""
        if self.gate.waiting:
            self.gate.waiting.pop(0)()
        elif self._request and self.server.wire.connected:
            self.server.send(self._request.pop(0))
        elif not self._connected and self.store.rows:
            self._connected = True
            self.backend.hold.callback(None)
        elif self._answer and self.backend.links and self.backend.link.wire.connected:
            self.backend.link.answer(self._answer.pop(0))
        else:
            return False
        self.check_always()
        return True

    def go_on(self) -> None:
        """All that can still happen, and all the time that it may take."""
        for _ in range(2000):
            if not self.step():
                self.clock.advance(1)
                self.check_always()

    def check_always(self) -> None:
        rows = list(self.store.rows.values())
        assert len(rows) <= 1
        if self.backend.links:
            assert rows, "a request without a row"
        if self.is_told:
            assert rows[0].settlement is not None, "an end without a bill"
        assert len(self.ledger.settled) <= 1, "settled twice"
        if any(row.settlement is None for row in rows):
            assert list(self.limits.in_flight.values()) == [1], "served, and not counted"

    def check_over(self) -> None:
        rows = list(self.store.rows.values())
        assert self.ledger.settled == [row.entry.rid for row in rows]
        assert all(row.settlement is not None for row in rows)
        assert self.services.exchanges == set()
        assert self.limits.in_flight == {}
        self.limits.stopService()
        while self.gate.waiting:
            self.gate.waiting.pop(0)()
        for share in self.shares.memory.shares.values():
            assert share.claims == {}, "claimed for ever"
        assert self.gate.waiting == []
        assert (self.server.active(), self.server.counted()) in ((0, 1), (0, 0))
        assert not self.server.wire.connected
        assert all(not link.wire.connected for link in self.backend.links)
        assert self.clock.getDelayedCalls() == []

    @property
    def settlement(self) -> Settlement | None:
        """How the row was closed, if there is one."""
        for row in self.store.rows.values():
            return row.settlement
        return None

    @property
    def bill(self) -> dict[str, int]:
        return {product: event.quantity for (_, product), event in self.store.bill.items()}


def leave(world: World) -> None:
    """The client hangs up."""
    world.server.leave()


def stop(world: World) -> None:
    """The proxy waits no longer."""
    for exchange in list(world.services.exchanges):
        exchange.cut()


def swept(
    folder: Path, case: Case, on_disconnect: str, disturb: Callable[[World], None]
) -> list[World]:
    """One world for each step at which it was disturbed, until a request was not."""
    worlds: list[World] = []
    was_told = False
    while not was_told:
        world = World(folder, case, on_disconnect)
        ran = [world.step() for _ in worlds]
        assert all(ran), "the end never came"
        was_told = world.is_told
        disturb(world)
        world.go_on()
        world.check_over()
        worlds.append(world)
    return worlds


@pytest.mark.parametrize("disturb", [leave, stop])
@pytest.mark.parametrize("on_disconnect", ["drain", "cancel"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_whenever_it_is_disturbed_its_row_is_settled_once(tmp_path, case, on_disconnect, disturb):
    worlds = swept(tmp_path, case, on_disconnect, disturb)
    assert len(worlds) > len(case.request) + len(case.answer)
    assert worlds[-1].bill == case.bill
    assert any(world.store.rows for world in worlds[:-1])


@pytest.mark.parametrize("name", ["whole", "stream"])
def test_a_client_that_leaves_after_its_request_was_sent_pays_the_exact_number(tmp_path, name):
    worlds = swept(tmp_path, CASES[name], "drain", leave)
    drained = [world for world in worlds if world.backend.links]
    assert len(drained) > 3
    for world in drained:
        assert world.settlement is not None
        assert world.settlement.state is State.SETTLED
        assert world.bill == BILL


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("on_disconnect", ["drain", "cancel"])
def test_a_client_that_leaves_before_its_request_was_sent_pays_nothing(
    tmp_path, name, on_disconnect
):
    worlds = swept(tmp_path, CASES[name], on_disconnect, leave)
    unsent = [world for world in worlds if not world.backend.links]
    assert len(unsent) > 3
    for world in unsent:
        assert world.bill == {}
        assert world.settlement is None or world.settlement.outcome is Outcome.CLIENT_GONE


@pytest.mark.parametrize("name", ["whole", "stream"])
def test_a_cancelled_request_is_never_charged_more_than_was_counted(tmp_path, name):
    for world in swept(tmp_path, CASES[name], "cancel", leave):
        assert all(quantity <= BILL[product] for product, quantity in world.bill.items())
