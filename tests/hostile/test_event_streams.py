"""Event streams as browsers and clients' own tests have them: the same events, the same bytes.

The inputs are those of the web platform tests (web-platform-tests/wpt, `eventsource/format-*` and
`event-data`, 2026) and of rexxars/eventsource-parser (`test/fixtures.ts` and `test/parse.test.ts`
at 6519a0f, August 2026). What a client makes of a stream is told by `events_of`, which is the
algorithm of WHATWG HTML, section 9.2.6, line by line.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from backend import DONE, SSE, ScriptedBackend, Seen, raw_answer, sse_event
from hypothesis import given, settings
from hypothesis import strategies as st
from proxy import running_proxy
from tally import LONG, Tally

from llmproxy.endpoints import Shape
from llmproxy.meter import StreamMeter
from llmproxy.sse import Decoder

pytestmark = pytest.mark.timeout(900 if LONG else 120)

Events = list[tuple[bytes, bytes]]

BOM = b"\xef\xbb\xbf"
LONG_LINE = b"x" * 2048
TEXT = "我現在都看實況不玩遊戲".encode()
EMOJI = "✔ 🥌 ♥ 🧹 ✅".encode()

#: name -> the stream, and the names and data of its events.
VECTORS: dict[str, tuple[bytes, Events]] = {
    # web platform tests
    "lines": (
        b"data:msg\ndata:msg\n\n:\nfalsefield:msg\n\nfalsefield:msg\nData:data\n\ndata\n\n"
        b"data:end\n\n",
        [(b"", b"msg\nmsg"), (b"", b""), (b"", b"end")],
    ),
    "a bom, and another in the middle": (
        BOM + b"data:1\n\n" + BOM + b"data:2\n\ndata:3\n\n\n",
        [(b"", b"1"), (b"", b"3")],
    ),
    "two boms": (
        BOM + BOM + b"data:1\n\ndata:2\n\ndata:3\n\n\n",
        [(b"", b"2"), (b"", b"3")],
    ),
    "comments": (
        b"data:1\r:\0\n:\r\ndata:2\n:%b\rdata:3\n:data:fail\r:%b\ndata:4\n\n"
        % (LONG_LINE, LONG_LINE),
        [(b"", b"1\n2\n3\n4")],
    ),
    "no last empty line": (b"retry:1000\ndata:test1\n\nid:test\ndata:test2\n", [(b"", b"test1")]),
    "empty data": (
        b"data:\n\ndata\ndata\n\ndata:test\n\n\n",
        [(b"", b""), (b"", b"\n"), (b"", b"test")],
    ),
    "a name": (b"event:test\ndata:x\n\ndata:x\n\n\n", [(b"test", b"x"), (b"", b"x")]),
    "an empty name": (b"event: \ndata:data\n\n\n", [(b"", b"data")]),
    "fields": (
        b"data:\0\ndata:  2\rData:1\ndata\0:2\ndata:1\r\0data:4\nda-ta:3\rdata_5\ndata:3\rdata:\r\n"
        b" data:32\ndata:4\n\n",
        [(b"", b"\0\n 2\n1\n3\n\n4")],
    ),
    "fields that nobody knows": (
        b"data:test\n data\ndata\nfoobar:xxx\njustsometext\n:thisisacommentyay\ndata:test\n\n\n",
        [(b"", b"test\n\ntest")],
    ),
    "leading spaces": (b"data:\ttest\rdata: \ndata:test\n\n\n", [(b"", b"\ttest\n\ntest")]),
    "line ends": (b"data:test\r\ndata\ndata:test\r\n\r\n", [(b"", b"test\n\ntest")]),
    "nul": (b"data:\0\n\n\n\n", [(b"", b"\0")]),
    "utf-8": ("data:ok…\n\n\n".encode(), [(b"", "ok…".encode())]),
    "retry": (b"retry:03000\ndata:x\n\n\n", [(b"", b"x")]),
    "a bogus retry": (b"retry:3000\nretry:1000x\ndata:x\n\n\n", [(b"", b"x")]),
    "an empty retry": (b"retry\ndata:test\n\n\n", [(b"", b"test")]),
    "ids": (
        b"id: 1\ndata: 1\n\ndata: 2\n\nid: 2\ndata:3\n\ndata:4\n\n",
        [(b"", b"1"), (b"", b"2"), (b"", b"3"), (b"", b"4")],
    ),
    "an empty id": (
        b"id: 1\ndata: 1\n\nid:\ndata:2\n\nid\ndata:3\n\n",
        [(b"", b"%d" % n) for n in (1, 2, 3)],
    ),
    **{
        f"nul in an id: {value!r}": (
            b"id: " + value + b"\nretry: 200\ndata: hello\n\n",
            [(b"", b"hello")],
        )
        for value in (b"\0\0", b"x\0", b"\0x", b"x\0x", b" \0")
    },
    # eventsource-parser
    "a name at the end": (
        b"".join(b"data: %d\n\n" % n for n in range(5)) + b"event: done\ndata: " + EMOJI + b"\n\n",
        [*((b"", b"%d" % n) for n in range(5)), (b"done", EMOJI)],
    ),
    "id and retry with each": (
        b"event: tick\nid: 1337\nretry: 50\ndata: 1337\n\nretry:\nid:2\nevent: tick\ndata:1338\n\n",
        [(b"tick", b"1337"), (b"tick", b"1338")],
    ),
    "heartbeats": (
        b": \xe2\x99\xa5\n\ndata: A\n\n: \xe2\x99\xa5\n\ndata: B\n\n",
        [(b"", b"A"), (b"", b"B")],
    ),
    "several lines": (
        b"event: stock\ndata: YHOO\ndata: +2\ndata: 10\n\nevent: stock\ndata: GOOG\ndata: -8\n\n",
        [(b"stock", b"YHOO\n+2\n10"), (b"stock", b"GOOG\n-8")],
    ),
    "text of more than a byte in two lines": (
        b"id: 0\ndata:" + TEXT[:15] + b"\ndata:" + TEXT[15:] + b"\n\n",
        [(b"", TEXT[:15] + b"\n" + TEXT[15:])],
    ),
    "empty lines first": (b"\n\n\n\nid: 1\ndata: " + TEXT + b"\n\n", [(b"", TEXT)]),
    "cr": (
        b"data: dog\rdata: bark\r\rdata: cat\rdata: meow\r\revent: done\rdata: x\r\r",
        [(b"", b"dog\nbark"), (b"", b"cat\nmeow"), (b"done", b"x")],
    ),
    "crlf": (
        b"data: sheep\r\ndata: bleat\r\n\r\ndata: pig\r\ndata: oink\r\n\r\n",
        [(b"", b"sheep\nbleat"), (b"", b"pig\noink")],
    ),
    "odd comments": (
        b": Hello\n\n"
        + b":" * 300
        + b"\ndata: First\n\n: \xd0\x9f: \xe7\xac\xac\ndata: Second\n\n"
        + b": Moop \n" * 10
        + b":\xd8\xab\ndata: Third\n\n",
        [(b"", b"First"), (b"", b"Second"), (b"", b"Third")],
    ),
    "odder comments": (
        b"data:1\r\r:\0\n:\r\ndata:2\n\n:%b\rdata:3\n\n:data:fail\r:%b\ndata:4\n\ndata:5"
        % (LONG_LINE, LONG_LINE),
        [(b"", b"%d" % n) for n in (1, 2, 3, 4)],
    ),
    "empty names": (b"event:\ndata: Hello 1\n\nevent:\n\n", [(b"", b"Hello 1")]),
    "a crlf that is cut": (b"data: A\r\ndata: B\r\ndata: C\r\n\r\n", [(b"", b"A\nB\nC")]),
    "cr and crlf": (b"data: one\r\r\n", [(b"", b"one")]),
    "a comment with cr": (b"data: one\n:ignored\rdata: two\n\n", [(b"", b"one\ntwo")]),
    "a comment with crlf": (b"data: one\n:ignored\r\ndata: two\n\n", [(b"", b"one\ntwo")]),
    "data without a colon": (b"data: one\ndata\r\ndata: two\n\n", [(b"", b"one\n\ntwo")]),
    "rubbish": (b"garbage\rdata: ok\n\n", [(b"", b"ok")]),
    "json and no event": (b'{"error":"Internal Server Error"}\n', []),
    "prose and no event": (b"Well, this is not what I expected\n", []),
    "almost data": (b"datax: y\ndata: ok\n\n", [(b"", b"ok")]),
}


def events_of(stream: bytes) -> Events:
    """The events that a client dispatches."""
    found: Events = []
    name, data = b"", b""
    *lines, _ = re.split(rb"\r\n|\n|\r", stream.removeprefix(BOM))
    for line in lines:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            if data:
                found.append((name, data[:-1]))
            name, data = b"", b""
        elif field == b"event":
            name = value
        elif field == b"data":
            data += value + b"\n"
    return found


def decoded(stream: bytes, cuts: list[int]) -> tuple[Events, bytes]:
    """The events that our decoder finds, and all its raw bytes."""
    decoder, raw, found = Decoder(), b"", []
    for a, b in pairwise([0, *cuts, len(stream)]):
        for event in decoder.feed(stream[a:b]):
            raw += event.raw
            if event.data or event.at >= 0:
                found.append((event.name, event.data))
    rest = decoder.end()
    return found, raw + (b"" if rest is None else rest.raw)


def cuts_of(stream: bytes) -> list[list[int]]:
    single = list(range(1, len(stream)))
    return [[], single, *([cut] for cut in single[:: 1 if LONG else max(1, len(single) // 20)])]


def metered(shape: Shape, stream: bytes, cuts: list[int]) -> tuple[object, ...]:
    """What a client would get, and what would be billed."""
    meter = StreamMeter(shape)
    shown = b"".join(meter.feed(stream[a:b]) for a, b in pairwise([0, *cuts, len(stream)]))
    rest = meter.finish()
    return shown + rest, meter.reading(), meter.ended, meter.failed


def test_each_stream_gives_the_same_events_and_bytes_in_any_split() -> None:
    tally = Tally("event streams, decoded and metered")
    for name, (stream, expected) in VECTORS.items():
        tally.add(f"{name}, as the standard says", events_of(stream) == expected)
        for cuts in cuts_of(stream):
            found, raw = decoded(stream, cuts)
            # An event whose last line end is a CR may be the half of a CRLF: it ends with the
            # stream, when a client has it too.
            late = stream.endswith(b"\r") and found == expected[:-1]
            tally.add(f"{name}, cut at {cuts[:3]}", found == expected or late, f"{found}")
            tally.add(f"{name}, its bytes cut at {cuts[:3]}", raw == stream)
            for shape in (Shape.CHAT, Shape.MESSAGES, Shape.RESPONSES):
                got = metered(shape, stream, cuts)
                same = got == metered(shape, stream, []) and got[0] == stream
                tally.add(f"{name}, {shape} cut at {cuts[:3]}", same)
    tally.check(at_least=3000)


ENDS = [b"\n", b"\r", b"\r\n"]
FIELDS = [b"data", b"data:", b"data: ", b"event:", b"id:", b"retry:", b":", b"datax:", b"Data:"]
VALUES = [b" ", b"x", BOM, b"\0", b"\xe2\x80\xa8", b"\x85", b"\x0b", b"\x1c", b"\xff"]
LINES = st.sampled_from([*ENDS, *FIELDS, *VALUES])


def test_any_lines_give_the_events_of_the_standard_in_any_split() -> None:
    tally = Tally("event streams, of any lines")

    @settings(max_examples=10_000 if LONG else 400, deadline=None)
    @given(st.lists(LINES, max_size=40).map(b"".join), st.lists(st.integers(0, 200), max_size=6))
    def read(stream: bytes, at: list[int]) -> None:
        stream += b"x"  # so that no CR is the last byte
        cuts = sorted(cut for cut in at if cut <= len(stream))
        assert decoded(stream, cuts) == (events_of(stream), stream)
        tally.add("any lines", True)

    read()
    tally.check(at_least=100)


USED = sse_event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})


def script(seen: Seen) -> list[Any]:
    stream, _ = VECTORS[seen.json()["messages"][0]["content"]]
    return [raw_answer(200, stream + b"\n\n" + USED + DONE, SSE)]


@pytest_twisted.ensureDeferred
async def test_each_stream_reaches_the_client_as_it_was(tmp_path: Path) -> None:
    tally = Tally("event streams, through the proxy")
    async with ScriptedBackend(script) as backend:
        async with running_proxy(tmp_path, {"m": {"url": backend.url}}) as proxy:
            for name, (stream, _) in VECTORS.items():
                messages = [{"role": "user", "content": name}]
                ask = {"model": "m", "messages": messages, "stream": True}
                ask["stream_options"] = {"include_usage": True}
                answer = await proxy.post("/v1/chat/completions", ask)
                whole = answer.whole and answer.body == stream + b"\n\n" + USED + DONE
                tally.add(name, whole, repr(answer.body[-80:]))
            rows = proxy.rows()
            tally.add("the bill", rows == [("settled", "complete", 3, 2)] * len(VECTORS))
    tally.check(at_least=len(VECTORS))
