"""The meter: what an answer costs, and how far it may be shown before the bill is committed.

    backend's bytes -> StreamMeter.feed -> the client's bytes      (all but the end)
                       StreamMeter.finish -> the held-back end     (once the bill is committed)

Pure, and never raises: an answer that can't be read is passed on and not billed exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from llmproxy.audio import read_audio
from llmproxy.endpoints import Shape
from llmproxy.jsonbytes import InvalidJSON, parse_object, replace
from llmproxy.model import MAX_COUNT, Counts, Kind, Reading
from llmproxy.sse import MAX_EVENT, Decoder, Event
from llmproxy.usage import (
    MESSAGE_INPUT,
    Absurd,
    Report,
    message_fields,
    raw_fragment,
    raw_text,
    read_usage,
    total,
)

# Python 3.11 takes longer to get a member of an enumeration than to do anything with it.
_CHAT, _AUDIO, _FREE, _RESPONSES = Shape.CHAT, Shape.AUDIO, Shape.FREE, Shape.RESPONSES
_PROMPT, _COMPLETION = Kind.PROMPT, Kind.COMPLETION

# Quotes inside a JSON string are escaped, so none of these patterns can match in an answer's text.
_CONTENT = re.compile(rb'"content"\s*+:\s*+"(?!")')
_OTHER_CONTENT = re.compile(
    rb'"(?:text|reasoning_content|reasoning|refusal|arguments)"\s*+:\s*+"(?!")'
    rb'|"(?:tool_calls|function_call)"\s*+:\s*+(?:\[\s*+)?\{'
)
# What a string's text has none of: then no pattern here can begin or end in it, nor can a line.
# They are numbers, as Python 3.11 raises and catches an error to look for bytes in bytes.
_QUOTE, _CR, _LF = b'"\r\n'
# With its quotes such a text could be taken for a name that `_Chat.see` looks for.
_NAMES = frozenset([b"usage", b"error"])
# An event around a text of it: all before the text; all from its closing quote on; the length of
# both; and what the client gets of the latter. A plain tuple, which is unpacked for each event: one
# with names takes three times as long.
_Mould = tuple[bytes, bytes, int, bytes]
_FINISHED = re.compile(rb'"finish_reason"\s*+:\s*+"')
_NULL_AT_END = b',"usage":null}'
# In valid JSON what stands before the very last brace belongs to the outermost object.
_FLAT = rb'(?:[^{}"]++|"[^"\\]*+")*+'
_USAGE_AT_END = re.compile(
    rb'"usage":\{' + _FLAT + rb"(?:\{" + _FLAT + rb"\}" + _FLAT + rb")*+\}(?=\}\Z)"
)


def read_answer(shape: Shape, body: bytes) -> Reading:
    """The reading of a whole JSON answer; not `answered` when it is no JSON object."""
    if shape is _AUDIO:
        return read_audio(body)
    try:
        answer = parse_object(body)
    except InvalidJSON:
        return Reading(raw=raw_fragment(body), exact=shape is _FREE)
    if shape is _FREE:
        return Reading(exact=True, answered=True)
    report = read_usage(shape, answer)
    exact = report.raw is None and bool(report.counts)
    return Reading(report.counts, exact, report.raw, answered=True)


class StreamMeter:
    """Reads the usage out of one event stream, and decides what the client may see of it.

    `show_usage`: the client asked for the usage chunk. `continuous`: the backend was asked for
    running counts in every chunk; `show_continuous`: by the client itself. `several`: the request
    may have several answers (n, prompt lists), whose running counts are not those of the whole.

    `ended`: the dialect's last event was seen; from there on everything is held back. `failed`:
    an error event was seen. `content_events`: how many events with content so far. `oversized`:
    how many events were too long to be looked into.

    When the answer breaks off before it `ended`, what `finish` gives is an incomplete event: read
    the meter after it, and don't send it.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        show_usage: bool = False,
        continuous: bool = False,
        show_continuous: bool = False,
        several: bool = False,
        max_event: int = MAX_EVENT,
    ) -> None:
        self._decoder = Decoder(max_event)
        self._dialect: _Dialect
        if shape is _CHAT:
            self._dialect = _Chat(show_usage, continuous, show_continuous, several)
        else:
            self._dialect = _DIALECTS.get(shape, _Dialect)()
        self._held: list[bytes] = []
        self._room = self._max = max_event
        self._may_glance = False  # what comes begins an event, and not one after the last
        # Read after each chunk: as properties they would take as long as the rest.
        self.ended = False
        self.failed = False
        self.content_events = 0
        self.oversized = 0

    def reading(self) -> Reading:
        """What is known now."""
        return self._dialect.reading()

    def counts(self) -> Counts:
        """The counts of `reading` alone, which are asked for each second."""
        return self._dialect.counts()

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the stream; what may be passed to the client now.

        It is `data` itself if that is one event and stays as it is.
        """
        if self._may_glance and len(data) <= self._max:
            shown = self._dialect.glance(data)
            if shown is not None:
                self.content_events = self._dialect.content_events
                return shown
        return self._fed(data)

    def _fed(self, data: bytes) -> bytes:
        decoder, dialect = self._decoder, self._dialect
        passed: list[bytes] = []
        raws = decoder.cut(data)
        for raw in raws:
            self._take(dialect.glance(raw) or dialect.see(decoder.event(raw)), passed)
        if not raws:
            for event in decoder.feed(data):
                self._take(dialect.see(event), passed)
        self._tell()
        return b"".join(passed)

    def _take(self, shown: bytes, passed: list[bytes]) -> None:
        if self._dialect.ended:
            self._hold(shown)
        else:
            passed.append(shown)

    def _tell(self) -> None:
        self.ended = self._dialect.ended
        self._may_glance = self._decoder.idle and not self.ended
        self.failed = self._dialect.failed
        self.content_events = self._dialect.content_events
        self.oversized = self._decoder.oversized

    def finish(self) -> bytes:
        """At the end of the body: all that was held back."""
        rest = self._decoder.end()
        if rest is not None:
            readable = _parse(rest.data) is not None or rest.data.startswith(b"[DONE]")
            self._hold(self._dialect.see(rest) if readable else rest.raw)
            self._tell()
        held = b"".join(self._held)
        self._held.clear()
        return held

    def _hold(self, piece: bytes) -> None:
        # A backend that goes on without end after the end of its answer must not fill our memory.
        if len(piece) <= self._room:
            self._room -= len(piece)
            self._held.append(piece)


def _parse(data: bytes) -> dict[str, Any] | None:
    try:
        return parse_object(data)
    except InvalidJSON:
        return None


class _Dialect:
    """What is common to the dialects; by itself it passes everything and knows nothing."""

    def __init__(self) -> None:
        self.ended = False
        self.failed = False
        self.content_events = 0
        self._answered = False
        self._counts: Counts = {}  # never changed, but replaced
        self._exact = False
        self._raw: str | None = None

    def glance(self, raw: bytes) -> bytes | None:
        """What `see` does, at a fraction of its cost, if `raw` is one whole event of the usual
        kind: with content, and nothing else of interest. For any other nothing is done: None.
        """
        return None

    def see(self, event: Event) -> bytes:
        """Take an event; the bytes that the client gets for it."""
        self._answered = True
        return event.raw

    def reading(self) -> Reading:
        return Reading(self.counts(), self._exact, self._raw, self._answered)

    def counts(self) -> Counts:
        counts = self._counts
        if self._exact or not self._answered or self.content_events < counts.get(_COMPLETION, 0):
            return counts
        return {**counts, _COMPLETION: self.content_events}

    def _absurd(self, raw: str | None) -> None:
        if raw is not None:
            self._raw, self._exact = raw, False

    def _valid(self, counts: Counts, exact: bool) -> None:
        self._counts, self._exact, self._raw = counts, exact, None


class _Chat(_Dialect):
    """Chat and legacy completions: usage in chunks, `[DONE]` at the end.

    A report in a chunk without choices is the whole answer's and replaces what was known. One in
    a chunk with choices is a running count: it belongs to that choice (so vLLM and SGLang give
    it) and never goes down.
    """

    def __init__(
        self, show_usage: bool, continuous: bool, show_continuous: bool, several: bool
    ) -> None:
        super().__init__()
        self._show_usage = show_usage
        self._continuous = continuous
        self._hide_running = continuous and not show_continuous
        self._several = several
        self._finished = False
        self._running: dict[object, int] = {}  # completion tokens by the index of the choice
        self._mould: _Mould | None = None  # of the last event with content and without usage

    def glance(self, raw: bytes) -> bytes | None:
        """An event like the last one, but for its text."""
        mould = self._mould
        if mould is None:
            return None
        head, tail, length, shown = mould
        text = raw.removeprefix(head).removesuffix(tail)
        if len(raw) - len(text) != length or not text:
            return None
        if _QUOTE in text or _LF in text or _CR in text or text in _NAMES:
            return None
        self.content_events += 1
        return raw if shown is tail else head + text + shown

    def see(self, event: Event) -> bytes:
        data = event.data
        if not data:
            # llama.cpp's older servers put an error into a field of that name.
            self.failed |= event.raw.startswith(b"error:")
            return event.raw
        if data.startswith(b"[DONE]"):
            self.ended = True
            return event.raw
        if b'"error"' in data and self._is_error(event):
            return event.raw
        self._answered = True
        at = data.find(b'"usage"')
        if at < 0:
            return self._see_usual(event, event.raw)
        if at == len(data) + 1 - len(_NULL_AT_END) and data.endswith(_NULL_AT_END):
            return self._see_usual(event, event.raw if self._show_usage else _without_null(event))
        return self._see_usage(event)

    def _see_usual(self, event: Event, shown: bytes) -> bytes:
        content = self._count(event.data)
        if content is not None and event.at == len(b"data: "):
            self._mould = _mould(event, shown, event.at + content.end())
        return shown

    def _is_error(self, event: Event) -> bool:
        chunk = _parse(event.data)
        error = event.name == b"error" or (chunk is not None and chunk.get("error") is not None)
        self.failed |= error
        return error

    def _count(self, data: bytes) -> re.Match[bytes] | None:
        """Take what matters of a chunk besides its usage; where its content is."""
        content = _CONTENT.search(data) or _OTHER_CONTENT.search(data)
        if content is not None:
            self.content_events += 1
            if self._running:
                self._exact = False  # more came than the last running count knows of
        if not self._finished and _FINISHED.search(data):
            self._finished = True
        return content

    def _see_usage(self, event: Event) -> bytes:
        data = event.data
        self._count(data)
        chunk = _parse(data)
        if chunk is None:
            self._absurd(raw_fragment(data))
            return event.raw
        if chunk.get("usage") is None:
            drop = "usage" in chunk and not self._show_usage
            return _spliced(event, None) if drop else event.raw
        report = read_usage(_CHAT, chunk)
        if choices := chunk.get("choices"):
            self._take_running(report, choices)
            if self._hide_running:
                return _spliced(event, b"null" if self._show_usage else None)
            return event.raw
        self._take_final(report)
        return event.raw if self._show_usage else b""

    def _take_final(self, report: Report) -> None:
        if report.raw is not None:
            self._absurd(report.raw)
        else:
            self._running.clear()
            self._valid(report.counts, exact=True)

    def _take_running(self, report: Report, choices: object) -> None:
        if report.raw is not None:
            self._absurd(report.raw)
            return
        self._mould = None  # the next event without a count makes this one inexact
        counts, running = self._counts, self._running
        index = _index(choices)
        running[index] = max(running.get(index, 0), report.counts[_COMPLETION])
        completion = running[index] if len(running) == 1 else min(sum(running.values()), MAX_COUNT)
        higher = {
            _PROMPT: max(report.counts[_PROMPT], counts.get(_PROMPT, 0)),
            _COMPLETION: max(completion, counts.get(_COMPLETION, 0)),
        }
        whole = len(running) == 1 and not self._several
        self._valid(higher, exact=whole and (self._continuous or self._finished))


def _mould(event: Event, shown: bytes, start: int) -> _Mould | None:
    """The mould of an event that is one line, with its text at `start`; None if it is unfit."""
    raw = event.raw
    end = raw.find(b'"', start)
    # The text is a value and no name, so nothing in front of it or behind makes it mean something.
    if raw[start - 1] != 0x22 or raw[end : end + 2] not in (b'",', b'"}'):
        return None
    if raw.find(b'"error"') >= 0 or raw != b"data: " + event.data + b"\n\n":
        return None
    head, tail = raw[:start], raw[end:]
    return head, tail, len(head) + len(tail), tail if shown is raw else shown[end:]


def _index(choices: object) -> object:
    first = choices[0] if isinstance(choices, list) else None
    index = first.get("index") if isinstance(first, dict) else None
    return index if isinstance(index, int) else 0


def _without_null(event: Event) -> bytes:
    """The event of a chunk that ends in `,"usage":null}`, without it."""
    return event.with_data(event.data[: -len(_NULL_AT_END)] + b"}")


def _spliced(event: Event, usage: bytes | None) -> bytes:
    data = event.data
    at = data.find(b'"usage"')
    if data[at - 1] == 0x2C and (match := _USAGE_AT_END.match(data, at)):
        kept = data[: at - 1] if usage is None else data[: at + len(b'"usage":')] + usage
        return event.with_data(kept + data[match.end() :])
    try:
        return event.with_data(replace(event.data, {"usage": usage}))
    except InvalidJSON:
        return event.raw


class _Named(_Dialect):
    """A dialect whose events have names, which are also their data's `type`."""

    names: ClassVar[frozenset[bytes]] = frozenset()
    prefix: ClassVar[bytes] = b"\0"
    delta: ClassVar[re.Pattern[bytes]]  # an event with content

    def glance(self, raw: bytes) -> bytes | None:
        """An event that is content by its name."""
        if self.delta.fullmatch(raw) is None:
            return None
        self._answered = True
        self.content_events += 1
        return raw

    def see(self, event: Event) -> bytes:
        if not event.data:
            return event.raw
        name, holder = event.name, None
        if name not in self.names and not name.startswith(self.prefix):
            # No name, or none of ours: then the data's type is what a client goes by.
            holder = self._holder(event.data, None)
            if holder.get("error") is not None:
                self.failed = True
                return event.raw
            name = str(holder.get("type", "")).encode("utf-8", "replace")
        if name == b"error":
            self.failed = True
            return event.raw
        self._answered = True
        self._take(name, event.data, holder)
        return event.raw

    def _take(self, name: bytes, data: bytes, holder: Mapping[str, Any] | None) -> None:
        """Take an event. `holder`: its data, if it has been parsed."""
        raise NotImplementedError

    def _holder(self, data: bytes, holder: Mapping[str, Any] | None) -> Mapping[str, Any]:
        if holder is None:
            holder = _parse(data)
        if holder is None:
            self._absurd(raw_fragment(data))
        return holder or {}


class _Messages(_Named):
    """Anthropic messages: input in `message_start`, cumulative output in `message_delta`.

    A later report of a field wins, but for the output, which never goes down, and for a prompt
    of no tokens, which is how some servers say that they don't repeat it.
    """

    names = frozenset(
        b"message_start message_delta message_stop content_block_start content_block_delta "
        b"content_block_stop ping error".split()
    )
    delta = re.compile(rb"event: content_block_delta\ndata: [^\r\n]++\n\n")

    def __init__(self) -> None:
        super().__init__()
        self._fields: dict[str, int] = {}

    def _take(self, name: bytes, data: bytes, holder: Mapping[str, Any] | None) -> None:
        if name == b"content_block_delta":
            self.content_events += 1
        elif name == b"message_start":
            message = self._holder(data, holder).get("message")
            usage = message.get("usage") if isinstance(message, dict) else None
            self._take_usage(usage, last=False)
        elif name == b"message_delta":
            self._take_usage(self._holder(data, holder).get("usage"), last=True)
        elif name == b"message_stop":
            self.ended = True

    def _take_usage(self, usage: object, *, last: bool) -> None:
        if usage is None:
            return
        try:
            reported = message_fields(usage)
            fields = self._fields | reported
            prompt = total(*(fields.get(name, 0) for name in MESSAGE_INPUT))
        except Absurd:
            self._absurd(raw_text(usage))
            return
        self._fields = fields
        counts = dict(self._counts)
        if "input_tokens" in fields:
            counts[_PROMPT] = prompt or counts.get(_PROMPT, 0)
        if "output_tokens" in fields:
            known = counts.get(_COMPLETION, 0)
            counts[_COMPLETION] = max(fields["output_tokens"], known)
        # The output in `message_start` is none yet: a last report without its own says nothing.
        final = last and ("output_tokens" in reported or self._exact)
        self._valid(counts, exact=final and len(counts) == 2)


class _Responses(_Named):
    """OpenAI responses: usage in the terminal event."""

    names = frozenset([b"error"])
    prefix = b"response."
    delta = re.compile(rb"event: response(?=\.)[^\r\n]*\.delta\ndata: [^\r\n]++\n\n")
    terminal = frozenset([b"response.completed", b"response.incomplete", b"response.failed"])

    def _take(self, name: bytes, data: bytes, holder: Mapping[str, Any] | None) -> None:
        if name.endswith(b".delta"):
            self.content_events += 1
        elif name in self.terminal:
            self.ended = True
            self.failed |= name == b"response.failed"
            report = read_usage(_RESPONSES, self._holder(data, holder).get("response"))
            if report.raw is not None:
                self._absurd(report.raw)
            elif report.counts:
                self._valid(report.counts, exact=True)


_DIALECTS = {Shape.MESSAGES: _Messages, Shape.RESPONSES: _Responses}
