"""Requests that two servers in a row could read in two ways, and such that are too large.

Each goes to a real proxy with a valid key, and is followed by a good request: if either of them
were understood, the backend would hear of it, and the ledger would have a row.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_twisted
from backend import ScriptedBackend, json_answer
from memory import Kept, Server
from memory import request_bytes as plain_request
from proxy import KEY, Client, ProxyHandle, request_bytes, running_proxy
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from llmproxy.channel import MAX_BLANK_LINES, MAX_FRAMING
from llmproxy.framing import MAX_FIELDS, MAX_HEADER, MAX_TARGET
from llmproxy.site import VARIABLE

reactor: Any = _reactor

only_ours = pytest.mark.skipif(
    os.environ.get(VARIABLE) == "twisted", reason="Twisted's channel does not do this"
)

CHAT = "/v1/chat/completions"
BODY = orjson.dumps({"model": "chat", "messages": []})
COMPLETION = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
GOOD = request_bytes("POST", CHAT, BODY)
LINE = b"POST /v1/chat/completions HTTP/1.1"
HOST = b"Host: proxy"
CHUNKED = b"Transfer-Encoding: chunked"
LENGTH = b"Content-Length: %d" % len(BODY)
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


def request(*fields: bytes, line: bytes = LINE, host: bytes = HOST, body: bytes = b"") -> bytes:
    """A request with a valid key; nothing frames its body but `fields`."""
    usual = [f for f in (host, b"Authorization: Bearer " + KEY.encode()) if f]
    return b"\r\n".join([line, *usual, b"Content-Type: application/json", *fields, b"", b""]) + body


def sized(value: bytes) -> bytes:
    return request(b"Content-Length: " + value, body=BODY)


def coded(*lines: bytes, line: bytes = LINE) -> bytes:
    return request(*lines, line=line, body=CHUNKS)


def chunked(body: bytes) -> bytes:
    return request(CHUNKED, body=body)


SIZE = b"%x" % len(BODY)
N = str(len(BODY)).encode()

LENGTHS = {
    "length, then coding": request(LENGTH, CHUNKED, body=CHUNKS),
    "coding, then length": request(CHUNKED, LENGTH, body=CHUNKS),
    "identity and length": request(b"Transfer-Encoding: identity", LENGTH, body=BODY),
    "two lengths": request(LENGTH, b"Content-Length: 0", body=BODY),
    "one length twice": request(LENGTH, LENGTH, body=BODY),
    "a list": sized(N + b", " + N),
    "plus": sized(b"+" + N),
    "minus": sized(b"-1"),
    "hexadecimal": sized(b"0x" + SIZE),
    "underscore": sized(b"0_" + N),
    "another script's digit": sized("\u0663".encode()),
    "400 digits": sized(b"9" * 400),
    "2 to the 64th": sized(b"18446744073709551616"),
    "two numbers": sized(b"1 2"),
    "a fraction": sized(b"3.0"),
    "quotes": sized(b'"%b"' % N),
    "nothing": sized(b""),
    "a comma": sized(N + b","),
    "a vertical tab": sized(b"\x0b" + N),
    "a space in the name": request(b"Content Length: " + N, body=BODY),
    "a space after the name": request(b"Content-Length : " + N, body=BODY),
}

CODINGS = {
    "xchunked": coded(b"Transfer-Encoding: xchunked"),
    "chunked first": coded(b"Transfer-Encoding: chunked, identity"),
    "gzip, chunked": coded(b"Transfer-Encoding: gzip, chunked"),
    "chunked twice in one": coded(b"Transfer-Encoding: chunked, chunked"),
    "chunked twice": coded(CHUNKED, CHUNKED),
    "identity": coded(b"Transfer-Encoding: identity"),
    "identity, then chunked": coded(b"Transfer-Encoding: identity", CHUNKED),
    "nothing": coded(b"Transfer-Encoding:"),
    "nothing, then chunked": coded(b"Transfer-Encoding:", CHUNKED),
    "vertical tab": coded(b"Transfer-Encoding: \x0bchunked"),
    "vertical tab behind": coded(b"Transfer-Encoding: chunked\x0b"),
    "space before the colon": coded(b"Transfer-Encoding : chunked"),
    "tab before the colon": coded(b"Transfer-Encoding\t: chunked"),
    "folded": coded(b"Transfer-Encoding:\r\n chunked"),
    "folded behind": coded(b"Transfer-Encoding: chunked\r\n x"),
    "a parameter": coded(b"Transfer-Encoding: chunked;q=1"),
    "quotes": coded(b'Transfer-Encoding: "chunked"'),
    "a comma": coded(b"Transfer-Encoding: chunked,"),
    "in HTTP/1.0": coded(CHUNKED, line=b"POST /v1/chat/completions HTTP/1.0"),
    "in another field's line": coded(b"X: y\rTransfer-Encoding: chunked"),
    "behind a bare LF": coded(b"X: y\nTransfer-Encoding: chunked"),
}

CHUNK_SYNTAX = {
    "0x": chunked(CHUNKS.replace(SIZE, b"0x" + SIZE, 1)),
    "plus": chunked(b"+" + CHUNKS),
    "minus": chunked(b"-1\r\n" + BODY),
    "17 digits": chunked(b"F" * 17 + b"\r\n" + BODY),
    "a space behind": chunked(CHUNKS.replace(b"\r\n", b" \r\n", 1)),
    "a space before": chunked(b" " + CHUNKS),
    "a tab behind": chunked(CHUNKS.replace(b"\r\n", b"\t\r\n", 1)),
    "bare LF behind the size": chunked(CHUNKS.replace(b"\r\n", b"\n", 1)),
    "bare CR behind the size": chunked(CHUNKS.replace(b"\r\n", b"\r", 1)),
    "CR CR LF": chunked(CHUNKS.replace(b"\r\n", b"\r\r\n", 1)),
    "bare LF behind the data": chunked(SIZE + b"\r\n" + BODY + b"\n0\r\n\r\n"),
    "nothing behind the data": chunked(SIZE + b"\r\n" + BODY + b"0\r\n\r\n"),
    "other bytes behind the data": chunked(SIZE + b"\r\n" + BODY + b"XX0\r\n\r\n"),
    "bare LF at the end": chunked(SIZE + b"\r\n" + BODY + b"\r\n0\r\n\n"),
    "two bare LF at the end": chunked(SIZE + b"\r\n" + BODY + b"\r\n0\n\n"),
    "no size": chunked(b"\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "no hexadecimal size": chunked(b"g\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "underscore": chunked(b"0_" + CHUNKS),
    "LF in an extension": chunked(CHUNKS.replace(b"\r\n", b";a\nb\r\n", 1)),
    "CR in an extension": chunked(CHUNKS.replace(b"\r\n", b";a\rb\r\n", 1)),
    "LF in a quoted extension": chunked(CHUNKS.replace(b"\r\n", b';a="\n"\r\n', 1)),
    "NUL in an extension": chunked(CHUNKS.replace(b"\r\n", b";a\0\r\n", 1)),
    "an extension of 64 KiB": chunked(CHUNKS.replace(b"\r\n", b";a=%b\r\n" % (b"x" * 65533), 1)),
    "a trailer with a length": chunked(CHUNKS[:-2] + b"Content-Length: 3\r\n\r\n"),
    "a trailer with a coding": chunked(CHUNKS[:-2] + CHUNKED + b"\r\n\r\n"),
    "a trailer with a key": chunked(CHUNKS[:-2] + b"Authorization: Bearer token3\r\n\r\n"),
    "a trailer with a host": chunked(CHUNKS[:-2] + b"X: y\r\nHost: other\r\n\r\n"),
    "a trailer that closes": chunked(CHUNKS[:-2] + b"Connection: close\r\n\r\n"),
    "a trailer that is folded": chunked(CHUNKS[:-2] + b"X: y\r\n z\r\n\r\n"),
    "a trailer that is no field": chunked(CHUNKS[:-2] + b"nonsense\r\n\r\n"),
    "a trailer of 1 MiB": chunked(CHUNKS[:-2] + b"X: " + b"y" * 2**20 + b"\r\n\r\n"),
    "a trailer of 1 MiB in lines": chunked(CHUNKS[:-2] + b"X: y\r\n" * 2**18 + b"\r\n"),
}

FIELDS = {
    "bare LF between": request(LENGTH + b"\nX: y", body=BODY),
    "bare CR between": request(LENGTH + b"\rX: y", body=BODY),
    "bare LF everywhere": request(LENGTH).replace(b"\r\n", b"\n") + BODY,
    "bare LF at the end": request(LENGTH)[:-2] + b"\n" + BODY,
    "bare CR at the end": request(LENGTH)[:-1] + BODY,
    "bare CR in a value": request(LENGTH, b"X: a\rb", body=BODY),
    "NUL in a value": request(LENGTH, b"X: a\0b", body=BODY),
    "NUL in a name": request(LENGTH, b"X\0: ab", body=BODY),
    "folded": request(LENGTH, b"X: a\r\n b", body=BODY),
    "folded by a tab": request(LENGTH, b"X: a\r\n\tb", body=BODY),
    "folded and empty": request(LENGTH, b"X:\r\n \r\n b", body=BODY),
    "folded at the top": request(LENGTH, line=LINE + b"\r\n X: y", body=BODY),
    "no colon": request(LENGTH, b"nonsense", body=BODY),
    "no name": request(LENGTH, b": x", body=BODY),
    "a space at the start": request(LENGTH, b" X: y", body=BODY),
    "a space in the name": request(LENGTH, b"X Y: z", body=BODY),
    "a space before the colon": request(LENGTH, b"X : y", body=BODY),
    "brackets in the name": request(LENGTH, b"X[]: y", body=BODY),
    "a letter that is not ASCII": request(LENGTH, "Content-L\u00e9ngth: 3".encode(), body=BODY),
    **{
        f"control character {n:#x}": request(LENGTH, b"X: a%cb" % n, body=BODY)
        for n in (*range(1, 9), 11, 12, *range(14, 32), 127)
    },
}

LINES = {
    "two spaces before the target": b"POST  /v1/chat/completions HTTP/1.1",
    "two spaces behind the target": b"POST /v1/chat/completions  HTTP/1.1",
    "a tab before the target": b"POST\t/v1/chat/completions HTTP/1.1",
    "a tab behind the target": b"POST /v1/chat/completions\tHTTP/1.1",
    "a space in front": b" POST /v1/chat/completions HTTP/1.1",
    "a tab in front": b"\tPOST /v1/chat/completions HTTP/1.1",
    "a space at the end": b"POST /v1/chat/completions HTTP/1.1 ",
    "a word too many": b"POST /v1/chat/completions x HTTP/1.1",
    "no version": b"POST /v1/chat/completions",
    "no target": b"POST HTTP/1.1",
    "a bare LF in front": b"\nPOST /v1/chat/completions HTTP/1.1",
    "two empty lines in front": b"\r\n\r\nPOST /v1/chat/completions HTTP/1.1",
    "HTTP/0.9": b"POST /v1/chat/completions HTTP/0.9",
    "HTTP/1.2": b"POST /v1/chat/completions HTTP/1.2",
    "HTTP/1.10": b"POST /v1/chat/completions HTTP/1.10",
    "HTTP/2.0": b"POST /v1/chat/completions HTTP/2.0",
    "http/1.1": b"POST /v1/chat/completions http/1.1",
    "another protocol": b"POST /v1/chat/completions RTSP/1.1",
    "a protocol of llhttp's": b"SOURCE /v1/chat/completions ICE/1.0",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM",
    "a method in small letters": b"post /v1/chat/completions HTTP/1.1",
    "a method that there is not": b"POSTS /v1/chat/completions HTTP/1.1",
    "absolute-form": b"POST http://other/v1/chat/completions HTTP/1.1",
    "absolute-form to us": b"POST http://proxy/v1/chat/completions HTTP/1.1",
    "asterisk-form": b"OPTIONS * HTTP/1.1",
    "a host and port": b"CONNECT other:443 HTTP/1.1",
    "CONNECT to a path": b"CONNECT /v1/chat/completions HTTP/1.1",
    "a fragment": b"POST /v1/chat/completions#x HTTP/1.1",
    "no slash": b"POST v1/chat/completions HTTP/1.1",
    "NUL": b"POST /v1/chat/completions\0 HTTP/1.1",
    "a control character": b"POST /v1/chat/completions\x01 HTTP/1.1",
    "a letter that is not ASCII": "POST /v1/ch\u00e4t HTTP/1.1".encode(),
}

HOSTS = {
    "none": b"",
    "two": b"Host: proxy\r\nHost: other",
    "one twice": b"Host: proxy\r\nHost: proxy",
    **{
        f"with {odd!r}": b"Host: " + odd
        for odd in (b"a/v1/models?", b"a?b", b"a#b", b"u@a", b"a b", b"a,b", b"a:b", b"a\\b")
    },
}

REFUSED: dict[str, Mapping[str, bytes]] = {
    "length": LENGTHS,
    "coding": CODINGS,
    "chunk": CHUNK_SYNTAX,
    "field": FIELDS,
    "line": {name: request(LENGTH, line=line, body=BODY) for name, line in LINES.items()},
    "host": {name: request(LENGTH, host=host, body=BODY) for name, host in HOSTS.items()},
    "upgrade": {
        protocol: request(
            LENGTH, b"Connection: Upgrade", b"Upgrade: " + protocol.encode(), body=BODY
        )
        for protocol in ("h2c", "websocket", "TLS/1.0")
    },
    "body": {
        "of GET": request(LENGTH, line=b"GET /v1/models HTTP/1.1", body=BODY),
        "of HEAD": request(LENGTH, line=b"HEAD /v1/models HTTP/1.1", body=BODY),
        "of GET in chunks": request(CHUNKED, line=b"GET /v1/models HTTP/1.1", body=CHUNKS),
    },
}
#: It answers them, with 405 and 413.
ANSWERED_BY_TWISTED = {
    *("a method in small letters", "a method that there is not"),
    *("400 digits", "2 to the 64th"),
}
FIRST_LINE_ONLY = {"GET /\r\n": b"GET /\r\n", "GET / HTTP/1.1 and a space": b"GET / HTTP/1.1 \r\n"}


@asynccontextmanager
async def proxy_and_backend(
    folder: Path, **settings: Any
) -> AsyncIterator[tuple[ProxyHandle, ScriptedBackend]]:
    async with (
        ScriptedBackend([json_answer(200, COMPLETION)]) as backend,
        running_proxy(folder, {"chat": {"url": backend.url}}, **settings) as proxy,
    ):
        yield proxy, backend


async def closed(client: Client, timeout_s: float = 5.0) -> bool:
    """Whether the connection ends in time."""
    if not client.closed.called:
        waiting: Deferred[None] = client.when(lambda received: False)
        late = reactor.callLater(timeout_s, client.abort)
        await waiting
        if not late.active():
            return False
        late.cancel()
    return True


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


async def refusal(proxy: ProxyHandle, data: bytes) -> str:
    """What is wrong with the answer to `data`, and nothing if it is a proper refusal."""
    client = await proxy.open()
    client.send(data)
    over = await closed(client)
    answer = client.answer()
    if statuses(client.received) not in ([400], [405], [431], [501]):
        return f"answered {statuses(client.received)}"
    if not over:
        return "not closed"
    if answer.fields.get("connection") != "close" or "error" not in answer.json():
        return f"no proper refusal: {client.received!r}"
    return ""


@pytest.mark.parametrize("group", REFUSED)
@pytest_twisted.ensureDeferred
async def test_what_could_be_read_in_two_ways_is_refused_and_nobody_hears_of_it(
    tmp_path: Path, group: str
) -> None:
    variants = dict(REFUSED[group])
    if os.environ.get(VARIABLE) == "twisted":
        if group in ("chunk", "upgrade"):
            pytest.skip("Twisted's channel does not do this")
        variants = {
            name: data for name, data in variants.items() if name not in ANSWERED_BY_TWISTED
        }
    async with proxy_and_backend(tmp_path) as (proxy, backend):
        wrong = {
            name: problem
            for name, data in variants.items()
            if (problem := await refusal(proxy, data + GOOD))
        }
        assert wrong == {}
        assert backend.received == 0
        assert proxy.rows() == []


@only_ours
@pytest.mark.parametrize("data", FIRST_LINE_ONLY.values(), ids=FIRST_LINE_ONLY)
def test_a_first_line_is_refused_before_the_rest_has_come(clock: Clock, data: bytes) -> None:
    server = Server(clock)
    for byte in data:
        server.send(bytes([byte]))
    assert statuses(server.sent) == [400]
    clock.advance(0)
    assert not server.wire.connected


@only_ours
@pytest.mark.parametrize("group", REFUSED)
def test_they_are_refused_in_whatever_pieces_they_come(clock: Clock, group: str) -> None:
    for name, data in REFUSED[group].items():
        if len(data) > 10_000:
            continue
        for size in (1, 2, 3, 7, 100):
            server = Server(clock)
            sent = data + plain_request(b"/smuggled", b"x")
            for start in range(0, len(sent), size):
                if server.wire.connected:
                    server.send(sent[start : start + size])
                    clock.advance(0)
            assert statuses(server.sent) == [400], (name, size)
            assert not any(request.path == b"/smuggled" for request in server.requests), name


# --- what is allowed all the same ---------------------------------------------------------------

UNUSUAL = {
    "an empty line in front": b"\r\n" + GOOD,
    "HTTP/1.0 without a host": request(
        LENGTH, line=LINE.replace(b"1.1", b"1.0"), host=b"", body=BODY
    ),
    "zeros before the length": sized(b"000" + N),
    "white space around the length": sized(b" \t" + N + b" \t"),
    "Chunked": coded(b"transfer-ENCODING:chunked"),
    "zeros before a chunk's size": chunked(b"000" + CHUNKS),
    "a size in capitals": chunked(CHUNKS.replace(SIZE, SIZE.upper(), 1)),
    "an extension": chunked(CHUNKS.replace(b"\r\n", b';a=b;c="d;e"\r\n', 1)),
    "a trailer": chunked(CHUNKS[:-2] + b"X: y\r\n\r\n"),
    "obsolete text in a value": request(LENGTH, b"X: \xff\xe9", body=BODY),
}


@only_ours
@pytest_twisted.ensureDeferred
async def test_what_is_unusual_and_clear_gets_to_the_backend_as_one_plain_request(
    tmp_path: Path,
) -> None:
    async with proxy_and_backend(tmp_path) as (proxy, backend):
        for name, data in UNUSUAL.items():
            answer = await proxy.send(data)
            assert answer.status == 200, name
        assert len(backend.requests) == len(UNUSUAL)
        assert {seen.body for seen in backend.requests} == {BODY}
        assert {seen.header("content-length") for seen in backend.requests} == {str(len(BODY))}
        assert {seen.header("transfer-encoding") for seen in backend.requests} == {None}
        assert [row[0] for row in proxy.rows()] == ["settled"] * len(UNUSUAL)


@pytest_twisted.ensureDeferred
async def test_a_name_with_underscores_is_not_the_name_with_hyphens_and_goes_nowhere(
    tmp_path: Path,
) -> None:
    odd = [b"Content_Length: 3", b"Transfer_Encoding: chunked", b"X_Api_Key: canary"]
    async with proxy_and_backend(tmp_path) as (proxy, backend):
        assert (await proxy.send(request(LENGTH, *odd, body=BODY))).status == 200
        (seen,) = backend.requests
        assert seen.body == BODY
        assert b"_" not in seen.head
        assert b"canary" not in seen.raw
        answer = await proxy.send(
            request(*odd, host=HOST, body=b"").replace(b"Authorization", b"X")
        )
        assert answer.status == 401  # neither a body nor a key
        assert len(backend.requests) == 1


@pytest_twisted.ensureDeferred
async def test_trace_is_not_answered_with_what_was_sent(tmp_path: Path) -> None:
    async with proxy_and_backend(tmp_path) as (proxy, backend):
        for path, status in ((CHAT, 405), ("/", 404)):
            answer = await proxy.send(request_bytes("TRACE", path, fields={"X-Canary": "canary"}))
            assert answer.status == status
            assert b"canary" not in answer.raw
        assert backend.received == 0


# --- limits ---------------------------------------------------------------------------------------

MANY = [b"X: y"] * (MAX_FIELDS - 3)  # with those that `request` has
LIMITS = {
    "fields": (request(LENGTH, *MANY, body=BODY), 431),
    "one large field": (request(LENGTH, b"X: " + b"y" * MAX_HEADER, body=BODY), 431),
    "large fields": (request(LENGTH, *[b"X: " + b"y" * 4096] * 8, body=BODY), 431),
    "a large field without an end": (LINE + b"\r\nX: " + b"y" * (MAX_HEADER + 1), 431),
    "target": (GOOD.replace(CHAT.encode(), CHAT.encode() + b"?" + b"x" * MAX_TARGET, 1), 414),
    "a target without an end": (b"GET /" + b"x" * (MAX_TARGET + 100), 414),
    "the length of a body": (sized(b"1001").replace(BODY, bytes(1001)), 413),
    "a body without a length": (chunked(b"3e9\r\n" + bytes(1001) + b"\r\n0\r\n\r\n"), 413),
    "a length past 2 to the 63rd": (sized(b"9223372036854775808"), 413),
    "a chunk of 2 to the 64th": (chunked(b"F" * 16 + b"\r\n" + bytes(1001)), 413),
    "an expectation": (request(LENGTH, b"Expect: 200-ok", body=BODY), 417),
    "two expectations": (request(LENGTH, b"Expect: 100-continue", b"Expect: x", body=BODY), 417),
}


@only_ours
@pytest_twisted.ensureDeferred
async def test_what_is_over_a_limit_is_told_so(tmp_path: Path) -> None:
    async with proxy_and_backend(tmp_path, max_json_body=1000) as (proxy, backend):
        for name, (data, status) in LIMITS.items():
            client = await proxy.open()
            client.send(data)
            await client.when(lambda received: received.endswith(b"}"))
            assert statuses(client.received) == [status], name
            assert await closed(client, 0 if status == 413 else 5) or status == 413, name
        assert backend.received == 0
        assert proxy.rows() == []


@pytest_twisted.ensureDeferred
async def test_just_below_the_limits_all_is_well(tmp_path: Path) -> None:
    spare = MAX_HEADER - len(request(LENGTH, b"X: "))
    within = {
        "fields": request(LENGTH, *MANY[:-1], body=BODY),
        "one large field": request(LENGTH, b"X: " + b"y" * spare, body=BODY),
        "target": GOOD.replace(
            CHAT.encode(), CHAT.encode() + b"?" + b"x" * (MAX_TARGET - len(CHAT) - 1), 1
        ),
        "body": request_bytes("POST", CHAT, BODY.ljust(1000)),
    }
    async with proxy_and_backend(tmp_path, max_json_body=1000) as (proxy, _):
        for name, data in within.items():
            assert (await proxy.send(data)).status == 200, name


@pytest_twisted.ensureDeferred
async def test_a_body_that_is_too_large_is_refused_before_it_is_invited(tmp_path: Path) -> None:
    async with proxy_and_backend(tmp_path, max_json_body=1000) as (proxy, backend):
        client = await proxy.open()
        client.send(request(b"Content-Length: 1001", b"Expect: 100-continue"))
        await client.when(lambda received: received.endswith(b"}"))
        assert statuses(client.received) == [413]
        await client.close()
        assert backend.received == 0


def test_who_speaks_http_1_0_is_not_invited(clock: Clock) -> None:
    if os.environ.get(VARIABLE) == "twisted":
        pytest.skip("Twisted's channel does not do this")
    server = Server(clock)
    fields = b"Expect: 100-continue", b"Content-Length: 3"
    server.send(plain_request(b"/", b"", *fields, version=b"HTTP/1.0"))
    reading = Deferred.fromCoroutine(server.requests[0].upload.read(10, 5))
    assert server.sent == b""
    server.send(b"abc")
    assert reading.result == b"abc"
    server.leave()


@pytest_twisted.ensureDeferred
async def test_a_body_that_stays_away_is_told_so(tmp_path: Path) -> None:
    async with proxy_and_backend(tmp_path, timeout_read=0.2) as (proxy, backend):
        for data in (request(LENGTH, body=BODY[:-1]), chunked(CHUNKS[:-7])):
            client = await proxy.open()
            client.send(data)
            await client.when(lambda received: received.endswith(b"}"))
            assert statuses(client.received) == [408]
            await client.close()
        assert backend.received == 0
        assert proxy.rows() == []


# --- one byte a chunk -----------------------------------------------------------------------------


@only_ours
@pytest_twisted.ensureDeferred
async def test_a_million_chunks_of_one_byte_are_not_read(tmp_path: Path) -> None:
    async with proxy_and_backend(tmp_path) as (proxy, backend):
        client = await proxy.open()
        used = time.process_time()
        client.send(chunked(b"1\r\n \r\n" * 1_000_000))
        assert await closed(client)
        assert statuses(client.received) == [400]
        assert time.process_time() - used < 2  # nearly all of it is this client's own
        assert backend.received == 0


@only_ours
def test_what_a_body_costs_does_not_depend_on_how_it_is_cut(clock: Clock) -> None:
    """Three bytes a chunk are allowed; so are empty lines, each of which could be the end."""

    def seconds(piece: bytes, bytes_in_all: int) -> float:
        server = Server(clock)
        server.send(plain_request(b"/", b"", CHUNKED))
        server.requests[0].upload.discard(lambda: None)
        piece *= 32 * 1024 // len(piece)
        began = time.process_time()
        for _ in range(bytes_in_all // len(piece)):
            server.send(piece)
        used = time.process_time() - began
        assert server.sent == b""
        server.leave()
        return used

    def of_lines() -> bytes:
        lines = b"\r\n\r\n" * 1000
        return b"%x\r\n%b\r\n" % (len(lines), lines)

    for piece in (b"3\r\nabc\r\n", of_lines()):
        assert seconds(piece, 2**20) < 1.0  # 80 ms on an idle machine


@only_ours
@pytest.mark.parametrize("body", [100, 1_000_000])
@pytest.mark.parametrize("tail", [b"1;", b"0\r\nX: "], ids=["extension", "trailer"])
def test_a_long_body_buys_no_long_extension_or_trailer(
    clock: Clock, body: int, tail: bytes
) -> None:
    server = Server(clock)
    server.send(plain_request(b"/", b"", CHUNKED) + b"%x\r\n" % body)
    server.requests[0].upload.discard(lambda: None)
    server.send(bytes(body))
    server.send(b"\r\n" + tail)
    sent = 0
    while server.wire.connected and sent < 2**20:
        server.send(b"x" * 1000)
        clock.advance(0)
        sent += 1000
    assert statuses(server.sent) == [400]
    assert sent < MAX_FRAMING + 3 * min(body, 1000) + 2000


# --- pipelining -----------------------------------------------------------------------------------


def asks(model: str, key: str | None) -> bytes:
    return request_bytes("POST", CHAT, orjson.dumps({"model": model, "messages": []}), key=key)


@pytest_twisted.ensureDeferred
async def test_requests_of_two_keys_in_one_packet_are_billed_to_their_own(tmp_path: Path) -> None:
    usage = [{"prompt_tokens": n, "completion_tokens": 1} for n in (10, 20, 30)]
    answers = [[json_answer(200, {"choices": [], "usage": each})] for each in usage]
    async with (
        ScriptedBackend(*answers) as backend,
        running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy,
    ):
        client = await proxy.open()
        client.send(asks("chat", "token2") + asks("chat", "token3") + asks("chat", "token2"))
        await client.when(lambda received: received.count(b"choices") == 3)
        assert re.findall(rb'"prompt_tokens":(\d+)', client.received) == [b"10", b"20", b"30"]
        assert proxy.rows("api_key, prompt") == [
            ("id-token2", 10),
            ("id-token3", 20),
            ("id-token2", 30),
        ]
        await client.close()


@pytest_twisted.ensureDeferred
async def test_a_wrong_key_in_between_is_answered_in_its_turn(tmp_path: Path) -> None:
    async with proxy_and_backend(tmp_path) as (proxy, backend):
        client = await proxy.open()
        client.send(asks("chat", "token2") + asks("chat", "wrong") + asks("chat", "token3"))
        await client.when(lambda received: received.count(b"choices") == 2)
        assert statuses(client.received) == [200, 401, 200]
        assert proxy.rows("api_key") == [("id-token2",), ("id-token3",)]
        assert len(backend.requests) == 2
        await client.close()


@only_ours
def test_a_body_of_empty_lines_is_a_body_and_the_connection_goes_on(clock: Clock) -> None:
    text = b"\r\n\r\n" * 10 * MAX_BLANK_LINES
    server = Server(clock, Kept(lambda request: request.answer(200, [], b"ok")))
    for _ in range(3):
        server.send(
            plain_request(b"/", b"", CHUNKED) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(text), text)
        )
    server.send(plain_request(b"/"))
    assert statuses(server.sent) == [200] * 4
    server.leave()


@only_ours
@pytest.mark.parametrize("lines", [1, MAX_BLANK_LINES + 1])
def test_a_first_line_is_seen_after_a_body_in_chunks_too(clock: Clock, lines: int) -> None:
    decoy = b"POST / HTTP/1.1\r\n"  # what the second line should have been
    text = b"\r\n\r\n" * lines + decoy
    first = plain_request(b"/first", b"", CHUNKED) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(text), text)
    server = Server(clock, Kept(lambda request: request.answer(200, [], b"ok")))
    server.send(first + plain_request(b"/second").replace(b"POST ", b"POST  "))
    clock.advance(0)
    assert statuses(server.sent) == [200, 400]
    assert not server.wire.connected
