"""Tests of the log: what a line looks like, what is left out, and streams that break or block."""

from __future__ import annotations

import io
import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.application.service import Application
from twisted.internet.task import Clock
from twisted.logger import (
    ILogObserver,
    Logger,
    LogLevel,
    LogPublisher,
    formatEvent,
    globalLogPublisher,
)
from twisted.python.failure import Failure

from llmproxy import logs
from llmproxy.errors import ConfigError
from llmproxy.logs import DescriptorSink, Line, LoggingService, Observer, escape, redact

WHEN = 1_795_446_000.1239


def event(text: str = "hello", level: Any = LogLevel.info, **fields: Any) -> dict[str, Any]:
    base = {"log_time": WHEN, "log_level": level, "log_namespace": "llmproxy.exchange"}
    return {**base, "log_format": text, **fields}


def written(*events: dict[str, Any], log_format: str = "text", level: str = "INFO") -> str:
    stream = io.StringIO()
    observe = logs.observer(stream, log_format, level)
    for each in events:
        observe(each)
    return stream.getvalue()


def failure_of(error: Exception) -> Failure:
    try:
        raise error
    except Exception:
        return Failure()


# One line


def test_a_text_line_has_time_level_namespace_and_message():
    line = written(event("{outcome} {rid} ms={ms}", outcome="complete", rid="r1", ms=5))
    assert line == "2026-11-23T15:00:00.123Z INFO llmproxy.exchange  complete r1 ms=5\n"


def test_a_json_line_has_the_fields_of_its_own_too():
    line = written(event("{model} done", model="m", ms=5, ttft=None, ok=True), log_format="json")
    assert line.endswith("}\n")
    assert json.loads(line) == {
        "time": "2026-11-23T15:00:00.123Z",
        "level": "INFO",
        "namespace": "llmproxy.exchange",
        "message": "m done",
        "model": "m",
        "ms": 5,
        "ttft": None,
        "ok": True,
    }


def test_times_go_on_across_seconds():
    line = logs.text_format()
    times = [
        line(when, "INFO", "llmproxy", "hello", (), None)[:24]
        for when in (WHEN, WHEN + 0.5, WHEN + 0.9)
    ]
    assert times == [
        "2026-11-23T15:00:00.123Z",
        "2026-11-23T15:00:00.623Z",
        "2026-11-23T15:00:01.023Z",
    ]


def test_json_leaves_out_what_is_not_a_plain_value():
    line = written(event(a={"x": 1}, b=[1], c=object(), d=b"x", e=1.5), log_format="json")
    assert set(json.loads(line)) == {"time", "level", "namespace", "message", "e"}


def test_json_stays_json_with_numbers_that_it_has_not():
    line = written(event(a=float("nan"), b=float("inf"), c=2**70), log_format="json")
    fields = json.loads(line, parse_constant=pytest.fail)
    assert "a" not in fields
    assert fields["c"] == 2**70


def test_fields_of_an_event_can_not_take_the_place_of_ours():
    line = written(event(time=1.0, level="x", namespace="y", message="z"), log_format="json")
    fields = json.loads(line)
    assert (fields["level"], fields["namespace"]) == ("INFO", "llmproxy.exchange")
    assert fields["message"] == "hello"


FORGED = (
    "x\r\n2026-11-23T15:00:00.123Z INFO llmproxy  forged\x1b[2J\x9b1m\x85\u2028\u2029\x0b\x7f\0"
)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_control_characters_can_not_forge_a_line(log_format):
    line = written(event("{model}", model=FORGED, log_namespace=FORGED), log_format=log_format)
    assert line.splitlines() == [line[:-1]]
    assert line[:-1].isprintable()


@pytest.mark.parametrize("code", range(0x80))
def test_of_ascii_what_can_not_be_printed_is_escaped(code):
    text = f"a{chr(code)}b"
    assert escape(text) == (text if text.isprintable() else text.encode("unicode_escape").decode())


def test_direction_marks_and_lone_surrogates_are_escaped():
    assert escape("a\u202eb\ud800c\x7f\t\xa0d é漢") == r"a\u202eb\ud800c\x7f\t\xa0d é漢"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_lone_surrogate_in_a_message_is_written(log_format):
    assert r"\ud800" in written(event("{a}", a="\ud800"), log_format=log_format)


def test_a_traceback_follows_its_line_indented():
    failure = failure_of(ValueError("bad\x1b\n2026 INFO forged"))
    line = written(event("it broke", LogLevel.critical, log_failure=failure))
    first, *rest = line[:-1].split("\n")
    assert first == "2026-11-23T15:00:00.123Z CRITICAL llmproxy.exchange  it broke"
    assert "Traceback (most recent call last):" in rest[0]
    assert all(line.startswith("    ") and line.isprintable() for line in rest)
    assert r"    2026 INFO forged" in rest


def test_a_traceback_is_a_field_in_json():
    line = written(event("it broke", log_failure=failure_of(ValueError("x"))), log_format="json")
    assert line.count("\n") == 1
    assert "ValueError: x" in json.loads(line)["traceback"]


def test_a_failure_without_a_message_gives_its_own():
    line = written(event("", LogLevel.critical, log_failure=failure_of(ValueError("why"))))
    assert line.splitlines()[0].endswith("  why")


def test_a_very_long_message_is_cut():
    assert len(written(event("{a}", a="x" * 10**6))) < 20_000


def test_formats_with_calls_and_attributes_work():
    line = written(event("{a.real} {b()} {c!r} {d[0]}", a=1, b=lambda: 2, c="3", d=[4]))
    assert line.endswith("  1 2 '3' 4\n")


@pytest.mark.parametrize("broken", ["{missing}", "{a.b}", "{", None, b"bytes", 5])
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_event_that_can_not_be_formatted_raises_nothing(broken, log_format):
    assert written(event() | {"log_format": broken}, log_format=log_format).count("\n") == 1


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_event_without_anything_is_reported_as_broken(log_format):
    assert "could not be written: KeyError" in written({}, log_format=log_format)


def test_a_field_that_raises_in_its_repr_raises_nothing():
    class Angry:
        def __format__(self, spec: str) -> str:
            raise RuntimeError

        __repr__ = __str__ = None  # type: ignore[assignment]

    assert written(event("{a}", a=Angry())).count("\n") == 1


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.floats(0, 1e6).map(lambda value: round(value, 1))
    | st.text(max_size=20)
    | st.text('ab\x7f\x00\n\\"é\ud800', max_size=8)
)


@given(st.dictionaries(st.text(max_size=5), PLAIN, max_size=5))
def test_what_orjson_writes_is_what_json_does(fields):
    fields = {
        name: value
        for name, value in fields.items()
        if not (isinstance(value, float) and not math.isfinite(value))
    }
    found = logs._encoded(fields)
    assert found.isascii()
    assert found.isprintable()
    assert json.loads(found) == fields


# A line that is logged often


@pytest.fixture
def published() -> Iterator[LogPublisher]:
    """The publisher of all events, as long as nobody observes but whom the test lets in."""
    publisher, others = globalLogPublisher, globalLogPublisher._observers
    publisher._observers = []
    yield publisher
    publisher._observers = others


LITERALS = st.sampled_from(["", " ", "x=", "{{", "}}", "%s", "\u2028", "://"])


@given(
    log_format=st.sampled_from(["text", "json"]),
    literals=st.lists(LITERALS, min_size=4, max_size=4),
    values=st.lists(PLAIN | st.just("http://u:p@h"), min_size=3, max_size=3),
)
def test_a_line_is_written_as_its_event_is(log_format, literals, values):
    text = "".join(f"{literal}{{{name}}}" for literal, name in zip(literals, "abc", strict=False))
    line = Line(Logger("llmproxy.exchange"), text + literals[-1])
    expected = written(
        event(text + literals[-1], **dict(zip("abc", values, strict=True))), log_format=log_format
    )
    stream = io.StringIO()
    with mock.patch("time.time", return_value=WHEN):
        logs.observer(stream, log_format, "INFO").write(line, tuple(values))
    assert stream.getvalue() == expected


def test_a_line_that_only_we_observe_is_no_event(published, monkeypatch):
    stream = io.StringIO()
    published.addObserver(logs.observer(stream, "text", "INFO"))
    logger = Logger("llmproxy.x")
    monkeypatch.setattr(logger, "info", pytest.fail)
    Line(logger, "{a} of {b}")(1, None)
    assert stream.getvalue().endswith(" INFO llmproxy.x  1 of None\n")


def test_a_line_that_others_observe_too_is_an_event(published):
    events: list[dict[str, Any]] = []
    stream = io.StringIO()
    published.addObserver(logs.observer(stream, "text", "INFO"))
    published.addObserver(events.append)
    Line(Logger("llmproxy.x"), "{a} of {b}")(1, None)
    assert stream.getvalue().endswith(" INFO llmproxy.x  1 of None\n")
    [found] = events
    assert formatEvent(found) == "1 of None"
    assert (found["a"], found["b"], found["log_level"]) == (1, None, LogLevel.info)


def test_a_line_is_below_a_level_like_its_event():
    stream = io.StringIO()
    logs.observer(stream, "text", "WARNING").write(Line(Logger(), "{a}"), (1,))
    assert stream.getvalue() == ""


def test_a_line_that_can_not_be_written_raises_nothing():
    stream = io.StringIO()
    logs.observer(stream, "text", "INFO").write(Line(Logger(), "{a}"), ())
    assert "could not be written: TypeError" in stream.getvalue()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_worker_s_line_has_its_number(log_format):
    stream = io.StringIO()
    logs.observer(stream, log_format, "INFO", worker=3)(event())
    if log_format == "json":
        assert json.loads(stream.getvalue())["worker"] == 3
    else:
        assert stream.getvalue().endswith(" INFO llmproxy.exchange[3]  hello\n")


# What passes


@pytest.mark.parametrize(
    ("level", "passing"),
    [
        ("DEBUG", "debug info warn error critical"),
        ("INFO", "info warn error critical"),
        ("WARNING", "warn error critical"),
        ("ERROR", "error critical"),
        ("CRITICAL", "critical"),
    ],
)
def test_events_below_the_level_are_left_out(level, passing):
    events = [event(each.name, each) for each in LogLevel.iterconstants()]
    lines = written(*events, level=level).splitlines()
    assert sorted(line.split()[-1] for line in lines) == sorted(passing.split())


def test_an_event_that_does_not_pass_is_not_formatted():
    class Counted:
        formatted = 0

        def __format__(self, spec: str) -> str:
            self.formatted += 1
            return ""

    counted = Counted()
    written(event("{a}", LogLevel.debug, a=counted), level="INFO")
    assert counted.formatted == 0
    written(event("{a}", LogLevel.info, a=counted), level="INFO")
    assert counted.formatted == 1


@pytest.mark.parametrize("namespace", ["twisted.web.http.HTTPChannel", "log_legacy"])
def test_libraries_are_heard_from_warnings_on(namespace):
    noise = event("noise") | {"log_namespace": namespace}
    assert written(noise) == ""
    assert "noise" in written(noise | {"log_level": LogLevel.warn})
    assert "noise" in written(noise, level="DEBUG")


def test_a_namespace_that_only_begins_alike_is_ours():
    assert written(event() | {"log_namespace": "twistedness"}) != ""


# Secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("mongodb://bob:hunter2@h1,h2/db?a=b", "mongodb://***@h1,h2/db?a=b"),
        ("mongodb://bob:hun/ter@2@h/db", "mongodb://***@h/db"),
        ("mongodb+srv://bob:x@h", "mongodb+srv://***@h"),
        ("see http://u:p@a/ and https://v:q@b/", "see http://***@a/ and https://***@b/"),
        ("http://h/x?token=abc&b=1", "http://h/x?token=***&b=1"),
        (
            "mongodb://h/?tlsCertificateKeyFilePassword=x",
            "mongodb://h/?tlsCertificateKeyFilePassword=***",
        ),
        ("http://host:8000/v1", "http://host:8000/v1"),
        ("mail bob@example.org", "mail bob@example.org"),
    ],
)
def test_credentials_in_uris_are_not_shown(text, shown):
    assert redact(text) == shown


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_part_of_an_event_shows_credentials(log_format):
    uri = "mongodb://bob:hunter2@h/db"
    failure = failure_of(OSError(f"no route to {uri}"))
    line = written(event("{uri}", uri=uri, log_failure=failure), log_format=log_format)
    assert "hunter2" not in line
    assert "mongodb://***@h/db" in line


# Streams that break or block


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for descriptor in (reader, writer):
        try:
            os.close(descriptor)
        except OSError:
            continue


def on_descriptor(descriptor: int) -> tuple[Observer, DescriptorSink]:
    sink = DescriptorSink(descriptor)
    return Observer(sink, logs.text_format(), "INFO"), sink


def read_all(descriptor: int) -> bytes:
    os.set_blocking(descriptor, False)
    found = b""
    try:
        while piece := os.read(descriptor, 2**20):
            found += piece
    except BlockingIOError:
        pass
    return found


def test_lines_go_to_a_descriptor_at_once(pipe):
    observe, sink = on_descriptor(pipe[1])
    observe(event("one"))
    assert read_all(pipe[0]).endswith(b"  one\n")
    assert sink.dropped == 0


def test_a_line_longer_than_a_piece_is_written_whole(pipe):
    observe, _ = on_descriptor(pipe[1])
    observe(event("{a}", a="x" * 10_000 + "end"))
    assert read_all(pipe[0]).endswith(b"xend\n")


def test_a_reader_that_went_away_costs_lines_and_nothing_else(pipe):
    observe, sink = on_descriptor(pipe[1])
    os.close(pipe[0])
    for _ in range(3):
        observe(event())
    assert sink.dropped == 3


def test_a_full_disk_costs_lines_and_nothing_else():
    with open("/dev/full", "wb", buffering=0) as full:
        observe, sink = on_descriptor(full.fileno())
        observe(event())
    assert sink.dropped == 1


def test_a_closed_descriptor_costs_lines_and_nothing_else(pipe):
    os.close(pipe[1])
    observe, sink = on_descriptor(pipe[1])
    observe(event())
    assert sink.dropped == 1


def test_a_reader_that_stands_still_blocks_nothing_and_gets_the_lines_later(pipe):
    observe, sink = on_descriptor(pipe[1])
    assert os.get_blocking(pipe[1])
    began = time.monotonic()
    for number in range(5000):
        observe(event("{n:05}", n=number))
    assert time.monotonic() - began < 2  # it would not end at all if it blocked
    found = read_all(pipe[0])
    while sink._waiting:
        sink.flush()
        found += read_all(pipe[0])
    assert [int(line[-5:]) for line in found.splitlines()] == list(range(5000))
    assert sink.dropped == 0


def test_what_waits_is_bounded_and_the_loss_is_told(pipe):
    observe, sink = on_descriptor(pipe[1])
    for _ in range(500):
        observe(event("{a}", a="x" * 10_000))
    assert sink._size <= logs.MAX_WAITING
    lost = sink.dropped
    assert lost > 300
    while sink._waiting:
        read_all(pipe[0])
        sink.flush()
    read_all(pipe[0])
    observe(event("after"))
    observe(event("later"))
    told, after, later = read_all(pipe[0]).decode().splitlines()
    assert told.endswith(f" ERROR llmproxy.logs  {lost} events were not written")
    assert (after[-5:], later[-5:]) == ("after", "later")


def test_a_line_that_was_cut_by_an_error_does_not_run_into_the_next(tmp_path, monkeypatch):
    real = os.write
    faults = iter([lambda fd, data: real(fd, data[:5]), lambda fd, data: real(-1, data)])
    monkeypatch.setattr(os, "write", lambda *args: next(faults, real)(*args))
    with (tmp_path / "log").open("wb") as file:
        observe, sink = on_descriptor(file.fileno())
        observe(event("one"))
        observe(event("two"))
    cut, told, two = (tmp_path / "log").read_text().splitlines()
    assert cut == "2026-"
    assert "1 events were not written" in told
    assert two.endswith("  two")
    assert sink.dropped == 1


class Reactor(Clock):
    """A reactor that the test starts and stops."""

    def __init__(self) -> None:
        super().__init__()
        self._starting: list[Callable[[], None]] = []
        self._stopping: list[Callable[[], None]] = []

    def callWhenRunning(self, act: Callable[[], None]) -> None:
        self._starting.append(act)

    def addSystemEventTrigger(self, phase: str, event: str, act: Callable[[], None]) -> None:
        assert (phase, event) == ("after", "shutdown")
        self._stopping.append(act)

    def start(self) -> None:
        for act in self._starting:
            act()

    def stop(self) -> None:
        for act in self._stopping:
            act()


@pytest.fixture
def gathering(pipe: tuple[int, int]) -> tuple[Reactor, Observer, int]:
    """A reactor that runs, an observer that gathers lines meanwhile, and where they come out."""
    reactor, (observe, _) = Reactor(), on_descriptor(pipe[1])
    observe.gather(reactor)
    observe(event("before"))
    reactor.start()
    return reactor, observe, pipe[0]


def texts(found: bytes) -> list[str]:
    return [line.split("  ", 1)[1] for line in found.decode().splitlines()]


def test_lines_wait_for_each_other_only_while_the_reactor_runs(gathering):
    reactor, observe, out = gathering
    assert texts(read_all(out)) == ["before"]
    observe(event("one"))
    observe(event("two"))
    reactor.advance(logs.GATHER_S - 0.001)
    assert read_all(out) == b""
    reactor.advance(0.001)
    assert texts(read_all(out)) == ["one", "two"]
    assert reactor.getDelayedCalls() == []
    observe(event("three"))
    reactor.stop()
    assert texts(read_all(out)) == ["three"]
    observe(event("after"))
    assert texts(read_all(out)) == ["after"]


@pytest.mark.parametrize("level", [LogLevel.warn, LogLevel.error, LogLevel.critical])
def test_a_warning_is_written_at_once_and_in_its_turn(gathering, level):
    reactor, observe, out = gathering
    read_all(out)
    observe(event("one"))
    observe(event("two", level))
    assert texts(read_all(out)) == ["one", "two"]
    observe(event("three"))
    reactor.advance(logs.GATHER_S)
    assert texts(read_all(out)) == ["three"]


def test_many_lines_are_written_without_waiting(gathering):
    _, observe, out = gathering
    read_all(out)
    while not (found := read_all(out)):
        observe(event("x" * 1000))
    assert logs.GATHER_BYTES <= len(found) < logs.GATHER_BYTES + 2000


def test_a_line_from_another_thread_is_written_at_once(gathering):
    reactor, observe, out = gathering
    read_all(out)
    thread = Thread(target=observe, args=[event("elsewhere")])
    thread.start()
    thread.join()
    assert texts(read_all(out)) == ["elsewhere"]
    assert reactor.getDelayedCalls() == []


def test_lines_are_never_cut_to_fill_a_piece(gathering, monkeypatch):
    reactor, observe, out = gathering
    read_all(out)
    pieces: list[bytes] = []
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        pieces.append(data)
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    for length in (10, 1000, 3000, 3000, 9000, 10):
        observe(event("x" * length))
    reactor.advance(logs.GATHER_S)
    assert [len(text) for text in texts(read_all(out))] == [10, 1000, 3000, 3000, 9000, 10]
    assert max(map(len, pieces)) <= select.PIPE_BUF
    assert [piece.count(b"\n") for piece in pieces] == [2, 1, 1, 0, 0, 2]


def test_a_loss_while_lines_wait_is_told_with_the_next_line(gathering):
    reactor, observe, out = gathering
    os.close(out)
    observe(event("one"))
    observe(event("two"))
    reactor.advance(logs.GATHER_S)
    assert observe.sink.dropped == 2


def test_a_line_that_is_written_meanwhile_is_neither_doubled_nor_lost(pipe, monkeypatch):
    observe, sink = on_descriptor(pipe[1])
    real = os.write
    late = [event("late")]

    def write(descriptor: int, data: bytes) -> int:
        written = real(descriptor, data)
        if late:
            observe(late.pop())
        return written

    monkeypatch.setattr(os, "write", write)
    observe(event("first"))
    assert texts(read_all(pipe[0])) == ["first", "late"]
    assert sink.dropped == 0


@pytest.mark.parametrize("stream", [None, object()])
def test_no_stream_at_all_raises_nothing(stream):
    observe = logs.observer(stream, "text", "INFO")
    observe(event())
    assert observe.sink.dropped == 1


def test_a_closed_stream_raises_nothing():
    stream = io.StringIO()
    observe = logs.observer(stream, "text", "INFO")
    stream.close()
    observe(event())
    assert observe.sink.dropped == 1


# Under twistd


def test_the_service_brings_its_observer_to_its_application():
    application, service = Application("x"), LoggingService()
    service.log_observer = logs.observer(io.StringIO(), "text", "INFO")
    service.setServiceParent(application)
    assert application.getComponent(ILogObserver) is service.log_observer


def test_without_an_observer_the_application_keeps_its_own():
    application = Application("x")
    LoggingService().setServiceParent(application)
    assert application.getComponent(ILogObserver, None) is None


@pytest.mark.parametrize(
    "options",
    [
        {"nodaemon": True, "logger": "some.factory"},
        {"nodaemon": True, "syslog": True},
        {"nodaemon": False, "logfile": "-"},
    ],
)
def test_what_the_operator_told_twistd_is_left_to_twistd(options):
    assert logs.twistd_observer(options, "text", "INFO") is None


def test_a_daemon_writes_to_a_file_and_appends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("twistd.log").write_text("before\n")
    observe = logs.twistd_observer({"nodaemon": False}, "text", "INFO")
    assert observe is not None
    observe(event())
    assert Path("twistd.log").read_text().splitlines()[0] == "before"
    assert Path("twistd.log").read_text().endswith("hello\n")
    assert isinstance(observe.sink, DescriptorSink)
    os.close(observe.sink._descriptor)


def test_a_log_file_that_can_not_be_opened_is_named(tmp_path):
    path = str(tmp_path / "missing" / "log")
    with pytest.raises(ConfigError, match=f"^{path}: can't be written: No such file"):
        logs.twistd_observer({"nodaemon": True, "logfile": path}, "text", "INFO")


TWISTD = ("-n", "--pidfile=", "-o", "-y", "demo.tac")
TAC = """
import sys, warnings
from twisted.application.service import Application
from twisted.internet import reactor
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from llmproxy import logs

class Demo(logs.LoggingService):
    def startService(self):
        super().startService()
        reactor.callWhenRunning(self.work)

    def work(self):
        Factory().doStart()
        Logger(namespace="llmproxy.demo").info("at work {n}", n=1)
        print("printed")
        reactor.listenTCP(0, Factory(), interface="127.0.0.1")
        reactor.callLater(0, lambda: 1 / 0)
        reactor.callLater(0.01, self.leave)

    def leave(self):
        reactor.stop()
        Logger(namespace="llmproxy.demo").info("at the end")

Logger(namespace="llmproxy.demo").info("at start")
application = Application("demo")
service = Demo()
service.log_observer = logs.twistd_observer({options!r}, {log_format!r}, {level!r})
if service.log_observer:
    service.log_observer.gather(reactor)
service.setServiceParent(application)
"""


def run_twistd(folder: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    settings = {"options": {"nodaemon": True}, "log_format": "text", "level": "INFO"} | settings
    tac = TAC
    for name, setting in settings.items():
        tac = tac.replace(f"{{{name}!r}}", repr(setting))
    (folder / "demo.tac").write_text(tac)
    root = str(Path(logs.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", "from twisted.scripts.twistd import run; run()", *TWISTD],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_under_twistd_each_event_is_one_line_in_our_format(tmp_path):
    done = run_twistd(tmp_path)
    assert done.stderr == ""
    lines = [line for line in done.stdout.splitlines() if not line.startswith("    ")]
    assert [line.split(" ", 1)[1] for line in lines] == [
        "INFO llmproxy.demo  at start",
        "INFO llmproxy.demo  at work 1",
        "INFO stdout  printed",
        "CRITICAL twisted.internet.base  while handling timed call",
        "INFO llmproxy.demo  at the end",
    ]
    assert done.stdout.count("ZeroDivisionError: division by zero") == 1


def test_under_twistd_each_event_is_one_object(tmp_path):
    done = run_twistd(tmp_path, log_format="json")
    objects = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["message"] for each in objects[:3]] == ["at start", "at work 1", "printed"]
    assert objects[1]["n"] == 1


def test_under_twistd_debug_shows_the_libraries_too(tmp_path):
    done = run_twistd(tmp_path, level="DEBUG")
    assert "Starting factory" in done.stdout
    assert "starting up." in done.stdout


def test_under_twistd_a_log_file_takes_what_stdout_would_have(tmp_path):
    done = run_twistd(tmp_path, options={"nodaemon": True, "logfile": "demo.log"})
    assert done.stdout == ""
    assert (tmp_path / "demo.log").read_text().count("at work 1") == 1


def test_a_logger_of_ours_reaches_the_observer():
    stream = io.StringIO()
    log = Logger(namespace="llmproxy.x", observer=logs.observer(stream, "text", "INFO"))
    log.info("{a} and {b}", a=1, b="two")
    assert stream.getvalue().endswith(" INFO llmproxy.x  1 and two\n")
