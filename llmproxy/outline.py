"""A large JSON text as its outline, made as the text arrives: the same without what is long.

    {"input": [1, 2, 3, 4, 5, 6], "user": "a string of 1 MiB"}
    {"input": [1, 2, 6], "user": "its first 256 bytes"}

To read a body of 32 MiB in one go would hold up all other requests, and its values can take fifty
times its bytes. So only the outline is read: strings are cut, and of many numbers in a row stay
the first two and the last. All brackets, names and other values stay as they are written. What is
left out is checked here, what stays is checked by who reads the outline. So the outline is a valid
JSON text (RFC 8259) if and only if the whole is one.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable

import orjson

from llmproxy.jsonbytes import InvalidJSON, Member

#: A string is cut to so many bytes, or a few less. No name may be longer.
KEPT = 256
#: The longest outline, in bytes, and the most values in it, counted as commas and opening brackets:
#: reading it takes 20 ms. A text of 64 KiB never has more.
MAX_OUTLINE = 4 * 1024 * 1024
MAX_VALUES = 50_000
#: Up to the first of these sizes a text is short whatever it says, and up to the second if it has
#: no more values than this, counted as those of an outline: shorter ones may have as many. It is
#: read in 0.5 ms, most of them; an outline takes 9 us for each KiB.
ALWAYS_SHORT, MAX_SHORT = 64 * 1024, 256 * 1024
FEW_VALUES = 16 * 1024
#: The values are counted each time that the outline has grown by so many bytes.
COUNT_EACH = 512 * 1024

# Four kinds of text: strings; what rows of numbers are made of, with the space between all tokens;
# everything else; and of the first two only what is so short that it stays as it is.
_ROW = rb"[-+.0-9eE, \t\r\n]"
_SHORT = re.compile(
    rb'(?:[^"+\-.0-9eE, \t\r\n]++'
    rb'|"(?:[^"\\]{0,128}+(?:\\.[^"\\]{0,24}+){0,4}+|[^"\\]{0,64}+(?:\\.[^"\\]{0,8}+){0,16}+)"'
    rb"|" + _ROW + rb"{1,64}+(?!" + _ROW + rb"))*+",
    re.DOTALL,
)  # fmt: skip
_LONG_ROW = re.compile(_ROW + rb"++")
_SPACES = re.compile(rb"[ \t\r\n]{64,}+")
_SPACE = re.compile(rb"[ \t\r\n]*+")
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
_HALF_CHARACTER = re.compile(rb"[\xc2-\xf4][\x80-\xbf]{0,2}\Z")
_HALF_ESCAPE = re.compile(rb"\\(?:u[0-9a-fA-F]{0,4}(?:\\(?:u[0-9a-fA-F]{0,3})?+)?+)?+\Z")


def is_short(text: bytes) -> bool:
    """Whether reading a text as a whole takes little time and memory, and needs no outline."""
    if len(text) < ALWAYS_SHORT:
        return True
    return len(text) <= MAX_SHORT and not _has_more_values(text, FEW_VALUES)


class Outline:
    """The outline of a whole text: `text`, and where its places were."""

    __slots__ = ("_places", "_places_before", "text")

    def __init__(self, text: bytes, places: array[int], places_before: array[int]) -> None:
        self.text = text
        self._places = places
        self._places_before = places_before

    def whole(self, members: Iterable[Member]) -> list[Member]:
        """Members of the outline as those of the whole text."""
        place = self._place
        return [
            Member(key, place(start), place(value_start), place(value_end))
            for key, start, value_start, value_end in members
        ]

    def _place(self, position: int) -> int:
        index = bisect_right(self._places, position) - 1
        return self._places_before[index] + position - self._places[index]


class Outliner:
    """Makes the outline of a text that is fed in blocks, best of 64 KiB and more.

    Raises InvalidJSON as soon as it is clear that the text is not valid, or its outline too large.
    It keeps the outline, and nothing else of the text.
    """

    def __init__(self) -> None:
        self._text = bytearray()
        self._before = 0  # bytes of the text that were looked at
        self._rest = b""  # the half of a character or of an escape
        self._in_string = False
        self._room = 0  # bytes of this string that may still be kept
        self._is_cut = False  # the last string is not there as a whole
        self._next_count = COUNT_EACH
        self._places = array("Q", [0])
        self._places_before = array("Q", [0])

    def feed(self, data: bytes) -> None:
        """Take the next block of the text. Raises InvalidJSON."""
        block = self._rest + data
        half = _HALF_CHARACTER.search(block[-3:])
        whole = block[: len(block) - len(half[0])] if half else block
        try:
            whole.decode()
        except UnicodeDecodeError:
            raise InvalidJSON("not valid JSON: it is not UTF-8") from None
        taken = self._take(whole)
        self._before += taken
        self._rest = block[taken:]
        if len(self._text) > self._next_count:
            self._next_count += COUNT_EACH
            self._refuse_too_much()

    def finish(self) -> Outline:
        """The outline of what was fed, which has still to be read. Raises InvalidJSON."""
        if self._in_string or self._rest:
            raise InvalidJSON("not valid JSON: it ends too early")
        self._refuse_too_much()
        return Outline(bytes(self._text), self._places, self._places_before)

    def _refuse_too_much(self) -> None:
        if len(self._text) > MAX_OUTLINE or _has_more_values(bytes(self._text), MAX_VALUES):
            raise InvalidJSON("too complex: it has too many values")

    def _take(self, block: bytes) -> int:
        """Look at a block; how much of it could be understood without the next one."""
        position, end = 0, len(block)
        while position < end:
            if self._in_string:
                position = self._string(block, position)
                if self._in_string:  # and it goes on in the next block
                    break
                continue
            if self._is_cut:
                self._refuse_name(block, position)
            short = _end(_SHORT, block, position)
            self._text += block[position:short]
            position = short
            if block.startswith(b'"', position):
                self._text += b'"'
                self._in_string, self._room, self._is_cut = True, KEPT, False
                position += 1
            elif position < end:
                position = self._row(block, position)
        return position

    def _string(self, block: bytes, position: int) -> int:
        """Take the inside of a string, as far as the block has it; where that ends."""
        end = _end(_INSIDE, block, position)
        kept = position + self._room
        if end > kept:
            kept = _WHOLE.match(block, position, kept).end()  # type: ignore[union-attr]
            self._is_cut = True
        else:
            kept = end
        self._text += block[position:kept]
        self._room = 0 if self._is_cut else self._room - (kept - position)
        if block.startswith(b'"', end):
            if self._is_cut:
                self._mark(end)
            self._text += b'"'
            self._in_string = False
            return end + 1
        if end < len(block) and not _HALF_ESCAPE.match(block, end):
            raise InvalidJSON("not valid JSON: a string in it can't be read")
        return end

    def _refuse_name(self, block: bytes, position: int) -> None:
        """What was cut must not be a name: two might seem to be the same."""
        following = _end(_SPACE, block, position)
        if block.startswith(b":", following):
            raise InvalidJSON(f"not taken: a name in it is longer than {KEPT} bytes")
        self._is_cut = following == len(block)

    def _row(self, block: bytes, position: int) -> int:
        """Take numbers, commas and spaces between two other things; where we are then."""
        row = block[position : _end(_LONG_ROW, block, position)]
        last = row.rfind(b",")
        second = row.find(b",", row.find(b",") + 1)
        if not 0 <= second < last:
            self._without_spaces(row, position)
            return position + len(row)
        # Two stay: a second value without a name can't pass where the row is none of an array.
        if not _is_row(row[second + 1 : last]):
            raise InvalidJSON("not valid JSON: a row of numbers in it can't be read")
        self._text += row[: second + 1]
        self._mark(position + last + 1)
        return position + last + 1

    def _without_spaces(self, row: bytes, position: int) -> None:
        start = 0
        for spaces in _SPACES.finditer(row):
            self._text += row[start : spaces.start()] + b" "
            start = spaces.end()
            self._mark(position + start)
        self._text += row[start:]

    def _mark(self, position: int) -> None:
        """Something was left out: the outline goes on with this place of the block."""
        self._places.append(len(self._text))
        self._places_before.append(self._before + position)


def _end(pattern: re.Pattern[bytes], block: bytes, position: int) -> int:
    match = pattern.match(block, position)
    return match.end() if match else position


def _is_row(text: bytes) -> bool:
    """Whether these are numbers with commas between them, and at least one."""
    try:
        return bool(orjson.loads(b"[" + text + b"]"))
    except ValueError:
        return False


def _has_more_values(text: bytes, most: int) -> bool:
    if _marks(text) <= most:
        return False
    # Many marks may be in strings, and of those there are no more than two for each value.
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 4 * (most + 1):
        return True
    return _marks(b"".join(plain.split(b'"')[::2])) > most


def _marks(text: bytes) -> int:
    return len(text) - len(text.translate(None, b",[{"))
