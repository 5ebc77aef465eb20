"""Audio: the upload's form, rewritten as it streams through, and the answer turned back.

The backend is always asked for `verbose_json`, since only that tells the duration that is billed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import ROUND_CEILING, Decimal
from typing import Any

from llmproxy import policy
from llmproxy.errors import BackendError, BadRequest, BodyTooLarge, UnsupportedMediaType
from llmproxy.jsonbytes import InvalidJSON, parse_object, replace
from llmproxy.model import MAX_COUNT, Kind, Reading
from llmproxy.usage import raw_text

MAX_FIELD = 4 * 1024  # bytes of a field that is not a file
MAX_HEADERS = 8 * 1024  # bytes of a part's headers
MAX_PARTS = 100
MAX_MODEL = 256  # characters of a model's name
SUBTITLES = 500  # to write so many takes some ms
HOLD_LIMIT = 32 * 1024 * 1024

RESPONSE_FORMATS = ("json", "text", "srt", "verbose_json", "vtt")

# Fields that we read and leave out; they may stand once, and are never files.
_READ = frozenset(["model", "response_format", "stream"])

_JSON = b"application/json"
_PLAIN = b"text/plain; charset=utf-8"  # OpenAI's for text, srt and vtt

_ARROW = re.compile("--+>")
_NUMBER = re.compile(r"[0-9]{1,20}(?:\.[0-9]{1,40})?(?:[eE][-+]?[0-9]{1,3})?")
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_MULTIPART = re.compile(rb"[ \t]*multipart/form-data[ \t]*(?=;|$)", re.IGNORECASE)
_FORM_DATA = re.compile(rb"form-data[ \t]*(?=;|$)", re.IGNORECASE)
# A quoted string without escaped quotes: servers don't agree on where such a string ends.
_PARAMETER = re.compile(
    rb'[ \t]*;[ \t]*(%s\*?)=(?:"((?:[^"\\\r\n]|\\(?!"))*+)"|([^\s";]+))[ \t]*' % _TOKEN
)
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
_HEADER = re.compile(rb"(%s):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)" % _TOKEN)


def boundary_of(content_type: bytes) -> bytes:
    """The boundary in a Content-Type of `multipart/form-data` (RFC 2046 section 5.1.1).

    Raises UnsupportedMediaType for another type, BadRequest for a boundary that can't be used.
    """
    match = _MULTIPART.match(content_type)
    if match is None:
        raise UnsupportedMediaType("The request body must be multipart/form-data.")
    boundary = _parameters(content_type, match.end()).get(b"boundary", b"")
    if not _BOUNDARY.fullmatch(boundary):
        raise BadRequest("The Content-Type has no usable boundary.")
    return boundary


def _parameters(value: bytes, position: int) -> dict[bytes, bytes]:
    """Parameters of a header (RFC 9110 section 5.6.6), names in lower case. Raises BadRequest."""
    parameters: dict[bytes, bytes] = {}
    while position < len(value):
        match = _PARAMETER.match(value, position)
        if match is None or match[1].lower() in parameters:
            raise BadRequest("A header of the form can't be read.")
        parameters[match[1].lower()] = match[2] if match[3] is None else match[3]
        position = match.end()
    return parameters


def check_response_format(response_format: str | None) -> None:
    """Raises BadRequest for a format that a billed answer can't be turned into."""
    if response_format is not None and response_format not in RESPONSE_FORMATS:
        known = ", ".join(RESPONSE_FORMATS)
        raise BadRequest(f"'response_format' must be one of {known}.", param="response_format")


class FormRewriter:
    """Rewrites a multipart/form-data body while it streams through (RFC 7578, RFC 2046).

    States: `first` (before the first boundary), `headers`, `field` (a small value, read whole),
    `file` (passed on as it comes), `boundary` (what follows a boundary), `end`.

    The owner feeds bytes. As soon as `model` is not None it calls `start` with the backend's name
    of the model; only then do bytes come out. The client's `model`, `response_format` and `stream`
    are left out, and our own are added at the end. Raises BadRequest for what can't be read as a
    form in one way only, BodyTooLarge when more than `hold_limit` bytes came before `model`.
    """

    def __init__(self, boundary: bytes, *, hold_limit: int = HOLD_LIMIT) -> None:
        self.model: str | None = None
        self.response_format: str | None = None
        self.timestamp_granularities: list[str] = []
        self._delimiter = b"\r\n--" + boundary
        # The first boundary needs no line end before it, nor does the content after its headers.
        self._buffer = bytearray(b"\r\n")
        self._lead = 2  # bytes of this kind at the start of the buffer
        self._state = "first"
        self._name = ""
        self._header = b""
        self._parts = 0
        self._seen: set[str] = set()
        self._out = bytearray()  # pieces of a few bytes each would take many times their size
        self._hold_limit = hold_limit
        self._backend_model: str | None = None

    def start(self, backend_model: str) -> bytes:
        """Let the output begin: what was held back so far."""
        self._backend_model = backend_model
        return self._release()

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the form; what the backend may get now, nothing before `start`."""
        if self._state != "end":
            self._buffer += data
            while self._step():
                pass
        if self._backend_model is not None:
            return self._release()
        return b""

    def finish(self) -> bytes:
        """The rest of the form, with our fields. Raises BadRequest if something is missing."""
        if self._state != "end":
            raise BadRequest("The form is incomplete: its last boundary is missing.")
        if self.model is None:
            raise BadRequest("The form has no 'model'.", param="model")
        if "file" not in self._seen:
            raise BadRequest("The form has no 'file'.", param="file")
        if self._backend_model is None:
            raise RuntimeError("start was not called")
        self._emit(self._field("model", self._backend_model))
        self._emit(self._field("response_format", "verbose_json"))
        self._emit(self._delimiter[2:] + b"--\r\n")
        return self._release()

    def _release(self) -> bytes:
        released = bytes(self._out)
        self._out.clear()
        return released

    def _emit(self, data: bytes) -> None:
        self._out += data
        if self.model is None and len(self._out) > self._hold_limit:
            raise BodyTooLarge("Send the 'model' field before the file: the form is too long.")

    def _field(self, name: str, value: str) -> bytes:
        head = f'\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
        return self._delimiter[2:] + (head + value + "\r\n").encode()

    def _step(self) -> bool:
        """Move on by one piece of the form; False when more bytes are needed."""
        match self._state:
            case "first":
                return self._first()
            case "boundary":
                return self._after_boundary()
            case "headers":
                return self._headers()
            case "field":
                return self._value()
            case "file":
                return self._file()
        self._buffer.clear()  # RFC 2046: what follows the last boundary is to be ignored
        return False

    def _take(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _first(self) -> bool:
        size = len(self._delimiter)
        if not self._delimiter.startswith(self._buffer[:size]):
            raise BadRequest("The form does not begin with its boundary.")
        if len(self._buffer) < size:
            return False
        del self._buffer[:size]
        self._state = "boundary"
        return True

    def _after_boundary(self) -> bool:
        if self._buffer.startswith(b"--"):
            self._state = "end"
            return True
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > 64 or bytes(self._buffer).rstrip(b" \t\r") not in (b"", b"-"):
                raise BadRequest("A boundary of the form is not followed by a line end.")
            return False
        if self._take(end + 2).strip(b" \t\r\n"):
            raise BadRequest("A boundary of the form is not followed by a line end.")
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise BadRequest(f"The form has more than {MAX_PARTS} parts.")
        self._state = "headers"
        return True

    def _headers(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end > MAX_HEADERS or (end < 0 and len(self._buffer) > MAX_HEADERS):
            raise BadRequest("The headers of a part of the form are too long.")
        if end < 0:
            return False
        self._header = self._take(end + 4)
        self._name, is_file = _part(self._header[:-4])
        self._check_name(is_file)
        self._state = "file" if is_file or self._name == "file" else "field"
        if self._state == "file":
            self._emit(self._delimiter[2:] + b"\r\n" + self._header)
        self._buffer[:0] = b"\r\n"
        self._lead = 2
        return True

    def _check_name(self, is_file: bool) -> None:
        policy.check_name(self._name, policy.REFUSED_IN_FORMS)
        if self._name in _READ and is_file:
            raise BadRequest(f"{self._name!r} must not be a file.", param=self._name)
        if self._name in _READ or self._name == "file":
            if self._name in self._seen:
                raise BadRequest(f"The form has {self._name!r} twice.", param=self._name)
            self._seen.add(self._name)

    def _value(self) -> bool:
        end = self._find_boundary()
        size = (len(self._buffer) - len(self._delimiter) if end < 0 else end) - 2
        if size > MAX_FIELD:
            raise BadRequest(f"A field of the form is longer than {MAX_FIELD} bytes.")
        if end < 0:
            return False
        value = self._content(end)
        if self._name in _READ:
            self._read_field(value)
        else:
            if self._name in ("timestamp_granularities[]", "timestamp_granularities"):
                self.timestamp_granularities.append(_text(self._name, value))
            self._emit(self._delimiter[2:] + b"\r\n" + self._header + value + b"\r\n")
        self._end_part()
        return True

    def _read_field(self, value: bytes) -> None:
        text = _text(self._name, value)
        if self._name == "model":
            if not text or len(text) > MAX_MODEL:
                raise BadRequest("'model' must be the name of a model.", param="model")
            self.model = text
        elif self._name == "response_format":
            check_response_format(text)
            self.response_format = text
        elif text.lower() not in ("", "0", "false"):
            raise BadRequest("'stream' is not supported for audio here.", param="stream")

    def _file(self) -> bool:
        end = self._find_boundary()
        if end < 0:
            if (size := len(self._buffer) - len(self._delimiter) + 1) > 0:
                self._emit(self._content(size))
            return False
        self._emit(self._content(end) + b"\r\n")
        self._end_part()
        return True

    def _end_part(self) -> None:
        del self._buffer[: len(self._delimiter)]
        self._state = "boundary"

    def _content(self, size: int) -> bytes:
        """Take `size` bytes off the buffer; those of them that are content."""
        lead = min(self._lead, size)
        self._lead -= lead
        return self._take(size)[lead:]

    def _find_boundary(self) -> int:
        """Where the next delimiter begins, or -1.

        A boundary after a bare LF or CR, or at the very beginning of the content, is a delimiter
        to some parsers and content to others: such a form is refused.
        """
        found = self._buffer.find(self._delimiter[2:])
        while found >= 0:
            if self._buffer[found - 2 : found] == b"\r\n" and found > self._lead:
                return found - 2
            # One at the very beginning was seen before, when what is before it was here.
            if found and self._buffer[found - 1] in (0x0D, 0x0A):
                raise BadRequest("The form has a boundary with a wrong line end before it.")
            found = self._buffer.find(self._delimiter[2:], found + 1)
        return -1


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise BadRequest(f"{name!r} is not UTF-8 text.", param=name) from None


def _part(head: bytes) -> tuple[str, bool]:
    """The name of a part, and whether it is a file, from its headers. Raises BadRequest."""
    headers: dict[bytes, bytes] = {}
    for line in head.split(b"\r\n"):
        match = _HEADER.fullmatch(line)
        if match is None or match[1].lower() in headers:
            raise BadRequest("The headers of a part of the form can't be read.")
        headers[match[1].lower()] = match[2].strip(b" \t")
    encoding = headers.get(b"content-transfer-encoding", b"binary").lower()
    if encoding not in (b"7bit", b"8bit", b"binary"):
        raise BadRequest("The form has a part with a Content-Transfer-Encoding.")
    disposition = headers.get(b"content-disposition", b"")
    match = _FORM_DATA.match(disposition)
    parameters = _parameters(disposition, match.end()) if match else {}
    name = parameters.get(b"name")
    if name is None or b"\\" in name or b"name*" in parameters:
        raise BadRequest("The form has a part without a readable name.")
    return _text("name", name), not parameters.keys().isdisjoint((b"filename", b"filename*"))


def read_audio(body: bytes) -> Reading:
    """The reading of a `verbose_json` answer: seconds of audio, rounded up.

    From `duration` (a number, or vLLM's numeric string), else `usage.seconds`.
    """
    try:
        answer = parse_object(body)
    except InvalidJSON:
        return Reading()
    usage = answer.get("usage")
    value = answer.get("duration")
    if value is None and isinstance(usage, dict):
        value = usage.get("seconds")
    seconds = _whole_seconds(value)
    if seconds is None:
        report = usage if value is None else value
        return Reading(raw=None if report is None else raw_text(report), answered=True)
    return Reading({Kind.TRANSCRIPTION: seconds}, exact=True, answered=True)


def _whole_seconds(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    text = str(value)
    if len(text) > 40 or not _NUMBER.fullmatch(text):
        return None
    seconds = Decimal(text).to_integral_value(ROUND_CEILING)
    return int(seconds) if seconds <= MAX_COUNT else None


def convert(body: bytes, response_format: str | None) -> tuple[bytes, Iterable[bytes]]:
    """A `verbose_json` answer as the client asked for it: its Content-Type, and its body in pieces
    that take some ms each to make.

    `None` is `json`. Raises BackendError, as the pieces do, when the answer lacks what the format
    needs.
    """
    if response_format == "verbose_json":
        return _JSON, [body]
    try:
        answer = parse_object(body)
    except InvalidJSON:
        raise _unusable() from None
    text = answer.get("text")
    if not isinstance(text, str):
        raise _unusable()
    if response_format in (None, "json"):
        # As bytes: what orjson has read may be nested deeper than it writes.
        others = [key for key in answer if key not in ("text", "usage")]
        return _JSON, [replace(body, dict.fromkeys(others))]
    if response_format == "text":
        return _PLAIN, [text.encode() + b"\n"]
    segments = _segments(answer, text)
    if response_format == "srt":
        return _PLAIN, _subtitles(segments, "", _srt)
    return _PLAIN, _subtitles(segments, "WEBVTT\n\n", _vtt)


def _unusable() -> BackendError:
    return BackendError("The backend's answer can't be turned into the format asked for.")


def _segments(answer: dict[str, Any], text: str) -> list[object]:
    segments = answer.get("segments")
    if segments is None:  # as when only word timestamps were asked for
        return [{"start": 0, "end": answer.get("duration"), "text": text}]
    if not isinstance(segments, list):
        raise _unusable()
    return segments


def _subtitles(
    segments: Sequence[object], head: str, write: Callable[[int, int, int, str], str]
) -> Iterator[bytes]:
    for start in range(0, max(len(segments), 1), SUBTITLES):
        some = enumerate(segments[start : start + SUBTITLES], start + 1)
        yield (head + "".join(write(*_cue(*each)) for each in some)).encode()
        head = ""


def _cue(number: int, segment: object) -> tuple[int, int, int, str]:
    """Number, start and end in milliseconds, and text of a subtitle."""
    if not isinstance(segment, dict) or not isinstance(segment.get("text"), str):
        raise _unusable()
    start, end = _milliseconds(segment.get("start")), _milliseconds(segment.get("end"))
    # The arrow and empty lines would end a subtitle early (WebVTT section 4.1).
    lines = [line.strip() for line in _ARROW.sub("->", segment["text"]).splitlines()]
    return number, start, end, "\n".join(line for line in lines if line)


def _milliseconds(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _unusable()
    text = str(value)
    if len(text) > 40 or not _NUMBER.fullmatch(text) or Decimal(text) > MAX_COUNT:
        raise _unusable()
    return round(Decimal(text) * 1000)


def _time(milliseconds: int, comma: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}{comma}{rest:03}"


def _srt(number: int, start: int, end: int, text: str) -> str:
    return f"{number}\n{_time(start, ',')} --> {_time(end, ',')}\n{text}\n\n"


def _vtt(number: int, start: int, end: int, text: str) -> str:
    return f"{_time(start, '.')} --> {_time(end, '.')}\n{text}\n\n"
