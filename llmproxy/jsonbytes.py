"""JSON objects as bytes: find and replace top-level members, leave every other byte alone.

A body is read for its few fields that matter here and passed on as it was written: numbers keep
their digits, members their order, unknown fields survive.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from operator import attrgetter
from typing import Any, NamedTuple

import orjson

#: From so many bytes on, parts of a text are no longer copied.
LARGE = 64 * 1024
#: Most members that an object may have whose members are looked for.
MAX_MEMBERS = 1000


class InvalidJSON(ValueError):
    """These bytes are not a JSON object (RFC 8259). The text shows nothing of them."""


class Member(NamedTuple):
    """A member of an object. The value's text is `raw[value_start:value_end]`."""

    key: str  # decoded
    key_start: int
    value_start: int
    value_end: int


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse a whole JSON object, strictly.

    Raises InvalidJSON for everything else: not UTF-8, a byte order mark, NaN, a number out of
    range, lone surrogates, trailing bytes, too deep (over 1024), another type, no bytes at all.
    """
    try:
        value = orjson.loads(raw)
    except ValueError as error:
        raise InvalidJSON(f"not valid JSON: {reason(error)}") from None
    if not isinstance(value, dict):
        raise InvalidJSON("not a JSON object")
    return value


def reason(error: ValueError, start: int = 0) -> str:
    """Why orjson could not read a text, whose first byte is that of `start`."""
    # Only orjson's own words: `str(error)` of other ValueErrors could quote the document.
    if isinstance(error, orjson.JSONDecodeError):
        return f"{error.msg} (byte {start + error.pos})"
    return "it can't be read"


#: A pattern for a string in a valid text.
# First as quickly as `re` goes: a quote behind a single backslash is not the end, and one behind
# another character is. The second half is for any string: with a quote behind more backslashes.
STRING = (
    rb'"(?:[^"]*+(?:"(?<=[^\\]\\")[^"]*+)*+"(?<!\\")'
    rb'|[^"\\]*+(?:\\.[^"\\]*+)*+")'
)
#: A pattern for the space between tokens.
SPACE = rb"[ \t\r\n]*+"
_OTHER = rb'[^"{}\[\]]*+'


def _balanced(depth: int) -> bytes:
    """A pattern for what can stand between brackets, with up to `depth` levels of its own."""
    deeper = rb"|[{\[]" + _balanced(depth - 1) + rb"[}\]]" if depth else b""
    return _OTHER + rb"(?:(?:" + STRING + deeper + rb")" + _OTHER + rb")*+"


#: A pattern for what stands between brackets in a valid text. Real requests have no more than eight
#: levels, and are read without a step in Python for each bracket.
BALANCED = _balanced(8)

_NEXT_BRACKETS = re.compile(
    _OTHER + rb"(?:" + STRING + _OTHER + rb")*+(?:([{\[]++)|([}\]]++))", re.DOTALL
)
_NUMBERS = frozenset([int, float])
# One member after the other: key, value, the last one's brace. Deeper ones are no members here, but
# a last match without a key.
_MEMBER = re.compile(
    rb"(?:\A" + SPACE + rb"\{" + SPACE + rb")?+(" + STRING + rb")" + SPACE + rb":" + SPACE
    + rb"(" + STRING + rb"|[^\"{}\[\],: \t\r\n]++|[{\[]" + BALANCED + rb"[}\]])"
    + SPACE + rb"(?:," + SPACE + rb"|(\})" + SPACE + rb"\Z)|.++",
    re.DOTALL,
)  # fmt: skip
# A colon, and a value without escapes, and without anything in brackets within it.
_SIMPLE = re.compile(
    SPACE + rb":" + SPACE
    + rb'("[^"\\]*+"|[^\"{}\[\],: \t\r\n]++|\{[^"{}\[\]]*+(?:"[^"\\]*+"[^"{}\[\]]*+)*+\})'
)  # fmt: skip
_ESCAPED_LETTER = re.compile(rb"\\u00[4-7]")
_OPEN = re.compile(rb"[ \t\r\n]*\{[ \t\r\n]*")
_KEY = re.compile(rb"(" + STRING + rb")[ \t\r\n]*:[ \t\r\n]*", re.DOTALL)
_SCALAR = re.compile(STRING + rb"|[^\"{}\[\],: \t\r\n]++", re.DOTALL)
_NEXT = re.compile(rb"[ \t\r\n]*(?:,[ \t\r\n]*|(\}))")


def members(raw: bytes) -> list[Member]:
    """The top-level members of a JSON object, in order, duplicates too.

    `raw` must be valid JSON (see `parse_object`): this only finds places. Raises InvalidJSON
    where it can't follow, and for too many of them. Linear in time.
    """
    found: list[Member] = []
    for match in _MEMBER.finditer(raw):
        if match[1] is None:
            break
        _append(found, match[1], match.start(1), match.start(2), match.end(2))
        if match[3]:
            return found
    return _members_at_any_depth(raw)


def members_of(raw: bytes, keys: Iterable[str]) -> list[Member]:
    """The top-level members of these keys, in order; all members where they can't be told at once.

    Each of `keys`, of letters and underscores, must be there, and once.
    """
    found = None if _has_escaped_letters(raw) else [_alone(raw, key) for key in keys]
    if found is None or None in found:
        return members(raw)
    return sorted(filter(None, found), key=attrgetter("key_start"))


def _has_escaped_letters(raw: bytes) -> bool:
    return b"\\u00" in raw and _ESCAPED_LETTER.search(raw) is not None


def _alone(raw: bytes, key: str) -> Member | None:
    """The member whose key is the only string of its kind; None if there are others, at any depth
    or as a value, or if its own value is not a simple one."""
    quoted = b'"%b"' % key.encode()
    start = raw.find(quoted)
    value = None if start != raw.rfind(quoted) else _SIMPLE.match(raw, start + len(quoted))
    return None if value is None else Member(key, start, value.start(1), value.end(1))


def _members_at_any_depth(raw: bytes) -> list[Member]:
    found: list[Member] = []
    position = _match(_OPEN, raw, 0).end()
    if raw[position : position + 1] == b"}":
        return found
    while True:
        key = _match(_KEY, raw, position)
        value_end = _end_of_value(raw, key.end())
        _append(found, key[1], position, key.end(), value_end)
        following = _match(_NEXT, raw, value_end)
        if following[1]:
            return found
        position = following.end()


def _append(found: list[Member], key: bytes, start: int, value_start: int, end: int) -> None:
    found.append(Member(decode_name(key), start, value_start, end))
    refuse_too_many(found)


def refuse_too_many(found: Sized) -> None:
    """Raises InvalidJSON for more than MAX_MEMBERS of them."""
    if len(found) > MAX_MEMBERS:
        raise InvalidJSON(f"too complex: it has more than {MAX_MEMBERS} fields")


def _match(pattern: re.Pattern[bytes], raw: bytes, position: int) -> re.Match[bytes]:
    match = pattern.match(raw, position)
    if match is None:
        raise InvalidJSON(f"not a JSON object (byte {position})")
    return match


def _end_of_value(raw: bytes, position: int) -> int:
    if raw[position : position + 1] not in (b"{", b"["):
        return _match(_SCALAR, raw, position).end()
    depth = 0
    while True:
        brackets = _match(_NEXT_BRACKETS, raw, position)
        position = brackets.end()
        if brackets[1]:
            depth += len(brackets[1])
            continue
        depth -= len(brackets[2])
        if depth <= 0:
            return position + depth


def decode_name(string: bytes) -> str:
    """The name that a string's text means. Raises InvalidJSON."""
    try:
        key = orjson.loads(string)
    except ValueError:
        raise InvalidJSON("not a JSON object: a name can't be read") from None
    return str(key)


def are_numbers(values: list[Any]) -> bool:
    """Whether a list has nothing but numbers."""
    return _NUMBERS.issuperset(map(type, values))


def duplicate(found: Sequence[Member]) -> str | None:
    """A key that stands twice, however it is spelled, or None."""
    seen = set()
    for member in found:
        if member.key in seen:
            return member.key
        seen.add(member.key)
    return None


def has_duplicates(raw: bytes, value: Mapping[str, object]) -> bool:
    """Whether `raw`, which was read as `value`, has a key twice, however it is spelled."""
    if _is_surely_whole(raw, value):
        return False
    found = _MEMBER.findall(raw)
    count = len(found) if found[-1][2] else len(_members_at_any_depth(raw))
    return count != len(value)


def _is_surely_whole(raw: bytes, value: Mapping[str, object]) -> bool:
    """Whether `value` surely has each member of `raw`, at any depth; this takes much less time than
    a look at the members.

    Of a key that stands twice `value` has the last, and a colon less. All other colons are in
    strings, as themselves, unless one is escaped.
    """
    try:
        text = orjson.dumps(value)
    except TypeError:  # deeper than orjson writes
        return False
    return text == raw or (b"\\u003" not in raw and _colons(raw) == _colons(text))


def _colons(text: bytes) -> int:
    return len(text) - len(text.replace(b":", b""))  # a third of the time of `count`


def append(raw: bytes, more: Mapping[str, bytes | None]) -> bytes:
    """`raw` with more members at its end; it must have one, and none of these."""
    added = [b"," + orjson.dumps(key) + b":" + value for key, value in more.items() if value]
    if not added:
        return raw
    end = raw.rindex(b"}")
    text = _sliceable(raw)
    return b"".join([text[:end], *added, text[end:]])


def replace(
    raw: bytes,
    changes: Mapping[str, bytes | None],
    found: Sequence[Member] | None = None,
) -> bytes:
    """`raw` with other values (JSON texts) for some of its top-level members.

    None removes a member and its comma; a key that is not there is appended. `found`: what
    `members(raw)` gave, if known; or those of them that are changed, if none is removed. Without an
    effect the result is `raw` itself.
    """
    if found is None:
        found = members(raw)
    text = _sliceable(raw)
    present = {member.key: text[member.value_start : member.value_end] for member in found}
    changes = {key: value for key, value in changes.items() if value != present.get(key)}
    if not changes:
        return raw
    out: list[bytes | memoryview] = []
    before: Member | None = None  # the member before this one, kept or not
    for member in found:
        value = changes.get(member.key, text[member.value_start : member.value_end])
        if value is not None:
            comma = text[before.value_end : member.key_start] if out and before else b""
            out += [comma, text[member.key_start : member.value_start], value]
        before = member
    for key, value in changes.items():
        if value is not None and key not in present:
            out += [b"," if out else b"", orjson.dumps(key), b":", value]
    head = found[0].key_start if found else _match(_OPEN, raw, 0).end()
    tail = found[-1].value_end if found else head
    return b"".join([text[:head], *out, text[tail:]])


def _sliceable(raw: bytes) -> bytes | memoryview:
    """Large ones are sliced without a copy."""
    return memoryview(raw) if len(raw) > LARGE else raw
