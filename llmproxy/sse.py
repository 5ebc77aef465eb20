"""Incremental decoder of an event stream (WHATWG HTML, section 9.2 "Server-sent events").

    bytes in any split -> Decoder.feed -> whole events, each with its raw bytes

The raw bytes of all events, and of what `end` gives, are together exactly the bytes that came in.
"""

from __future__ import annotations

import re
from typing import NamedTuple

#: A longer event is passed on in pieces and not looked into. The longest real ones are the last
#: events of the responses dialect, which repeat the whole request and answer.
MAX_EVENT = 4 * 1024 * 1024
#: So is one of more lines (CRLF counts twice): to look at each of a million takes 200 ms.
MAX_LINES = 64 * 1024

_BOM = b"\xef\xbb\xbf"
# A line's end with an empty line after it. Atomic, so that CRLF is never read as two line ends.
_END_OF_EVENT = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")


class Event(NamedTuple):
    """An event. `data` is empty for one that a client ignores (comments, a piece of a long one).

    `raw`: its bytes, with the empty line that ends it. `name`: the last `event` field, or empty.
    `at`: where `data` stands in `raw`; -1 if it is spread over several lines.
    """

    raw: bytes
    name: bytes
    data: bytes
    at: int

    def with_data(self, data: bytes) -> bytes:
        """The raw bytes of this event with other data, everything else as it is."""
        if self.at >= 0:
            return self.raw[: self.at] + data + self.raw[self.at + len(self.data) :]
        return _replace_lines(self.raw, data)


class Decoder:
    """Cuts a stream into events. Linear in time for any split of the input.

    An event that ends in CR at the end of what came is kept until the next byte shows whether
    this CR is the first half of a CRLF; so the events don't depend on how the stream was cut.
    `oversized`: how many events were longer than `max_event` bytes, or had too many lines; they
    come as pieces without data. `idle`: all that came was whole events, one at least; what comes
    now begins one.
    """

    def __init__(self, max_event: int = MAX_EVENT) -> None:
        self.oversized = 0
        self.idle = False
        self._max = max_event
        self._buffer = bytearray()
        self._scan = 0  # no event ends before this offset of the buffer
        self._cr = False  # a CR was seen: line ends can be of all three kinds
        self._fresh = True  # a byte order mark may still come
        self._skipping = False  # inside an event that is too long

    def cut(self, data: bytes) -> list[bytes]:
        """The raw bytes of the events that `feed` gives, if it takes only empty lines to find them.

        So it is with most reads of a stream: the decoder is `idle`, all lines end in LF, and with
        `data` an event ends. Otherwise empty, and `data` is still to be fed.
        """
        if not (self.idle and data.endswith(b"\n\n")) or len(data) > self._max:
            return []
        if data.find(b"\r") >= 0:
            return []
        if data.find(b"\n\n") == len(data) - 2:
            return [data]
        *raws, rest = data.split(b"\n\n")
        return [] if rest else [raw + b"\n\n" for raw in raws]

    def feed(self, data: bytes) -> list[Event]:
        """The events that are whole with these bytes."""
        if not self._cr and b"\r" in data:
            self._cr = True
        source: bytes | bytearray = data
        if self._buffer:
            self._buffer += data
            source = self._buffer
        events = []
        start, scan = 0, self._scan
        while (end := self._end_of_event(source, scan)) > 0:
            events.append(self.event(bytes(source[start:end])))
            start = scan = end
        if start == len(source):
            self._buffer.clear()
            self._scan = 0
            self.idle = not self._fresh
        else:
            self.idle = False
            self._keep(source, start, events)
        return events

    def end(self) -> Event | None:
        """What is left at the end of the stream: an event without its empty line, as a rule."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        self._scan = 0
        return self.event(rest) if rest else None

    def _end_of_event(self, source: bytes | bytearray, scan: int) -> int:
        """Where the event ends that has no end before `scan`, or -1; sets where to go on."""
        if not self._cr:
            found = source.find(b"\n\n", scan)
            if found >= 0:
                return found + 2
        elif match := _END_OF_EVENT.search(source, scan):
            end = match.end()
            if end < len(source) or source[-1] == 0x0A:
                return end
            self._scan = match.start()
            return -1
        self._scan = max(scan, len(source) - 1)
        return -1

    def _keep(self, source: bytes | bytearray, start: int, events: list[Event]) -> None:
        """Carry the incomplete event over to the next feed; pass on the most of one too long."""
        self._scan -= start
        if source is self._buffer:
            del self._buffer[:start]
        else:
            self._buffer = bytearray(source[start:])
        if self._skipping or len(self._buffer) > self._max:
            self.oversized += not self._skipping
            self._skipping = True
            if piece := bytes(self._buffer[: self._scan]):
                events.append(Event(piece, b"", b"", -1))
                del self._buffer[: self._scan]
                self._scan = 0

    def event(self, raw: bytes) -> Event:
        """The event of these bytes, which `cut` gave."""
        fresh, self._fresh = self._fresh, False
        if self._skipping or len(raw) > self._max:
            self.oversized += not self._skipping
            self._skipping = False
            return Event(raw, b"", b"", -1)
        if not self._cr and raw.startswith(b"data: ") and raw.find(b"\n") == len(raw) - 2:
            return Event(raw, b"", raw[6:-2], 6)
        if len(raw) > MAX_LINES and raw.count(b"\n") + raw.count(b"\r") > MAX_LINES:
            self.oversized += 1
            return Event(raw, b"", b"", -1)
        return _parse(raw, len(_BOM) if fresh and raw.startswith(_BOM) else 0)


def _parse(raw: bytes, at: int) -> Event:
    """Interpret the lines of one event; `at`: where they begin."""
    name, parts, where = b"", [], -1
    for line in raw[at:].splitlines(keepends=True):
        field, colon, value = line.rstrip(b"\r\n").partition(b":")
        offset = at + len(field) + len(colon)
        if value[:1] == b" ":
            value, offset = value[1:], offset + 1
        if field == b"data":
            parts.append(value)
            where = offset
        elif field == b"event":
            name = value
        at += len(line)
    if len(parts) == 1:
        return Event(raw, name, parts[0], where)
    return Event(raw, name, b"\n".join(parts), -1)


def _replace_lines(raw: bytes, data: bytes) -> bytes:
    """Put `data` where the first data line of an event is, and drop its other data lines."""
    out, placed = [], False
    for line in raw.splitlines(keepends=True):
        text = line.rstrip(b"\r\n")
        if text.partition(b":")[0].removeprefix(_BOM) != b"data":
            out.append(line)
        elif not placed:
            placed = True
            end = line[len(text) :] or b"\n"
            out += [b"data: " + part + end for part in data.split(b"\n")]
    return b"".join(out)
