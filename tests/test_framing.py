"""What a request's first line and fields must be like."""

from __future__ import annotations

import pytest

from llmproxy.errors import BadRequest, ExpectationFailed, TargetTooLong
from llmproxy.framing import (
    MAX_HEADER,
    MAX_TARGET,
    Fields,
    check,
    combined,
    first_line,
    may_trail,
    problem_so_far,
)

HOST = (b"Host", b"proxy")
PLAIN = [b"proxy", b"proxy:8080", b"127.0.0.1:1", b"[::1]:8080", b"a_b-c.d~e", b"%41", b""]
ODD = [
    *(b"a/v1/models?", b"a?b", b"a#b", b"u@a", b"a b", b"a,b", b"a\\b", b"a:b", b"a:1:2", b"[::1"),
    *(b"\xc3\xa9", b"http://a", b"a/", b"[::1]x"),
]


def fields(*sent: tuple[bytes, bytes]) -> Fields:
    return combined(sent)


def test_fields_are_found_by_name_in_any_case_and_combined_in_order() -> None:
    found = fields((b"A", b" 1\t"), (b"b", b""), (b"a", b"2"))
    assert found == {b"a": b"1, 2", b"b": b""}


@pytest.mark.parametrize("host", PLAIN)
def test_one_plain_host_will_do(host: bytes) -> None:
    check(b"POST", b"/v1", b"HTTP/1.1", fields((b"hOst", host)))


@pytest.mark.parametrize("host", ODD)
def test_an_odd_host_is_refused(host: bytes) -> None:
    with pytest.raises(BadRequest):
        check(b"POST", b"/v1", b"HTTP/1.1", fields((b"Host", host)))


@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"])
def test_two_hosts_are_refused(version: bytes) -> None:
    with pytest.raises(BadRequest):
        check(b"POST", b"/v1", version, fields(HOST, HOST))


def test_a_host_may_be_missing_in_http_1_0_only() -> None:
    check(b"POST", b"/v1", b"HTTP/1.0", {})
    with pytest.raises(BadRequest):
        check(b"POST", b"/v1", b"HTTP/1.1", {})


@pytest.mark.parametrize("version", [b"HTTP/0.9", b"HTTP/1.2", b"HTTP/2.0", b"RTSP/1.0"])
def test_another_version_is_refused(version: bytes) -> None:
    with pytest.raises(BadRequest):
        check(b"POST", b"/v1", version, fields(HOST))


@pytest.mark.parametrize("target", [b"*", b"http://a/v1", b"a:80", b"v1", b"", b"/v1#x"])
def test_a_target_that_is_no_path_is_refused(target: bytes) -> None:
    with pytest.raises(BadRequest):
        check(b"POST", target, b"HTTP/1.1", fields(HOST))


def test_a_target_has_a_limit() -> None:
    check(b"POST", b"/" * MAX_TARGET, b"HTTP/1.1", fields(HOST))
    with pytest.raises(TargetTooLong):
        check(b"POST", b"/" * (MAX_TARGET + 1), b"HTTP/1.1", fields(HOST))


@pytest.mark.parametrize("coding", [b"chunked", b"Chunked"])
def test_chunked_is_the_one_coding(coding: bytes) -> None:
    check(b"POST", b"/", b"HTTP/1.1", fields(HOST, (b"Transfer-Encoding", coding)))


@pytest.mark.parametrize(
    "coding", [b"gzip, chunked", b"chunked, chunked", b"identity", b"", b"\x0bchunked", b"xchunked"]
)
def test_another_coding_is_refused(coding: bytes) -> None:
    with pytest.raises(BadRequest):
        check(b"POST", b"/", b"HTTP/1.1", fields(HOST, (b"Transfer-Encoding", coding)))


def test_chunks_are_refused_where_they_could_be_misread() -> None:
    chunked = (b"Transfer-Encoding", b"chunked")
    with pytest.raises(BadRequest):
        check(b"POST", b"/", b"HTTP/1.0", fields(HOST, chunked))
    with pytest.raises(BadRequest):
        check(b"POST", b"/", b"HTTP/1.1", fields(HOST, chunked, chunked))
    with pytest.raises(BadRequest):
        check(b"POST", b"/", b"HTTP/1.1", fields(HOST, chunked, (b"Content-Length", b"3")))


def test_there_is_one_expectation() -> None:
    check(b"POST", b"/", b"HTTP/1.1", fields(HOST, (b"Expect", b"100-Continue")))
    with pytest.raises(ExpectationFailed):
        check(b"POST", b"/", b"HTTP/1.1", fields(HOST, (b"Expect", b"200-ok")))


@pytest.mark.parametrize(
    "head", [b"", b"\r", b"\r\n", b"GE", b"\r\nGET / HTTP/1.1", b"GET / HTTP/1.1\r"]
)
def test_a_first_line_may_yet_come(head: bytes) -> None:
    assert problem_so_far(head) is None


@pytest.mark.parametrize(
    ("line", "good"),
    [
        (b"GET / HTTP/1.1", True),
        (b"\r\nGET / HTTP/1.1", True),
        (b"GET  / HTTP/1.1", False),
        (b"GET /  HTTP/1.1", False),
        (b" GET / HTTP/1.1", False),
        (b"GET / HTTP/1.1 ", False),
        (b"\nGET / HTTP/1.1", False),
        (b"\r\n", False),
        (b"GET /", False),
        (b"GET / RTSP/1.1", False),
    ],
)
def test_a_first_line_has_three_words_and_single_spaces(line: bytes, good: bool) -> None:
    head = line + b"\r\nHost: a\r\n\r\n"
    assert first_line(head) == ((b"GET", b"/", b"HTTP/1.1") if good else None)
    assert (problem_so_far(line + b"\r\n") is None) is good


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /" + b"x" * MAX_TARGET, None),
        (b"GET /" + b"x" * (MAX_TARGET + 100), 414),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * (MAX_HEADER - 100), None),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * MAX_HEADER, 431),
    ],
)
def test_a_header_has_its_limits_before_it_is_whole(head: bytes, status: int | None) -> None:
    problem = problem_so_far(head)
    assert (problem and problem.status) == status


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_who_asks_for_something_sends_nothing(method: bytes) -> None:
    check(method, b"/", b"HTTP/1.1", fields(HOST))
    check(method, b"/", b"HTTP/1.1", fields(HOST, (b"Content-Length", b"00")))
    for framed in ((b"Content-Length", b"1"), (b"Transfer-Encoding", b"chunked")):
        with pytest.raises(BadRequest):
            check(method, b"/", b"HTTP/1.1", fields(HOST, framed))


def test_a_path_is_nothing_to_connect_to() -> None:
    with pytest.raises(BadRequest):
        check(b"CONNECT", b"/v1", b"HTTP/1.1", fields(HOST))


@pytest.mark.parametrize("name", [b"Content-Length", b"HOST", b"authorization", b"TE", b"If-Match"])
def test_what_matters_before_the_body_may_not_come_after_it(name: bytes) -> None:
    assert may_trail([(b"X-Checksum", b"1"), (b"Server-Timing", b"x")])
    assert not may_trail([(b"X-Checksum", b"1"), (name, b"1")])
