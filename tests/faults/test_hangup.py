"""The client hangs up at every byte of an answer: one row, one bill, the right number, no leak.

Two rulers, because the proxy passes on whole events: bytes that the client has read when it
leaves, and bytes that the backend has sent when the client leaves. Each request has numbers of its
own (prompt 100000 + N, completion 200000 + N), by which its row is found.

A half-close (FIN after the request, and still reading) counts as leaving, as in uvicorn, nginx
and Go's server: over TCP it can't be told from a close. Such a client never gets something that
looks whole but isn't.
"""

from __future__ import annotations

import enum
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import broken
import pytest
import pytest_twisted
from backend import (
    CHUNKED,
    LAST_CHUNK,
    Connection,
    ScriptedBackend,
    Seen,
    Stall,
    chunk,
    head,
    raw_answer,
)
from figures import LONG, report
from proxy import Answer, Client, ProxyHandle, reactor, request_bytes, running_proxy
from speech import ALL, CHAT, COMPLETIONS, MESSAGES, RESPONSES, Speech, usage_of
from twisted.internet.defer import DeferredSemaphore, gatherResults
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.task import deferLater

PROMPT, COMPLETION = 100_000, 200_000
KINDS = ("prompt", "completion", "embedding")
TOKENS = 2
#: Reactor turns in which bytes surely get from one end to the other.
TURNS = 6
CONCURRENT = 40
#: How soon a backend's connection is closed after the client has left (`on_disconnect = "cancel"`).
CANCEL_S = 0.2


class Way(enum.Enum):
    """How a client leaves."""

    FIN = "fin"
    RST = "rst"
    HALF_CLOSE = "half-close"


SPEECHES = [(each, stream) for each in ALL for stream in (True, False) if each.streams >= stream]
WAYS = list(Way)
NAMES = [f"{speech.name}{'-stream' if stream else ''}" for speech, stream in SPEECHES]


class Leaver(Client):
    """Reads exactly `read` bytes, then leaves; None: when it is told to."""

    def __init__(self, way: Way, read: int | None) -> None:
        super().__init__()
        self.left_at: float | None = None
        self._way = way
        self._read = read

    def connectionMade(self) -> None:
        self._aim()

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        self._aim()
        if self._read is not None and len(self.received) >= self._read:
            self.leave()

    def leave(self) -> None:
        """Hang up; once."""
        if self.left_at is not None or self.transport is None or not self.transport.connected:  # type: ignore[attr-defined]
            return
        self.left_at = time.monotonic()
        transport: Any = self.transport
        if self._way is Way.FIN:
            transport.loseConnection()
        elif self._way is Way.RST:
            transport.abortConnection()
        else:
            transport.bufferSize = 65536
            transport.loseWriteConnection()

    def _aim(self) -> None:
        if self._read is not None and self.left_at is None:
            transport: Any = self.transport
            transport.bufferSize = max(self._read - len(self.received), 1)


async def turns(count: int = TURNS) -> None:
    for _ in range(count):
        await deferLater(reactor, 0)


@dataclass(frozen=True)
class Turns:
    """A step: let the others have their turns."""

    async def run(self, connection: Connection) -> None:
        await turns()


@dataclass(frozen=True)
class Call:
    """A step: call this."""

    act: Callable[[], object]

    async def run(self, connection: Connection) -> None:
        self.act()


@dataclass
class Case:
    """A request, and when its client leaves: after `read` bytes, or when the backend has sent
    `sent` bytes of its answer."""

    number: int
    speech: Speech
    stream: bool
    way: Way
    read: int | None = None
    sent: int | None = None
    client: Leaver = field(init=False)
    backend_connection: Connection | None = None
    got: Answer = field(default_factory=lambda: Answer(b""))

    def __post_init__(self) -> None:
        self.client = Leaver(self.way, self.read)

    @property
    def bill(self) -> dict[str, int]:
        return self.speech.bill(PROMPT + self.number, COMPLETION + self.number)

    def request(self) -> bytes:
        body = self.speech.request("m", str(self.number), stream=self.stream)
        return request_bytes("POST", self.speech.path, body)

    def __str__(self) -> str:
        at = f"read={self.read}" if self.sent is None else f"sent={self.sent}"
        return f"{self.speech.name} stream={self.stream} {self.way.value} {at}"


def answer_parts(speech: Speech, number: int, stream: bool) -> list[bytes]:
    """What the backend sends, event by event."""
    prompt, completion = PROMPT + number, COMPLETION + number
    if not stream:
        headers = {"Content-Type": "application/json"}
        return [raw_answer(200, speech.json(prompt, completion), headers)]
    events = [
        *speech.begin(prompt),
        *[speech.token(None)] * TOKENS,
        *speech.end(prompt, completion),
    ]
    return [head(200, CHUNKED), *map(chunk, events), LAST_CHUNK]


class Sweep:
    """Many cases over one proxy."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.cases: dict[int, Case] = {}
        self._folder = folder
        self._options = options
        self._numbers = itertools.count()
        self._seen: Counter[int] = Counter()

    def case(
        self,
        speech: Speech,
        stream: bool,
        way: Way,
        *,
        read: int | None = None,
        sent: int | None = None,
    ) -> Case:
        """One more case."""
        case = Case(next(self._numbers), speech, stream, way, read, sent)
        self.cases[case.number] = case
        return case

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ProxyHandle]:
        """The proxy and its backend."""
        async with ScriptedBackend(self._script) as backend:
            table = {"url": backend.url, **self._options}
            async with running_proxy(self._folder, {"m": table}) as proxy:
                yield proxy

    def _script(self, seen: Seen) -> list[Any]:
        endpoint = next(s for s in ALL if s.path == seen.target)
        case = self.cases[int(endpoint.heard(seen.json()))]
        self._seen[case.number] += 1
        case.backend_connection = seen.connection
        parts = answer_parts(case.speech, case.number, case.stream)
        if case.sent is None:
            return [step for part in parts for step in (Turns(), part)]
        return self.cut_script(case, b"".join(parts))

    def cut_script(self, case: Case, raw: bytes) -> list[Any]:
        """The backend sends so many bytes, the client leaves, and the backend sends the rest."""
        first, rest = raw[: case.sent], raw[case.sent :]
        return [first, Turns(), Call(case.client.leave), Turns(), rest]

    async def run(self, proxy: ProxyHandle, cases: Iterable[Case]) -> None:
        """Do them all, some at a time."""
        places = DeferredSemaphore(CONCURRENT)
        running = [places.run(self._one, proxy, case) for case in cases]
        await gatherResults(running, consumeErrors=True)
        await self._quiet(proxy)

    async def _one(self, proxy: ProxyHandle, case: Case) -> None:
        endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", proxy.port)
        client = await connectProtocol(endpoint, case.client)
        client.send(case.request())
        if case.read == 0:
            await turns(1)  # the request is out
            client.leave()
        await client.when(lambda received: self.is_over(case, received))
        case.got = client.answer()
        if client.left_at is None:
            client.leave()
        if client.transport.connected and case.way is Way.HALF_CLOSE:
            await turns()
            client.transport.loseConnection()
        await client.closed

    def is_over(self, case: Case, received: bytes) -> bool:
        """The client need not wait any longer."""
        return Answer(received).whole

    async def _quiet(self, proxy: ProxyHandle) -> None:
        """Until nothing is in flight; a leak would be in flight for ever."""
        services: Any = proxy.proxy._services
        for _ in range(500):
            if not services.exchanges and not proxy.proxy._site.connections:  # type: ignore[union-attr]
                break
            await deferLater(reactor, 0.01)
        assert not services.exchanges
        assert not proxy.proxy._site.connections  # type: ignore[union-attr]
        assert not services.checkpoints._streams
        assert not services.checkpoints._written

    # -- verdict ---------------------------------------------------------------------------

    def verify(self, proxy: ProxyHandle) -> Counter[str]:
        """Each request has its row and its bill; the result counts outcomes."""
        outcomes: Counter[str] = Counter()
        rows: dict[int, list[tuple[str, str, dict[str, int]]]] = {}
        for state, outcome, *numbers in proxy.rows("state, outcome, prompt, completion, embedding"):
            known = {kind: n for kind, n in zip(KINDS, numbers, strict=True) if n is not None}
            number = known.get("prompt", known.get("embedding", PROMPT - 1)) - PROMPT
            rows.setdefault(number, []).append((state, outcome, known))
            outcomes[outcome] += 1
        bills = self._bills(proxy)
        for case in self.cases.values():
            self._check(case, rows.pop(case.number, []), bills.pop(case.number, {}))
        for state, outcome, counts in rows.pop(-1, []):  # not sent: its client had left
            assert (state, outcome, counts) == ("settled", "client_gone", {})
        assert not rows
        assert not bills
        return outcomes

    def _bills(self, proxy: ProxyHandle) -> dict[int, dict[str, int]]:
        found: dict[int, dict[str, int]] = {}
        by_rid: dict[str, dict[str, int]] = {}
        events = proxy.query("SELECT rid, product, quantity FROM event_oneoff")
        for rid, product, quantity in events:
            bill = by_rid.setdefault(rid, {})
            assert product not in bill
            bill[product.removeprefix("m/gpu/")] = quantity
        for bill in by_rid.values():
            number = bill.get("prompt", bill.get("embedding", 0)) - PROMPT
            assert number not in found
            found[number] = bill
        return found

    def _check(
        self, case: Case, rows: Sequence[tuple[str, str, dict[str, int]]], bill: dict[str, int]
    ) -> None:
        if self._seen[case.number] == 0:
            assert case.read == 0, case  # left before it was asked for anything
            assert not rows, case
            assert not bill, case
            return
        assert self._seen[case.number] == 1, case
        assert len(rows) == 1, (str(case), rows)
        [(state, outcome, counts)] = rows
        assert (state, counts) == ("settled", case.bill), (str(case), rows)
        assert bill == case.bill, (str(case), bill)
        if case.got.whole:
            assert outcome == "complete", str(case)
        elif case.sent is not None:
            assert outcome == "client_gone", str(case)
        else:
            assert outcome in ("complete", "client_gone"), str(case)


def offsets(size: int, step: int) -> Iterable[int]:
    """All of them in the long form, otherwise each `step`-th; the ends always."""
    return sorted({*range(0, size, 1 if LONG else step), size - 1, size})


async def size_of_answer(proxy: ProxyHandle, sweep: Sweep, speech: Speech, stream: bool) -> int:
    case = sweep.case(speech, stream, Way.FIN)
    answer = await proxy.send(case.request())
    assert answer.whole
    case.got = answer
    return len(answer.raw)


@pytest.mark.parametrize(("speech", "stream"), SPEECHES, ids=NAMES)
@pytest.mark.timeout(900 if LONG else 120)
@pytest_twisted.ensureDeferred
async def test_who_reads_so_many_bytes_and_leaves_is_billed_once_and_exactly(
    tmp_path: Path, speech: Speech, stream: bool
) -> None:
    sweep = Sweep(tmp_path)
    began = time.monotonic()
    async with sweep.running() as proxy:
        size = await size_of_answer(proxy, sweep, speech, stream)
        step = 1 if (speech, stream) == (CHAT, True) else 7
        cases = [
            sweep.case(speech, stream, way, read=read)
            for read in offsets(size, step)
            for way in WAYS
        ]
        await sweep.run(proxy, cases)
        outcomes = sweep.verify(proxy)
    name = f"hang-up, bytes read, {speech.name}{' stream' if stream else ''}"
    report(name, requests=len(sweep.cases), seconds=time.monotonic() - began, **outcomes)


@pytest.mark.parametrize(("speech", "stream"), SPEECHES, ids=NAMES)
@pytest.mark.timeout(900 if LONG else 120)
@pytest_twisted.ensureDeferred
async def test_who_leaves_when_so_much_has_come_is_billed_once_and_exactly(
    tmp_path: Path, speech: Speech, stream: bool
) -> None:
    sweep = Sweep(tmp_path)
    began = time.monotonic()
    size = len(b"".join(answer_parts(speech, 0, stream)))
    step = 1 if (speech, stream) == (CHAT, True) else 7
    cases = [
        sweep.case(speech, stream, way, sent=sent)
        for sent in offsets(size, step)
        if sent < size
        for way in WAYS
    ]
    async with sweep.running() as proxy:
        await sweep.run(proxy, cases)
        outcomes = sweep.verify(proxy)
    name = f"hang-up, bytes sent, {speech.name}{' stream' if stream else ''}"
    report(name, requests=len(sweep.cases), seconds=time.monotonic() - began, **outcomes)


@pytest_twisted.ensureDeferred
async def test_who_leaves_within_the_request_leaves_no_row(tmp_path: Path) -> None:
    request = Case(0, CHAT, True, Way.FIN).request()
    async with Sweep(tmp_path).running() as proxy:
        for way in WAYS:
            for sent in offsets(len(request), 3):
                if sent == len(request):
                    continue
                client = await connectProtocol(
                    TCP4ClientEndpoint(reactor, "127.0.0.1", proxy.port), Leaver(way, None)
                )
                client.send(request[:sent])
                await turns(2)
                client.leave()
                await client.closed
        assert await proxy.settled(0) == []
        assert proxy.bill() == {}


# -- on_disconnect = "cancel" --------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """So much has come of a stream, and so the row must be closed."""

    sent: int
    state: str
    counts: dict[str, int]


STEP = 10
"""Completion tokens from one running count to the next: the chunks can't be what is billed."""


def running_stream(speech: Speech, number: int) -> list[bytes]:
    """The events of a stream with running counts, where the dialect has such."""
    prompt, counted = PROMPT + number, speech in (CHAT, COMPLETIONS)
    tokens = [
        speech.token(usage_of(prompt, STEP * (n + 1)) if counted else None) for n in range(TOKENS)
    ]
    return [*speech.begin(prompt), *tokens, *speech.end(prompt, COMPLETION + number)]


def verdicts(speech: Speech, number: int) -> list[tuple[str, dict[str, int]]]:
    """How a row is closed when so many events have come."""
    prompt, final = PROMPT + number, ("settled", speech.bill(PROMPT + number, COMPLETION + number))
    counted = range(1, TOKENS + 1)
    nothing: tuple[str, dict[str, int]] = ("orphan", {})
    if speech is MESSAGES:
        known = [("estimated", speech.bill(prompt, n)) for n in (0, *counted)]
        return [nothing, *known, final, final]
    if speech is RESPONSES:
        return [nothing, *[("estimated", {"completion": n}) for n in (0, *counted)], final]
    return [nothing, *[("settled", speech.bill(prompt, STEP * n)) for n in counted], final, final]


def moments(speech: Speech, number: int) -> Iterable[Moment]:
    """Every byte in the long form; in the short one those around each event's end."""
    parts = [head(200, CHUNKED), *map(chunk, running_stream(speech, number))]
    # An event's data is known before its line and the event have ended: less LF LF, CRLF.
    ends = [end - 4 for end in itertools.accumulate(map(len, parts))][1:]
    near = {sent for end in ends for sent in (end - 1, end, end + 1, end + 2, end + 4)}
    size = sum(map(len, parts))
    for sent in range(size + 1) if LONG else sorted({0, len(parts[0]), size, *near}):
        yield Moment(sent, *verdicts(speech, number)[sum(end <= sent for end in ends)])


class CancelSweep(Sweep):
    """The backend goes silent at the moment, and its connection must be closed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, on_disconnect="cancel", usage="continuous")

    def cut_script(self, case: Case, raw: bytes) -> list[Any]:
        if case.stream:
            parts = map(chunk, running_stream(case.speech, case.number))
            raw = head(200, CHUNKED) + b"".join(parts)
        return [raw[: case.sent], Turns(), Call(case.client.leave), Stall()]

    def is_over(self, case: Case, received: bytes) -> bool:
        return False

    async def leave(
        self, proxy: ProxyHandle, case: Case
    ) -> tuple[str, str | None, dict[str, int], dict[str, int], float]:
        """Do one; its row, its bill, and how long the backend's connection was still open."""
        before = {rid for (rid,) in proxy.rows("rid")}
        await self.run(proxy, [case])
        assert case.backend_connection is not None
        assert case.client.left_at is not None
        closed = await case.backend_connection.when_closed()
        [(rid, state, outcome, *counts)] = [
            row
            for row in proxy.rows("rid, state, outcome, prompt, completion, embedding")
            if row[0] not in before
        ]
        known = {kind: n for kind, n in zip(KINDS, counts, strict=True) if n is not None}
        events = proxy.query(f"SELECT product, quantity FROM event_oneoff WHERE rid = '{rid}'")
        bill = {product.removeprefix("m/gpu/"): quantity for product, quantity in events}
        assert len(bill) == len(events)
        return state, outcome, known, bill, closed - case.client.left_at


@pytest.mark.parametrize("speech", [each for each in ALL if each.streams], ids=lambda s: s.name)
@pytest.mark.timeout(900 if LONG else 120)
@pytest_twisted.ensureDeferred
async def test_a_cancelled_stream_is_billed_to_its_last_event_and_closed_at_once(
    tmp_path: Path, speech: Speech
) -> None:
    sweep, slowest = CancelSweep(tmp_path), 0.0
    async with sweep.running() as proxy:
        for way, moment in itertools.product(WAYS, list(moments(speech, 0))):
            case = sweep.case(speech, True, way, sent=moment.sent)
            [there] = [each for each in moments(speech, case.number) if each.sent == moment.sent]
            state, outcome, counts, bill, took = await sweep.leave(proxy, case)
            assert (state, outcome, counts) == (there.state, "client_gone", there.counts), case
            assert bill == there.counts, case
            assert b"usage" not in case.got.body or speech is MESSAGES, case
            assert took < CANCEL_S, case
            slowest = max(slowest, took)
    name = f"hang-up, cancel, {speech.name} stream"
    report(name, requests=len(sweep.cases), slowest_close_s=slowest)


@pytest.mark.parametrize("speech", ALL, ids=lambda s: s.name)
@pytest_twisted.ensureDeferred
async def test_a_cancelled_answer_of_which_nothing_is_known_is_left_to_the_operator(
    tmp_path: Path, speech: Speech
) -> None:
    sweep, slowest = CancelSweep(tmp_path), 0.0
    size = len(answer_parts(speech, 0, False)[0])
    async with sweep.running() as proxy:
        for way, sent in itertools.product(WAYS, offsets(size, 41)):
            if sent == size:
                continue
            case = sweep.case(speech, False, way, sent=sent)
            state, outcome, counts, bill, took = await sweep.leave(proxy, case)
            assert (state, outcome, counts, bill) == ("orphan", "client_gone", {}, {}), case
            assert took < CANCEL_S, case
            slowest = max(slowest, took)
    report(f"hang-up, cancel, {speech.name}", requests=len(sweep.cases), slowest_close_s=slowest)


# -- the experiment itself -----------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["drop-on-disconnect", "running-count-on-disconnect"])
@pytest_twisted.ensureDeferred
async def test_the_sweep_finds_a_planted_fault(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken.plant(fault, monkeypatch.setattr)
    sweep = Sweep(tmp_path)
    async with sweep.running() as proxy:
        await sweep.run(proxy, [sweep.case(CHAT, True, way, sent=300) for way in WAYS])
        with pytest.raises(AssertionError):
            sweep.verify(proxy)
