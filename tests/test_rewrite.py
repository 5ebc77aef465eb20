"""The request's body: refused where it is ambiguous, otherwise changed as little as can be."""

from __future__ import annotations

import json
import time

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from surveys import plan_both, surveyed

from llmproxy.endpoints import ENDPOINTS
from llmproxy.errors import BadRequest
from llmproxy.rewrite import JSONRequest, body_for, plan

CHAT = ENDPOINTS["/v1/chat/completions"]
COMPLETIONS = ENDPOINTS["/v1/completions"]
RESPONSES = ENDPOINTS["/v1/responses"]
MESSAGES = ENDPOINTS["/v1/messages"]
EMBEDDINGS = ENDPOINTS["/v1/embeddings"]


def read(text: str, endpoint=CHAT) -> JSONRequest:
    return plan_both(endpoint, text.encode())


def sent(text: str, endpoint=CHAT, **options) -> str:
    return body_for(read(text, endpoint), endpoint, **options).decode()


@pytest.mark.parametrize(
    ("fields", "stream", "show_usage", "show_continuous"),
    [
        ("", False, False, False),
        (',"stream":false', False, False, False),
        (',"stream":true', True, False, False),
        (',"stream":true,"stream_options":null', True, False, False),
        (',"stream":true,"stream_options":{}', True, False, False),
        (',"stream":true,"stream_options":{"include_usage":false}', True, False, False),
        (',"stream":true,"stream_options":{"include_usage":true}', True, True, False),
        (',"stream":true,"stream_options":{"include_usage":"true"}', True, False, False),
        (',"stream":true,"stream_options":{"continuous_usage_stats":true}', True, False, False),
        (
            ',"stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true}',
            True,
            True,
            True,
        ),
    ],
)
def test_a_body_says_how_the_answer_is_wanted(fields, stream, show_usage, show_continuous):
    request = read('{"model":"m"' + fields + "}")
    assert request.model == "m"
    assert request.stream is stream
    assert request.show_usage is show_usage
    assert request.show_continuous is show_continuous


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ("", None),
        ("[]", None),
        ('{"model":"m"}x', None),
        ('{"model":"m","a":NaN}', None),
        ("{}", "model"),
        ('{"model":null}', "model"),
        ('{"model":""}', "model"),
        ('{"model":["m"]}', "model"),
        ('{"model":"' + "m" * 257 + '"}', "model"),
        ('{"model":"m","stream":null}', "stream"),
        ('{"model":"m","stream":"true"}', "stream"),
        ('{"model":"m","stream":1}', "stream"),
        ('{"model":"m","stream":[]}', "stream"),
        ('{"model":"m","stream_options":[]}', "stream_options"),
        ('{"model":"m","stream_options":true}', "stream_options"),
        ('{"model":"m","model":"n"}', "model"),
        ('{"model":"m","\\u006dodel":"n"}', "model"),
        ('{"model":"m","seed":1,"seed":1}', "seed"),
        ('{"model":"m","Model":"n"}', "model"),
        ('{"model":"m","\u017ftream":true}', "stream"),
        ('{"model":"m","Stream_Options":{"include_usage":false}}', "stream_options"),
        (
            '{"model":"m","stream_options":{"include_usage":true,"include_usage":false}}',
            "stream_options.include_usage",
        ),
        (
            '{"model":"m","stream_options":{"Include_Usage":false}}',
            "stream_options.include_usage",
        ),
    ],
)
def test_a_body_that_can_be_read_in_two_ways_or_none_is_refused(text, param):
    with pytest.raises(BadRequest) as caught:
        read(text)
    assert caught.value.status == 400
    assert caught.value.param == param


@pytest.mark.parametrize("value", ["true", "1", "0", "0.0", '"true"', "[]", "{}"])
def test_background_responses_are_refused(value):
    with pytest.raises(BadRequest) as caught:
        read('{"model":"m","background":' + value + "}", RESPONSES)
    assert caught.value.param == "background"


@pytest.mark.parametrize("value", ["false", "null"])
def test_responses_in_the_foreground_are_taken(value):
    assert read('{"model":"m","background":' + value + "}", RESPONSES)


@pytest.mark.parametrize("path", [path for path, e in ENDPOINTS.items() if not e.streams])
def test_a_stream_is_refused_where_there_is_none(path):
    with pytest.raises(BadRequest) as caught:
        read('{"model":"m","stream":true}', ENDPOINTS[path])
    assert caught.value.param == "stream"
    assert not read('{"model":"m","stream":false}', ENDPOINTS[path]).stream


@pytest.mark.parametrize(
    ("fields", "several"),
    [
        ("", False),
        (',"n":1', False),
        (',"n":null', False),
        (',"n":2', True),
        (',"best_of":3', True),
        (',"prompt":"a"', False),
        (',"prompt":["a"]', False),
        (',"prompt":["a","b"]', True),
        (',"prompt":[1,2,3]', False),
        (',"prompt":[[1],[2]]', True),
    ],
)
def test_a_request_for_several_answers_is_known(fields, several):
    assert read('{"model":"m"' + fields + "}", COMPLETIONS).several is several


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        (CHAT, '{"model":"m","stream":false,"stream_options":{}}'),
        (CHAT, '{"model":"m", "x": 1.0}'),
        (CHAT, '{"model":"m","stream":true,"stream_options":{"include_usage":true}}'),
        (MESSAGES, '{"model":"m","stream":true}'),
        (EMBEDDINGS, '{"model":"m"}'),
        (RESPONSES, '{"model":"m","stream":true,"store":false}'),
    ],
)
def test_a_body_that_needs_no_change_is_the_same_object(endpoint, text):
    request = read(text, endpoint)
    assert body_for(request, endpoint) is request.raw
    assert body_for(request, endpoint, model="m") is request.raw


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"model":"m"}', '{"model":"\\"n\\""}'),
        ('{ "a": 1.50, "model" : "m" }', '{ "a": 1.50, "model" : "\\"n\\"" }'),
        ('{"\\u006dodel":"m"}', '{"\\u006dodel":"\\"n\\""}'),
        ('{"x":{"model":"m"},"model":"m"}', '{"x":{"model":"m"},"model":"\\"n\\""}'),
    ],
)
def test_the_model_gets_the_backends_name(before, after):
    assert sent(before, model='"n"') == after


OPTIONS = [
    ("", ',"stream_options":{"include_usage":true}'),
    (',"stream_options":null', ',"stream_options":{"include_usage":true}'),
    (',"stream_options":{}', ',"stream_options":{"include_usage":true}'),
    (',"stream_options":{"include_usage":0}', ',"stream_options":{"include_usage":true}'),
    (
        ',"stream_options":{"x":1.0, "include_usage":false}',
        ',"stream_options":{"x":1.0, "include_usage":true}',
    ),
    (
        ',"stream_options":{"continuous_usage_stats":true}',
        ',"stream_options":{"include_usage":true}',
    ),
    (
        ',"stream_options":{"include_usage":true,"continuous_usage_stats":true}',
        ',"stream_options":{"include_usage":true,"continuous_usage_stats":true}',
    ),
]


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("before", "after"), OPTIONS)
def test_a_stream_always_reports_its_usage(before, after, endpoint):
    head = '{"model":"m","stream":true'
    assert sent(head + before + "}", endpoint) == head + after + "}"


@pytest.mark.parametrize("before", [before for before, _ in OPTIONS])
def test_running_counts_are_asked_for_where_the_backend_has_them(before):
    body = json.loads(sent('{"model":"m","stream":true' + before + "}", continuous=True))
    assert body["stream_options"]["include_usage"] is True
    assert body["stream_options"]["continuous_usage_stats"] is True


@pytest.mark.parametrize("endpoint", [MESSAGES, RESPONSES])
def test_other_dialects_get_no_stream_options(endpoint):
    body = json.loads(sent('{"model":"m","stream":true}', endpoint, continuous=True))
    assert "stream_options" not in body


@pytest.mark.parametrize("before", ["", ',"store":true', ',"store":null', ',"store":false'])
def test_responses_are_never_stored(before):
    assert sent('{"model":"m"' + before + "}", RESPONSES) == '{"model":"m","store":false}'


# What is long, by a name.
LONG = {
    "TEXT": "x" * 5000,
    "ROW": ",".join(map(str, range(2000))),
    "GAP": " " * 999,
    "NAME": "x" * 254,
    "FIELDS": ",".join(f'"{n}":1' for n in range(1000)),
}


def full(text: str) -> str:
    for name, long in LONG.items():
        text = text.replace(name, long)
    return text


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt":"TEXT","model":"m","stream":true,"stream_options":{},"user":[ROW]}',
        '{"a":[ROW],"stream_options":{"include_usage":true},"stream":true,"model":"m"}',
        '{"prompt":[ROW],"model":"m"}',
        '{"prompt":[[ROW],[ROW]],"model":"m"}',
        '{"prompt":["TEXT","TEXT"],"n":3,"model":"m","best_of":2}',
        '{"model":"m","store":GAP1,"stream":true,"n":1GAP}',
        '{"store":"TEXT","background":false,"model":"\\u006d\\ud83d\\ude00NAME"}',
        '{"model":"m","messages":[{"content":[{"image_url":{"url":"https://TEXT"}}]}]}',
        '{"model":"m","messages":[{"content":[{"image_url":{"url":"data:TEXT"}}]}]}',
        '{"model":"m","n":500,"prompt":["a","TEXT","b"]}',
        '{"model":"m","n":500,"prompt":[[ROW],[ROW],[ROW]]}',
        '{"model":"m","n":500,"prompt":[ROW]}',
        '{"model":"m","fallbacks":"TEXT"}',
        'GAP{"messages":[{"content":"TEXT"},{"content":null}],"model":"m"}\n',
    ],
)
@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES])
def test_a_large_body_is_read_and_changed_like_a_small_one(text, endpoint):
    raw = full(text).encode()
    plan_both(endpoint, raw)


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ('{"model":"TEXT"}', "model"),
        ('{"model":[ROW]}', "model"),
        ('{"model":"m","stream":"TEXT"}', "stream"),
        ('{"model":"m","stream_options":{"x":"TEXT"}}', "stream_options"),
        ('{"model":"m","stream_options":{"x":[ROW]}}', "stream_options"),
        ('{"model":"m","a":"TEXT","a":1}', "a"),
        ('{"model":"m","a":"TEXT","model":"m"}', "model"),
        ('{"model":"m","a":"TEXT","Stream":true}', "stream"),
        ('{"model":"m","a":"TEXT\\ud800"}', None),
        ('{"model":"m","a":[ROW,01]}', None),
        ('{"model":"m",FIELDS}', None),
    ],
)
def test_a_large_body_is_refused_like_a_small_one(text, param):
    with pytest.raises(BadRequest) as caught:
        read(full(text))
    assert caught.value.param == param


NAMES = b",".join(b'"%d%b":1' % (n, "é".encode() * 30_000) for n in range(200))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model":"m",%b}' % NAMES,
        b'{"model":"m","messages":[{"role":"system","content":"%b"}]}' % ("é".encode() * 500_000),
    ],
    ids=["long names", "a long text before the user's"],
)
def test_what_follows_the_steps_takes_little_time(raw):
    began = time.thread_time()
    survey = surveyed(CHAT, raw)
    surveyed_at = time.thread_time()
    plan(CHAT, raw, survey).opening()
    assert time.thread_time() - surveyed_at < (surveyed_at - began) / 2


def test_a_request_does_not_show_its_prompt():
    assert "secret" not in repr(read('{"model":"m","messages":"secret"}'))


VALUES = (
    st.none()
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('ab\\"{}[],:é')
)


@given(st.dictionaries(st.text("abc_"), VALUES | st.lists(VALUES), max_size=5), st.booleans())
def test_all_other_fields_survive(fields, stream):
    body = {**fields, "model": "m", "stream": stream}
    raw = json.dumps(body).encode()
    out = orjson.loads(body_for(plan(CHAT, raw), CHAT, model="n", continuous=True))
    expected = orjson.loads(raw) | {"model": "n"}
    if stream:
        expected["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    assert out == expected
    assert list(out) == list(expected)
