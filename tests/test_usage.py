"""Usage reports, dialect by dialect."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.endpoints import Shape
from llmproxy.model import MAX_COUNT, Kind
from llmproxy.usage import ABSENT, MAX_RAW, Report, raw_fragment, read_usage

P, C, E = Kind.PROMPT, Kind.COMPLETION, Kind.EMBEDDING


@pytest.mark.parametrize(
    ("shape", "answer", "counts"),
    [
        (Shape.CHAT, {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}, {P: 3, C: 4}),
        (Shape.CHAT, {"usage": {"prompt_tokens": 0, "completion_tokens": 0}}, {P: 0, C: 0}),
        (
            Shape.CHAT,
            {"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 99}},
            {P: 3, C: 4},
        ),
        (
            Shape.CHAT,
            {"usage": {"prompt_tokens": MAX_COUNT, "completion_tokens": 1}},
            {P: MAX_COUNT, C: 1},
        ),
        (Shape.EMBEDDING, {"usage": {"prompt_tokens": 5, "total_tokens": 6}}, {E: 5}),
        (Shape.EMBEDDING, {"usage": {"total_tokens": 6}}, {E: 6}),
        (Shape.EMBEDDING, {"usage": {"prompt_tokens": None, "total_tokens": 6}}, {E: 6}),
        (Shape.EMBEDDING, {"meta": {"billed_units": {"input_tokens": 7}}}, {E: 7}),
        (Shape.EMBEDDING, {"meta": {"tokens": {"input_tokens": 8}}}, {E: 8}),
        (Shape.MESSAGES, {"usage": {"input_tokens": 1, "output_tokens": 2}}, {P: 1, C: 2}),
        (
            Shape.MESSAGES,
            {
                "usage": {
                    "input_tokens": 1,
                    "cache_creation_input_tokens": 10,
                    "cache_read_input_tokens": 100,
                    "output_tokens": 2,
                }
            },
            {P: 111, C: 2},
        ),
        (
            Shape.MESSAGES,
            {"usage": {"input_tokens": 1, "cache_read_input_tokens": None, "output_tokens": 2}},
            {P: 1, C: 2},
        ),
        (
            Shape.RESPONSES,
            {
                "usage": {
                    "input_tokens": 1,
                    "output_tokens": 20,
                    "output_tokens_details": {"reasoning_tokens": 15},
                }
            },
            {P: 1, C: 20},
        ),
    ],
)
def test_a_valid_report_gives_its_counts(shape, answer, counts):
    assert read_usage(shape, answer) == Report(counts)


@pytest.mark.parametrize("answer", [{}, {"usage": None}, {"choices": []}, [], None, "usage", 3])
@pytest.mark.parametrize("shape", list(Shape))
def test_a_missing_report_is_absent(shape, answer):
    assert read_usage(shape, answer) == ABSENT


BAD = ["-1", "3.0", "3.5", '"3"', "true", "1" + "0" * 30, "9223372036854775808", "[]", "{}"]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("shape", "template"),
    [
        (Shape.CHAT, '{"prompt_tokens":%s,"completion_tokens":1}'),
        (Shape.CHAT, '{"prompt_tokens":1,"completion_tokens":%s}'),
        (Shape.EMBEDDING, '{"prompt_tokens":%s,"total_tokens":1}'),
        (Shape.EMBEDDING, '{"total_tokens":%s}'),
        (Shape.MESSAGES, '{"input_tokens":%s,"output_tokens":1}'),
        (Shape.MESSAGES, '{"input_tokens":1,"output_tokens":%s}'),
        (Shape.MESSAGES, '{"input_tokens":1,"cache_read_input_tokens":%s,"output_tokens":1}'),
        (Shape.RESPONSES, '{"input_tokens":%s,"output_tokens":1}'),
    ],
)
def test_an_absurd_count_is_kept_as_text_and_not_counted(shape, template, bad):
    usage = orjson.loads(template % bad)
    report = read_usage(shape, {"usage": usage})
    assert report == Report(raw=orjson.dumps(usage).decode())


@pytest.mark.parametrize("usage", [{}, {"prompt_tokens": 1}, {"completion_tokens": 1}, [], 5, "x"])
def test_a_report_without_its_counts_is_absurd(usage):
    assert read_usage(Shape.CHAT, {"usage": usage}).raw == orjson.dumps(usage).decode()


@pytest.mark.parametrize("usage", [{"input_tokens": 1}, {"output_tokens": 1}, {}])
def test_a_messages_report_without_its_counts_is_absurd(usage):
    assert read_usage(Shape.MESSAGES, {"usage": usage}).raw == orjson.dumps(usage).decode()


def test_a_sum_over_the_largest_count_is_absurd():
    usage = {"input_tokens": MAX_COUNT, "cache_read_input_tokens": 1, "output_tokens": 1}
    report = read_usage(Shape.MESSAGES, {"usage": usage})
    assert not report.counts
    assert report.raw


def test_search_units_are_no_tokens():
    report = read_usage(Shape.EMBEDDING, {"meta": {"billed_units": {"search_units": 1}}})
    assert report == Report(raw='{"billed_units":{"search_units":1}}')


def test_the_kept_text_is_bounded():
    report = read_usage(Shape.CHAT, {"usage": {"note": "\N{SNOWMAN}" * 5000}})
    assert report.raw is not None
    assert MAX_RAW - 3 < len(report.raw.encode()) <= MAX_RAW


def test_a_report_too_deep_to_write_down_is_absurd_all_the_same():
    deep = orjson.loads(b'{"a":' * 300 + b"1" + b"}" * 300)
    assert read_usage(Shape.CHAT, {"usage": deep}).raw


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["usage", "meta", "prompt_tokens", "input_tokens", "billed_units"]),
            inner,
        )
    ),
    max_leaves=6,
)


@given(st.sampled_from(Shape), JSON)
def test_any_value_gives_a_report(shape, value):
    report = read_usage(shape, value)
    assert all(type(n) is int and 0 <= n <= MAX_COUNT for n in report.counts.values())
    assert not (report.counts and report.raw)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"usage":{"prompt_tokens":NaN},"x":"answer"', '{"prompt_tokens":NaN}'),
        (b'{"usage": NaN, "text": "answer"', "NaN"),
        (b'{"usage":"answer', None),
        (b'{"usage":null', None),
        (b'{"text":"answer"', None),
    ],
)
def test_of_broken_json_only_the_report_is_kept(data, expected):
    assert raw_fragment(data) == expected
