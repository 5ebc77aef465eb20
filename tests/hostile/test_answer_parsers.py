"""Whatever a backend sends: no parser of answers raises, grows, or depends on how it was cut."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tally import LONG, Tally
from test_llhttp_answers import VECTORS, Read, taken

from llmproxy import audio
from llmproxy.endpoints import Shape
from llmproxy.errors import BackendError
from llmproxy.meter import StreamMeter, read_answer
from llmproxy.model import MAX_COUNT, Reading
from llmproxy.usage import MAX_RAW, raw_fragment, read_usage

pytestmark = pytest.mark.timeout(900 if LONG else 120)

EXAMPLES = settings(max_examples=5000 if LONG else 200, deadline=None)
CUTS = st.lists(st.integers(0, 3000), max_size=6) | st.just(list(range(3000)))


def bounds(data: bytes, at: list[int]) -> list[int]:
    """Where `data` is cut: the offsets that are in it, in order."""
    return sorted({cut for cut in at if 0 < cut < len(data)})


# --- HTTP ---------------------------------------------------------------------------------------

STARTS = [b"HTTP/1.1 200 OK", b"HTTP/1.0 200 OK", b"HTTP/1.1 100 Continue", b"HTTP/1.1 204 No"]
STARTS += [b"HTTP/1.1 304 Not", b"HTTP/1.1 099 X", b"HTTP/1.1 999 X", b"ICE/1.1 200 OK", b""]
FIELDS = [b"Content-Length: 3", b"Content-Length: 5", b"Transfer-Encoding: chunked", b"X: \x80"]
FIELDS += [b"Connection: close", b"Connection: keep-alive", b"Connection: upgrade", b"X:", b" x"]
FIELDS += [b"Content-Encoding: identity", b"Transfer-Encoding: gzip", b"Upgrade: h2c", b"X : 1"]
BODIES = [
    b"abc",
    b"hello",
    b"3\r\nabc\r\n",
    b"3;a=b\r\nabc\r\n",
    b"0\r\n",
    b"ffffffff\r\n",
    b"\r\n",
]
LINES = st.sampled_from([*STARTS, *FIELDS, *FIELDS, b""]).map(lambda line: line + b"\r\n")
MESSAGES = st.lists(LINES | st.sampled_from(BODIES) | st.binary(max_size=3), max_size=14)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """One of the known answers, with some bytes of it changed."""
    data = bytearray(draw(st.sampled_from([data for data, _ in VECTORS.values()])))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        width = draw(st.sampled_from([0, 0, 1, 7]))
        data[at : at + width] = draw(
            st.sampled_from([b"", b"\r", b"\n", b":", b"0", b"\xff", b" "])
        )
    return bytes(data)


def read(data: bytes, at: list[int]) -> Read | None:
    """What the agent made of it. An empty line behind it ends the connection only if it is late."""
    found = taken(data, bounds(data, at))
    return found and found._replace(again=False)


def test_any_answer_is_read_the_same_in_any_split() -> None:
    tally = Tally("any bytes as an answer")

    @EXAMPLES
    @given(MESSAGES.map(b"".join) | damaged(), CUTS)
    def answer(data: bytes, at: list[int]) -> None:
        whole = read(data, [])
        assert whole == read(data, at)
        assert whole is None or len(whole.body) <= len(data)
        tally.add("an answer", True)

    answer()
    tally.check(at_least=100)


# --- event streams ------------------------------------------------------------------------------

ODD = ["-1", "3.0", "3.5", '"3"', "true", "null", "[]", "{}", "1e30", "NaN", "1" + "0" * 30, "-0"]
COUNTS = st.sampled_from(["3", "0", *ODD, f"{MAX_COUNT}", f"{MAX_COUNT + 1}", "1E400", '"\\ud800"'])
NAMES = ["prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "total_tokens"]
NAMES += ["cache_read_input_tokens", "seconds", "billed_units"]


@st.composite
def usages(draw: st.DrawFn) -> str:
    """The text of a usage report, valid or not."""
    members = [f'"{draw(st.sampled_from(NAMES))}":{draw(COUNTS)}' for _ in range(draw(SOME))]
    return draw(st.sampled_from(["{%s}", "{%s}", "{%s}", "[%s]", "{%s", '{"a":{%s}}'])) % ",".join(
        members
    )


SOME = st.integers(0, 4)
HOLDERS = [
    '{"choices":[],"usage":%s}',
    '{"choices":[{"index":0,"delta":{"content":"x"}}],"usage":%s}',
    '{"choices":[{"index":1,"delta":{},"finish_reason":"stop"}], "usage" : %s }',
    '{"usage":%s,"choices":[{"text":"\\"usage\\":1\u2028"}]}',
    '{"type":"message_start","message":{"usage":%s}}',
    '{"type":"message_delta","usage":%s}',
    '{"type":"response.completed","response":{"usage":%s}}',
    '{"type":"response.failed","response":{"usage":%s}}',
    '{"error":{"usage":%s}}',
    '{"meta":%s}',
    "%s",
]
LAST = ["[DONE]", '{"type":"message_stop"}', '{"type":"response.output_text.delta","delta":"x"}']
EVENT_NAMES = ["", "", "message_delta", "message_stop", "response.completed", "error", "ping"]
ENDS = [b"\n", b"\n", b"\r\n", b"\r"]


@st.composite
def events(draw: st.DrawFn) -> bytes:
    """An event with a usage report somewhere, or the last one of a dialect."""
    data = draw(st.sampled_from(HOLDERS)) % draw(usages())
    data = draw(st.sampled_from([data, data, data, *LAST]))
    name = draw(st.sampled_from(EVENT_NAMES))
    lines = [f"event: {name}"] if name else []
    lines += [": x"] if draw(st.booleans()) else []
    middle = draw(st.integers(0, len(data)))
    pieces = [data] if draw(st.booleans()) else [data[:middle], data[middle:]]
    lines += [f"data: {piece}" for piece in pieces]
    end = draw(st.sampled_from(ENDS))
    return b"".join(line.encode() + end for line in [*lines, ""])


STREAMS = st.tuples(
    st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\n"]),
    st.lists(events() | st.sampled_from([b": ping\n\n", b"\r\n", b"data"]), max_size=8),
).map(lambda parts: parts[0] + b"".join(parts[1]))


def metered(meter: StreamMeter, stream: bytes, cuts: list[int]) -> tuple[object, ...]:
    shown = b"".join(meter.feed(stream[a:b]) for a, b in pairwise([0, *cuts, len(stream)]))
    return shown + meter.finish(), meter.reading(), meter.ended, meter.failed


def assert_sound(reading: Reading) -> None:
    """Counts that a bill can hold, and a text that is bounded."""
    assert all(type(n) is int and 0 <= n <= MAX_COUNT for n in reading.counts.values())
    assert reading.raw is None or len(reading.raw.encode()) <= MAX_RAW
    assert not (reading.exact and reading.counts and reading.raw)


def test_any_stream_is_metered_the_same_in_any_split() -> None:
    tally = Tally("any usage in a stream")
    options = st.fixed_dictionaries(
        {name: st.booleans() for name in ("show_usage", "continuous", "show_continuous", "several")}
    )

    @EXAMPLES
    @given(st.sampled_from(Shape), options, STREAMS, CUTS)
    def stream(shape: Shape, chosen: dict[str, bool], data: bytes, at: list[int]) -> None:
        whole, cut = StreamMeter(shape, **chosen), StreamMeter(shape, **chosen)
        shown = metered(whole, data, [])
        assert shown == metered(cut, data, bounds(data, at))
        # `null` may take the place of a shorter usage, and of data in several lines each may grow.
        assert len(shown[0]) <= len(data) * 1.2 + 16  # type: ignore[arg-type]
        assert_sound(whole.reading())
        tally.add(f"{shape}", True)

    stream()
    tally.check(at_least=100)


# --- whole answers ------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["-->", "1.5", "1e999", "9" * 50, "--->\r\n\r\n"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["usage", "meta", "text", "duration", "segments", "start", "end", *NAMES]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
TIMES = st.floats(0, 1e19) | st.integers(0, 10**6) | st.sampled_from(["1.5", "x", None, -1, True])
SEGMENTS = st.lists(
    st.fixed_dictionaries(
        {"start": TIMES, "end": TIMES, "text": st.text("->\n\r\u2028 a", max_size=9)}
    ),
    max_size=4,
)
SPEECH = st.fixed_dictionaries({"text": st.text(max_size=5), "segments": SEGMENTS | JSON})


def deep(levels: int) -> bytes:
    return b'{"text":"a","usage":' + b'{"usage":' * levels + b"1" + b"}" * levels + b"}"


BODIES_OF_JSON = (JSON | SPEECH).map(lambda value: json.dumps(value).encode())
ANSWERS = BODIES_OF_JSON | st.binary(max_size=40) | usages().map(str.encode)
ANSWERS |= st.integers(0, 1100).map(deep)


def test_any_answer_is_read_and_turned_back_or_refused() -> None:
    tally = Tally("any whole answer")

    @EXAMPLES
    @given(ANSWERS)
    def answer(body: bytes) -> None:
        for shape in Shape:
            assert_sound(read_answer(shape, body))
        fragment = raw_fragment(body)
        assert fragment is None or len(fragment.encode()) <= MAX_RAW
        for wanted in (None, *audio.RESPONSE_FORMATS):
            assert_turned(body, wanted)
        tally.add("an answer", True)

    answer()
    tally.check(at_least=100)


def assert_turned(body: bytes, wanted: str | None) -> None:
    try:
        turned = b"".join(audio.convert(body, wanted)[1])
    except BackendError:
        return
    assert len(turned) <= 3 * len(body) + 100
    if wanted in ("srt", "vtt"):
        segments = orjson.loads(body).get("segments")
        assert turned.count(b"-->") == (1 if segments is None else len(segments))
    elif wanted in (None, "json"):
        assert orjson.loads(turned)["text"] == orjson.loads(body)["text"]


def test_any_value_is_a_report_absent_or_absurd() -> None:
    tally = Tally("any usage in a whole answer")

    @EXAMPLES
    @given(st.sampled_from(Shape), JSON)
    def report(shape: Shape, value: Any) -> None:
        found = read_usage(shape, {"usage": value})
        assert all(type(n) is int and 0 <= n <= MAX_COUNT for n in found.counts.values())
        assert not (found.counts and found.raw)
        assert value is None or shape in (Shape.AUDIO, Shape.FREE) or found.counts or found.raw
        tally.add(f"{shape}", True)

    report()
    tally.check(at_least=100)
