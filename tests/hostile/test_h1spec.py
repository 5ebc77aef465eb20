"""The 33 cases of h1spec (github.com/uNetworking/h1spec, 92814b2) against a server that echoes.

Its rules: what is not whole gets no answer yet; the status is in one of the ranges; where there is
a body to echo, a 200 has it.
"""

from __future__ import annotations

from typing import NamedTuple

from reading import read
from tally import Tally

GET = b"GET / HTTP/1.1\r\n"
POST = b"POST / HTTP/1.1\r\nHost: example.com\r\n"
HOST = b"Host: example.com\r\n"
YES, NO, NO_OR_OURS = (200, 299), (400, 499), (400, 599)

#: What may yet become a request: each is cut from one.
UNFINISHED = [
    *(b"G", b"GET ", b"GET /hello", b"GET /hello ", b"GET /hello HTTP", b"GET /hello HTTP/1.1"),
    *(b"GET /hello HTTP/1.1\r", b"GET /hello HTTP/1.1\r\n", b"GET /hello HTTP/1.1\r\nHos"),
    *(b"GET /hello HTTP/1.1\r\nHost:", b"GET /hello HTTP/1.1\r\nHost: "),
    *(b"GET /hello HTTP/1.1\r\nHost: localhost", b"GET /hello HTTP/1.1\r\nHost: localhost\r"),
    *(
        b"GET /hello HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /hello HTTP/1.1\r\nHost: localhost\r\n\r",
    ),
]


class Case(NamedTuple):
    name: str
    data: bytes
    ranges: tuple[tuple[int, int], ...]
    echo: bytes = b""


CHUNKS = b"c\r\nHellO world1\r\n0\r\n\r\n"
CASES = [
    Case("no version", b"GET / \r\n\r\n", (NO_OR_OURS,)),
    Case("an expectation", GET + HOST + b"Expect: 100-continue\r\n\r\n", ((100, 100), YES)),
    Case("GET", GET + HOST + b"\r\n", (YES,)),
    Case("a tab, and nothing", GET + b"hoSt:\texample.com\r\nempty:\r\n\r\n", (YES,)),
    Case("brackets in a name", GET + HOST + b"X-Invalid[]: test\r\n\r\n", (NO,)),
    Case("no Host", GET + b"Content-Length: 5\r\n\r\n", (NO,)),
    Case("two Hosts", GET + HOST + b"Host: example.org\r\n\r\n", (NO,)),
    Case("far below 0", GET + HOST + b"Content-Length: -%b\r\n\r\n" % (b"123456789" * 3), (NO,)),
    Case("below 0", GET + HOST + b"Content-Length: -1234\r\n\r\n", (NO,)),
    Case("no number", GET + HOST + b"Content-Length: abc\r\n\r\n", (NO,)),
    Case("an empty value", GET + HOST + b"X-Empty-Header: \r\n\r\n", (YES,)),
    Case("a bell", GET + HOST + b"X-Bad-Control-Char: test\x07\r\n\r\n", (NO,)),
    Case("HTTP/9.9", b"GET / HTTP/9.9\r\n" + HOST + b"\r\n", (NO_OR_OURS,)),
    Case("text in front", b"Extra line" + GET + HOST + b"\r\n", (NO_OR_OURS,)),
    Case("a bare CR", GET + HOST + b"\rSome-Header: Test\r\n\r\n", (NO,)),
    Case("POST", POST + b"Content-Length: 5\r\n\r\nhello", (YES, (404, 404)), b"hello"),
    Case("chunks", POST + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS, (YES,), b"HellO world1"),
    Case(
        "chunks and a length",
        POST + b"content-LengtH: 5\r\nTransFer-Encoding: chunked\r\n\r\n" + CHUNKS,
        (NO, YES),
        b"HellO world1",
    ),
]


def test_h1spec() -> None:
    verdicts = Tally("h1spec")
    for data in UNFINISHED:
        verdicts.add(repr(data), read(data).waits)
    for case in CASES:
        reading = read(case.data)
        status = reading.statuses[0] if reading.statuses else 0
        good = any(low <= status <= high for low, high in case.ranges)
        if status == 200 and case.echo:
            good = good and reading.sent.endswith(b"\r\n\r\n" + case.echo)
        verdicts.add(case.name, good, f"answered {reading.statuses}")
    verdicts.check(at_least=33)
