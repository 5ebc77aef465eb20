"""What a request's first line and fields must be like."""

from __future__ import annotations

import pytest

from llmproxy.errors import BadRequest, ExpectationFailed, TargetTooLong
from llmproxy.framing import MAX_TARGET, Fields, check, combined

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
    check(b"/v1", b"HTTP/1.1", fields((b"hOst", host)))


@pytest.mark.parametrize("host", ODD)
def test_an_odd_host_is_refused(host: bytes) -> None:
    with pytest.raises(BadRequest):
        check(b"/v1", b"HTTP/1.1", fields((b"Host", host)))


@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"])
def test_two_hosts_are_refused(version: bytes) -> None:
    with pytest.raises(BadRequest):
        check(b"/v1", version, fields(HOST, HOST))


def test_a_host_may_be_missing_in_http_1_0_only() -> None:
    check(b"/v1", b"HTTP/1.0", {})
    with pytest.raises(BadRequest):
        check(b"/v1", b"HTTP/1.1", {})


@pytest.mark.parametrize("version", [b"HTTP/0.9", b"HTTP/1.2", b"HTTP/2.0", b"RTSP/1.0"])
def test_another_version_is_refused(version: bytes) -> None:
    with pytest.raises(BadRequest):
        check(b"/v1", version, fields(HOST))


@pytest.mark.parametrize("target", [b"*", b"http://a/v1", b"a:80", b"v1", b"", b"/v1#x"])
def test_a_target_that_is_no_path_is_refused(target: bytes) -> None:
    with pytest.raises(BadRequest):
        check(target, b"HTTP/1.1", fields(HOST))


def test_a_target_has_a_limit() -> None:
    check(b"/" * MAX_TARGET, b"HTTP/1.1", fields(HOST))
    with pytest.raises(TargetTooLong):
        check(b"/" * (MAX_TARGET + 1), b"HTTP/1.1", fields(HOST))


@pytest.mark.parametrize("coding", [b"chunked", b"Chunked"])
def test_chunked_is_the_one_coding(coding: bytes) -> None:
    check(b"/", b"HTTP/1.1", fields(HOST, (b"Transfer-Encoding", coding)))


@pytest.mark.parametrize(
    "coding", [b"gzip, chunked", b"chunked, chunked", b"identity", b"", b"\x0bchunked", b"xchunked"]
)
def test_another_coding_is_refused(coding: bytes) -> None:
    with pytest.raises(BadRequest):
        check(b"/", b"HTTP/1.1", fields(HOST, (b"Transfer-Encoding", coding)))


def test_chunks_are_refused_where_they_could_be_misread() -> None:
    chunked = (b"Transfer-Encoding", b"chunked")
    with pytest.raises(BadRequest):
        check(b"/", b"HTTP/1.0", fields(HOST, chunked))
    with pytest.raises(BadRequest):
        check(b"/", b"HTTP/1.1", fields(HOST, chunked, chunked))
    with pytest.raises(BadRequest):
        check(b"/", b"HTTP/1.1", fields(HOST, chunked, (b"Content-Length", b"3")))


def test_there_is_one_expectation() -> None:
    check(b"/", b"HTTP/1.1", fields(HOST, (b"Expect", b"100-Continue")))
    with pytest.raises(ExpectationFailed):
        check(b"/", b"HTTP/1.1", fields(HOST, (b"Expect", b"200-ok")))
