"""The event decoder: the same events for any cut, and every byte accounted for."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.sse import MAX_LINES, Decoder, Event

STREAMS = sorted((Path(__file__).parent / "streams").glob("*.sse"))


def decode(stream: bytes, cuts: list[int] | None = None, max_event: int = 1 << 20) -> list[Event]:
    decoder = Decoder(max_event)
    bounds = [0, *(cuts or []), len(stream)]
    events = [event for a, b in pairwise(bounds) for event in decoder.feed(stream[a:b])]
    rest = decoder.end()
    return events if rest is None else [*events, rest]


def one_by_one(stream: bytes, max_event: int = 1 << 20) -> list[Event]:
    return decode(stream, list(range(1, len(stream))), max_event)


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"data: a\n\n", [(b"", b"a")]),
        (b"data:a\n\ndata:  b\n\n", [(b"", b"a"), (b"", b" b")]),
        (b"event: x\ndata: a\n\n", [(b"x", b"a")]),
        (b"event:  x \ndata:  a \n\n", [(b" x ", b" a ")]),
        (b"data: a\nevent: x\nid: 7\nretry: 10\n\n", [(b"x", b"a")]),
        (b"data: a\ndata: b\n\n", [(b"", b"a\nb")]),
        (b"data\n\n", [(b"", b"")]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [(b"", b"a"), (b"", b"b")]),
        (b"data: a\r\rdata: b\r\r", [(b"", b"a"), (b"", b"b")]),
        (b"data: a\n\rdata: b\r\n\ndata: c\r\r\n", [(b"", b"a"), (b"", b"b"), (b"", b"c")]),
        (b"data: a\rdata: b\n\n", [(b"", b"a\nb")]),
        (b": ping\n\ndata: a\n\n", [(b"", b""), (b"", b"a")]),
        (b": note\ndata: a\n\n", [(b"", b"a")]),
        (b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n", [(b"", b"a"), (b"", b"")]),
        (b"\n\n\ndata: a\n\n", [(b"", b""), (b"", b"a")]),
        (b"data: a\n\ndata: b\n", [(b"", b"a"), (b"", b"b")]),
        (b"data: a\xe2\x80\xa8b\x0b\x0c\x1c\n\n", [(b"", b"a\xe2\x80\xa8b\x0b\x0c\x1c")]),
        (b"event: x\nevent: y\ndata: a\n\ndata: b\n\n", [(b"y", b"a"), (b"", b"b")]),
        (b"", []),
    ],
)
def test_a_stream_is_read_as_the_standard_says(stream, expected):
    assert [(event.name, event.data) for event in decode(stream)] == expected
    assert one_by_one(stream) == decode(stream)


@given(st.lists(st.sampled_from([b"\n", b"\r", b"data: a", b"event: e", b": c", b"x"])), st.data())
def test_no_cut_changes_the_events(pieces, data):
    stream = b"".join(pieces)
    cuts = data.draw(st.lists(st.integers(0, len(stream))).map(sorted))
    assert decode(stream, cuts) == decode(stream) == one_by_one(stream)


@given(
    st.lists(st.sampled_from([b"\n", b"\n\n", b"\r", b"data: a", b"event: e", b"\xef\xbb\xbf"])),
    st.data(),
)
def test_the_short_cut_gives_the_same_events(pieces, data):
    stream = b"".join(pieces)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=4).map(sorted))
    short, long = Decoder(20), Decoder(20)
    for a, b in pairwise([0, *cuts, len(stream)]):
        raws = short.cut(stream[a:b])
        events = [short.event(raw) for raw in raws] if raws else short.feed(stream[a:b])
        assert events == long.feed(stream[a:b])
        assert (short.idle, short.oversized) == (long.idle, long.oversized)
    assert short.end() == long.end()


@given(st.binary(max_size=60) | st.text("dat:\r\n ", max_size=60).map(str.encode))
def test_no_byte_is_lost(stream):
    assert b"".join(event.raw for event in one_by_one(stream)) == stream
    for event in decode(stream):
        assert event.at < 0 or event.raw[event.at :].startswith(event.data)


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
def test_a_recorded_stream_gives_the_same_events_at_every_cut(path):
    stream = path.read_bytes()
    whole = decode(stream)
    assert all(decode(stream, [cut]) == whole for cut in range(0, len(stream), 3))
    assert one_by_one(stream) == whole


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_an_event_comes_out_no_later_than_the_byte_after_it(end):
    decoder = Decoder()
    assert len(decoder.feed(b"data: a" + end + end + b"d")) == 1


def test_an_event_ended_by_lf_comes_out_at_once():
    assert len(Decoder().feed(b"data: a\r\n\r\n")) == 1


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"data: old\n\n", b"data: new\n\n"),
        (b"event: e\r\ndata:old\r\nid: 1\r\n\r\n", b"event: e\r\ndata:new\r\nid: 1\r\n\r\n"),
        (b"data: o\nid: 1\ndata: ld\n\n", b"data: new\nid: 1\n\n"),
    ],
)
def test_other_data_leaves_the_rest_of_an_event_alone(raw, expected):
    (event,) = decode(raw)
    assert event.with_data(b"new") == expected


def test_data_of_several_lines_stays_several_lines():
    (event,) = decode(b"data: {\r\ndata: }\r\n\r\n")
    assert event.with_data(b"[\n]") == b"data: [\r\ndata: ]\r\n\r\n"


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_an_event_over_the_limit_passes_unread_in_pieces(end, step):
    long = b"data: " + b"x" * 95 + end
    stream = b"data: a" + end + long + b"data: b" + end
    events = decode(stream, list(range(step, len(stream), step)), max_event=100)
    assert b"".join(event.raw for event in events) == stream
    assert [event.data for event in events if event.data] == [b"a", b"b"]


def test_an_event_at_the_limit_is_read():
    stream = b"data: " + b"x" * 92 + b"\n\n"
    assert one_by_one(stream, max_event=100)[0].data == b"x" * 92


@pytest.mark.parametrize("end", [b"\n", b"\r"])
def test_an_event_of_too_many_lines_passes_unread(end):
    many, one = b"data: a" + end, b"data: b" + end + end
    for count, found in ((MAX_LINES - 1, 2), (MAX_LINES, 1)):
        stream = many * count + end + one
        decoder = Decoder()
        events = [*decoder.feed(stream + b"x"), decoder.end()]
        assert b"".join(event.raw for event in events if event) == stream + b"x"
        assert [event.data[-1:] for event in events if event and event.data][-1] == b"b"
        assert sum(bool(event.data) for event in events if event) == found
        assert decoder.oversized == 2 - found


def test_an_event_over_the_limit_is_not_held_in_memory():
    decoder = Decoder(max_event=1000)
    out = sum(len(event.raw) for _ in range(100) for event in decoder.feed(b"x" * 1000))
    assert out > 98_000
    assert decoder.oversized == 1


@pytest.mark.parametrize("line", [b"x" * 1_000_000, b"data: a\r\ndata:b\r\n" * 50_000])
def test_single_bytes_take_linear_time(line):
    began = time.process_time()
    events = one_by_one(b"data: " + line[:200_000] + b"\n\n")
    assert len(events) == 1
    assert time.process_time() - began < 3


def test_a_line_of_a_mebibyte_is_one_event():
    stream = b"data: " + b"x" * (1 << 20) + b"\n\n"
    cuts = list(range(1000, len(stream), 1000))
    assert [len(e.data) for e in decode(stream, cuts, 1 << 22)] == [1 << 20]
