"""JSONTestSuite, and JSON that was made up, against each parser of JSON that requests meet.

Small bodies and large ones are read in two ways, which must agree on every one of them. What is
accepted reaches the backend byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_twisted
from backend import ScriptedBackend, json_answer
from hypothesis import given, settings
from hypothesis import strategies as st
from json_suite import VECTORS
from proxy import ProxyHandle, running_proxy
from surveys import plan_both
from tally import LONG, Tally

from llmproxy.endpoints import ENDPOINTS
from llmproxy.errors import BadRequest
from llmproxy.jsonbytes import InvalidJSON, append, members, parse_object, replace
from llmproxy.rewrite import body_for
from llmproxy.survey import MAX_VALUES

pytestmark = pytest.mark.timeout(900)

PATH = "/v1/chat/completions"
CHAT = ENDPOINTS[PATH]
COMPLETION = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
#: Two fields of one name: JSON allows them, but they can be read in two ways.
TWICE = ("y_object_duplicated_key", "y_object_duplicated_key_and_value")
PAD = b'"pad":"%b"' % (b"x" * 70_000)


def bodies() -> Iterator[tuple[str, bytes]]:
    """Name and body: each vector as the value of a field, and each object as the body."""
    for name, vector in VECTORS.items():
        yield name, b'{"model":"m","x":%b}' % vector
        yield f"{name}, large", b'{"model":"m",%b,"x":%b}' % (PAD, vector)
        if vector.lstrip().startswith(b"{") and vector.lstrip()[1:].lstrip()[:1] != b"}":
            yield f"{name}, itself", vector.replace(b"{", b'{"model":"m",', 1)


def expected(name: str) -> set[int]:
    """The statuses that are right for a body."""
    if name.removesuffix(", itself") in TWICE and name.endswith("itself"):
        return {400}
    return {"y": {200}, "n": {400}, "i": {200, 400}}[name[0]]


def test_both_ways_agree_on_each_vector() -> None:
    tally = Tally("JSONTestSuite, both ways")
    for name, body in bodies():
        try:
            plan_both(CHAT, body)
            status = 200
        except BadRequest as error:
            status = error.status
        except AssertionError as error:
            tally.add(name, False, str(error))
            continue
        tally.add(name, status in expected(name), str(status))
    tally.check(at_least=2 * 318)


@pytest_twisted.ensureDeferred
async def test_each_vector_is_refused_or_reaches_the_backend_byte_for_byte(tmp_path: Path) -> None:
    tally = Tally("JSONTestSuite, through the proxy")
    async with ScriptedBackend(json_answer(200, COMPLETION)) as backend:
        async with running_proxy(tmp_path, {"m": {"url": backend.url}}) as proxy:
            for name, body in bodies():
                if LONG or "large" not in name or len(VECTORS[name.removesuffix(", large")]) < 40:
                    tally.add(name, *await tried(proxy, backend, name, body))
    tally.check(at_least=318)


async def tried(
    proxy: ProxyHandle, backend: ScriptedBackend, name: str, body: bytes
) -> tuple[bool, str]:
    """Whether a body was met as it should be, and how it was met."""
    before = len(backend.requests)
    answer = await proxy.post(PATH, body)
    got = [seen.body for seen in backend.requests[before:]]
    passed = [body] if answer.status == 200 else []
    return answer.status in expected(name) and got == passed, f"{answer.status}, {len(got)} sent"


# --- made up --------------------------------------------------------------------------------------

#: What JSON is made of, and what it is not made of.
SHARDS = [
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b" ", b"\n", b"\0", b"\x7f", b"/", b"'"),
    *(b"0", b"1", b"-", b"+", b".", b"e", b"E", b"1e999", b"true", b"false", b"null", b"NaN"),
    *(b'"a":', b'"model":"m"', b'"stream":true', b'"stream_options":{}', b'"n":1', b'"n":2'),
    *(
        b"\\u",
        b"\\ud83d",
        b"\\ude00",
        b"\\n",
        b'\\"',
        b"\xc3\xa9",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xff",
    ),
    *(b"x" * 300, b"7," * 50, b" " * 90, b'"a",' * 40, b"[]," * 9, b"[" * 30, b"]" * 30),
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
KEYS = TEXT | st.sampled_from(
    ["model", "stream", "stream_options", "Model", "n", "prompt", "store"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.just("x" * 300)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4)
)


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """Bodies: of shards, or of a value that is then broken here and there."""
    if draw(st.booleans()):
        shards = draw(st.lists(st.sampled_from(SHARDS), max_size=12))
        return draw(st.sampled_from([b"", b'{"model":"m","x":'])) + b"".join(shards)
    value: Any = {"model": "m", **draw(st.dictionaries(KEYS, VALUES, max_size=5))}
    indent = draw(st.sampled_from([None, 1, 70]))
    raw = json.dumps(value, indent=indent, ensure_ascii=draw(st.booleans())).encode()
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.sampled_from(SHARDS)) + raw[at + draw(st.integers(0, 3)) :]
    return raw


def readings(raw: bytes) -> list[dict[str, Any]]:
    """How servers read a body: the last or the first of two fields counts, or any case does."""
    pairs = json.loads(raw, object_pairs_hook=list)
    last, first = json.loads(raw), dict(reversed(pairs))
    folded = {key.casefold(): last[key] for key in last}
    return [last, orjson.loads(raw), {**last, **{key: last[key] for key in first}}, folded]


def test_what_passes_is_read_alike_by_all_servers() -> None:
    tally = Tally("made-up JSON")
    passed = 0

    @settings(max_examples=10_000 if LONG else 500, deadline=None)
    @given(texts())
    def each(raw: bytes) -> None:
        nonlocal passed
        assert raw.count(b",") < MAX_VALUES
        tally.add(repr(raw), True)
        try:
            request = plan_both(CHAT, raw)
        except BadRequest:
            return
        passed += 1
        sent = body_for(request, CHAT, model="org/m")
        for server in readings(sent):
            assert server["model"] == "org/m"
            assert server.get("stream", False) is request.stream
            assert not request.stream or server["stream_options"]["include_usage"] is True

    each()
    tally.check(at_least=400)
    assert passed > tally.tried / 50  # not all are refused


def test_places_in_any_text_are_found_or_refused() -> None:
    tally = Tally("made-up JSON, as bytes")

    @settings(max_examples=10_000 if LONG else 500, deadline=None)
    @given(texts(), KEYS)
    def each(raw: bytes, key: str) -> None:
        tally.add(repr(raw), True)
        try:
            value = parse_object(raw)
            found = members(raw)
        except InvalidJSON:
            return
        assert {m.key: orjson.loads(raw[m.value_start : m.value_end]) for m in found} == value
        assert orjson.loads(replace(raw, {key: b"[1]"})) == value | {key: [1]}
        assert key not in orjson.loads(replace(raw, {key: None}))
        if value and key not in value:
            assert orjson.loads(append(raw, {key: b"[1]"})) == value | {key: [1]}

    each()
    tally.check(at_least=400)
