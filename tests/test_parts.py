"""A large JSON text in parts: valid when the whole is, and little is there at a time."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy import parts
from llmproxy.jsonbytes import InvalidJSON, Member, members, parse_object
from llmproxy.parts import (
    ALWAYS_SHORT,
    BLOCK,
    BYTES_PER_VALUE,
    KEPT,
    LONG_VALUE,
    MAX_DEPTH,
    MAX_SHORT,
    MAX_TOKEN,
    RUN,
    Part,
    Parts,
    is_short,
)

LONG = b"x" * 2 * RUN
#: More numbers than stand in one part.
ROW = b",".join(b"%d" % number for number in range(RUN))
Names = tuple[str, ...]


def of(raw: bytes, most: int | None = None) -> Parts[Names]:
    return Parts(raw, (), lambda names, name: (*names, name), most)


def found(raw: bytes, most: int | None = None) -> list[Part[Names]]:
    """All parts. Raises InvalidJSON."""
    return [part for part in of(raw, most) if part is not None]


def read(raw: bytes) -> tuple[dict[str, Any], list[Member]]:
    """What is read of a text, put together again, and its members. Raises InvalidJSON."""
    reading = of(raw)
    whole: dict[str, Any] = {}
    path: list[Any] = [whole]  # what is open, from the top
    for level, _, value in filter(None, reading):
        del path[level:]
        if isinstance(value, dict):
            path[-1].update(value)
        else:
            path[-1] += value
        path.append(list(value.values())[-1] if isinstance(value, dict) else value[-1])
    return whole, reading.members


def _passes(reading: Callable[[bytes], object], raw: bytes) -> bool:
    try:
        reading(raw)
    except InvalidJSON:
        return False
    return True


#: Whether a text is valid as a whole, and whether it is taken in parts.
is_valid = partial(_passes, parse_object)
is_taken = partial(_passes, found)


def test_what_is_long_comes_in_parts_of_its_own():
    raw = b'{"model":"m","input":["%b",{"a":[%b],"b":1}],"user":"%b","n":2}' % (LONG, ROW, LONG)
    first, *rest = (part for part in found(raw) if part.place != ("input", "a"))
    assert first == (1, (), {"model": "m"})
    assert rest == [
        (1, (), {"input": []}),
        (2, ("input",), ["x" * KEPT]),
        (2, ("input",), [{}]),
        (3, ("input",), {"a": []}),
        (3, ("input",), {"b": 1}),
        (1, (), {"user": "x" * KEPT}),
        (1, (), {"n": 2}),
    ]
    rows = [part.value for part in found(raw) if part.place == ("input", "a")]
    assert [number for row in rows for number in row] == list(range(RUN))
    assert all(len(str(row)) < 2 * RUN for row in rows)


# --- valid if and only if the whole is ----------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
LONG_TEXT = st.builds(lambda text, times: text * times, TEXT, st.integers(0, 300))
ROWS = st.lists(st.integers(-(2**70), 2**70) | st.floats(-1e9, 1e9), min_size=5, max_size=60)
LEAVES = st.none() | st.booleans() | st.floats(-1e9, 1e9) | LONG_TEXT | ROWS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4)
)
STYLES: Any = st.sampled_from(
    [{}, {"separators": (",", ":")}, {"ensure_ascii": False}, {"indent": 80}]
)
SIZES = st.tuples(st.sampled_from([8, 30, 200, RUN]), st.sampled_from([12, 80, BLOCK]))
HURTS = [bytes([byte]) for byte in b'"\\{}[]:, \n\x001eE+-.tu\x80\xc3\xed\xff'] + [
    *(b"\\ud800", b"\\udc00", b"NaN", b"1e400", b"\xed\xa0\x80", b"\xf0\x9f\x98\x80"),
    *(b'\\"', b",,", b"[]", b"{}", b'"":'),
]


@st.composite
def writings(draw: st.DrawFn) -> bytes:
    """An object with what is long in it, in one of the ways to write it."""
    value = draw(st.dictionaries(TEXT, VALUES, min_size=1, max_size=4))
    return json.dumps(value, **draw(STYLES)).encode()


def alike(whole: object, told: object) -> bool:
    """Whether a value is what is told of it."""
    if isinstance(whole, str) and isinstance(told, str):
        cut = len(told) < len(whole)
        return whole.startswith(told) and (not cut or len(told) >= KEPT // 12 - 1)
    if isinstance(whole, dict) and isinstance(told, dict):
        return list(whole) == list(told) and all(alike(whole[k], told[k]) for k in whole)
    if isinstance(whole, list) and isinstance(told, list):
        return len(whole) == len(told) and all(map(alike, whole, told))
    return whole == told and type(whole) is type(told)


@given(writings(), SIZES)
def test_the_parts_are_those_of_the_whole(raw, sizes):
    with patch.multiple(parts, RUN=sizes[0], BLOCK=sizes[1]):
        body, places = read(raw)
    assert alike(parse_object(raw), body)
    assert places == members(raw)


@given(writings(), SIZES, st.data())
def test_whatever_is_broken_is_broken_in_parts(raw, sizes, data):
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        hurt = data.draw(st.sampled_from(HURTS) | st.just(b""))
        raw = raw[:at] + hurt + raw[at + data.draw(st.integers(0, 2)) :]
    with patch.multiple(parts, RUN=sizes[0], BLOCK=sizes[1]):
        assert is_taken(raw) == is_valid(raw)


STRINGS = [
    *(b"\x1f", b"\x00", b"\n", b"\\x", b"\\u12g4", b"\\ud800", b"\\udc00", b"\\ud83d\\u0041"),
    *(b"\\ud83d\\n", b"\xff", b"\xc3", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\\"),
    *(b"\\n", b"\\u00e9", b"\\ud83d\\ude00", b"\xc3\xa9", b"\xf0\x9f\x98\x80", b"\x7f", b'\\"'),
]


@pytest.mark.parametrize("inside", STRINGS)
@pytest.mark.parametrize("begin", [0, KEPT, BLOCK])
def test_the_inside_of_a_string_is_judged_wherever_it_is_cut(inside, begin):
    for before in range(max(0, begin - len(inside) - 2), begin + 2):
        raw = b'{"a":"%b%b%b"}' % (b"x" * before, inside, LONG)
        try:
            [part] = found(raw)
        except InvalidJSON:
            assert not is_valid(raw)
        else:
            assert isinstance(part.value, dict)
            assert orjson.loads(raw)["a"].startswith(part.value["a"])


@pytest.mark.parametrize(
    "between",
    [
        *(b"1,,2", b"01", b"1 2", b"1.", b".5", b"+1", b"-", b"1e", b"1e400", b"9" * 400, b""),
        *(b",", b"1.5", b"-0", b"1e-400", b"2E+5", b"18446744073709551616", b" 7\t\r\n", b"0.0"),
        *(b"1." + b"0" * 2 * RUN, b"[]", b"]", b"}", b":", b'"":1'),
    ],
)
def test_values_in_a_row_are_judged_wherever_it_is_cut(between):
    for before in range(RUN - len(between) - 3, RUN + 3):
        raw = b'{"a":[%b%b,%b]}' % (b"1," * (before // 2), between, ROW)
        assert is_taken(raw) == is_valid(raw)


@pytest.mark.parametrize(
    "text", ['{"a":%s,"b":1}', '{"a":1},%s,{"b":2}', '%s,{"a":1}', '{"a":{"b":true,%s,"c":1}}']
)
def test_numbers_in_a_row_pass_in_an_array_only(text):
    raw = (text % ROW.decode()).encode()
    assert not is_valid(raw)
    with pytest.raises(InvalidJSON):
        found(raw)


def test_space_between_tokens_tells_nothing():
    space = b" \t\r\n" * BLOCK
    raw = space + b'{"a"%b:%b1%b,"b":[%b],"c":2%b}' % (space, space, space, space, space) + space
    body, places = read(raw)
    assert body == {"a": 1, "b": [], "c": 2}
    assert places == members(raw)


@pytest.mark.parametrize("levels", [MAX_DEPTH - 2, MAX_DEPTH - 1, MAX_DEPTH, MAX_DEPTH + 1])
@pytest.mark.parametrize("inside", [b"", b"1", b"{}", b"[]", ROW])
@pytest.mark.parametrize("unit", [b"[", b'{"":'])
def test_values_may_be_nested_as_deep_as_those_of_short_texts(levels, inside, unit):
    inner = inside if unit == b"[" else inside or b"0"
    if unit != b"[" and inside == ROW:
        inner = b"[%b]" % ROW
    raw = b'{"a":%b%b%b}' % (unit * levels, inner, (b"]" if unit == b"[" else b"}") * levels)
    assert is_taken(raw) == is_valid(raw)


# --- its bounds -----------------------------------------------------------------------------------


def test_a_name_may_be_long_but_not_for_ever():
    assert list(read(b'{"%b":1,"b":"%b"}' % (LONG, LONG))[0]) == [LONG.decode(), "b"]
    with pytest.raises(InvalidJSON, match=f"a name in it is longer than {MAX_TOKEN} bytes"):
        found(b'{"%b":1}' % (b"a" * 2 * MAX_TOKEN))


#: What may be repeated, and how many values each is.
UNITS = [
    *((b"[],", 2), (b"{},", 2), (b'"",', 1), (b'{"a":1},', 2), (b"null,", 1)),
    *((b'"a,b",', 1), (b'"\\"",', 1), (b'"[",[0,0],', 4), (b'"%b",' % LONG, 0)),
    (b"[%b]," % ROW, LONG_VALUE),
]


@pytest.mark.parametrize(("unit", "values"), UNITS)
def test_a_text_may_have_so_many_values(unit, values):
    times = 50
    text = b'{"a":[%b"%b"]}' % (unit * times, LONG)
    least = LONG_VALUE + values * times
    found(text, least)
    if values:
        with pytest.raises(InvalidJSON, match="too complex: it has too many values"):
            found(text, least - times)


def test_numbers_in_a_row_are_not_counted():
    assert found(b'{"a":[[%b],[%b]]}' % (ROW, ROW), 3 * LONG_VALUE)


@pytest.mark.parametrize(
    "unit", [b"[],", b'{"":0},', b'"a",', b'{"":' * 9 + b"1" + b"}" * 9 + b","]
)
def test_reading_takes_little_memory_whatever_it_is(unit):
    raw = b'{"a":[%b0]}' % (unit * (1024 * 1024 // len(unit)))
    found(b'{"a":[]}')
    tracemalloc.start()
    try:
        for _ in of(raw):
            pass
        assert tracemalloc.get_traced_memory()[1] < 100 * RUN
    finally:
        tracemalloc.stop()


FEW = MAX_SHORT // BYTES_PER_VALUE


@pytest.mark.parametrize(
    ("text", "short"),
    [
        (b"," * (ALWAYS_SHORT - 1), True),
        (b"," * ALWAYS_SHORT, False),
        ((b",[{" + b" " * (3 * BYTES_PER_VALUE - 3)) * 1000, True),
        ((b",[{" + b" " * (3 * BYTES_PER_VALUE - 4)) * 1000, False),
        (b'{"a":"' + b',[{\\"' * FEW + b'"}', True),
        (b'{"a":"",' + b",[{" * 2 * FEW + b"}", False),
        (b'"",' * (FEW + 1) + b'"' + b"," * ALWAYS_SHORT + b'"', False),
        (b" " * MAX_SHORT, True),
        (b" " * (MAX_SHORT + 1), False),
    ],
    ids=[
        *("small", "commas", "few values", "more values"),
        *("a text of code", "the same without quotes", "many texts", "long", "longer"),
    ],
)
def test_a_text_is_short_by_its_size_and_its_values(text, short):
    assert is_short(text) == short
