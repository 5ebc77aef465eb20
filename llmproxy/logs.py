"""The log: one line for each event, as text or as JSON, on a stream that may break or block.

`twistd` makes its own observer unless the application brings one, so a service that is to be run
by it is a `LoggingService`: it hands its observer to the application as soon as it is put into it,
which is before twistd begins to log. So nothing is logged twice, and nothing in another format.

Each request has its line, so an event costs little: `Logger.info` makes it, `Observer` formats it
by what it has kept of the event's format, and `DescriptorSink` writes many lines at once.
"""

from __future__ import annotations

import json
import math
import os
import re
import select
import stat
import string
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import islice
from operator import itemgetter
from typing import IO, Any, Protocol, cast

import orjson
from twisted.application.service import IServiceCollection, MultiService
from twisted.logger import ILogObserver, LogEvent, LoggingFile, LogLevel, formatEvent
from twisted.logger import Logger as TwistedLogger
from twisted.python.components import Componentized
from zope.interface import directlyProvides, implementer

from llmproxy.errors import ConfigError

#: A level's name in the configuration, and its rank.
LEVELS = {"DEBUG": 0, "INFO": 1, "WARNING": 2, "ERROR": 3, "CRITICAL": 4}
_NAMES = tuple(LEVELS)
_INFO = LogLevel.info
_WARNING = LEVELS["WARNING"]
_RANKS = {
    LogLevel.debug: 0,
    LogLevel.info: 1,
    LogLevel.warn: 2,
    LogLevel.error: 3,
    LogLevel.critical: 4,
}
# What the libraries say in passing (each connection made and lost) would bury what we say.
_LIBRARIES = ("twisted.", "treq.", "txmongo.", "log_legacy")

#: The field that tells which worker process says it.
WORKER = "worker"
#: How long a line below WARNING may wait for others, so that they are written together, and how
#: many bytes of them.
GATHER_S = 0.05
GATHER_BYTES = 2**15
#: Bytes that may wait for a reader who is slow; what comes on top of them is dropped.
MAX_WAITING = 2**20
# A pipe of which poll() says that it is writable takes this much without blocking (pipe(7)).
_PIECE = select.PIPE_BUF
_MAX_TEXT = 2**14
_MAX_TRACEBACK = 2**16

_MILLISECONDS = [f".{each:03d}Z" for each in range(1000)]

_CREDENTIALS = re.compile(r"(?i)\b([a-z][a-z0-9+.\-]*://)[^\s\"'<>]*@")
_SECRETS = re.compile(r"(?i)((?:password|secret|token|api_?key)[=:])[^\s&,;\"'<>]+")

Format = Callable[[LogEvent], str]


class Logger(TwistedLogger):
    """Twisted's, but its `info` takes a quarter of the time.

    `Logger.emit` looks through all levels, in order, to see whether the given one exists.
    """

    def info(self, format: str | None = None, **fields: object) -> None:
        """See `twisted.logger.Logger.info`."""
        fields["log_logger"] = self
        fields["log_level"] = _INFO
        fields["log_namespace"] = self.namespace
        fields["log_source"] = self.source
        fields["log_format"] = format
        fields["log_time"] = time.time()
        self.observer(fields)


def redact(text: str) -> str:
    """`text` without the credentials of the URIs in it.

    An unescaped `/` or `@` in a password must not leave the rest of it there, so all up to the
    last `@` of a word goes, the user's name with it.
    """
    return _SECRETS.sub(r"\1***", _CREDENTIALS.sub(r"\1***@", text))


def escape(text: str) -> str:
    r"""`text` with all that can't be printed as `\n`, `\x1b`, `\u2028` and so on."""
    if _is_surely_printable(text) or text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def _is_surely_printable(text: str) -> bool:
    """Printable ASCII without quotes and backslashes, as nearly all lines are: found out in a tenth
    of the time of `isprintable`, as orjson gets no longer by escapes. It does not escape DEL."""
    return text.isascii() and "\x7f" not in text and len(orjson.dumps(text)) == len(text) + 2


def word(text: str) -> str:
    """`text` as the value of one `name=value` in a message: in quotes, as JSON has them, where it
    could be taken for more.
    """
    return json.dumps(text, ensure_ascii=False) if " " in text or '"' in text else text


def message(event: LogEvent) -> str:
    """The event's text, or its failure's where it has none."""
    failure = event.get("log_failure")
    text = _formatted(event)
    return _safe(text or (failure.getErrorMessage() if failure else ""))


def _formatted(event: LogEvent) -> str:
    text = event.get("log_format")
    # A tenth of formatEvent's time, which knows more: calls ("{name()}") and flattened events.
    if isinstance(text, str) and "log_flattened" not in event:
        try:
            if plain := _plain_format(text):
                template, values = plain
                return template % values(event)
            if "(" not in text:
                return text.format_map(event)
        except Exception:
            pass  # formatEvent says what is wrong with it
    return formatEvent(event)


@lru_cache(256)
def _plain_format(text: str) -> tuple[str, Callable[[LogEvent], tuple[object, ...]]] | None:
    """A format of at least two plain names (`{name}`) with `%s` in their places, and the getter of
    their values: a third of the time of `format_map`. None for any other.
    """
    parts = list(string.Formatter().parse(text))
    names = [name for _, name, _, _ in parts if name is not None]
    if len(names) < 2 or any(spec or conversion for _, _, spec, conversion in parts):
        return None
    if not all(name.isidentifier() for name in names):
        return None
    marks = ("" if name is None else "%s" for _, name, _, _ in parts)
    literals = (literal.replace("%", "%%") for literal, *_ in parts)
    template = "".join(part for pair in zip(literals, marks, strict=True) for part in pair)
    return template, itemgetter(*names)


def _safe(text: str) -> str:
    if len(text) > _MAX_TEXT:
        text = text[:_MAX_TEXT] + "..."
    return redact(text) if "://" in text else text


def _traceback(event: LogEvent) -> str | None:
    failure = event.get("log_failure")
    if failure is None:
        return None
    text: str = failure.getTraceback()
    return redact(text.rstrip()[-_MAX_TRACEBACK:])


class _Times:
    """Times in UTC as RFC 3339 has them, with milliseconds."""

    def __init__(self) -> None:
        self._second, self._text = -1, ""

    def __call__(self, seconds: float) -> str:
        second, milliseconds = divmod(int(seconds * 1000), 1000)
        if second != self._second:
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = second
        return self._text + _MILLISECONDS[milliseconds]


def _level(event: LogEvent) -> str:
    return _NAMES[_RANKS.get(event.get("log_level"), 1)]


def text_format() -> Format:
    """`TIME LEVEL NAMESPACE  MESSAGE`; the lines of a traceback follow, indented.

    A worker's number stands behind its namespace, in brackets.
    """
    times = _Times()

    def line(event: LogEvent) -> str:
        when, where = times(event["log_time"]), event.get("log_namespace", "-")
        if (worker := event.get(WORKER)) is not None:
            where = f"{where}[{worker}]"
        first = escape(f"{when} {_level(event)} {where}  {message(event)}")
        trace = _traceback(event)
        if trace is None:
            return first
        return "\n    ".join([first, *map(escape, trace.split("\n"))])

    return line


def json_format() -> Format:
    """One object: `time`, `level`, `namespace`, `message`, the event's own fields that are plain
    values, and `traceback` where there is one.
    """
    times = _Times()

    def line(event: LogEvent) -> str:
        record = {
            "time": times(event["log_time"]),
            "level": _level(event),
            "namespace": str(event.get("log_namespace", "-")),
            "message": message(event),
        }
        record.update(_fields(event, record))
        if (trace := _traceback(event)) is not None:
            record["traceback"] = trace
        return _encoded(record)

    return line


_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def _encoded(record: Mapping[str, object]) -> str:
    """A record as JSON in ASCII, with all control characters escaped."""
    # What orjson writes in ASCII is what json does, in a tenth of the time; but for DEL, and for
    # floats with an exponent.
    try:
        text = orjson.dumps(record).decode()
    except TypeError:
        text = "\x7f"  # lone surrogates, integers of more than 64 bits
    if text.isascii() and "\x7f" not in text and not _has_exponent(record):
        return text
    # All but DEL is escaped by the encoder, as it writes ASCII only.
    return _encode(record).replace("\x7f", "\\u007f")


def _has_exponent(record: Mapping[str, object]) -> bool:
    for value in record.values():
        if type(value) is float and value and not 1e-3 <= abs(value) < 1e15:
            return True
    return False


def _fields(event: LogEvent, taken: Mapping[str, object]) -> dict[str, Any]:
    fields = {}
    for name, value in event.items():
        if name[:4] == "log_" or name in taken:
            continue
        if isinstance(value, str):
            fields[name] = _safe(value)
        elif value is None or _is_plain(value):
            fields[name] = value
    return fields


def _is_plain(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int)


class Sink(Protocol):
    """Where lines go. `dropped` counts those that got lost."""

    dropped: int

    def write(self, entry: bytes, may_wait: bool = False) -> None:
        """Write it, or count it as dropped; never raises.

        `may_wait`: it may be written a little later, together with others.
        """


class DescriptorSink:
    """Writes to a file descriptor, and never waits for whoever reads at its other end.

    What can't be written at once waits for the next line, up to `MAX_WAITING` bytes. What meets an
    error (no reader, no space) is dropped. The descriptor's own flags stay as they are, since other
    processes may share it. Once it gathers lines, those that may wait are written together.
    """

    def __init__(self, descriptor: int, owner: object = None) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._owner = owner  # a file object that would close the descriptor at its end
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._torn = False  # what was written last is the first part of a line
        self._flush_later: Callable[[], object] | None = None  # while lines are gathered
        self._is_due = False  # it was called
        self._thread = 0  # the one in which it may be called
        self._writing = False
        self._poll = None if _is_file(descriptor) else select.poll()
        if self._poll:
            self._poll.register(descriptor, select.POLLOUT)

    @property
    def descriptor(self) -> int:
        """Where it writes."""
        return self._descriptor

    def gather(self, reactor: Any) -> None:
        """Gather lines as long as `reactor` runs, and only those that are written in its thread."""

        def begin() -> None:
            self._thread = threading.get_ident()
            self._flush_later = lambda: reactor.callLater(GATHER_S, self.flush)

        def end() -> None:
            self._flush_later = None
            self.flush()

        reactor.callWhenRunning(begin)
        reactor.addSystemEventTrigger("after", "shutdown", end)

    def write(self, entry: bytes, may_wait: bool = False) -> None:
        """Write what waits, then `entry`."""
        if self._torn and not self._waiting:
            entry = b"\n" + entry
        if self._size + len(entry) > MAX_WAITING:
            self.dropped += 1
        else:
            self._waiting.append(entry)
            self._size += len(entry)
        if not (may_wait and self._will_flush()):
            self.flush()

    def _will_flush(self) -> bool:
        if self._flush_later is None or self._size >= GATHER_BYTES:
            return False
        if not self._is_due and threading.get_ident() == self._thread:
            self._is_due = True
            self._flush_later()
        return self._is_due

    def flush(self) -> None:
        """Write what waits, as far as that goes now."""
        self._is_due = False
        if self._writing:
            return  # called by another thread, or by what the garbage collector found meanwhile
        self._writing = True
        try:
            while self._waiting and self._is_ready():
                self._write_piece()
        except BlockingIOError:
            pass
        except OSError:
            self._drop()
        finally:
            self._writing = False

    def _is_ready(self) -> bool:
        # An error is reported as ready, and met by the write.
        return self._poll is None or bool(self._poll.poll(0))

    def _write_piece(self) -> None:
        waiting = self._waiting
        written = os.write(self._descriptor, self._next_piece())
        self._size -= written
        while waiting and len(waiting[0]) <= written:
            written -= len(waiting.popleft())
        self._torn = written > 0
        if self._torn:
            waiting[0] = waiting[0][written:]

    def _next_piece(self) -> bytes:
        """As many whole lines as can be written at once, or a part of one that is too long."""
        room = _PIECE if self._poll else GATHER_BYTES
        piece = [self._waiting[0] if self._poll is None else self._waiting[0][:room]]
        room -= len(piece[0])
        for entry in islice(self._waiting, 1, None):
            room -= len(entry)
            if room < 0:
                break
            piece.append(entry)
        return b"".join(piece)

    def _drop(self) -> None:
        self.dropped += len(self._waiting)
        self._waiting.clear()
        self._size = 0


def _is_file(descriptor: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:
        return False


class StreamSink:
    """Writes to an object that only has `write`, such as a test's `StringIO`."""

    def __init__(self, stream: IO[str]) -> None:
        self.dropped = 0
        self._stream = stream

    def write(self, entry: bytes, may_wait: bool = False) -> None:
        """Write it, and make it go out."""
        try:
            self._stream.write(entry.decode())
            self._stream.flush()
        except Exception:
            self.dropped += 1


class NullSink:
    """For a process whose output was closed when it started: everything is dropped."""

    dropped = 0

    def write(self, entry: bytes, may_wait: bool = False) -> None:
        """Count it."""
        self.dropped += 1


def sink(stream: IO[str] | IO[bytes] | None) -> Sink:
    """The sink for a stream: its descriptor where it has one."""
    if stream is None:
        return NullSink()
    try:
        return DescriptorSink(stream.fileno(), stream)
    except (AttributeError, OSError, ValueError):
        return StreamSink(stream)  # type: ignore[arg-type]


@implementer(ILogObserver)
class Observer:
    """Writes the events that pass its level to a sink. Never raises."""

    def __init__(self, sink: Sink, line: Format, level: str) -> None:
        self.sink = sink
        self._line = line
        self._rank = LEVELS[level]
        self._told = 0

    def __call__(self, event: LogEvent) -> None:
        rank = _RANKS.get(event.get("log_level"), 1)
        if not self._passes(rank, event):
            return
        try:
            text = self._line(event)
        except Exception as error:
            text = self._own(f"an event could not be written: {type(error).__name__}")
        lost = self.sink.dropped
        may_wait = rank < _WARNING and lost == self._told
        if lost > self._told:
            text = self._own(f"{lost - self._told} events were not written") + "\n" + text
        self.sink.write((text + "\n").encode(), may_wait)
        if self.sink.dropped == lost:
            self._told = lost

    def gather(self, reactor: Any) -> None:
        """Let lines below WARNING wait up to `GATHER_S`, to be written together, where that helps.

        So it is while `reactor` runs. A process that is killed loses the lines that wait.
        """
        if isinstance(self.sink, DescriptorSink):
            self.sink.gather(reactor)

    def _passes(self, rank: int, event: LogEvent) -> bool:
        if rank < self._rank:
            return False
        if rank >= _WARNING or self._rank == 0:
            return True
        return not str(event.get("log_namespace", "")).startswith(_LIBRARIES)

    def _own(self, text: str) -> str:
        return self._line(
            {
                "log_time": time.time(),
                "log_level": LogLevel.error,
                "log_namespace": __name__,
                "log_format": "{text}",
                "text": text,
            }
        )


def of_worker(number: int, observer: ILogObserver) -> ILogObserver:
    """An observer that tells `observer` which worker it is that says something."""

    def observe(event: LogEvent) -> None:
        observer({**event, WORKER: number})

    directlyProvides(observe, ILogObserver)
    return cast(ILogObserver, observe)


def observer(stream: IO[str] | IO[bytes] | None, log_format: str, level: str) -> Observer:
    """An observer that writes to `stream` as `log_format` (`text`, `json`) has it.

    Events below `level` (a key of `LEVELS`) are left out, and what the libraries say below WARNING,
    unless `level` is DEBUG.
    """
    return Observer(sink(stream), _line_format(log_format), level)


def _line_format(name: str) -> Format:
    return json_format() if name == "json" else text_format()


def descriptor_of(observer: ILogObserver | None) -> int:
    """Where an observer writes, for other processes to write there too; else stdout."""
    sink = observer.sink if isinstance(observer, Observer) else None
    return sink.descriptor if isinstance(sink, DescriptorSink) else 1


def twistd_observer(
    options: Mapping[str, Any] | None, log_format: str, level: str
) -> Observer | None:
    """The observer for a process that twistd runs with `options` (`Options.parent` of a plugin).

    It writes where twistd would have: to the file of `--logfile`, else to stdout, or to
    `twistd.log` as a daemon. None where the operator wants another one: `--logger`, `--syslog`.
    Raises ConfigError when the file can't be opened.
    """
    options = options or {"nodaemon": True}
    if options.get("logger") or options.get("syslog"):
        return None
    is_daemon = not (options.get("nodaemon") or options.get("debug"))
    path = options.get("logfile") or ("twistd.log" if is_daemon else "-")
    if path != "-":
        return Observer(_appended(path), _line_format(log_format), level)
    # A daemon has no stdout: twistd says so, if it is left to itself.
    return None if is_daemon else observer(_stdout(), log_format, level)


def _appended(path: str) -> DescriptorSink:
    try:
        return DescriptorSink(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666))
    except OSError as error:
        raise ConfigError(f"{path}: can't be written: {error.strerror or error}") from None


def _stdout() -> IO[str] | None:
    # When a log has begun in this process, sys.stdout leads back into it.
    return sys.__stdout__ if isinstance(sys.stdout, LoggingFile) else sys.stdout


class LoggingService(MultiService):
    """A root service that brings its observer to the application that it is put into.

    With `log_observer` None, or without an application, nothing is changed.
    """

    log_observer: ILogObserver | None = None

    def setServiceParent(self, parent: IServiceCollection) -> None:
        """Called by twistd before it begins to log; see AppLogger.start."""
        if self.log_observer is not None and isinstance(parent, Componentized):
            parent.setComponent(ILogObserver, self.log_observer)
        super().setServiceParent(parent)
