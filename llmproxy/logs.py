"""The log: one line for each event, as text or as JSON, on a stream that may break or block.

`twistd` makes its own observer unless the application brings one, so a service that is to be run
by it is a `LoggingService`: it hands its observer to the application as soon as it is put into it,
which is before twistd begins to log. So nothing is logged twice, and nothing in another format.

Each request has its line, so that costs little: a `Line` has taken its format apart before, and is
no event where only our own observer would see it; `DescriptorSink` writes many lines at once.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import IO, Any, Protocol

import orjson
from twisted.application.service import IServiceCollection, MultiService
from twisted.logger import (
    ILogObserver,
    LogEvent,
    Logger,
    LoggingFile,
    LogLevel,
    formatEvent,
    globalLogPublisher,
)
from twisted.python.components import Componentized
from zope.interface import implementer

from llmproxy.errors import ConfigError

#: A level's name in the configuration, and its rank.
LEVELS = {"DEBUG": 0, "INFO": 1, "WARNING": 2, "ERROR": 3, "CRITICAL": 4}
_NAMES = tuple(LEVELS)
_INFO, _WARNING = LEVELS["INFO"], LEVELS["WARNING"]
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

#: Makes a line of an event's time (Unix), level, namespace, message, fields, and traceback.
Format = Callable[[float, str, str, str, Iterable[tuple[str, object]], str | None], str]


class Line:
    """A line that is logged often, at INFO: called with the values of its format's fields (`{name}`
    and no more), in their order.

    It is an event like any other where somebody else than our own observer listens, too.
    """

    __slots__ = ("_format", "_logger", "names", "namespace", "template")

    def __init__(self, logger: Logger, text: str) -> None:
        parts = [(literal, name) for literal, name, *_ in string.Formatter().parse(text)]
        self._logger, self._format = logger, text
        self.namespace = logger.namespace
        self.names = [name for _, name in parts if name is not None]
        #: The format with `%s` in the places of the fields, which takes two thirds of the time.
        self.template = "".join(
            literal.replace("%", "%%") + ("" if name is None else "%s") for literal, name in parts
        )

    def __call__(self, *values: object) -> None:
        observer = _only_observer()
        if observer is not None:
            observer.write(self, values)
        else:
            self._logger.info(self._format, **dict(zip(self.names, values, strict=True)))


def _only_observer() -> Observer | None:
    """Our observer, if nobody else observes."""
    observers: Sequence[object] = getattr(globalLogPublisher, "_observers", ())
    if len(observers) == 1 and type(observers[0]) is Observer:
        return observers[0]
    return None


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
    return _safe(formatEvent(event) or (failure.getErrorMessage() if failure else ""))


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


def text_format(worker: int | None = None) -> Format:
    """`TIME LEVEL NAMESPACE  MESSAGE`; the lines of a traceback follow, indented.

    A worker's number stands behind its namespace, in brackets.
    """
    times = _Times()
    who = "" if worker is None else f"[{worker}]"

    def line(
        when: float,
        level: str,
        namespace: str,
        message: str,
        fields: Iterable[tuple[str, object]],
        traceback: str | None,
    ) -> str:
        first = escape(f"{times(when)} {level} {namespace}{who}  {message}")
        if traceback is None:
            return first
        return "\n    ".join([first, *map(escape, traceback.split("\n"))])

    return line


def json_format(worker: int | None = None) -> Format:
    """One object: `time`, `level`, `namespace`, `message`, the event's own fields that are plain
    values, `worker` with its number, and `traceback` where there is one.
    """
    times = _Times()

    def line(
        when: float,
        level: str,
        namespace: str,
        message: str,
        fields: Iterable[tuple[str, object]],
        traceback: str | None,
    ) -> str:
        record: dict[str, object] = {
            "time": times(when),
            "level": level,
            "namespace": namespace,
            "message": message,
        }
        _add_plain(record, fields)
        if worker is not None:
            record[WORKER] = worker
        if traceback is not None:
            record["traceback"] = traceback
        return _encoded(record)

    return line


_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def _encoded(record: Mapping[str, object]) -> str:
    """A record as JSON in ASCII, with all control characters escaped."""
    # What orjson writes in ASCII is what json does, in a tenth of the time; but for DEL, and for
    # 1e16, which is as good as 1e+16.
    try:
        text = orjson.dumps(record).decode()
    except TypeError:
        text = "\x7f"  # lone surrogates, integers of more than 64 bits
    if text.isascii() and "\x7f" not in text:
        return text
    # All but DEL is escaped by the encoder, as it writes ASCII only.
    return _encode(record).replace("\x7f", "\\u007f")


def _add_plain(record: dict[str, object], fields: Iterable[tuple[str, object]]) -> None:
    for name, value in fields:
        if name[:4] == "log_" or name in record:
            continue
        if value is None or type(value) is int:
            record[name] = value
        elif isinstance(value, str):
            record[name] = _safe(value)
        elif _is_plain(value):
            record[name] = value


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
        rank = _RANKS.get(event.get("log_level"), _INFO)
        if not self._passes(rank, event):
            return
        try:
            text = self._line(
                event["log_time"],
                _NAMES[rank],
                str(event.get("log_namespace", "-")),
                message(event),
                event.items(),
                _traceback(event),
            )
        except Exception as error:
            text = self._broken(error)
        self._write(text, rank)

    def write(self, line: Line, values: tuple[object, ...]) -> None:
        """Write what the event of `line` with these values would give."""
        if self._rank > _INFO:
            return
        try:
            said = _safe(line.template % values)
            fields = zip(line.names, values, strict=True)
            text = self._line(time.time(), "INFO", line.namespace, said, fields, None)
        except Exception as error:
            text = self._broken(error)
        self._write(text, _INFO)

    def _write(self, text: str, rank: int) -> None:
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

    def _broken(self, error: Exception) -> str:
        return self._own(f"an event could not be written: {type(error).__name__}")

    def _own(self, text: str) -> str:
        return self._line(time.time(), "ERROR", __name__, text, [("text", text)], None)


def observer(
    stream: IO[str] | IO[bytes] | None, log_format: str, level: str, worker: int | None = None
) -> Observer:
    """An observer that writes to `stream` as `log_format` (`text`, `json`) has it.

    Events below `level` (a key of `LEVELS`) are left out, and what the libraries say below WARNING,
    unless `level` is DEBUG. `worker`: the number of the worker process that says it.
    """
    return Observer(sink(stream), _line_format(log_format, worker), level)


def _line_format(name: str, worker: int | None = None) -> Format:
    return json_format(worker) if name == "json" else text_format(worker)


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
