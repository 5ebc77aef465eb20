"""The outline of a large JSON text: valid when the whole is, and small whatever the whole is."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from outlines import outlined

from llmproxy.jsonbytes import InvalidJSON, Member, members, parse_object
from llmproxy.outline import (
    ALWAYS_SHORT,
    FEW_VALUES,
    KEPT,
    MAX_OUTLINE,
    MAX_SHORT,
    MAX_VALUES,
    is_short,
)

LONG = b"x" * 2 * KEPT
#: More numbers than stay as they are.
ROW = b",".join(b"%d" % number for number in range(100))


def read(raw: bytes, cuts: list[int] | None = None) -> tuple[dict[str, Any], list[Member]]:
    """What is read of a text by way of its outline. Raises InvalidJSON."""
    outline = outlined(raw, cuts or [])
    return parse_object(outline.text), outline.whole(members(outline.text))


def is_valid(raw: bytes) -> bool:
    try:
        parse_object(raw)
    except InvalidJSON:
        return False
    return True


def test_of_a_large_text_stays_its_outline():
    raw = b'{"input":[%b],"user":"%b","model":"m"}' % (ROW, LONG)
    assert outlined(raw).text == b'{"input":[0,1,99],"user":"%b","model":"m"}' % LONG[:KEPT]


def test_what_is_short_stays_as_it_is_written():
    raw = b' {"a" :\t[1,2.50,-3e5,true,null],"\\u0062":"\xc3\xa9\\n\\ud83d\\ude00","c":{}}\r\n'
    for cut in range(len(raw)):
        assert outlined(raw, [cut]).text == raw


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
CUTS = st.lists(st.integers(0, 10**6), max_size=5)
HURTS = [bytes([byte]) for byte in b'"\\{}[]:, \n\x001eE+-.tu\x80\xc3\xed\xff'] + [
    *(
        b"\\ud800",
        b"\\udc00",
        b"NaN",
        b"1e400",
        b"\xed\xa0\x80",
        b"\xf0\x9f\x98\x80",
        b'\\"',
        b",,",
    ),
]


@st.composite
def writings(draw: st.DrawFn) -> bytes:
    """An object with what is cut in it, in one of the ways to write it."""
    value = draw(st.dictionaries(TEXT, VALUES, min_size=1, max_size=4))
    return json.dumps(value, **draw(STYLES)).encode()


def within(cuts: list[int], raw: bytes) -> list[int]:
    return [cut % (len(raw) + 1) for cut in cuts]


def alike(whole: object, outline: object) -> bool:
    """Whether an outline is one of the whole, as far as anybody may rely on it."""
    if isinstance(whole, str) and isinstance(outline, str):
        cut = len(outline) < len(whole)
        return whole.startswith(outline) and (not cut or len(outline) >= KEPT // 12 - 1)
    if isinstance(whole, dict) and isinstance(outline, dict):
        return list(whole) == list(outline) and all(alike(whole[k], outline[k]) for k in whole)
    if isinstance(whole, list) and isinstance(outline, list):
        if len(whole) == len(outline):
            return all(map(alike, whole, outline))
        return alike(whole[0], outline[0]) and 3 <= len(outline) < len(whole)
    return whole == outline


@given(writings(), CUTS)
def test_an_outline_is_read_as_the_whole_is(raw, cuts):
    body, found = read(raw, within(cuts, raw))
    assert alike(parse_object(raw), body)
    assert found == members(raw)


@given(writings(), CUTS, st.data())
def test_whatever_is_broken_is_broken_in_the_outline(raw, cuts, data):
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        hurt = data.draw(st.sampled_from(HURTS) | st.just(b""))
        raw = raw[:at] + hurt + raw[at + data.draw(st.integers(0, 2)) :]
    try:
        read(raw, within(cuts, raw))
    except InvalidJSON as error:
        told = str(error)
    else:
        told = "valid"
    assert is_valid(raw) == (told == "valid") or "longer than" in told


STRINGS = [
    *(b"\x1f", b"\x00", b"\n", b"\\x", b"\\u12g4", b"\\ud800", b"\\udc00", b"\\ud83d\\u0041"),
    *(b"\\ud83d\\n", b"\xff", b"\xc3", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\\"),
    *(b"\\n", b"\\u00e9", b"\\ud83d\\ude00", b"\xc3\xa9", b"\xf0\x9f\x98\x80", b"\x7f", b'\\"'),
]


@pytest.mark.parametrize("inside", STRINGS)
@pytest.mark.parametrize("before", [0, KEPT - 5, KEPT - 1, KEPT, 3 * KEPT])
def test_the_inside_of_a_string_is_judged_wherever_it_is_cut(inside, before):
    raw = b'{"a":"%b%b%b"}' % (b"x" * before, inside, LONG)
    middle = raw.index(inside)
    for cut in range(middle - 2, middle + len(inside) + 2):
        try:
            read(raw, [cut])
        except InvalidJSON:
            assert not is_valid(raw)
        else:
            assert is_valid(raw)


@pytest.mark.parametrize(
    "between",
    [
        *(
            b"1,,2",
            b"01",
            b"1 2",
            b"1.",
            b".5",
            b"+1",
            b"-",
            b"1e",
            b"1e400",
            b"9" * 400,
            b"",
            b",",
        ),
        *(b"1.5", b"-0", b"1e-400", b"2E+5", b"18446744073709551616", b" 7\t\r\n", b"0.0"),
    ],
)
def test_numbers_in_a_row_are_judged_wherever_it_is_cut(between):
    raw = b'{"a":[%b,%b,%b]}' % (ROW, between, ROW)
    middle = raw.index(b",99,") + 4
    for cut in range(middle - 2, middle + len(between) + 2):
        try:
            read(raw, [cut])
        except InvalidJSON:
            assert not is_valid(raw)
        else:
            assert is_valid(raw)


@pytest.mark.parametrize(
    "text", ['{"a":%s,"b":1}', '{"a":1},%s,{"b":2}', '%s,{"a":1}', '{"a":{"b":true,%s,"c":1}}']
)
def test_numbers_in_a_row_pass_in_an_array_only(text):
    raw = (text % ROW.decode()).encode()
    assert not is_valid(raw)
    with pytest.raises(InvalidJSON):
        read(raw)


def test_space_between_tokens_is_left_out():
    space = b" \t\r\n" * 5000
    raw = space + b'{"a":%b1%b,"b":[%b],"c":2%b}' % (space, space, space, space) + space
    body, found = read(raw, [20_100, 50_000])
    assert body == {"a": 1, "b": [], "c": 2}
    assert found == members(raw)
    assert len(outlined(raw).text) < 100


# --- its bounds -----------------------------------------------------------------------------------


def test_a_name_that_is_cut_is_refused():
    # Two that begin alike would seem to be one, or one that stands twice to be two.
    raw = b'{"%b":1}' % (b"a" * 2 * KEPT)
    for cut in (0, 5, KEPT + 100, len(raw) - 3):
        with pytest.raises(InvalidJSON, match="a name in it is longer than 256 bytes"):
            read(raw[:-3] + b"  :1}", [cut])
    assert read(b'{"%b":1}' % (b"a" * KEPT))[0] == {"a" * KEPT: 1}


@pytest.mark.parametrize("unit", [b"[]", b"{}", b'""', b'{"a":1}', b"null", b'"a","b"'])
def test_too_many_values_are_refused(unit):
    text = b'{"a":[' + b",".join([unit] * MAX_VALUES) + b"]}"
    with pytest.raises(InvalidJSON, match="too complex"):
        outlined(text)


@pytest.mark.parametrize("unit", [b"[", b'{"a":', b'"' + LONG + b'",', b'{"a":1.5},'])
def test_an_outline_never_becomes_too_large(unit):
    text = b'{"a":[' + unit * (10 * MAX_OUTLINE // len(unit))
    with pytest.raises(InvalidJSON, match="too complex"):
        outlined(text, list(range(65536, len(text), 65536)))


@pytest.mark.parametrize("unit", [b"[],", b"[" * 1022 + b"]" * 1022 + b",", b"{},", b'"",', b"1,"])
def test_what_is_not_large_is_never_too_complex(unit):
    text = b'{"a":[' + unit * ((65536 - 9) // len(unit)) + b"0]}"
    assert list(read(text)[0]) == ["a"]


def test_commas_in_strings_are_no_values():
    raw = orjson.dumps({"a": ["," * 200] * 20_000})
    assert len(read(raw)[0]["a"]) == 20_000


@pytest.mark.parametrize(
    ("text", "short"),
    [
        (b"," * (ALWAYS_SHORT - 1), True),
        (b"," * ALWAYS_SHORT, False),
        (b",[{ ]}" * (FEW_VALUES // 3) + b" " * ALWAYS_SHORT, True),
        (b",[{ ]}" * (FEW_VALUES // 3 + 1) + b" " * ALWAYS_SHORT, False),
        (b'{"a":"' + b',[{\\"' * FEW_VALUES + b'"}', True),
        (b'{"a":"",' + b",[{" * 2 * FEW_VALUES + b"}", False),
        (b'"",' * (FEW_VALUES + 1) + b'"' + b"," * ALWAYS_SHORT + b'"', False),
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
