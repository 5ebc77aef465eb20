"""Forms with audio that were made up: read in one way only, whatever pieces they come in.

What passes is read by two other parsers, as the server behind might be any of them.
"""

from __future__ import annotations

import email
import io
import tracemalloc
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from multipart import MultipartError, MultipartParser  # type: ignore[import-untyped]
from tally import LONG, Tally

from llmproxy.audio import MAX_HEADERS, FormRewriter, boundary_of
from llmproxy.errors import BadRequest, BodyTooLarge, ProxyError

pytestmark = pytest.mark.timeout(900)

BOUNDARY = b"-X"
LINE = b"--" + BOUNDARY
#: What boundaries and headers are made of, and what looks like them.
SHARDS = [
    *(b"\r\n", b"\r", b"\n", b"-", b"--", LINE, b"\r\n" + LINE, b"\n" + LINE, LINE + b"--", b" "),
    *(b"a", b"\0", b"\xff", b":", b";", b'"', b"=", b"\t", b"model", b"file"),
    *(b'Content-Disposition: form-data; name="model"', b'; filename="a"', b"; name*=utf-8''x"),
    *(b"Content-Type: audio/wav", b"Content-Transfer-Encoding: base64", b"\r\n\r\n"),
]
CONTENT = st.lists(st.sampled_from(SHARDS), max_size=8).map(b"".join)
NAMES = st.sampled_from(
    [b"model", b"file", b"response_format", b"stream", b"language", b"prompt", b"", b"a\\", b"m b"]
)
CUTS = st.lists(st.integers(1, 10**6), max_size=6)


@st.composite
def parts(draw: st.DrawFn) -> bytes:
    name = draw(NAMES)
    more = draw(st.sampled_from([b"", b"", b'; filename="a.wav"', b"\r\nContent-Type: text/plain"]))
    head = b'Content-Disposition: form-data; name="%b"%b\r\n\r\n' % (name, more)
    usual = {b"model": b"whisper", b"response_format": b"json", b"stream": b"false"}
    return head + (usual.get(name) or draw(CONTENT))


@st.composite
def forms(draw: st.DrawFn) -> bytes:
    """Bodies, most of them forms; some with a model and a file, as they must be."""
    listed = draw(st.lists(parts(), max_size=4))
    if draw(st.booleans()):
        file = b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + draw(CONTENT)
        model = b'Content-Disposition: form-data; name="model"\r\n\r\nwhisper'
        listed = draw(st.permutations([*listed[:2], file, model]))
    body = b"".join(LINE + b"\r\n" + part + b"\r\n" for part in listed) + LINE + b"--\r\n"
    for _ in range(draw(st.integers(0, 2)) if draw(st.booleans()) else 0):
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.sampled_from(SHARDS)) + body[at + draw(st.integers(0, 4)) :]
    return body


def rewritten(body: bytes, cuts: Sequence[int] = ()) -> bytes:
    """What a backend gets of a form in these pieces. Raises ProxyError."""
    rewriter, out, started = FormRewriter(BOUNDARY), b"", False
    for start, end in pairwise([0, *sorted(cuts), len(body)]):
        out += rewriter.feed(body[start:end])
        if rewriter.model is not None and not started:
            out += rewriter.start("org/whisper")
            started = True
    return out + rewriter.finish()


def verdict(body: bytes, cuts: Sequence[int] = ()) -> bytes | str:
    try:
        return rewritten(body, cuts)
    except (BadRequest, BodyTooLarge) as error:
        return error.message


def by_multipart(body: bytes) -> list[tuple[str, bytes]]:
    """The parts, as Python's `multipart` has them. Raises MultipartError."""
    # A file's name is passed on in whatever coding it has.
    parser = MultipartParser(io.BytesIO(body), BOUNDARY.decode(), strict=True, charset="latin-1")
    return [(part.name, part.raw) for part in parser]


def by_email(body: bytes) -> list[tuple[str, bytes]]:
    """The same by Python's `email`."""
    head = b'Content-Type: multipart/form-data; boundary="%b"\r\n\r\n' % BOUNDARY
    message = email.message_from_bytes(head + body)
    return [
        (part.get_param("name", header="content-disposition"), part.get_payload(decode=True))  # type: ignore[union-attr, misc]
        for part in message.get_payload()
    ]


def check(body: bytes, cuts: Sequence[int]) -> None:
    whole = verdict(body)
    pieces = verdict(body, [cut % (len(body) + 1) for cut in cuts])
    if isinstance(whole, str):
        assert isinstance(pieces, str), "it passes only in pieces"
        return
    assert pieces == whole
    passed = by_multipart(whole)
    assert passed[-2:] == OURS
    assert [name for name, _ in passed].count("model") == 1
    assert by_email(whole) == passed
    try:
        sent = by_multipart(body)
    except MultipartError:
        return  # it is stricter than others
    assert passed[:-2] == [part for part in sent if part[0] not in LEFT_OUT]


NO_UTF8 = (
    b"".join(
        b"--%b\r\nContent-Disposition: form-data; %b\r\n\r\nx\r\n" % (BOUNDARY, named)
        for named in (b'name="file"; filename="\xff.wav"', b'name="model"')
    )
    + b"--%b--\r\n" % BOUNDARY
)
OURS = [("model", b"org/whisper"), ("response_format", b"verbose_json")]
LEFT_OUT = ("model", "response_format", "stream")


def test_forms_are_read_in_one_way_in_whatever_pieces_they_come() -> None:
    tally = Tally("audio forms")
    passed = 0

    @settings(max_examples=20_000 if LONG else 400, deadline=None)
    @example(NO_UTF8, [])
    @given(forms(), CUTS)
    def each(body: bytes, cuts: list[int]) -> None:
        nonlocal passed
        check(body, cuts)
        passed += isinstance(verdict(body), bytes)
        tally.add(repr(body), True)

    each()
    tally.check(at_least=300)
    assert passed > tally.tried / 50  # not all are refused


@pytest.mark.parametrize("cut", range(1, 40))
def test_what_looks_like_a_boundary_is_content_wherever_it_is_cut(cut: int) -> None:
    file = b'Content-Disposition: form-data; name="file"\r\n\r\na---Xa\r'
    model = b'Content-Disposition: form-data; name="model"\r\n\r\nm'
    body = b"".join(LINE + b"\r\n" + part + b"\r\n" for part in (model, file)) + LINE + b"--\r\n"
    check(body, [len(body) - cut, len(body) - cut // 2])


def test_what_types_say_is_read_or_refused() -> None:
    tally = Tally("types of forms")
    kinds = st.sampled_from([b"multipart/form-data", b"Multipart/Form-Data ", b"multipart/mixed"])
    shards = st.sampled_from(
        [
            *(b";", b" ", b"boundary", b"boundary=", b'"', b"X", b"\\", b"=", b"\t", b"x" * 71),
            *(b"charset=utf-8", b"\xff", b"--", b"boundary*=utf-8''x", b"(a)", b","),
        ]
    )

    @settings(max_examples=10_000 if LONG else 200, deadline=None)
    @given(kinds, st.lists(shards, max_size=6).map(b"".join))
    def each(kind: bytes, more: bytes) -> None:
        try:
            boundary = boundary_of(kind + more)
        except ProxyError as error:
            assert error.status in (400, 415)  # noqa: PT017
        else:
            assert 0 < len(boundary) <= 70
            assert not boundary.endswith(b" ")
        tally.add(repr(more), True)

    each()
    tally.check(at_least=100)


def test_a_form_takes_no_memory_but_for_what_is_held_back() -> None:
    rewriter = FormRewriter(BOUNDARY)
    rewriter.feed(LINE + b'\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n')
    rewriter.start("m")
    rewriter.feed(LINE + b'\r\nContent-Disposition: form-data; name="file"\r\n\r\n')
    tracemalloc.start()
    try:
        for shard in SHARDS * 20:
            if LINE not in shard:
                rewriter.feed(b"x" + shard * 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * MAX_HEADERS + 8 * 1000 * max(map(len, SHARDS))
