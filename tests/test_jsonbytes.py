"""Splicing JSON objects as bytes."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmproxy.jsonbytes import (
    InvalidJSON,
    _members_at_any_depth,
    append,
    duplicate,
    has_duplicates,
    members,
    members_of,
    parse_object,
    replace,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
LEAVES = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(-1e9, 1e9) | TEXT
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=6)
STYLES = st.sampled_from(
    [
        {},
        {"separators": (",", ":")},
        {"indent": 2},
        {"ensure_ascii": False},
        {"separators": (" ,\n", " :\t")},
    ]
)


@given(OBJECTS, STYLES)
def test_members_are_found_in_any_writing(value, style):
    raw = json.dumps(value, **style).encode()
    found = members(raw)
    read = {m.key: orjson.loads(raw[m.value_start : m.value_end]) for m in found}
    assert read == orjson.loads(raw)
    assert [m.key for m in found] == list(value)


@given(OBJECTS, STYLES, TEXT, VALUES)
def test_replacing_changes_one_member_only(value, style, key, new):
    raw = json.dumps(value, **style).encode()
    spliced = replace(raw, {key: orjson.dumps(new)})
    expected = orjson.loads(raw) | {key: orjson.loads(orjson.dumps(new))}
    assert orjson.loads(spliced) == expected
    assert list(orjson.loads(spliced)) == list(expected)


@given(OBJECTS, STYLES, st.dictionaries(TEXT, VALUES, max_size=3))
def test_appended_is_what_is_not_there(value, style, more):
    value["also"] = None
    raw = json.dumps(value, **style).encode() + b" \n"
    texts: dict[str, bytes | None] = {
        key: orjson.dumps(each) for key, each in more.items() if key not in value
    }
    longer = append(raw, texts)
    assert list(parse_object(longer).items()) == list(parse_object(replace(raw, texts)).items())
    assert longer.startswith(raw.rstrip()[:-1])


@st.composite
def writings(draw: st.DrawFn) -> bytes:
    """An object in which keys may stand twice, at any level, and with escapes."""
    style: Any = draw(STYLES)
    key = TEXT | st.sampled_from(["a", "b", '"', "\\"])
    texts = [
        (json.dumps(draw(key)) if draw(st.booleans()) else '"\\u0061"')
        + draw(st.sampled_from([":", " : ", "\n:\t"]))
        + json.dumps(draw(VALUES | st.text('a"\\\\{}[],:')), **style)
        for _ in range(draw(st.integers(0, 5)))
    ]
    return ("{" + draw(st.sampled_from([",", " , "])).join(texts) + "}").encode()


@given(writings(), st.integers(0, 12))
def test_duplicates_are_seen_in_any_writing(raw, depth):
    raw = b'{"deep":' + b"[" * depth + raw + b"]" * depth + b"," + raw[1:]
    try:
        value = parse_object(raw)
    except InvalidJSON:
        return  # a comma too many, as the object was empty
    assert has_duplicates(raw, value) == (duplicate(members(raw)) is not None)
    assert list(dict.fromkeys(member.key for member in members(raw))) == list(value)
    assert members(raw) == _members_at_any_depth(raw)


@pytest.mark.parametrize("escape", ["\\u003a", "\\u003A"])
def test_a_colon_that_is_escaped_does_not_hide_a_duplicate(escape):
    raw = b'{"a":1,"a":"%b"}' % escape.encode()
    assert raw.count(b":") == orjson.dumps(parse_object(raw)).count(b":")
    assert has_duplicates(raw, parse_object(raw))
    assert not has_duplicates(raw.replace(b'"a"', b'"b"', 1), parse_object(raw) | {"b": 1})


@pytest.mark.parametrize("twice", [False, True])
def test_duplicates_are_seen_beside_what_is_deeper_than_orjson_writes(twice):
    raw = b'{"a":1,"%b":' % (b"a" if twice else b"b") + b"[" * 1000 + b"]" * 1000 + b"}"
    with pytest.raises(TypeError):
        orjson.dumps(parse_object(raw))
    assert has_duplicates(raw, parse_object(raw)) == twice


LOOK_ALIKES = st.sampled_from(
    [
        *("1", "2", "true", "[]", "{}", '"a"', '"b"', '"x\\"a"', '"\\\\"', '{"a":1}'),
        *('{"b":"}"}', '{"b":"{"}', '{"c":{}}', '{"c":[1]}', '["a"]', '{"c":"\\""}', '"a:1,"'),
    ]
)


@st.composite
def look_alikes(draw: st.DrawFn) -> bytes:
    """An object whose keys stand once, beside what looks like them."""
    a = draw(st.sampled_from(['"a"', '"a"', '"\\u0061"']))
    keys = draw(st.permutations([a, '"b"', '"\\u00e9"', '"x\\"a"', '"d"']))
    space = draw(st.sampled_from(["", " ", "\n\t"]))
    texts = [f"{key}{space}:{space}{draw(st.just('1') | LOOK_ALIKES)}{space}" for key in keys]
    return ("{" + ",".join(texts) + "}").encode()


@example(b'{"\\u0061":1,"x\\"a":2}', ["a"], 1)
@example(b'{"d":1,"a":2}', ["a", "d"], 2)
@given(look_alikes(), st.permutations(["a", "b", "d"]), st.integers(0, 3))
def test_members_are_found_by_their_keys_beside_what_looks_like_them(raw, keys, count):
    found = members_of(raw, keys[:count])
    assert {member.key for member in found} >= set(keys[:count])
    assert found == [member for member in members(raw) if member in found]
    changes: dict[str, bytes | None] = dict.fromkeys(keys[:count], b"0")
    assert replace(raw, changes, found) == replace(raw, changes)


def test_a_member_is_found_without_a_look_at_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = b'{"x":"\\u00e9 \\"a\\"","a" : {"n": "o"},"b":[{"a2":1}]}'
    (expected,) = [member for member in members(raw) if member.key == "a"]
    monkeypatch.setattr("llmproxy.jsonbytes.members", None)
    assert members_of(raw, ["a"]) == [expected]


@given(OBJECTS, STYLES, st.lists(TEXT))
def test_removing_leaves_valid_json_without_the_members(value, style, keys):
    keys += list(value)[::2]
    raw = json.dumps(value, **style).encode()
    expected = {key: v for key, v in orjson.loads(raw).items() if key not in keys}
    assert orjson.loads(replace(raw, dict.fromkeys(keys))) == expected


@pytest.mark.parametrize(
    ("raw", "changes", "expected"),
    [
        (b'{"a":1.0,"b":1e5,"c":0.10}', {"b": b"2"}, b'{"a":1.0,"b":2,"c":0.10}'),
        (b' { "a" : 1 , "b" : 2 } ', {"a": b"7"}, b' { "a" : 7 , "b" : 2 } '),
        (b'{"a":1,"u":null}', {"u": None}, b'{"a":1}'),
        (b'{"u":null,"a":1}', {"u": None}, b'{"a":1}'),
        (b'{"a":1,"u":null,"b":2}', {"u": None}, b'{"a":1,"b":2}'),
        (b'{"a":1, "u":null, "b":2}', {"u": None}, b'{"a":1, "b":2}'),
        (b'{"u":null}', {"u": None}, b"{}"),
        (b'{"u":1,"u":2,"a":3}', {"u": None}, b'{"a":3}'),
        (b"{}", {"a": b"1", "b": b"2"}, b'{"a":1,"b":2}'),
        (b" { } ", {"a": b"1"}, b' { "a":1} '),
        (b'{"a":1}', {"b": b"[]"}, b'{"a":1,"b":[]}'),
        (b'{"a":1}', {"a": None, "b": b"2"}, b'{"b":2}'),
        (b'{"a":"\\"}","b":{"c":"]"}}', {"b": b"0"}, b'{"a":"\\"}","b":0}'),
        (b'{"\\u0061":1}', {"a": b"2"}, b'{"\\u0061":2}'),
        (b'{"x":{"a":1},"a":2}', {"a": b"3"}, b'{"x":{"a":1},"a":3}'),
    ],
)
def test_a_splice_keeps_every_other_byte(raw, changes, expected):
    assert replace(raw, changes) == expected


@pytest.mark.parametrize("changes", [{}, {"a": b"1"}, {"c": None}])
def test_a_splice_without_effect_gives_the_same_object(changes):
    raw = b'{"a":1,"b":2}'
    assert replace(raw, changes) is raw


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        (b'{"a":1,"b":2}', None),
        (b'{"a":1,"a":2}', "a"),
        (b'{"model":1,"\\u006dodel":2}', "model"),
        (b'{"a":{"b":1},"b":2}', None),
    ],
)
def test_a_duplicate_key_is_seen_however_it_is_spelled(raw, key):
    assert duplicate(members(raw)) == key


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b'"a"',
        b"null",
        b"{",
        b"{} {}",
        b"{}x",
        b"\xef\xbb\xbf{}",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e400}',
        b'{"a":' + b"1" * 4301 + b"}",
        b'{"a":"\\ud800"}',
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',
        "{}".encode("utf-16"),
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":' * 2000 + b"1" + b"}" * 2000,
    ],
)
def test_what_is_not_a_json_object_is_refused(raw):
    with pytest.raises(InvalidJSON):
        parse_object(raw)


def test_the_refusal_of_invalid_json_does_not_quote_it():
    with pytest.raises(InvalidJSON) as caught:
        parse_object(b'{"prompt":"secret" x}')
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_flood_of_brackets_is_refused_quickly():
    began = time.process_time()
    with pytest.raises(InvalidJSON):
        parse_object(b"[" * (16 << 20))
    assert time.process_time() - began < 0.1


@given(st.binary(max_size=40) | st.text('{}[]":,\\ a1', max_size=40).map(str.encode))
def test_whatever_parses_as_an_object_has_members_and_nothing_else_raises(raw):
    try:
        keys = {member.key for member in members(raw)}
    except InvalidJSON:
        keys = None
    with contextlib.suppress(InvalidJSON):
        assert parse_object(raw).keys() == keys


@pytest.mark.parametrize("depth", [1, 7, 8, 9, 10, 17, 100, 900])
def test_any_depth_is_skipped(depth):
    deep = b'{"x":[' * (depth // 2) + b'"]}"' + b"]}" * (depth // 2)
    raw = b'{"deep":' + deep + b',"a":1}'
    assert replace(raw, {"a": None}) == b'{"deep":' + deep + b"}"


@pytest.mark.parametrize(
    "value",
    [
        b'"' + b"x" * 4_000_000 + b'"',
        b'"' + b'\\"' * 1_000_000 + b'"',
        b"[" + b"[]," * 300_000 + b"[]]",
        b"[" + b"1," * 1_000_000 + b"1]",
        b"[" * 900 + b'"a",' * 100_000 + b"1" + b"]" * 900,
    ],
    ids=["string", "escapes", "lists", "numbers", "deep"],
)
def test_large_values_are_skipped_in_linear_time(value):
    raw = b'{"v":' + value + b',"a":1}'
    began = time.process_time()
    assert [m.key for m in members(raw)] == ["v", "a"]
    assert time.process_time() - began < 0.5
