"""Audio: the form as it streams through, the duration that is billed, the formats."""

from __future__ import annotations

import email
import re
import time
import tracemalloc
from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.audio import (
    SUBTITLES,
    FormRewriter,
    boundary_of,
    check_response_format,
    convert,
    read_audio,
)
from llmproxy.errors import BackendError, BadRequest, BodyTooLarge, UnsupportedMediaType
from llmproxy.model import MAX_COUNT, Kind, Reading

BOUNDARY = b"----X7"
FILE = b"RIFF\r\n----\x00\r\n------X6\r\n-\r\n--\r\n"


def field(name: str, value: bytes) -> bytes:
    return b'Content-Disposition: form-data; name="' + name.encode() + b'"\r\n\r\n' + value


def upload(content: bytes = FILE) -> bytes:
    head = b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n'
    return head + b"Content-Type: audio/wav\r\n\r\n" + content


def form(*parts: bytes, boundary: bytes = BOUNDARY) -> bytes:
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts)
    return body + b"--" + boundary + b"--\r\n"


MODEL = field("model", b"whisper")
USUAL = form(MODEL, field("language", b"pl"), upload())


def rewrite(
    body: bytes, cuts: list[int] | None = None, rewriter: FormRewriter | None = None
) -> bytes:
    """Feed a form in pieces, as an owner does: `start` as soon as the model is known."""
    rewriter = rewriter or FormRewriter(BOUNDARY)
    out, started = b"", False
    for a, b in pairwise([0, *(cuts or []), len(body)]):
        out += rewriter.feed(body[a:b])
        if rewriter.model is not None and not started:
            assert out == b""
            out += rewriter.start("Systran/whisper")
            started = True
    return out + rewriter.finish()


def parts_of(body: bytes, boundary: bytes = BOUNDARY) -> list[tuple[str | None, bytes]]:
    """The parts of a form, by the reading of another parser."""
    head = b'Content-Type: multipart/form-data; boundary="' + boundary + b'"\r\n\r\n'
    message = email.message_from_bytes(head + body)
    return [
        (part.get_param("name", header="content-disposition"), part.get_payload(decode=True))  # type: ignore[union-attr, misc]
        for part in message.get_payload()
    ]


OURS = [("model", b"Systran/whisper"), ("response_format", b"verbose_json")]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([MODEL, upload()], [("file", FILE)]),
        ([upload(), MODEL], [("file", FILE)]),
        ([MODEL, upload(b"")], [("file", b"")]),
        (
            [field("language", b"pl"), MODEL, upload(), field("prompt", b"a\r\nb")],
            [("language", b"pl"), ("file", FILE), ("prompt", b"a\r\nb")],
        ),
        ([field("response_format", b"srt"), upload(), MODEL], [("file", FILE)]),
        ([field("stream", b"false"), upload(), MODEL], [("file", FILE)]),
        (
            [
                field("timestamp_granularities[]", b"word"),
                field("timestamp_granularities[]", b"segment"),
                MODEL,
                upload(),
            ],
            [
                ("timestamp_granularities[]", b"word"),
                ("timestamp_granularities[]", b"segment"),
                ("file", FILE),
            ],
        ),
        ([MODEL, *[field("x", b"y")] * 98, upload()], [*[("x", b"y")] * 98, ("file", FILE)]),
        ([field("temperature", b""), MODEL, upload()], [("temperature", b""), ("file", FILE)]),
    ],
)
def test_a_form_goes_on_with_our_fields_for_the_clients(parts, expected):
    body = form(*parts)
    out = rewrite(body)
    assert parts_of(out) == [*expected, *OURS]
    assert all(rewrite(body, [cut]) == out for cut in range(1, len(body)))
    assert rewrite(body, list(range(1, len(body)))) == out


def test_other_parts_keep_their_bytes():
    kept = [field("language", b"pl"), upload()]
    assert rewrite(form(MODEL, *kept)).startswith(form(*kept)[: -len(b"--\r\n")])


def test_what_the_client_asked_for_is_known():
    rewriter = FormRewriter(BOUNDARY)
    parts = [field("response_format", b"vtt"), field("timestamp_granularities[]", b"word")]
    rewrite(form(MODEL, upload(), *parts), rewriter=rewriter)
    assert rewriter.model == "whisper"
    assert rewriter.response_format == "vtt"
    assert rewriter.timestamp_granularities == ["word"]


def test_after_the_model_the_file_passes_as_it_comes():
    rewriter = FormRewriter(BOUNDARY)
    rewriter.feed(b"--" + BOUNDARY + b"\r\n" + MODEL + b"\r\n--" + BOUNDARY + b"\r\n")
    rewriter.start("w")
    rewriter.feed(upload(b""))
    for _ in range(10):
        assert len(rewriter.feed(b"x" * 1000)) >= 990


def test_nothing_leaves_before_the_model_is_known():
    rewriter = FormRewriter(BOUNDARY)
    assert rewriter.feed(form(upload(), MODEL)) == b""
    assert rewriter.start("w").startswith(b"--" + BOUNDARY)


@pytest.mark.parametrize("step", [1, 100, 10_000])
def test_too_much_before_the_model_is_refused_with_advice(step):
    body = form(upload(b"x" * 5000), MODEL)
    rewriter = FormRewriter(BOUNDARY, hold_limit=4000)
    with pytest.raises(BodyTooLarge, match="'model' field before the file"):
        rewrite(body, list(range(step, len(body), step)), rewriter)


@pytest.mark.parametrize("step", [1, 100, 10_000])
def test_any_size_after_the_model_is_taken(step):
    body = form(MODEL, upload(b"x" * 5000))
    rewriter = FormRewriter(BOUNDARY, hold_limit=1000)
    rewrite(body, list(range(step, len(body), step)), rewriter)


def test_what_is_held_back_takes_no_more_memory_than_it_is_long():
    size = 200_000
    rewriter = FormRewriter(BOUNDARY)
    tracemalloc.start()
    try:
        rewriter.feed(b"--" + BOUNDARY + b"\r\n" + upload(b""))
        for _ in range(size // 4):
            rewriter.feed(b"abcd")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * size


LINE = b"--" + BOUNDARY + b"\r\n"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"preamble\r\n" + USUAL,
        b"\r\n" + USUAL,
        USUAL[:-4],
        USUAL[:-5] + b"-x\r\n",
        USUAL.replace(BOUNDARY, b"----Y"),
        form(MODEL),
        form(upload()),
        form(field("model", b""), upload()),
        form(field("model", b"\xff"), upload()),
        form(field("model", b"m" * 257), upload()),
        form(MODEL, MODEL, upload()),
        form(MODEL, upload(), upload()),
        form(MODEL, field("response_format", b"json"), field("response_format", b"json"), upload()),
        form(MODEL, field("stream", b"false"), field("stream", b"false"), upload()),
        form(MODEL, field("stream", b"true"), upload()),
        form(MODEL, field("stream", b"1"), upload()),
        form(MODEL, field("stream", b"dHJ1ZQ=="), upload()),
        form(MODEL, field("response_format", b"diarized_json"), upload()),
        form(MODEL, field("prompt", b"x" * 4097), upload()),
        form(MODEL, *[field("x", b"")] * 99, upload()),
        form(MODEL, b"X: " + b"x" * 9000 + b"\r\n" + upload()),
        form(MODEL, b"\r\n" + FILE, upload()),
        form(MODEL, b"Content-Type: text/plain\r\n\r\nx", upload()),
        form(MODEL, b"Content-Disposition: form-data\r\n\r\nx", upload()),
        form(MODEL, b'Content-Disposition: attachment; name="x"\r\n\r\nx', upload()),
        form(MODEL, b'Content-Disposition: form-data; name="x"; name="y"\r\n\r\nx', upload()),
        form(MODEL, b"Content-Disposition: form-data; name*=utf-8''x\r\n\r\nx", upload()),
        form(MODEL, b'Content-Disposition: form-data; name="st\\ream"\r\n\r\nx', upload()),
        form(MODEL, b'Content-Disposition: form-data; name="a\\"; b="c"\r\n\r\nx', upload()),
        form(MODEL, b'Content-Disposition: form-data; name="x\r\n\r\nx', upload()),
        form(MODEL, b'Content-Disposition : form-data; name="x"\r\n\r\nx', upload()),
        form(MODEL, b'Content-Disposition: form-data;\r\n name="x"\r\n\r\nx', upload()),
        form(MODEL, b'Content-Disposition: form-data; name="x"\nX: y\r\n\r\nx', upload()),
        form(MODEL, b"Content-Transfer-Encoding: base64\r\n" + field("x", b"eA=="), upload()),
        form(b"Content-Type: text/plain\r\nContent-Type: text/plain\r\n" + MODEL, upload()),
        form(b'Content-Disposition: form-data; name="model"; filename="m"\r\n\r\nw', upload()),
        form(MODEL, upload(b"a\n" + LINE + b"b")),
        form(MODEL, upload(b"a\r" + LINE + b"b")),
        form(MODEL, upload(LINE + b"b")),
        form(MODEL, upload(LINE + field("x", b"y"))),
        form(
            MODEL, b'Content-Disposition: form-data; name="x"; filename="a\\"b"\r\n\r\ny', upload()
        ),
        form(MODEL, upload(b"a\r\n--" + BOUNDARY + b"x\r\n")),
        form(MODEL, upload(b"a\r\n--" + BOUNDARY + b"\nb")),
        form(MODEL, upload(b"a\r\n--" + BOUNDARY + b"- \r\nb")),
    ],
)
def test_a_form_that_can_be_read_in_two_ways_or_none_is_refused(body):
    for cuts in ([], list(range(1, len(body))), list(range(3, len(body), 7))):
        with pytest.raises(BadRequest):
            rewrite(body, cuts)


def test_streaming_is_refused_by_its_name():
    with pytest.raises(BadRequest) as caught:
        rewrite(form(MODEL, field("stream", b"true"), upload()))
    assert caught.value.param == "stream"


@pytest.mark.parametrize(
    "head",
    [
        b"content-disposition:form-data;name=file;filename=a.wav\r\n\r\n",
        b'Content-Disposition: form-data; name="file"; filename="C:\\a b.wav"\r\n\r\n',
        b"Content-Disposition: form-data; name=\"file\"; filename*=utf-8''%c4%85.wav\r\n\r\n",
        b'Content-Disposition: form-data; name="file"; filename="\xc4\x85.wav"\r\n'
        b"Content-Type: audio/wav\r\nContent-Transfer-Encoding: binary\r\n\r\n",
        b'X-A:\r\nContent-Disposition: form-data; filename=""; name="file"\r\n\r\n',
    ],
)
def test_part_headers_that_clients_send_are_understood(head):
    assert rewrite(form(MODEL, head + FILE)).startswith(LINE + head + FILE)


def test_padding_after_a_boundary_and_an_epilogue_are_dropped():
    body = USUAL.replace(LINE, LINE[:-2] + b" \t\r\n") + b"epilogue" * 1000
    assert rewrite(body, list(range(1, len(body)))) == rewrite(USUAL)


def test_finish_without_start_is_a_mistake_of_ours():
    rewriter = FormRewriter(BOUNDARY)
    rewriter.feed(USUAL)
    with pytest.raises(RuntimeError):
        rewriter.finish()


@given(st.lists(st.sampled_from([b"\r", b"\n", b"-", b"--", BOUNDARY, b"x"])), st.data())
def test_any_content_passes_whole_or_is_refused_at_any_cut(pieces, data):
    content = b"".join(pieces)
    body = form(MODEL, upload(content))
    cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=6).map(sorted))
    try:
        out = rewrite(body)
    except BadRequest:
        assert re.search(rb"(?:^|[\r\n])--" + BOUNDARY, content)
        with pytest.raises(BadRequest):
            rewrite(body, cuts)
    else:
        assert rewrite(body, cuts) == out
        assert out.startswith(LINE + upload(content) + b"\r\n--")


@given(st.binary(max_size=60) | st.text('\r\n-Xx:"; ', max_size=60).map(str.encode))
def test_any_bytes_are_a_form_or_refused(data):
    for body in (data, LINE + data, USUAL[:60] + data + USUAL[60:]):
        rewriter = FormRewriter(BOUNDARY)
        try:
            rewrite(body, list(range(1, len(body))), rewriter)
        except BadRequest:
            continue


def test_single_bytes_take_linear_time():
    body = form(MODEL, upload(b"\r\n-" * 60_000))
    began = time.process_time()
    rewriter = FormRewriter(BOUNDARY)
    rewriter.feed(body[:200])
    rewriter.start("w")
    for at in range(200, len(body)):
        rewriter.feed(body[at : at + 1])
    rewriter.finish()
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        (b"multipart/form-data; boundary=abc", b"abc"),
        (b'multipart/form-data; boundary="a b:c"', b"a b:c"),
        (b"Multipart/Form-Data ;Boundary=----WebKitFormBoundary7", b"----WebKitFormBoundary7"),
        (b"multipart/form-data; charset=utf-8; boundary=x", b"x"),
        (b"multipart/form-data; boundary=" + b"x" * 70, b"x" * 70),
    ],
)
def test_the_boundary_is_read(content_type, boundary):
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b'multipart/form-data; boundary=""',
        b'multipart/form-data; boundary="a "',
        b'multipart/form-data; boundary="a',
        b'multipart/form-data; boundary="a\\b"',
        b"multipart/form-data; boundary=a; boundary=b",
        b"multipart/form-data; boundary=a b",
        b"multipart/form-data; boundary=" + b"x" * 71,
        b"multipart/form-data; boundary=\xff",
        b"multipart/form-data; boundary=a\r\nb",
    ],
)
def test_an_unusable_boundary_is_refused(content_type):
    with pytest.raises(BadRequest):
        boundary_of(content_type)


@pytest.mark.parametrize(
    "content_type",
    [b"", b"application/json", b"multipart/mixed; boundary=a", b"multipart/form-datax"],
)
def test_another_media_type_is_refused(content_type):
    with pytest.raises(UnsupportedMediaType):
        boundary_of(content_type)


@pytest.mark.parametrize("wanted", [None, "json", "text", "srt", "vtt", "verbose_json"])
def test_formats_that_can_be_made_are_taken(wanted):
    check_response_format(wanted)


@pytest.mark.parametrize("wanted", ["", "diarized_json", "JSON", "xml"])
def test_other_formats_are_refused(wanted):
    with pytest.raises(BadRequest) as caught:
        check_response_format(wanted)
    assert caught.value.param == "response_format"


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        (b'{"duration":2.0}', 2),
        (b'{"duration":2.01}', 3),
        (b'{"duration":7}', 7),
        (b'{"duration":"8.470000267028809"}', 9),
        (b'{"duration":"8"}', 8),
        (b'{"duration":0}', 0),
        (b'{"duration":1e-300}', 1),
        (b'{"duration":1e3}', 1000),
        (b'{"duration":"9223372036854775807"}', MAX_COUNT),
        (b'{"usage":{"type":"duration","seconds":9}}', 9),
        (b'{"duration":null,"usage":{"seconds":9}}', 9),
        (b'{"duration":3,"usage":{"seconds":9}}', 3),
    ],
)
def test_seconds_are_rounded_up(body, seconds):
    assert read_audio(body) == Reading({Kind.TRANSCRIPTION: seconds}, True, None, True)


@pytest.mark.parametrize(
    ("body", "raw"),
    [
        (b'{"duration":-1}', "-1"),
        (b'{"duration":true}', "true"),
        (b'{"duration":"inf"}', '"inf"'),
        (b'{"duration":"nan"}', '"nan"'),
        (b'{"duration":"1_0"}', '"1_0"'),
        (b'{"duration":" 1"}', '" 1"'),
        (b'{"duration":"1e999999999"}', '"1e999999999"'),
        (b'{"duration":"1e999"}', '"1e999"'),
        (b'{"duration":"9223372036854775807.5"}', '"9223372036854775807.5"'),
        (b'{"duration":[]}', "[]"),
        (b'{"duration":-1,"usage":{"seconds":9}}', "-1"),
        (b'{"usage":{"type":"tokens","total_tokens":5}}', '{"type":"tokens","total_tokens":5}'),
        (b'{"text":"x"}', None),
        (b'{"usage":7}', "7"),
    ],
)
def test_a_duration_that_is_none_is_not_billed_exactly(body, raw):
    assert read_audio(body) == Reading({}, False, raw, True)


@pytest.mark.parametrize("body", [b"[]", b"x", b'{"duration":3'])
def test_what_is_no_json_object_is_no_answer(body):
    assert read_audio(body) == Reading()


VERBOSE = orjson.dumps(
    {
        "task": "transcribe",
        "duration": "3725.5",
        "text": "Dzień dobry. --> Tak.",
        "segments": [
            {"id": 0, "start": 0.0, "end": 2.5, "text": " Dzień dobry."},
            {"id": 1, "start": 3723.25, "end": 3725.4996, "text": " --> Tak.\n\n "},
        ],
    }
)


def converted(body: bytes, wanted: str) -> tuple[bytes, bytes]:
    content_type, pieces = convert(body, wanted)
    return content_type, b"".join(pieces)


@pytest.mark.parametrize(
    ("wanted", "content_type", "expected"),
    [
        (None, b"application/json", '{"text":"Dzień dobry. --> Tak."}'),
        ("json", b"application/json", '{"text":"Dzień dobry. --> Tak."}'),
        ("verbose_json", b"application/json", VERBOSE.decode()),
        ("text", b"text/plain; charset=utf-8", "Dzień dobry. --> Tak.\n"),
        (
            "srt",
            b"text/plain; charset=utf-8",
            "1\n00:00:00,000 --> 00:00:02,500\nDzień dobry.\n\n"
            "2\n01:02:03,250 --> 01:02:05,500\n-> Tak.\n\n",
        ),
        (
            "vtt",
            b"text/plain; charset=utf-8",
            "WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nDzień dobry.\n\n"
            "01:02:03.250 --> 01:02:05.500\n-> Tak.\n\n",
        ),
    ],
)
def test_an_answer_is_turned_into_what_was_asked_for(wanted, content_type, expected):
    assert converted(VERBOSE, wanted) == (content_type, expected.encode())


def test_usage_stays_in_a_json_answer():
    body = b'{"text":"a","duration":1,"usage":{"type":"duration","seconds":1}}'
    assert converted(body, "json")[1] == b'{"text":"a","usage":{"type":"duration","seconds":1}}'


def test_what_is_nested_deeper_than_can_be_written_stays_in_a_json_answer():
    deep = b'{"a":' * 400 + b"1" + b"}" * 400
    body = b'{"text":"a","duration":1,"usage":' + deep + b"}"
    assert converted(body, "json")[1] == b'{"text":"a","usage":' + deep + b"}"


@pytest.mark.parametrize("text", ["-->", "--->", "----->", "a --->> b", "-- > --> ->"])
def test_no_text_has_the_arrow_that_begins_a_subtitle(text):
    body = orjson.dumps({"text": "a", "segments": [{"start": 0, "end": 1, "text": text}]})
    assert converted(body, "vtt")[1].count(b"-->") == 1


def test_without_segments_the_text_is_one_subtitle():
    body = b'{"text":"a","duration":"1.5"}'
    assert converted(body, "srt")[1] == b"1\n00:00:00,000 --> 00:00:01,500\na\n\n"


@pytest.mark.parametrize("wanted", ["json", "text", "srt", "vtt"])
@pytest.mark.parametrize(
    "body", [b"", b"x", b"{}", b'{"text":1}', b'{"segments":[{"start":0,"end":1,"text":"a"}]}']
)
def test_an_answer_without_text_can_not_be_turned(body, wanted):
    with pytest.raises(BackendError):
        converted(body, wanted)


@pytest.mark.parametrize(
    "segment",
    [
        b"1",
        b"{}",
        b'{"start":0,"end":null,"text":"a"}',
        b'{"start":-1,"end":1,"text":"a"}',
        b'{"start":"1e99","end":1,"text":"a"}',
        b'{"start":true,"end":1,"text":"a"}',
    ],
)
def test_subtitles_need_times(segment):
    with pytest.raises(BackendError):
        converted(b'{"text":"a","segments":[' + segment + b"]}", "srt")


@pytest.mark.parametrize("count", [0, 1, SUBTITLES, SUBTITLES + 1, 3 * SUBTITLES])
def test_many_subtitles_come_in_pieces(count):
    body = orjson.dumps({"text": "a", "segments": [{"start": 0, "end": 1, "text": "a"}] * count})
    _, pieces = convert(body, "srt")
    numbers = [re.findall(rb"(?m)^(\d+)\n", piece) for piece in pieces]
    assert [int(number) for some in numbers for number in some] == list(range(1, count + 1))
    assert max(map(len, numbers)) <= SUBTITLES
