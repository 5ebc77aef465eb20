"""A large JSON object, part by part: all of it is read, and little of it is there at a time.

    {"model": "m", "input": ["a string of 1 MiB", {"text": ...}, ...]}

    level 1: {"model": "m"}               members that stand together, 4 KiB of them at most
    level 1: {"input": []}                what is longer begins, and its items follow
    level 2: ["how the string begins"]
    level 2: [{}]
    level 3: {"text": ...}

To read a body of 32 MiB in one go would hold up all other requests, and its values can take fifty
times its bytes. A part is read in some 50 us.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Callable, Generator, Iterator
from enum import Enum
from typing import Any, Generic, NamedTuple, TypeVar

import orjson

from llmproxy.jsonbytes import (
    BALANCED,
    SPACE,
    STRING,
    InvalidJSON,
    Member,
    are_numbers,
    decode_name,
    members,
    reason,
    refuse_too_many,
)

#: What is read in one go, in bytes: values that stand together, and a piece of a long string.
RUN, BLOCK = 4 * 1024, 64 * 1024
#: How much of a long string is told, in bytes of JSON, or a few less.
KEPT = 256
#: The longest number, or name of a value, that is not read together with others, in bytes of JSON.
MAX_TOKEN = 64 * 1024
#: How deep values may be nested, as orjson has it, and how deep a run is at most.
MAX_DEPTH, RUN_DEPTH = 1024, 12
#: What a value counts that has parts of its own: it takes as long as so many others.
LONG_VALUE = 11
#: A text is short if it has fewer bytes than this, or than that and few values: one for so many
#: bytes, counted as commas and opening brackets. It is read in a millisecond, and a fifth of the
#: time that its parts take, and what is read takes less than ten times its bytes.
ALWAYS_SHORT, MAX_SHORT, BYTES_PER_VALUE = 8 * 1024, 256 * 1024, 24

_COMMA = SPACE + rb"," + SPACE
_VALUE = (
    rb"(?:" + STRING + rb'|[^"{}\[\],: \t\r\n]++(?=[\]},: \t\r\n])|[{\[]' + BALANCED + rb"[}\]])"
)
_MEMBER = STRING + SPACE + rb":" + SPACE + _VALUE
_VALUES = re.compile(_VALUE + rb"(?:" + _COMMA + _VALUE + rb")*+", re.DOTALL)
_MEMBERS = re.compile(_MEMBER + rb"(?:" + _COMMA + _MEMBER + rb")*+", re.DOTALL)
_NAME = re.compile(STRING, re.DOTALL)
_SPACES = re.compile(SPACE)
# The inside of a string (RFC 8259 section 7), without half of a surrogate pair.
_ESCAPE = (
    rb'\\(?:["\\/bfnrt]|u(?:[0-9a-ce-fA-CE-F][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}'
    rb"|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))"
)
_PLAIN = rb'[^"\\\x00-\x1f]*+'
_INSIDE = re.compile(_PLAIN + rb"(?:" + _ESCAPE + _PLAIN + rb")*+")
# Whole characters and escapes, for where a string is cut.
_WHOLE = re.compile(
    rb"(?:[\x00-\x5b\x5d-\x7f]++|" + _ESCAPE
    + rb"|[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3})*+"
)  # fmt: skip
_SCALAR = re.compile(rb'[^"{}\[\],: \t\r\n]++')
_CLOSING = {b"[": b"]", b"{": b"}"}
_Utf8 = getincrementaldecoder("utf-8")

_Place = TypeVar("_Place")
_Result = TypeVar("_Result")
#: Some work, done in steps. What comes of a step may be nothing, but some time has passed.
Steps = Generator["Part[_Place] | None", None, _Result]


def is_short(text: bytes) -> bool:
    """Whether reading a text as a whole takes little time and memory."""
    size = len(text)
    if size < ALWAYS_SHORT:
        return True
    return size <= MAX_SHORT and not _has_more_values(text, size // BYTES_PER_VALUE)


class Part(NamedTuple, Generic[_Place]):
    """Some items of an array, or some members of an object.

    `level`: in how many arrays and objects they stand; 1 for members of the whole. `place`: where.
    An item that has parts of its own is empty here, and of a long string there is its beginning.
    """

    level: int
    place: _Place
    value: list[Any] | dict[str, Any]


class _Open(NamedTuple, Generic[_Place]):
    """What is being read. `member`: where it begins, if it is a member of the whole."""

    place: _Place
    closing: bytes
    member: Member | None


class _Next(Enum):
    """What may come next."""

    FIRST = "a value, or the end of what holds none"
    VALUE = "a value"
    REST = "a comma, or the end"


class Parts(Generic[_Place]):
    """The parts of a text, in order, and now and then None: nothing is new, but time has passed.

    The text must be a JSON object (RFC 8259), valid as it is for `parse_object`; else there is
    InvalidJSON, instead of the last part at the latest.

    `top`: the place of the whole. `within`: the place of what has this name in that place; items of
    an array are where it is. `most`: so many values it may have, besides numbers in a row.
    `members`: all those of the whole once all is read, with two of one name, too.
    """

    def __init__(
        self,
        text: bytes,
        top: _Place,
        within: Callable[[_Place, str], _Place],
        most: int | None = None,
    ) -> None:
        self.members: list[Member] = []
        self._text = text
        self._at = 0
        self._opened = [_Open(top, b"}", None)]
        self._within = within
        self._left = most

    def __iter__(self) -> Iterator[Part[_Place] | None]:
        yield from self._spaces()
        if not self._is_at(b"{"):
            raise InvalidJSON("not a JSON object")
        self._at += 1
        following = _Next.FIRST
        while self._opened:
            yield from self._spaces()
            if following is not _Next.VALUE and self._is_at(self._opened[-1].closing):
                self._close()
                following = _Next.REST
            elif following is not _Next.REST:
                is_whole = yield from self._take()
                following = _Next.REST if is_whole else _Next.FIRST
            elif self._is_at(b","):
                self._at += 1
                following = _Next.VALUE
            else:
                raise self._unexpected()
        yield from self._spaces()
        if self._at < len(self._text):
            raise self._unexpected()

    def _take(self) -> Steps[_Place, bool]:
        """Take what comes; False if it was only begun."""
        opened, start, level = self._opened[-1], self._at, len(self._opened)
        is_object = opened.closing == b"}"
        end = _end(_MEMBERS if is_object else _VALUES, self._text, start, RUN)
        if end == start:
            name = (yield from self._name()) if is_object else None
            return (yield from self._take_long(opened, name, start))
        self._at = end
        run = (b"{%b}" if is_object else b"[%b]") % self._text[start:end]
        value = _read(run, start - 1)
        self._count_values(run, value)
        if level > MAX_DEPTH - RUN_DEPTH:
            _read(b"[" * (level - 1) + run + b"]" * (level - 1), start - level)
        if level == 1:
            for name, *places in members(run):
                self._found(Member(name, *(place + start - 1 for place in places)))
        yield Part(level, opened.place, value)
        return True

    def _take_long(
        self, opened: _Open[_Place], name: str | None, start: int
    ) -> Steps[_Place, bool]:
        """Take a value that is long, or deep, or has a long name."""
        yield from self._spaces()
        level, value_start = len(self._opened), self._at
        bracket = self._text[value_start : value_start + 1]
        value: object
        if bracket in _CLOSING:
            value = {} if bracket == b"{" else []
            self._open(opened.place, name, Member(name or "", start, value_start, 0))
        else:
            value = (yield from self._string()) if bracket == b'"' else self._scalar()
            if level == 1:
                self._found(Member(name or "", start, value_start, self._at))
        yield Part(level, opened.place, [value] if name is None else {name: value})
        return bracket not in _CLOSING

    def _open(self, place: _Place, name: str | None, member: Member) -> None:
        level = len(self._opened)
        if level == MAX_DEPTH:
            raise InvalidJSON(f"not valid JSON: nested too deep (byte {self._at})")
        self._spend(LONG_VALUE)
        if name is not None:
            place = self._within(place, name)
        closing = _CLOSING[self._text[self._at : self._at + 1]]
        self._opened.append(_Open(place, closing, member if level == 1 else None))
        self._at += 1

    def _close(self) -> None:
        self._at += 1
        member = self._opened.pop().member
        if member is not None:
            self._found(member._replace(value_end=self._at))

    def _found(self, member: Member) -> None:
        self.members.append(member)
        refuse_too_many(self.members)

    def _name(self) -> Steps[_Place, str]:
        """Take a name and its colon."""
        start, end = self._at, _end(_NAME, self._text, self._at, MAX_TOKEN)
        if end == start:
            if self._is_at(b'"') and len(self._text) - start > MAX_TOKEN:
                raise InvalidJSON(f"not taken: a name in it is longer than {MAX_TOKEN} bytes")
            raise self._unexpected()
        self._at = end
        name = decode_name(self._text[start:end])
        yield from self._spaces()
        if not self._is_at(b":"):
            raise self._unexpected()
        self._at += 1
        return name

    def _scalar(self) -> object:
        start, end = self._at, _end(_SCALAR, self._text, self._at, MAX_TOKEN)
        if end == start:
            raise self._unexpected()
        self._at = end
        (value,) = _read(b"[%b]" % self._text[start:end], start - 1)
        return value

    def _string(self) -> Steps[_Place, str]:
        """Take a long string; how it begins."""
        text, start, utf8 = self._text, self._at + 1, _Utf8()
        end = start
        try:
            while (after := _end(_INSIDE, text, end, BLOCK)) > end:
                utf8.decode(text[end:after])
                end = after
                yield None
            utf8.decode(b"", final=True)
        except UnicodeDecodeError:
            raise InvalidJSON("not valid JSON: it is not UTF-8") from None
        if not text.startswith(b'"', end):
            raise InvalidJSON(f"not valid JSON: a string in it can't be read (byte {end})")
        self._at = end + 1
        kept = text[start : _end(_WHOLE, text, start, min(KEPT, end - start))]
        return str(orjson.loads(b'"%b"' % kept))

    def _spaces(self) -> Steps[_Place, None]:
        while (end := _end(_SPACES, self._text, self._at, BLOCK)) == self._at + BLOCK:
            self._at = end
            yield None
        self._at = end

    def _is_at(self, byte: bytes) -> bool:
        return self._text.startswith(byte, self._at)

    def _unexpected(self) -> InvalidJSON:
        what = "unexpected character" if self._at < len(self._text) else "unexpected end of data"
        return InvalidJSON(f"not valid JSON: {what} (byte {self._at})")

    def _count_values(self, run: bytes, value: list[Any] | dict[str, Any]) -> None:
        if self._left is not None and not (type(value) is list and are_numbers(value)):
            self._spend(_marks(_unquoted(run)))

    def _spend(self, values: int) -> None:
        if self._left is not None:
            self._left -= values
            if self._left < 0:
                raise InvalidJSON("too complex: it has too many values")


def _read(text: bytes, start: int) -> Any:
    try:
        return orjson.loads(text)
    except ValueError as error:
        raise InvalidJSON(f"not valid JSON: {reason(error, start)}") from None


def _end(pattern: re.Pattern[bytes], text: bytes, start: int, most: int) -> int:
    match = pattern.match(text, start, start + most)
    return match.end() if match else start


def _has_more_values(text: bytes, most: int) -> bool:
    if _marks(text) <= most:
        return False
    # Many marks may be in strings, and of those there are no more than two for each value.
    if text.count(b'"') - text.count(b'\\"') > 4 * (most + 1):
        return True
    return _marks(_unquoted(text)) > most


def _unquoted(text: bytes) -> bytes:
    """A text without its strings."""
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(plain.split(b'"')[::2])


def _marks(text: bytes) -> int:
    return len(text) - len(text.translate(None, b",[{"))
