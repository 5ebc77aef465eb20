"""Bytes that mean harm: whatever comes, in whatever pieces, the channel answers in HTTP or closes.

Requests are mutated, glued together and cut anywhere. None may raise, hang half-way without a
deadline, get a 5xx, or be read in two ways: the pieces in which bytes come change nothing.
"""

from __future__ import annotations

import itertools
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import Kept, Server, request_bytes
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from llmproxy.endpoints import Dialect
from llmproxy.errors import RequestTimeout
from llmproxy.site import VARIABLE, Request
from llmproxy.upload import ClientGone

pytestmark = pytest.mark.skipif(
    os.environ.get(VARIABLE) == "twisted", reason="this is about our own channel"
)

WHOLE = [
    request_bytes(b"/v1/a", b"body"),
    request_bytes(b"/v1/b", b"", b"Transfer-Encoding: chunked") + b"3\r\nabc\r\n0\r\nT: x\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n",
    b"HEAD / HTTP/1.0\r\n\r\n",
    request_bytes(b"/", b"x", b"Connection: close"),
    request_bytes(b"/", b"", b"Content-Length: 4", b"Expect: 100-continue") + b"late",
]
LONG, MANY = b"<long>", b"<many>"  # written out later: hypothesis shows what it tries
PIECES = [
    *(b"\r\n", b"\n", b"\r", b" ", b":", b"\0", b"\t", b"0", b"-1", b"+", b",", b";", b"#", b"?"),
    *(b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: b\r\n", b"\r\n\r\n"),
    *(b"Upgrade: h2c\r\nConnection: upgrade\r\n", b" HTTP/1.1", b"PRI * HTTP/2.0\r\n\r\nSM"),
    *(b"\xff\xfe", LONG, MANY, b"ffffffffffffffffff\r\n", b"0\r\n\r\n"),
]


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Some requests in a row, some of them not quite."""
    data = b"".join(draw(st.lists(st.sampled_from(WHOLE), min_size=1, max_size=4)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        cut = draw(st.integers(0, 4))
        data = data[:at] + draw(st.sampled_from([b"", *PIECES])) + data[at + cut :]
    return data


def play(data: bytes, cuts: list[int]) -> tuple[list[tuple[bytes, bytes, bytes]], list[int], bool]:
    """What was served of `data` (method, path, body), the statuses of all answers, and whether the
    connection was still open."""
    served: list[tuple[bytes, bytes, bytes]] = []

    def serve(request: Request) -> None:
        def done(body: bytes) -> None:
            served.append((request.method, request.path, body))
            request.answer(200, [], b"ok")

        waiting.append((request, done))

    def too_late(failure: Failure, request: Request) -> None:
        failure.trap(RequestTimeout, ClientGone)
        request.refuse(Dialect.OPENAI, RequestTimeout("The body did not come."))

    waiting: list[tuple[Request, object]] = []
    clock = Clock()
    server = Server(clock, Kept(serve))

    def answer_what_is_whole() -> None:
        while waiting and waiting[0][0].upload.whole:
            request, done = waiting.pop(0)
            done(request.upload.at_once(10**9) or b"")  # type: ignore[operator]

    data = data.replace(LONG, b"A" * 40_000).replace(MANY, b"X: y\r\n" * 120)
    edges = sorted({0, *(cut % (len(data) + 1) for cut in cuts), len(data)})
    for start, end in itertools.pairwise(edges):
        if not server.wire.connected:
            break
        server.send(data[start:end])
        answer_what_is_whole()
        clock.advance(0)
    is_open = server.wire.connected
    for request, _ in waiting:  # who wants a body waits for it, but not for ever
        Deferred.fromCoroutine(request.upload.read(10**9, 30)).addErrback(too_late, request)
    clock.advance(60)  # every deadline has passed
    clock.advance(60)
    clock.advance(1)
    assert not server.wire.connected or waiting == []
    assert server.active() == 0 or server.wire.connected
    sent = server.sent
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", sent)]
    server.leave()
    clock.advance(0)
    assert server.active() == 0
    assert clock.getDelayedCalls() == []
    return served, [status for status in statuses if status not in (100, 408)], is_open


@settings(max_examples=400, deadline=None)
@given(streams(), st.lists(st.integers(0, 200_000), max_size=8))
def test_whatever_comes_is_answered_in_http_and_the_same_in_any_pieces(
    data: bytes, cuts: list[int]
) -> None:
    served, statuses, is_open = play(data, cuts)
    assert all(status in (200, 400, 413, 414, 417, 431) for status in statuses)
    once = play(data, [])
    assert (served, is_open) == (once[0], once[2])
    # Which of two mistakes is told first can depend on the pieces, but not whether one is told.
    assert [status == 200 for status in statuses] == [status == 200 for status in once[1]]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_noise_is_no_request(data: bytes, cuts: list[int]) -> None:
    served, statuses, _ = play(data, cuts)
    assert served == []
    assert all(status == 400 for status in statuses)
