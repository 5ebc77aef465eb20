"""A real proxy in a process of its own, and inputs that mean harm, with good requests in between.

None without a key reaches the backend. None is answered with a 5xx of ours, leaves a traceback,
keeps the others waiting or costs memory. The good ones are all served and billed to the token.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import orjson
import pytest
from figures import report
from load import Load
from prometheus_client.parser import text_string_to_metric_families
from pulse import LATE_S, Pulse, pulse_of
from rig import Rig
from speech import BY_PATH, CHAT
from storm import CANARY, CRLF, Input, Storm, large, post
from tally import LONG, Tally
from test_surroundings import page

from llmproxy.metrics import METHODS, PATHS

INPUTS = 100_000 if LONG else 2_500
SEED = random.randrange(10**6)
CONNECTIONS = 24
#: One good request comes after so many bad ones.
EACH = 10
BAD, GOOD = 0, 1  # whose keys
#: How long an input is waited for before the client says that it is over, and how long after that.
QUIET_S, END_S = 0.05, 10.0
PROMPT, TOKENS = 7, 3
#: How much more memory the process may have after half of the storm.
GROWTH_MIB = 12
#: A large input, and what it may cost: so many times its bytes, and some pages that come with it.
LARGE_MIB = 16 if LONG else 3
TIMES, SLACK_MIB = 10, 2
PULSE = Path(__file__).parent.with_name("threats") / "pulse.py"
ANSWER = re.compile(rb"HTTP/1\.[01] (\d{3}) [^\r\n]*\r\n")


class Backend:
    """Answers everything well, and keeps what it was sent in mind."""

    def __init__(self) -> None:
        self.requests = 0
        self.seen_canary = False

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _serve(self, link: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        try:
            while True:
                await self._answer(link, out)
        except (asyncio.IncompleteReadError, OSError):
            out.transport.abort()

    async def _answer(self, link: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        head = await link.readuntil(b"\r\n\r\n")
        path = head.split(b" ", 2)[1].decode()
        body = await _body(head, link)
        if path != "/health":
            self.requests += 1
            self.seen_canary |= CANARY.encode() in head + body
        out.write(answer_to(path, body))
        await out.drain()


async def _body(head: bytes, link: asyncio.StreamReader) -> bytes:
    if b"chunked" not in head.lower():
        found = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        return await link.readexactly(int(found[1])) if found else b""
    body = b""
    while size := int(await link.readuntil(b"\r\n"), 16):
        body += (await link.readexactly(size + 2))[:-2]
    await link.readexactly(2)
    return body


def answer_to(path: str, body: bytes) -> bytes:
    """What each endpoint says when it is well."""
    speech = BY_PATH.get(path, CHAT)
    if b"chat" in path.encode() and orjson.loads(body).get("stream") is True:
        events = [
            *speech.begin(PROMPT),
            *[speech.token(None)] * TOKENS,
            *speech.end(PROMPT, TOKENS),
        ]
        stream = b"".join(events)
        head = f"Content-Type: text/event-stream{CRLF}Content-Length: {len(stream)}"
        return f"HTTP/1.1 200 OK{CRLF}{head}{CRLF}{CRLF}".encode() + stream
    answer = speech.json(PROMPT, TOKENS)
    if "audio" in path:
        answer = b'{"text":"hm","duration":1.5,"language":"en","segments":[]}'
    elif path.endswith("count_tokens"):
        answer = b'{"input_tokens":3}'
    head = f"Content-Type: application/json{CRLF}Content-Length: {len(answer)}"
    return f"HTTP/1.1 200 OK{CRLF}{head}{CRLF}{CRLF}".encode() + answer


async def reply(port: int, given: Input, *, leaves: bool = False) -> tuple[bytes, bool]:
    """All that came back, and whether it ended: with an answer in time, or soon after we left.

    `leaves`: the client hangs up as soon as it has sent all.
    """
    link, out = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    try:
        for piece in given.pieces:
            out.write(piece)
            await asyncio.sleep(0)
        if leaves:
            return received, True
        try:
            while more := await asyncio.wait_for(link.read(65536), QUIET_S):
                received += more
            return received, True
        except TimeoutError:
            out.write_eof()
        while more := await asyncio.wait_for(link.read(65536), END_S):
            received += more
        return received, True
    except TimeoutError:
        return received, False
    except OSError:  # reset: it does not read what nobody wants
        return received, True
    finally:
        out.transport.abort()


def complaint(received: bytes, ended: bool, *, open_to: bool) -> str:
    """What is wrong with an answer; nothing if it is as it should be."""
    if not ended:
        return "does not end"
    if received and not ANSWER.match(received):
        return f"no HTTP: {received[:60]!r}"
    wrong = [int(status) for status in ANSWER.findall(received) if int(status) >= 500]
    if wrong:
        return f"{wrong}: {received[:300]!r}"
    if not open_to and b'"choices"' in received:
        return "it was let in"
    return ""


class Hammer:
    """So many connections at once, each with one input after the other."""

    def __init__(self, rig: Rig, tally: Tally) -> None:
        self.good = 0
        self._port, self._admin_port = rig.port, rig.admin_port
        self._tally = tally

    async def strike(self, inputs: Iterator[Input], *, open_to: bool) -> None:
        """Send them all. Without a key some go to the admin site; with one some clients leave."""
        await asyncio.gather(*(self._one(inputs, open_to) for _ in range(CONNECTIONS)))

    async def _one(self, inputs: Iterator[Input], open_to: bool) -> None:
        for number, given in enumerate(inputs):
            odd = number % 8 == 7
            port = self._admin_port if odd and not open_to else self._port
            received, ended = await reply(port, given, leaves=odd and open_to)
            wrong = complaint(received, ended, open_to=open_to)
            why = f"{wrong} for {given.data[:400]!r}" if wrong else ""
            self._tally.add(given.kind, not wrong, why)
            if number % EACH == EACH - 1:
                await self._good()

    async def _good(self) -> None:
        body = CHAT.request("m", "hello", stream=True)
        request = post(CHAT.path, body, [f"Authorization: Bearer {Load.key(GOOD)}"])
        link, out = await asyncio.open_connection("127.0.0.1", self._port)
        out.write(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        answer = await asyncio.wait_for(link.read(-1), END_S)
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        assert answer.count(CHAT.token(None)) == TOKENS, answer
        assert CHAT.last in answer, answer
        out.transport.abort()
        self.good += 1


def resident_mib(pid: int, which: str = "VmRSS") -> float:
    """Memory of a process; `VmHWM`: the most that it was since `forget_peak`."""
    found = re.search(rf"{which}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def make_rig(folder: Path) -> Rig:
    return Rig(folder, clients=2, command=[str(PULSE)])


def configure(rig: Rig, url: str) -> None:
    rig.configure(url)
    # So many wrong keys of one address would all be refused without a look at them.
    rig.config.write_text("failed_keys_per_minute = 0\n" + rig.config.read_text())


def without_faults(log: str) -> None:
    assert "Traceback" not in log, log[log.index("Traceback") - 2000 :][:6000]
    assert " CRITICAL " not in log
    assert " ERROR " not in log, re.findall(".* ERROR .*", log)[:5]


@pytest.mark.timeout(1800 if LONG else 120)
def test_a_storm_of_hostile_inputs_harms_nobody(tmp_path: Path) -> None:
    rig, tally, backend = make_rig(tmp_path), Tally("storm"), Backend()
    storm = Storm(random.Random(SEED), Load.key(BAD))
    figures: dict[str, float] = {"seed": SEED}
    pulse = Pulse()

    async def story() -> None:
        nonlocal pulse
        async with backend.serving() as url:
            configure(rig, url)
            async with rig.running() as process:
                await pulse_of(process.pid, tmp_path)  # that of its start
                hammer = Hammer(rig, tally)
                keyless = (storm.without_key() for _ in range(INPUTS // 2))
                began = time.monotonic()
                await hammer.strike(keyless, open_to=False)
                assert backend.requests == hammer.good, "something without a key was forwarded"
                assert not backend.seen_canary
                before = resident_mib(process.pid)
                await hammer.strike((storm.with_key() for _ in range(INPUTS // 2)), open_to=True)
                took = time.monotonic() - began
                pulse = await pulse_of(process.pid, tmp_path)
                figures.update(
                    good=hammer.good,
                    forwarded=backend.requests - hammer.good,
                    inputs_per_s=INPUTS / took,
                    mib_before=before,
                    mib_after=resident_mib(process.pid),
                )
                check_labels(page(rig, "/metrics"))
                await asyncio.sleep(0.2)
                process.terminate()
                assert await asyncio.to_thread(process.wait, 20) == 0
            check_bills(rig, hammer.good)
            check_rows(rig, backend.requests)

    asyncio.run(story())
    report("storm", **figures)
    report("storm, its pulse", **asdict(pulse))
    without_faults(rig.output())
    tally.check(at_least=INPUTS)
    assert figures["mib_after"] - figures["mib_before"] < GROWTH_MIB
    assert pulse.busy_s < LATE_S
    # Not a single one on a quiet machine; but others may use its disk, too.
    assert pulse.held < 0.002 * pulse.beats


def check_rows(rig: Rig, requests: int) -> None:
    """Each request to the backend has its row, and only who has left can have one without."""
    ended = Counter(outcome for (outcome,) in rig.query("SELECT outcome FROM ledger"))
    assert set(ended) <= {"complete", "client_gone", "refused"}, ended
    assert ended["complete"] <= requests <= ended.total(), (requests, ended)


def check_labels(exposition: str) -> None:
    """No metric has a label of the clients' making."""
    known = {
        "method": {*METHODS, "other"},
        "path": {*PATHS, "other"},
        "model": {"m", "other"},
        "status": {*map(str, range(200, 600)), "none", "other"},
    }
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            for name in sample.labels.keys() & known.keys():
                assert sample.labels[name] in known[name], sample


def check_bills(rig: Rig, good: int) -> None:
    """All good requests are billed, to the token; and no row is left open."""
    bill = dict(
        rig.query(
            "SELECT product, sum(quantity) FROM event_oneoff"
            f" WHERE api_key = '{GOOD}' GROUP BY product"
        )
    )
    assert bill == {"m/gpu/prompt": PROMPT * good, "m/gpu/completion": TOKENS * good}
    assert not rig.open_rows()
    assert rig.query("PRAGMA integrity_check") == [("ok",)]


# -- memory ----------------------------------------------------------------------------------------


async def peak_mib(pid: int, port: int, given: Input) -> float:
    """How much memory the process had, at most, until it has answered."""
    forget_peak(pid)
    link, out = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(OSError):  # it answers, and does not read the rest
        out.write(given.data)
        await asyncio.wait_for(link.readuntil(b"\r\n"), 60)
    out.transport.abort()
    await asyncio.sleep(0.05)  # what it does when the client has gone belongs to it
    return resident_mib(pid, "VmHWM")


@pytest.mark.timeout(600 if LONG else 60)
def test_no_large_input_costs_ten_times_its_bytes(tmp_path: Path) -> None:
    rig, tally = make_rig(tmp_path), Tally("large inputs")

    async def story() -> None:
        async with Backend().serving() as url:
            configure(rig, url)
            async with rig.running() as process:
                # Before any: what one of them leaves would be there for the next ones.
                quiet = resident_mib(process.pid)
                for given in large(LARGE_MIB * 2**20, Load.key(BAD)):
                    more = await peak_mib(process.pid, rig.port, given) - quiet
                    report(f"large, {given.kind}", times=more / LARGE_MIB)
                    allowed = TIMES * LARGE_MIB + SLACK_MIB
                    tally.add(given.kind, more <= allowed, f"{more:.0f} MiB for {LARGE_MIB}")

    asyncio.run(story())
    without_faults(rig.output())
    tally.check()
