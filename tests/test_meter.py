"""The meter over streams as real servers send them, and over damaged ones."""

from __future__ import annotations

import re
import time
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.endpoints import Shape
from llmproxy.meter import StreamMeter, read_answer
from llmproxy.model import MAX_COUNT, Kind, Reading
from llmproxy.sse import MAX_EVENT, Decoder

P, C, E = Kind.PROMPT, Kind.COMPLETION, Kind.EMBEDDING
STREAMS = Path(__file__).parent / "streams"

SHAPES = {
    path.stem: Shape.MESSAGES
    if path.stem.startswith("anthropic") or path.stem == "vllm_messages"
    else Shape.RESPONSES
    if "responses" in path.stem
    else Shape.CHAT
    for path in sorted(STREAMS.glob("*.sse"))
}
READINGS = {
    "anthropic_error": Reading({P: 25, C: 2}, answered=True),
    "anthropic_messages": Reading({P: 2125, C: 15}, exact=True, answered=True),
    "anthropic_tool_use": Reading({P: 472, C: 89}, exact=True, answered=True),
    "chat_usage_with_finish": Reading({P: 12, C: 7}, exact=True, answered=True),
    "llamacpp_chat": Reading({P: 14, C: 8}, exact=True, answered=True),
    "llamacpp_python_no_usage": Reading({C: 7}, answered=True),
    "ollama_chat": Reading({P: 31, C: 8}, exact=True, answered=True),
    "openai_responses_completed": Reading({P: 37, C: 11}, exact=True, answered=True),
    "openai_responses_failed": Reading({C: 7}, answered=True),
    "openai_responses_incomplete": Reading({P: 37, C: 11}, exact=True, answered=True),
    "sglang_chat": Reading({P: 23, C: 8}, exact=True, answered=True),
    "vllm_chat_continuous": Reading({P: 23, C: 9}, exact=True, answered=True),
    "vllm_chat_error": Reading({C: 1}, answered=True),
    "vllm_chat_null_usage": Reading({P: 23, C: 9}, exact=True, answered=True),
    "vllm_chat_tool_calls": Reading({P: 180, C: 21}, exact=True, answered=True),
    "vllm_chat_two_choices": Reading({P: 23, C: 10}, exact=True, answered=True),
    "vllm_chat_usage": Reading({P: 23, C: 9}, exact=True, answered=True),
    "vllm_completions": Reading({P: 5, C: 16}, exact=True, answered=True),
    "vllm_messages": Reading({P: 23, C: 9}, exact=True, answered=True),
    "vllm_responses": Reading({P: 37, C: 11}, exact=True, answered=True),
}
CONTENT = {"vllm_chat_tool_calls": 7, "anthropic_tool_use": 4, "vllm_chat_two_choices": 8}
CONTENT |= {"vllm_chat_error": 1, "anthropic_error": 2}


def stream_of(name: str) -> bytes:
    return (STREAMS / f"{name}.sse").read_bytes()


def run(meter: StreamMeter, stream: bytes, cuts: list[int] | None = None) -> tuple[bytes, bytes]:
    """What the client gets before the bill is committed, and after."""
    bounds = [0, *(cuts or []), len(stream)]
    shown = b"".join(meter.feed(stream[a:b]) for a, b in pairwise(bounds))
    return shown, meter.finish()


def chat(**options: bool) -> StreamMeter:
    return StreamMeter(Shape.CHAT, **options)


def sse(*events: object) -> bytes:
    texts = [e if isinstance(e, bytes) else orjson.dumps(e) for e in events]
    return b"".join(b"data: " + text + b"\n\n" for text in texts)


def chunk(content: str = "", finish: str | None = None, index: int = 0, **more: object) -> object:
    choice = {"index": index, "delta": {"content": content}, "finish_reason": finish}
    return {"object": "chat.completion.chunk", "choices": [choice], **more}


def usage(prompt: object, completion: object) -> dict[str, object]:
    return {"prompt_tokens": prompt, "completion_tokens": completion}


def final(prompt: object, completion: object) -> object:
    return {"object": "chat.completion.chunk", "choices": [], "usage": usage(prompt, completion)}


DONE = b"[DONE]"


def test_every_recorded_stream_has_an_expectation():
    assert READINGS.keys() == SHAPES.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_a_recorded_stream_is_read(name):
    meter = StreamMeter(SHAPES[name], show_usage=True)
    shown, rest = run(meter, stream_of(name))
    assert shown + rest == stream_of(name)
    assert meter.reading() == READINGS[name]
    assert meter.content_events == CONTENT.get(name, 7)
    assert meter.ended == (name != "anthropic_error")
    assert meter.failed == (name.endswith(("error", "failed")))


@pytest.mark.parametrize("name", SHAPES)
def test_the_end_of_an_answer_is_held_back(name):
    if name == "anthropic_error":
        return
    meter = StreamMeter(SHAPES[name], show_usage=True)
    _, rest = run(meter, stream_of(name))
    last = re.split(rb"(?:\r?\n){2}", stream_of(name).strip())
    if name == "vllm_messages":
        assert rest.count(b"message_stop") == 2
        assert rest.endswith(b"data: [DONE]\n\n")
    else:
        assert rest.strip() == last[-1]


OPTIONS = [
    {},
    {"show_usage": True},
    {"continuous": True},
    {"show_usage": True, "continuous": True},
    {"show_usage": True, "continuous": True, "show_continuous": True},
]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("name", SHAPES)
def test_no_cut_changes_the_bill_or_the_bytes(name, end):
    stream = stream_of(name).replace(b"\r\n", b"\n").replace(b"\n", end)
    for options in OPTIONS if SHAPES[name] is Shape.CHAT else OPTIONS[:1]:
        whole = StreamMeter(SHAPES[name], **options)
        expected = run(whole, stream)
        step = 11 if options or end != b"\n" else 1
        cuts = [[cut] for cut in range(1, len(stream), step)] + [list(range(1, len(stream)))]
        for each in cuts:
            meter = StreamMeter(SHAPES[name], **options)
            assert run(meter, stream, each) == expected
            assert meter.reading() == whole.reading()
            assert (meter.ended, meter.failed) == (whole.ended, whole.failed)


@pytest.mark.parametrize(
    "name",
    [name for name, reading in READINGS.items() if reading.exact or reading.counts == {C: 7}],
)
def test_a_missing_last_empty_line_does_not_change_the_bill(name):
    meter = StreamMeter(SHAPES[name])
    run(meter, stream_of(name).rstrip(b"\r\n"))
    assert meter.reading() == READINGS[name]
    assert meter.ended


def test_a_client_that_did_not_ask_gets_the_stream_without_usage():
    plain = stream_of("vllm_chat_usage")
    without = b"\n\n".join(e for e in plain.split(b"\n\n") if b'"choices":[]' not in e)
    for name, options in [
        ("vllm_chat_usage", {}),
        ("vllm_chat_null_usage", {}),
        ("vllm_chat_continuous", {"continuous": True}),
    ]:
        assert b"".join(run(chat(**options), stream_of(name))) == without


def test_a_client_that_asked_gets_null_for_the_running_counts_that_only_we_asked_for():
    meter = chat(show_usage=True, continuous=True)
    shown = b"".join(run(meter, stream_of("vllm_chat_continuous")))
    assert shown == stream_of("vllm_chat_null_usage")


def test_a_client_that_asked_for_running_counts_gets_them():
    meter = chat(show_usage=True, continuous=True, show_continuous=True)
    stream = stream_of("vllm_chat_continuous")
    assert b"".join(run(meter, stream)) == stream


def test_usage_that_a_server_sends_unasked_in_a_chunk_with_choices_is_left_there():
    stream = stream_of("chat_usage_with_finish")
    assert b"".join(run(chat(), stream)) == stream


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"usage":null,"choices":[]}', b'{"choices":[]}'),
        (b'{"choices": [], "usage": null}', b'{"choices": []}'),
        (b'{"choices":[],"usage":null,"x":1.50}', b'{"choices":[],"x":1.50}'),
        (b'{"choices":[],"usage" :null}', b'{"choices":[]}'),
        (b'{"choices":[{"text":"\\"usage\\":null}"}]}', None),
        (b'{"choices":[],"usage":{},"usage":null}', b'{"choices":[]}'),
        (b'{"choices":[{"usage":{}}],"usage":null}', b'{"choices":[{"usage":{}}]}'),
        (b'{"choices":[{"usage":null}]}', None),
        (b'{"choices":[],"x":{"usage":null}}', None),
        (b'{"choices":[],"usage":null', None),
    ],
)
def test_only_the_chunks_own_null_usage_is_removed(before, after):
    expected = sse(before) if after is None else sse(after)
    assert chat().feed(sse(before)) == expected
    assert chat(show_usage=True).feed(sse(before)) == sse(before)


@pytest.mark.parametrize(
    ("before", "after", "null"),
    [
        (b'{"choices":[1],"usage":%s}', b'{"choices":[1]}', b'{"choices":[1],"usage":null}'),
        (b'{"usage":%s,"choices":[1]}', b'{"choices":[1]}', b'{"usage":null,"choices":[1]}'),
        (b'{"choices":[1], "usage":%s}', b'{"choices":[1]}', b'{"choices":[1], "usage":null}'),
        (
            b'{"choices":[{"usage":{}}],"usage":%s}',
            b'{"choices":[{"usage":{}}]}',
            b'{"choices":[{"usage":{}}],"usage":null}',
        ),
        (
            b'{"choices":[1],"usage":%s,"x":{"usage":{}}}',
            b'{"choices":[1],"x":{"usage":{}}}',
            b'{"choices":[1],"usage":null,"x":{"usage":{}}}',
        ),
    ],
)
@pytest.mark.parametrize("details", [b"", b',"details":{"cached":1}', b',"d":{"e":{"f":"}"}}'])
def test_only_the_chunks_own_running_usage_is_removed(before, after, null, details):
    report = b'{"prompt_tokens":1,"completion_tokens":2' + details + b"}"
    stream = sse(before % report)
    assert chat(continuous=True).feed(stream) == sse(after)
    assert chat(continuous=True, show_usage=True).feed(stream) == sse(null)


def test_null_usage_is_removed_from_data_of_several_lines():
    stream = b'data: {"choices":[{}]\ndata: ,"usage":null}\n\n'
    assert chat().feed(stream) == b'data: {"choices":[{}]\ndata: }\n\n'


VALID, RUNNING = final(5, 7), chunk("x", usage=usage(5, 3))


@pytest.mark.parametrize(
    ("events", "options", "expected"),
    [
        ([chunk("a"), VALID, DONE], {}, Reading({P: 5, C: 7}, True, None, True)),
        ([chunk("a")] * 9 + [VALID], {}, Reading({P: 5, C: 7}, True, None, True)),
        ([RUNNING, VALID, chunk("a")], {}, Reading({P: 5, C: 7}, True, None, True)),
        (
            [RUNNING, chunk("x", usage=usage(5, 1)), chunk("x", index=1, usage=usage(5, 4))],
            {"continuous": True},
            Reading({P: 5, C: 7}, False, None, True),
        ),
        ([VALID, chunk("a"), DONE], {}, Reading({P: 5, C: 7}, True, None, True)),
        ([chunk("a"), DONE, VALID], {}, Reading({P: 5, C: 7}, True, None, True)),
        ([VALID, final(5, 9)], {}, Reading({P: 5, C: 9}, True, None, True)),
        ([VALID, final(5, 6)], {}, Reading({P: 5, C: 6}, True, None, True)),
        ([final(0, 0), DONE], {}, Reading({P: 0, C: 0}, True, None, True)),
        ([chunk("a"), chunk("b"), DONE], {}, Reading({C: 2}, False, None, True)),
        ([RUNNING], {}, Reading({P: 5, C: 3}, False, None, True)),
        ([RUNNING], {"continuous": True}, Reading({P: 5, C: 3}, True, None, True)),
        (
            [RUNNING, chunk("x", usage=usage(5, 2))],
            {"continuous": True},
            Reading({P: 5, C: 3}, True, None, True),
        ),
        ([RUNNING, chunk("y")], {"continuous": True}, Reading({P: 5, C: 3}, False, None, True)),
        ([RUNNING, VALID], {"continuous": True}, Reading({P: 5, C: 7}, True, None, True)),
        (
            [RUNNING],
            {"continuous": True, "several": True},
            Reading({P: 5, C: 3}, False, None, True),
        ),
        (
            [RUNNING, chunk("x", index=1, usage=usage(5, 4))],
            {"continuous": True},
            Reading({P: 5, C: 7}, False, None, True),
        ),
        (
            [chunk("x", "stop", usage=usage(5, 3)), DONE],
            {},
            Reading({P: 5, C: 3}, True, None, True),
        ),
        (
            [chunk("x", "stop"), chunk("", usage=usage(5, 3)), DONE],
            {},
            Reading({P: 5, C: 3}, True, None, True),
        ),
        (
            [final(5, -1), DONE],
            {},
            Reading({C: 0}, False, '{"prompt_tokens":5,"completion_tokens":-1}', True),
        ),
        ([final(5, -1), VALID, DONE], {}, Reading({P: 5, C: 7}, True, None, True)),
        (
            [VALID, final(5, 1.5), DONE],
            {},
            Reading({P: 5, C: 7}, False, '{"prompt_tokens":5,"completion_tokens":1.5}', True),
        ),
        (
            [b'{"choices":[],"usage":{"prompt_tokens":NaN}}', DONE],
            {},
            Reading({C: 0}, False, '{"prompt_tokens":NaN}', True),
        ),
        ([], {}, Reading()),
        ([DONE], {}, Reading()),
    ],
)
def test_wherever_usage_stands_the_last_valid_report_wins(events, options, expected):
    meter = chat(**options)
    run(meter, sse(*events))
    assert meter.reading() == expected


BAD = [-1, 3.0, 3.5, "3", True, None, [], {}, 1e30, 2**63]


@pytest.mark.parametrize("bad", BAD)
def test_an_absurd_count_leaves_the_reading_inexact_with_its_text(bad):
    for report in (final(bad, 1), final(1, bad)):
        meter = chat()
        run(meter, sse(chunk("a"), report, DONE))
        reading = meter.reading()
        assert not reading.exact
        assert reading.raw == orjson.dumps(report["usage"]).decode()  # type: ignore[index]


def test_the_sum_of_running_counts_stays_a_count():
    events = [chunk("x", index=i, usage=usage(1, MAX_COUNT)) for i in (0, 1)]
    meter = chat(continuous=True)
    run(meter, sse(*events))
    assert meter.reading().counts[C] == MAX_COUNT


@pytest.mark.parametrize(
    "report",
    [
        {"choices": [], "usage": usage(1, 2)},
        {"choices": [], "usage": "none"},
        {"choices": None, "usage": usage(1, 2)},
        {"usage": usage(1, 2)},
    ],
)
def test_a_usage_chunk_is_shown_only_to_those_who_asked(report):
    assert chat().feed(sse(report)) == b""
    assert chat(show_usage=True).feed(sse(report)) == sse(report)


@pytest.mark.parametrize(
    ("delta", "counts"),
    [
        (b'{"content":"a"}', True),
        (b'{"content":"\\"a"}', True),
        (b'{"content" : "a"}', True),
        (b'{"content":""}', False),
        (b'{"content":null}', False),
        (b'{"role":"assistant"}', False),
        (b'{"content":null,"reasoning_content":"a"}', True),
        (b'{"content":"","reasoning":"a"}', True),
        (b'{"refusal":"a"}', True),
        (b'{"content":null,"tool_calls":[]}', False),
        (b'{"tool_calls":[{"index":0,"function":{"arguments":"{"}}]}', True),
        (b'{"function_call":{"arguments":"{"}}', True),
        (b'{"x":"\\"content\\":\\"a\\""}', False),
    ],
)
def test_chunks_with_content_are_counted(delta, counts):
    meter = chat()
    meter.feed(b'data: {"choices":[{"delta":' + delta + b"}]}\n\n")
    assert meter.content_events == counts


@pytest.mark.parametrize(
    ("shape", "stream", "failed"),
    [
        (Shape.CHAT, sse({"error": {"message": "x"}}), True),
        (Shape.CHAT, sse({"object": "error", "error": "x"}), True),
        (Shape.CHAT, b'event: error\ndata: {"error":"x"}\n\n', True),
        (Shape.CHAT, b'error: {"code":500}\n\n', True),
        (Shape.CHAT, sse({"error": None, "choices": []}), False),
        (Shape.CHAT, sse(chunk('"error"')), False),
        (Shape.MESSAGES, b'event: error\ndata: {"type":"error"}\n\n', True),
        (Shape.MESSAGES, sse({"type": "error", "error": {}}), True),
        (Shape.MESSAGES, sse({"type": "ping"}), False),
        (Shape.RESPONSES, sse({"type": "error", "message": "x"}), True),
        (Shape.RESPONSES, sse({"error": {"message": "x"}}), True),
        (Shape.RESPONSES, sse({"type": "response.failed", "response": {}}), True),
        (Shape.RESPONSES, sse({"type": "response.created", "response": {"error": 1}}), False),
    ],
)
def test_an_error_event_is_noticed_and_passed_on(shape, stream, failed):
    meter = StreamMeter(shape)
    assert b"".join(run(meter, stream)) == stream
    assert meter.failed is failed


def test_an_error_event_alone_is_no_answer():
    meter = chat()
    run(meter, sse({"error": {"message": "x"}}))
    assert meter.reading() == Reading()


@pytest.mark.parametrize("shape", [Shape.MESSAGES, Shape.RESPONSES])
def test_events_without_a_name_are_known_by_their_type(shape):
    name = "anthropic_messages" if shape is Shape.MESSAGES else "openai_responses_completed"
    stream = re.sub(rb"event: [^\n]*\n", b"", stream_of(name))
    meter = StreamMeter(shape)
    shown, rest = run(meter, stream)
    assert meter.reading() == READINGS[name]
    assert meter.ended
    assert rest
    assert shown + rest == stream


def anthropic(start: object, *deltas: object) -> bytes:
    events: list[object] = [{"type": "message_start", "message": {"usage": start}}]
    events += [{"type": "message_delta", "usage": delta} for delta in deltas]
    return sse(*events)


@pytest.mark.parametrize(
    ("start", "deltas", "expected"),
    [
        ({"input_tokens": 5, "output_tokens": 1}, [], Reading({P: 5, C: 1}, False, None, True)),
        ({"input_tokens": 5}, [{"output_tokens": 9}], Reading({P: 5, C: 9}, True, None, True)),
        (
            {"input_tokens": 5},
            [{"output_tokens": 9}, {"output_tokens": 4}],
            Reading({P: 5, C: 9}, True, None, True),
        ),
        (
            {"input_tokens": 5},
            [{"input_tokens": 50, "output_tokens": 9}],
            Reading({P: 50, C: 9}, True, None, True),
        ),
        (
            {"input_tokens": 100},
            [{"input_tokens": 20, "cache_read_input_tokens": 80, "output_tokens": 9}],
            Reading({P: 100, C: 9}, True, None, True),
        ),
        (
            {"input_tokens": 20, "cache_read_input_tokens": 80},
            [{"input_tokens": 20, "output_tokens": 9}],
            Reading({P: 100, C: 9}, True, None, True),
        ),
        (
            {"input_tokens": 5},
            [{"input_tokens": 0, "output_tokens": 9}],
            Reading({P: 5, C: 9}, True, None, True),
        ),
        (None, [{"output_tokens": 9}], Reading({C: 9}, False, None, True)),
        (
            None,
            [{"input_tokens": 3, "output_tokens": 9}],
            Reading({P: 3, C: 9}, True, None, True),
        ),
        (
            {"input_tokens": 5},
            [{"output_tokens": -1}],
            Reading({P: 5, C: 0}, False, '{"output_tokens":-1}', True),
        ),
        (
            {"input_tokens": MAX_COUNT},
            [{"cache_read_input_tokens": 1, "output_tokens": 1}],
            Reading(
                {P: MAX_COUNT, C: 0},
                False,
                '{"cache_read_input_tokens":1,"output_tokens":1}',
                True,
            ),
        ),
        (
            {"input_tokens": True},
            [{"input_tokens": 3, "output_tokens": 9}],
            Reading({P: 3, C: 9}, True, None, True),
        ),
    ],
)
def test_usage_of_messages_is_put_together_from_its_events(start, deltas, expected):
    meter = StreamMeter(Shape.MESSAGES)
    run(meter, anthropic(start, *deltas))
    assert meter.reading() == expected


@pytest.mark.parametrize("shape", [Shape.MESSAGES, Shape.RESPONSES])
def test_usage_in_an_event_that_has_no_name_and_is_no_json_is_kept_as_text(shape):
    meter = StreamMeter(shape)
    run(meter, sse(b'{"type":"message_delta","usage":{"output_tokens":NaN}}', DONE))
    assert meter.reading().raw == '{"output_tokens":NaN}'


def test_messages_cut_short_count_their_deltas():
    stream = stream_of("anthropic_messages")
    meter = StreamMeter(Shape.MESSAGES)
    run(meter, stream[: stream.index(b"event: content_block_stop")])
    assert meter.reading() == Reading({P: 2125, C: 7}, answered=True)


def test_responses_cut_short_count_their_deltas():
    stream = stream_of("openai_responses_completed")
    meter = StreamMeter(Shape.RESPONSES)
    run(meter, stream[: stream.index(b"event: response.output_text.done")])
    assert meter.reading() == Reading({C: 7}, answered=True)


def test_an_incomplete_last_event_does_not_count():
    meter = chat()
    stream = sse(chunk("a"), final(5, 7))
    run(meter, stream[:-20])
    assert meter.reading() == Reading({C: 1}, answered=True)


def test_client_metadata_in_a_response_is_not_taken_for_its_end():
    stream = stream_of("openai_responses_completed")
    meter = StreamMeter(Shape.RESPONSES)
    meter.feed(stream[: stream.index(b"event: response.output_item.added")])
    assert not meter.ended


def test_what_follows_the_end_does_not_fill_the_memory():
    meter = StreamMeter(Shape.CHAT, max_event=1000)
    meter.feed(sse(DONE))
    for _ in range(100):
        assert meter.feed(sse(b"x" * 100)) == b""
    assert len(meter.finish()) <= 1000


def test_an_event_that_is_too_long_passes_unread():
    stream = sse(chunk("a"), chunk("b" * 2000), VALID, DONE)
    meter = StreamMeter(Shape.CHAT, show_usage=True, max_event=1000)
    assert b"".join(run(meter, stream, list(range(1, len(stream))))) == stream
    assert meter.oversized == 1
    assert meter.reading() == Reading({P: 5, C: 7}, True, None, True)


@given(st.sampled_from(Shape), st.binary(max_size=80), st.booleans(), st.booleans())
def test_random_bytes_never_raise_and_pass_unchanged(shape, data, show, continuous):
    meter = StreamMeter(shape, show_usage=show, continuous=continuous)
    assert b"".join(run(meter, data)) == data


class Plain(Decoder):
    """A decoder without its short cut."""

    def cut(self, data: bytes) -> list[bytes]:
        return []


def looking_closely(shape: Shape, **options: Any) -> StreamMeter:
    """A meter that takes the long way for all events."""
    meter = StreamMeter(shape, **options)
    meter._decoder = Plain(options.get("max_event", MAX_EVENT))
    meter._dialect.glance = lambda raw: None  # type: ignore[method-assign]
    return meter


CHAT_FORMS = [
    b'data: {"choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":null}]%s}',
    b'data: {"choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":"stop"}]%s}',
    b'data: {"choices":[{"index":1,"delta":{"reasoning":"%s","content":null}}]%s}',
    b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"arguments":"%s"}}]}}]%s}',
    b'data: {"choices":[{"text":"%s"}],"error":null%s}',
    b'data: {"content":"%s",","error":1%s}',
    b'id: 1\ndata: {"choices":[{"text":"%s"}]%s}',
    b'data: {"choices":[{"text":"%s"}]%s}\nevent: error',
    b'data: {"content":"%s":"x"%s}',
    b'data: {"content":"%s",]%s}',
    b'\xef\xbb\xbfdata: {"content":"%s"%s}',
]
NAMED_FORMS = [
    b'event: content_block_delta\ndata: {"delta":{"text":"%s"}%s}',
    b"event: content_block_delta\ndata: %s%s",
    b"event: response.output_text.delta\ndata: %s%s",
    b"event: response.delta\ndata: %s%s",
    b"event: response.delta\ndata: %s\ndata: %s",
    b"event: responses.delta\ndata: %s%s",
]
USAGES = [
    b"",
    b',"usage":null',
    b',"usage":null}',
    b',"usage":{"prompt_tokens":5,"completion_tokens":3}',
    b',"usage":{}',
]
TEXTS = [b"a", b" b", b"", b"usage", b"error", b"errors", b"finish_reason", b"content", b"\\"]
TEXTS += [b'\\"', b'"', b'","x":"', b'":"', b"\r", b"\n", b"\n\n", b"\xff", b"data: {", b"x" * 40]
LAST = [b"data: [DONE]\n\n", b"event: message_stop\ndata: {}\n\n"]
LAST += [sse(chunk("x", usage=usage(5, 3))), sse(final(5, 7)), b"\n", b"event: x\ndata: {}\n\n"]


def assert_both_ways_agree(shape: Shape, reads: list[bytes], options: dict[str, Any]) -> None:
    quick, long = StreamMeter(shape, **options), looking_closely(shape, **options)
    for read in reads:
        assert quick.feed(read) == long.feed(read)
        assert state(quick) == state(long)
    assert quick.finish() == long.finish()
    assert state(quick) == state(long)


@pytest.mark.parametrize(
    ("shape", "form"),
    [(Shape.CHAT, form) for form in CHAT_FORMS]
    + [(shape, form) for shape in (Shape.MESSAGES, Shape.RESPONSES) for form in NAMED_FORMS],
)
def test_the_quick_way_gives_what_the_long_way_does(shape, form):
    short: dict[str, Any] = {"max_event": 100}
    options = [*OPTIONS, short] if shape is Shape.CHAT else [{}, short]
    for more, text, end in product(USAGES, TEXTS, [b"\n\n", b"\r\n\r\n", b"\r\r"]):
        first, second = (form % (each, more) + end for each in (b"a", text))
        for each in options:
            assert_both_ways_agree(shape, [first, second, first, *LAST, first], each)


@given(
    st.sampled_from([Shape.CHAT, Shape.MESSAGES, Shape.RESPONSES]),
    st.sampled_from(CHAT_FORMS + NAMED_FORMS),
    st.sampled_from(USAGES),
    st.sampled_from([b"\n\n", b"\n\r\n", b"\n\n\n"]),
    st.lists(st.sampled_from(TEXTS), max_size=9),
    st.lists(st.integers(0, 900), max_size=5),
    st.sampled_from(OPTIONS),
)
def test_no_cut_makes_the_quick_way_another(shape, form, more, end, texts, cuts, options):
    events = [form % (text, more) + end for text in texts] + LAST
    whole = b"".join(events)
    bounds = sorted({0, *accumulate(map(len, events)), *cuts})
    assert_both_ways_agree(shape, [whole[a:b] for a, b in pairwise(bounds)], options)
    bounds = [0, *sorted(cuts), len(whole)]
    assert_both_ways_agree(shape, [whole[a:b] for a, b in pairwise(bounds)], options)


def state(meter: StreamMeter) -> tuple[object, ...]:
    told = (meter.ended, meter.failed, meter.content_events, meter.oversized)
    return *told, meter.reading()


def glances_of(meter: StreamMeter, stream: bytes) -> int:
    """How many of the reads, an event each, are dealt with at a glance."""
    glance, found = meter._dialect.glance, 0

    def counted(raw: bytes) -> bytes | None:
        nonlocal found
        shown = glance(raw)
        found += shown is not None
        return shown

    meter._dialect.glance = counted  # type: ignore[method-assign]
    for event in re.findall(rb"(?s).*?\n\n", stream):
        meter.feed(event)
    return found


# The others have running counts, two answers in turns, tool calls, CRLF, or not many events.
@pytest.mark.parametrize(
    "name",
    [n for n in SHAPES if not n.endswith(("continuous", "choices", "calls", "error", "no_usage"))],
)
def test_most_events_of_a_recorded_stream_are_dealt_with_at_a_glance(name):
    assert glances_of(StreamMeter(SHAPES[name]), stream_of(name)) >= 4


def test_a_read_of_one_event_that_stays_as_it_is_is_not_copied():
    meter = chat()
    for content in ("a", "b", "c"):
        event = sse(chunk(content))
        assert meter.feed(event) is event


@given(st.data())
def test_damaged_streams_never_raise_and_no_cut_changes_the_bill(data):
    stream = bytearray(stream_of(data.draw(st.sampled_from(sorted(SHAPES)))))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(stream) - 1))
        width = data.draw(st.sampled_from([0, 1, 1, 9]))
        stream[at : at + width] = data.draw(
            st.sampled_from([b"", b"\r", b"\n", b'"', b"}", b"null", b"-", b"\xff", b"[", b"9e9"])
        )
    shape = data.draw(st.sampled_from(Shape))
    options = data.draw(st.sampled_from(OPTIONS))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=5).map(sorted))
    whole, cut = StreamMeter(shape, **options), StreamMeter(shape, **options)
    assert run(whole, bytes(stream)) == run(cut, bytes(stream), cuts)
    assert whole.reading() == cut.reading()
    assert all(0 <= count <= MAX_COUNT for count in whole.reading().counts.values())


def test_a_long_stream_in_single_bytes_takes_linear_time():
    stream = sse(chunk("y" * 200_000), *[chunk("x")] * 500, VALID, DONE)
    began = time.process_time()
    run(chat(), stream, list(range(1, len(stream))))
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("shape", "body", "expected"),
    [
        (
            Shape.CHAT,
            b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}',
            Reading({P: 1, C: 2}, True, None, True),
        ),
        (Shape.CHAT, b'{"choices":[]}', Reading({}, False, None, True)),
        (Shape.CHAT, b'{"usage":{}}', Reading({}, False, "{}", True)),
        (
            Shape.CHAT,
            b'{"usage":{"prompt_tokens":NaN}}',
            Reading({}, False, '{"prompt_tokens":NaN}', False),
        ),
        (Shape.CHAT, b"<html>", Reading({}, False, None, False)),
        (Shape.CHAT, b"", Reading()),
        (Shape.EMBEDDING, b'{"usage":{"total_tokens":9}}', Reading({E: 9}, True, None, True)),
        (
            Shape.MESSAGES,
            b'{"usage":{"input_tokens":1,"output_tokens":2}}',
            Reading({P: 1, C: 2}, True, None, True),
        ),
        (Shape.AUDIO, b'{"duration":1.5}', Reading({Kind.TRANSCRIPTION: 2}, True, None, True)),
        (Shape.FREE, b'{"input_tokens":3}', Reading({}, True, None, True)),
        (Shape.FREE, b"", Reading({}, True, None, False)),
    ],
)
def test_a_whole_answer_is_read(shape, body, expected):
    assert read_answer(shape, body) == expected
