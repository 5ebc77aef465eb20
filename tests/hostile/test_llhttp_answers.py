"""Answers of backends as llhttp's own tests have them: what our agent makes of each.

The inputs are those of nodejs/llhttp, `test/response/*.md` at 01e105a (June 2026): the bytes, less
what was repeated for its modes. What is expected is ours: an answer that llhttp takes only when it
is told to be lenient is none, and a connection is used again only when nobody could have read
another answer from it.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
import pytest_twisted
from backend import Close, ScriptedBackend, Seen, json_answer
from proxy import ProxyHandle, running_proxy
from tally import LONG, Tally
from test_agent import Body, Rig
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone, ResponseFailed
from twisted.web.http import PotentialDataLoss

pytestmark = pytest.mark.timeout(900 if LONG else 120)

WHOLE, CLOSED, BROKEN = ResponseDone, PotentialDataLoss, ResponseFailed


class Read(NamedTuple):
    """An answer that is taken: `end` is how its body ends once the backend has closed, `again`
    whether the connection may serve again before that."""

    status: int
    body: bytes
    end: type[BaseException] = WHOLE
    again: bool = True


def ok(*fields: bytes, body: bytes = b"", start: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join([start, *fields, b"", body])


CHUNKED = b"Transfer-Encoding: chunked"
KEPT, CLOSE = b"Connection: keep-alive", b"Connection: close"
H2C = (b"Connection: upgrade", b"Upgrade: h2c")
NO_CONTENT = b"HTTP/1.1 204 No content"
SWITCHING = b"HTTP/1.1 101 Switching Protocols"
UNCHANGED = b"HTTP/1.1 304 Not Modified"
PLAIN = b"Content-Type: text/plain"
UUID = b"2ad731e3-4dcd-4f70-b871-0ad284b29ffc"
PAGE = (
    b"<HTML><HEAD><meta http-equiv=content-type content=text/html;charset=utf-8>\n"
    b"<TITLE>301 Moved</TITLE></HEAD><BODY>\n<H1>301 Moved</H1>\nThe document has moved\n"
    b'<A HREF="http://www.google.com/">here</A>.\r\n</BODY></HTML>'
)
SOAP = b'<?xml version="1.0" encoding="UTF-8"?>\n<SOAP-ENV:Envelope></SOAP-ENV:Envelope>'

#: name -> the bytes, and what they are; None: no answer.
VECTORS: dict[str, tuple[bytes, Read | None]] = {
    # connection.md
    "proxy-connection: close": (
        ok(b"Content-Length: 11", b"Proxy-Connection: close", body=b"hello world"),
        Read(200, b"hello world", WHOLE, False),
    ),
    "1.0, kept, no length": (
        ok(KEPT, start=b"HTTP/1.0 200 OK", body=b"HTTP/1.0 200 OK"),
        Read(200, b"HTTP/1.0 200 OK", CLOSED, False),
    ),
    "1.0, kept, 204 and more": (
        ok(KEPT, start=b"HTTP/1.0 204 No content", body=b"HTTP/1.0 200 OK"),
        Read(204, b"", WHOLE, False),
    ),
    "no length": (ok(body=b"HTTP/1.1 200 OK"), Read(200, b"HTTP/1.1 200 OK", CLOSED, False)),
    "204 and more": (
        ok(start=NO_CONTENT, body=b"HTTP/1.1 200 OK"),
        Read(204, b"", WHOLE, False),
    ),
    "204, close, and more": (
        ok(CLOSE, start=NO_CONTENT, body=b"HTTP/1.1 200 OK"),
        Read(204, b"", WHOLE, False),
    ),
    "close, and more": (
        ok(b"Content-Length: 5", CLOSE, body=UUID),
        Read(200, UUID[:5], WHOLE, False),
    ),
    "101 with a length": (
        ok(*H2C, b"Content-Length: 4", start=SWITCHING, body=b"bodyproto"),
        None,
    ),
    "101 in chunks": (
        ok(*H2C, CHUNKED, start=SWITCHING, body=b"2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\nproto"),
        None,
    ),
    "200 with upgrade": (ok(*H2C, body=b"body"), Read(200, b"body", CLOSED, False)),
    "200 with upgrade and a length": (
        ok(*H2C, b"Content-Length: 4", body=b"body"),
        Read(200, b"body"),
    ),
    "200 with upgrade in chunks": (
        ok(*H2C, CHUNKED, body=b"2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n"),
        Read(200, b"body"),
    ),
    "304 with a length, and another": (
        ok(b"Content-Length: 10", start=UNCHANGED, body=b"\r\n")
        + ok(b"Content-Length: 5", body=b"hello"),
        Read(304, b"", WHOLE, False),
    ),
    "304 in chunks, and another": (
        ok(CHUNKED, start=UNCHANGED) + ok(CHUNKED, body=b"5\r\nhello\r\n0\r\n"),
        Read(304, b"", WHOLE, False),
    ),
    "100, an empty line, 404": (
        ok(start=b"HTTP/1.1 100 Continue", body=b"\r\n")
        + ok(b"Content-Length: 14", start=b"HTTP/1.1 404 Not Found", body=b"404: Not Found"),
        Read(404, b"404: Not Found"),
    ),
    "103, and less than its length": (
        ok(b"Link: </styles.css>; rel=preload; as=style", start=b"HTTP/1.1 103 Early Hints")
        + ok(KEPT, b"Keep-Alive: timeout=5", b"Content-Length: 17", body=b"response content"),
        Read(200, b"response content", BROKEN, False),
    ),
    # content-length.md
    "close without a length": (
        ok(b"Content-Type: text/xml; charset=utf-8", CLOSE, body=SOAP),
        Read(200, SOAP, CLOSED, False),
    ),
    "content-length-x": (
        ok(b"Content-Length-X: 0", CHUNKED, body=b"2\r\nOK\r\n0\r\n\r\n"),
        Read(200, b"OK"),
    ),
    "an answer where the body should be": (
        ok(b"Content-Length: 123", body=ok(b"Content-Length: 456")),
        Read(200, ok(b"Content-Length: 456"), BROKEN, False),
    ),
    "tabs around the length": (
        ok(b"Content-Length:\t42\t"),
        Read(200, b"", BROKEN, False),
    ),
    # finish.md, sample.md
    "nothing but a status": (ok(), Read(200, b"", CLOSED, False)),
    "404 and nothing else": (
        ok(start=b"HTTP/1.1 404 Not Found"),
        Read(404, b"", CLOSED, False),
    ),
    "no phrase": (ok(start=b"HTTP/1.1 301"), Read(301, b"", CLOSED, False)),
    "an empty phrase": (ok(start=b"HTTP/1.1 200 "), Read(200, b"", CLOSED, False)),
    "a tab before a value": (
        ok(b"Header1: Value1", b"Header2:\t Value2", b"Content-Length: 0"),
        Read(200, b""),
    ),
    "rtsp": (ok(start=b"RTSP/1.1 200 OK"), None),
    "ice": (ok(start=b"ICE/1.1 200 OK"), None),
    "httper": (ok(start=b"HTTPER/1.1 200 OK"), None),
    "0.9": (ok(start=b"HTTP/0.9 200 OK"), None),
    "an empty line first": (
        b"\r\n" + ok(b"Header1: Value1", b"Header2:\t Value2", b"Content-Length: 0"),
        None,
    ),
    "a dollar in a name, and less than its length": (
        ok(
            b"Location: http://www.google.com/",
            b"X-$PrototypeBI-Version: 1.6.0.3",
            b"Content-Length:  219  ",
            start=b"HTTP/1.1 301 Moved Permanently",
            body=PAGE,
        ),
        Read(301, PAGE, BROKEN, False),
    ),
    "quotes in a value": (
        ok(
            b'p3p: policyref="http://www.amazon.com/w3c/p3p.xml",CP="CAO DSP LAW CUR ADM "',
            b"Content-Type: text/html; charset=ISO-8859-1",
            CHUNKED,
            start=b"HTTP/1.1 301 MovedPermanently",
            body=b"1\r\n\n\r\n0\r\n\r\n",
        ),
        Read(301, b"\n"),
    ),
    "no carriage return": (
        b"HTTP/1.1 200 OK\nContent-Type: text/html; charset=utf-8\nConnection: close\n\nthese",
        None,
    ),
    "an underscore in a name": (
        ok(b"Content-Type: text/xml", b"Content-Length: 0", b"DCLK_imp: v7;x;~okv=;dcmt=text/xml;"),
        Read(200, b""),
    ),
    "1.0, kept, an empty value": (
        ok(b"Pragma: ", b"Content-Length: 0", KEPT, start=b"HTTP/1.0 301 Moved Permanently"),
        Read(301, b"", WHOLE, False),
    ),
    "a dot and an underscore before a name": (
        ok(b".et-Cookie: PlaxoCS=1; path=/", b"_eep-Alive: timeout=45", b"_onnection: Keep-Alive")[
            :-2
        ]
        + CHUNKED
        + b"\r\n"
        + CLOSE
        + b"\r\n\r\n0\r\n\r\n",
        Read(200, b"", WHOLE, False),
    ),
    "a space in a name": (
        ok(b"en-US Content-Type: text/xml", b"Content-Length: 16", KEPT, body=b"<xml>hello</xml>"),
        None,
    ),
    "a phrase that is not ascii": (
        ok(
            b"Date: Fri, 5 Nov 2010 23:07:12 GMT+2",
            b"Content-Length: 0",
            CLOSE,
            start="HTTP/1.1 500 Oriëntatieprobleem".encode(),
        ),
        Read(500, b"", WHOLE, False),
    ),
    "text without a length": (
        ok(PLAIN, body=b"hello world"),
        Read(200, b"hello world", CLOSED, False),
    ),
    # invalid.md, lenient-version.md
    **{
        f"start line: {start!r}": (start + b"\r\n\r\n", None)
        for start in (
            b"HTP/1.1 200 OK",
            b"HTTP/01.1 200 OK",
            b"HTTP/11.1 200 OK",
            b"HTTP/1.01 200 OK",
            b"HTTP/1.1\t200 OK",
            b"\rHTTP/1.1\t200 OK",
            b"HTTP/5.6 200 OK",
            b"HTTP/1.1  200 OK",
            b"HTTP/1.1 2 OK",
            b"HTTP/1.1 200 OK\r\nFoo: 1\rBar: 2",
            b"HTTP/1.1 200 OK\rContent-Length: 0",
            b"HTTP/1.1 200 OK\r\rContent-Length: 4\r\n\r\nEvil",
            b"HTTP/1.1 200 OK\r\n Host: foo",
        )
    },
    "two spaces before the phrase": (
        ok(start=b"HTTP/1.1 200  OK"),
        Read(200, b"", CLOSED, False),
    ),
    "only line feeds": (b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", None),
    "only line feeds, and a body": (b"HTTP/1.1 200 OK\nFoo: abc\nBar: def\n\nBODY\n", None),
    # pausing.md, pipelining.md
    "a length": (ok(b"Content-Length: 3", body=b"abc"), Read(200, b"abc")),
    "a chunk": (ok(CHUNKED, body=b"a\r\n0123456789\r\n0\r\n\r\n"), Read(200, b"0123456789")),
    "a chunk with an extension": (
        ok(CHUNKED, body=b"a;foo=bar\r\n0123456789\r\n0\r\n\r\n"),
        Read(200, b"0123456789"),
    ),
    "three answers": (
        ok(b"Content-Length: 3", body=b"AAA\r\n")
        + ok(b"Content-Length: 4", start=b"HTTP/1.1 201 Created", body=b"BBBB\r\n")
        + ok(b"Content-Length: 5", start=b"HTTP/1.1 202 Accepted", body=b"CCCC"),
        Read(200, b"AAA", WHOLE, False),
    ),
    # transfer-encoding.md
    "a space after a chunk's size": (
        ok(CHUNKED, body=b"25  \r\nThis is the data in the first chunk\r\n\r\n0  \r\n\r\n"),
        Read(200, b"", BROKEN, False),
    ),
    "chunked, deflate": (ok(CHUNKED + b", deflate", body=b"World"), None),
    "chunked, and identity": (ok(CHUNKED, b"Transfer-Encoding: identity", body=b"World"), None),
    "chunkedchunked": (ok(CHUNKED + b"chunked", body=b"2\r\nOK\r\n0\r\n\r\n"), None),
    "extensions": (
        ok(
            CHUNKED,
            body=b"5;ilovew3;somuchlove=aretheseparametersfor\r\nhello\r\n"
            b"6;blahblah;blah\r\n world\r\n0\r\n\r\n",
        ),
        Read(200, b"hello world"),
    ),
    "an extension without its semicolon": (
        ok(CHUNKED, body=b"2 erfrferferf\r\naa\r\n0 rrrr\r\n\r\n"),
        Read(200, b"", BROKEN, False),
    ),
    "a semicolon without an extension": (
        ok(CHUNKED, body=b"2;\r\naa\r\n0\r\n\r\n"),
        Read(200, b"", BROKEN, False),
    ),
    "quoted extensions, and no end": (
        ok(
            CHUNKED,
            body=b'5;ilovew3="I love; extensions";somuchlove="aretheseparametersfor";blah;foo=bar'
            b"\r\nhello\r\n6;blahblah;blah\r\n world\r\n0\r\n",
        ),
        Read(200, b"hello world", BROKEN, False),
    ),
    "an extension with an open quote": (
        ok(
            CHUNKED,
            body=b'5;ilovew3="abc";somuchlove="def; ghi\r\nhello\r\n6;blahblah;blah\r\n world\r\n0',
        ),
        Read(200, b"", BROKEN, False),
    ),
    "a folded transfer-encoding": (
        ok(CHUNKED + b"\r\n  abc", body=b"5\r\nWorld\r\n0\r\n\r\n"),
        None,
    ),
}


def taken(data: bytes, cuts: list[int]) -> Read | None:
    """What the agent makes of an answer that comes in these pieces, after which it is closed."""
    rig, body = Rig(), Body()
    answers = rig.ask()
    for a, b in pairwise([0, *cuts, len(data)]):
        if not rig.endpoint.wires[0].gone:
            rig.receive(data[a:b])
        if answers and not body.connected and not isinstance(answers[0], Exception):
            answers[0].deliverBody(body)
    again = bool(rig.agent._idle)
    if not rig.endpoint.wires[0].gone:
        rig.endpoint.connections[0].connectionLost(Failure(ConnectionDone()))
    rig.agent.close()
    [answer] = answers
    if isinstance(answer, Exception):
        return None
    [end] = body.ends
    return Read(answer.code, body.data, end, again)


def cuts_of(data: bytes) -> list[list[int]]:
    single = list(range(1, len(data)))
    if LONG:
        return [[], single, *([cut] for cut in single)]
    return [[], single, *([cut] for cut in single[:: max(1, len(single) // 12)])]


def test_each_answer_is_taken_or_refused_the_same_in_any_split() -> None:
    tally = Tally("llhttp's answers, in memory")
    for name, (data, expected) in VECTORS.items():
        for cuts in cuts_of(data):
            got = taken(data, cuts)
            tally.add(f"{name}, cut at {cuts[:3]}", got == expected, f"{got}")
    tally.check(at_least=800)


GOOD = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}, "id": "good"}


def script(seen: Seen) -> list[Any]:
    name = seen.json()["messages"][0]["content"]
    if name == "good":
        return [json_answer(200, GOOD)]
    data, expected = VECTORS[name]
    ends = expected is None or expected.end is WHOLE
    return [data] if ends else [data, Close()]


def verdict(expected: Read | None) -> tuple[int, tuple[str, str]]:
    """The client's status and the row's state and outcome: none of these answers is a result."""
    if expected is None or expected.status == 200:
        return 502, ("orphan", "backend_failed")
    if expected.status == 204:
        return 502, ("orphan", "refused")
    return expected.status if expected.status == 404 else 502, ("settled", "refused")


async def ask(proxy: ProxyHandle, name: str) -> Any:
    body = {"model": "m", "messages": [{"role": "user", "content": name}]}
    return await proxy.post("/v1/chat/completions", body)


@pytest_twisted.ensureDeferred
async def test_no_answer_is_shown_billed_or_mixed_up_with_the_next_clients(tmp_path: Path) -> None:
    tally = Tally("llhttp's answers, through the proxy")
    async with ScriptedBackend(script) as backend:
        async with running_proxy(tmp_path, {"m": {"url": backend.url}}) as proxy:
            for name, (_, expected) in VECTORS.items():
                answer = await ask(proxy, name)
                after = await ask(proxy, "good")
                asked, good = backend.requests[-2:]
                reused = asked.connection is good.connection
                [row, _] = proxy.rows("state, outcome")[-2:]
                tally.add(name, (answer.status, row) == verdict(expected), f"{answer.status} {row}")
                tally.add(f"after {name}", after.body == orjson.dumps(GOOD))
                allowed = expected is not None and expected.again
                tally.add(f"the connection of {name}", allowed or not reused)
            count = len(VECTORS)  # of the good ones
            assert proxy.bill() == {"m/gpu/prompt": 3 * count, "m/gpu/completion": 2 * count}
    tally.check(at_least=150)
