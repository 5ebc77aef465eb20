"""JSON that hurts: it is refused at once, or passes byte for byte. Nobody waits for it, and it
takes no more memory than its bytes account for.

Small bodies and large ones are read in two ways, so whatever can be made large comes in both sizes.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import itertools
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
import pytest
from figures import report
from load import Load
from proxy import Answer, request_bytes
from pulse import pulse_of
from rig import Rig
from tally import LONG

from llmproxy.parts import LONG_VALUE
from llmproxy.survey import MAX_VALUES

MIB = 1024 * 1024
PULSE = Path(__file__).with_name("pulse.py")
CHAT, MESSAGES, AUDIO = "/v1/chat/completions", "/v1/messages", "/v1/audio/transcriptions"
RESPONSES = "/v1/responses"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "input_tokens": 3, "output_tokens": 2}
ANSWER = orjson.dumps({"choices": [], "text": "", "duration": 1.0, "usage": USAGE})

#: Processor time, in seconds, that one refusal may take, and that nothing else is done for.
REFUSAL_S, STALL_S = (0.1, 0.05) if LONG else (0.3, 0.1)


def most_memory(body: bytes) -> int:
    """What one request may take: ten times its bytes; and pages that come with any."""
    return 10 * len(body) + MIB


# --- a proxy in a process of its own, and a server that counts ---------------------------------


class Server(BaseHTTPRequestHandler):
    """An LLM server that keeps the digests of the bodies that it got, and answers when it may."""

    protocol_version = "HTTP/1.1"
    digests: list[str]
    may_answer: threading.Event

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        digest, length = hashlib.sha256(), int(self.headers.get("content-length", -1))
        while length != 0:
            if length < 0:
                size = int(self.rfile.readline(), 16)
                digest.update(self.rfile.read(size))
                self.rfile.readline()
                length = 0 if size == 0 else -1
            else:
                part = self.rfile.read(min(length, MIB))
                digest.update(part)
                length -= len(part)
        self.digests.append(digest.hexdigest())
        self.may_answer.wait()
        self._answer()

    def _answer(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, format: str, *args: object) -> None:
        """Nobody wants to know."""


class Measured:
    """A proxy that is measured. `digests`: of what its server got, which answers when it may."""

    def __init__(self, rig: Rig, pid: int, digests: list[str], may_answer: threading.Event) -> None:
        self.rig = rig
        self.digests = digests
        self.may_answer = may_answer
        self._pid = pid

    def post(self, path: str, body: bytes, **fields: str) -> Answer:
        """The answer to a body; `fields` are header fields, with `_` for `-`."""
        named = {name.replace("_", "-"): value for name, value in fields.items()}
        return self.send(request_bytes("POST", path, body, key=Load.key(0), fields=named))

    def post_chunks(self, path: str, body: bytes, size: int, content_type: str) -> Answer:
        """The answer to a body that comes in chunks of `size` bytes."""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: proxy\r\nAuthorization: Bearer {Load.key(0)}\r\n"
            f"Content-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        parts = (body[at : at + size] for at in range(0, len(body), size))
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
        return self.send(head.encode() + chunks + b"0\r\n\r\n")

    def send(self, data: bytes) -> Answer:
        """The answer to a request; all of that is sent, though the answer may come before."""
        with socket.create_connection(("127.0.0.1", self.rig.port), timeout=30) as connection:
            sending = threading.Thread(target=_send, args=(connection, data))
            sending.start()
            answer = _received(connection)
            sending.join()
        return answer

    def passed(self) -> tuple[int, int]:
        """How many requests its server got, and how many rows the ledger has."""
        return len(self.digests), self.rig.query("SELECT count(*) FROM ledger")[0][0]

    def cpu_s(self) -> float:
        """The processor time that it has had."""
        return int(self._proc("schedstat").split()[0]) / 1e9

    def written(self) -> int:
        """Bytes that it has written to files."""
        lines = dict(line.split(": ") for line in self._proc("io").splitlines())
        return int(lines["wchar"])

    @contextmanager
    def peak(self) -> Iterator[Callable[[], int]]:
        """Tells how much more memory it had than at the begin, in bytes."""
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")
        before = self._memory("VmRSS")
        yield lambda: self._memory("VmHWM") - before

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Its server answers at the end."""
        self.may_answer.clear()
        try:
            yield
        finally:
            self.may_answer.set()

    @contextmanager
    def pulse(self) -> Iterator[None]:
        """Fails if it did one thing for too long."""
        asyncio.run(pulse_of(self._pid, self.rig.folder))
        yield
        pulse = asyncio.run(pulse_of(self._pid, self.rig.folder))
        report("JSON, the longest that others wait", seconds=pulse.busy_s)
        assert pulse.busy_s < STALL_S

    def _memory(self, name: str) -> int:
        lines = dict(line.split(":") for line in self._proc("status").splitlines())
        return int(lines[name].split()[0]) * 1024

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self._pid}/{name}").read_text()


def _send(connection: socket.socket, data: bytes) -> None:
    with suppress(OSError):  # it may be refused before it is whole
        connection.sendall(data)


def _received(connection: socket.socket) -> Answer:
    raw = b""
    while not Answer(raw).whole:
        data = connection.recv(65536)
        assert data, f"closed after {raw!r}"
        raw += data
    return Answer(raw)


@contextmanager
def measured(folder: Path) -> Iterator[Measured]:
    digests: list[str] = []
    may_answer = threading.Event()
    may_answer.set()
    handler = type("Counting", (Server,), {"digests": digests, "may_answer": may_answer})
    listening = type("Listening", (ThreadingHTTPServer,), {"request_queue_size": 128})
    server = listening(("127.0.0.1", 0), handler)
    server.handle_error = lambda *args: None  # the proxy was killed
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    serving.start()
    rig = Rig(folder, clients=1, command=[str(PULSE)])
    rig.configure(f"http://127.0.0.1:{server.server_port}")
    process, _ = asyncio.run(rig.serving())
    try:
        yield Measured(rig, process.pid, digests, may_answer)
    finally:
        process.kill()
        process.wait()
        server.shutdown()
        server.server_close()
        serving.join()


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    with measured(tmp_path_factory.mktemp("proxy")) as running:
        assert running.post(CHAT, GOOD).status == 200  # all is loaded
        yield running


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Measured]:
    """One whose memory nobody has used before."""
    with measured(tmp_path) as running:
        assert running.post(CHAT, GOOD).status == 200
        yield running


# --- what is refused ------------------------------------------------------------------------------

ASK = b'{"model":"m","messages":[],"x":'
#: A field that makes a body large.
PAD = b'"pad":"%b",' % (b"x" * 100_000)

#: In the place of a value: 400, whatever the body's size.
VALUES: dict[str, bytes] = {
    "nested 100,000": b"[" * 100_000 + b"]" * 100_000,
    "objects nested 100,000": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nested 1,025": b"[" * 1024 + b"]" * 1024,
    "an integer of 4,301 digits": b"9" * 4301,
    "1e400": b"1e400",
    "-1e400": b"-1e400",
    "NaN": b"NaN",
    "Infinity": b"Infinity",
    "-Infinity": b"-Infinity",
    "hexadecimal": b"0x10",
    "a leading zero": b"01",
    "a plus": b"+1",
    "invalid UTF-8": b'"\xff"',
    "overlong UTF-8": b'"\xc0\xaf"',
    "a surrogate in UTF-8": b'"\xed\xa0\x80"',
    "beyond Unicode": b'"\xf4\x90\x80\x80"',
    "half a character": b'"\xe2\x82"',
    "a lone high surrogate": b'"\\ud800"',
    "a lone low surrogate": b'"\\udc00"',
    "surrogates in the wrong order": b'"\\udc00\\ud800"',
    "an unknown escape": b'"\\x41"',
    "a control character": b'"\x00"',
    "a line end in a string": b'"\n"',
    "a string without an end": b'"abc',
    "a comma at the end": b"[1,]",
    "no comma": b"[1 2]",
    "a comment": b"/* */ 1",
    "quotes of another kind": b"'a'",
    "nothing": b"",
    "half of an array": b"[1",
    "an array that ends as an object": b"[1}",
    "a form feed": b"\x0c1",
    "no-break space": b"\xc2\xa01",
}
GOOD = ASK + b'"\xc3\xa4"}'
#: As a body.
BODIES: dict[str, bytes] = {
    "empty": b"",
    "space": b" \r\n",
    "much space": b" " * MIB,
    "null": b"null",
    "an array": b"[" + GOOD + b"]",
    "a string": b'"' + b"x" * MIB + b'"',
    "a number": b"1",
    "a byte order mark": b"\xef\xbb\xbf" + GOOD,
    "UTF-16": GOOD.decode().encode("utf-16"),
    "UTF-16, no mark": GOOD.decode().encode("utf-16-be"),
    "large UTF-16": (GOOD[:-1] + b"," + PAD[:-1] + b"}").decode().encode("utf-16-le"),
    "UTF-32": GOOD.decode().encode("utf-32"),
    "Latin-1": GOOD.decode().encode("latin-1"),
    "trailing bytes": GOOD + b"x",
    "a trailing NUL": GOOD + b"\0",
    "twice": GOOD + GOOD,
    "two lines": GOOD + b"\n" + GOOD,
    "only brackets": b"[" * (16 * MIB),
    "only names": b'{"a":' * (3 * MIB),
    "only braces": b"{" * MIB,
    "only quotes": b'"' * MIB,
    "only backslashes": b'{"a":"' + b"\\" * MIB,
    "only commas": b'{"a":[' + b"," * MIB,
    "only digits": b'{"a":' + b"1" * (8 * MIB),
    "many arrays": ASK + b"[" + b"[]," * (5 * MIB) + b"[]]}",
    "many objects": ASK + b"[" + b'{"a":{}},' * MIB + b"[]]}",
    "many deep arrays": ASK + b"[" + (b"[" * 500 + b"]" * 500 + b",") * 5000 + b"1]}",
    "many empty strings": ASK + b"[" + b'"",' * MIB + b"1]}",
    "many strings with escapes": ASK + b"[" + b'"\\n\\n\\n\\n\\n",' * (MIB // 4) + b"1]}",
    "many names with escapes": ASK + b"[" + b'{"\\n\\n\\n\\n\\n":1},' * (MIB // 4) + b"1]}",
    "many names": ASK + b"{" + b",".join(b'"%x":1' % n for n in range(200_000)) + b"}}",
    "many fields": ASK + b"1," + b",".join(b'"%x":1' % n for n in range(200_000)) + b"}",
    "many fields, but small": ASK + b"1," + b",".join(b'"%x":1' % n for n in range(5000)) + b"}",
    "one field many times": ASK + b"1" + b',"a":1' * 100_000 + b"}",
    "a name of 1 MiB": b'{"model":"m","' + b"n" * MIB + b'":1}',
}


#: Members of a body in which a field stands twice, or as good as that.
TWICE: dict[str, bytes] = {
    "two models": b'"model":"m","model":"n"',
    "one model twice": b'"model":"m","a":1,"model":"m"',
    "a model with an escape": b'"model":"m","\\u006dodel":"n"',
    "a model with escapes": b'"\\u006d\\u006F\\u0064\\u0065\\u006C":"m","model":"n"',
    "a capital model": b'"model":"m","Model":"n"',
    "a capital model first": b'"MODEL":"n","model":"m"',
    "two streams": b'"model":"m","stream":false,"stream":true',
    "a stream with a long s": b'"model":"m","\xc5\xbftream":true',
    "a stream with a long s, escaped": b'"model":"m","\\u017ftream":true',
    "options twice": b'"model":"m","stream_options":null,"stream_options":{}',
    "an option twice": b'"model":"m","stream_options":{"include_usage":true,"include_usage":false}',
    "an option with an escape": b'"model":"m","stream_options":{"include_usage":true,'
    b'"include\\u005fusage":false}',
    "n twice": b'"model":"m","n":1,"n":1000',
    "a length twice": b'"model":"m","max_tokens":1,"max_tokens":1000000',
    "messages twice": b'"model":"m","messages":[],"messages":[{}]',
    "background twice": b'"model":"m","background":false,"background":true',
    "an unknown field twice": b'"model":"m","seed":1,"seed":1',
    "no name twice": b'"model":"m","":1,"":2',
    "far apart": b'"model":"m",' + b'"a":"' + b"x" * MIB + b'","model":"n"',
}


def refused() -> Iterator[tuple[str, bytes]]:
    yield from BODIES.items()
    for name, twice in TWICE.items():
        yield name, b"{" + twice + b"}"
        yield f"{name}, in a large body", b"{" + PAD + twice + b"}"
    for name, value in VALUES.items():
        yield name, ASK + value + b"}"
        yield f"{name}, in a large body", ASK + value + b"," + PAD[:-1] + b"}"
        yield f"{name}, late in a large body", b"{" + PAD + ASK[1:] + value + b"}"


@pytest.mark.timeout(120)
def test_what_is_not_json_is_refused_at_once_and_holds_up_nobody(proxy: Measured) -> None:
    slowest: tuple[float, str] = (0.0, "")
    passed = proxy.passed()
    with proxy.pulse():
        for number, (name, body) in enumerate(refused()):
            path = (CHAT, MESSAGES)[number % 2]
            with proxy.peak() as memory:
                before_s = proxy.cpu_s()
                answer = proxy.post(path, body)
                took_s = proxy.cpu_s() - before_s
                assert memory() < most_memory(body), name
            assert answer.status == 400, name
            check_shape(path, answer.json())
            assert took_s < REFUSAL_S, name
            slowest = max(slowest, (took_s, name))
    report("JSON refused", tried=number + 1, slowest_s=slowest[0], which=repr(slowest[1]))
    assert proxy.passed() == passed
    assert proxy.post(CHAT, GOOD).status == 200


def check_shape(path: str, body: dict[str, Any]) -> None:
    """An error as the clients of a path expect it."""
    error = body["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(("The request body is ", "The field "))
    assert body.get("type") == ("error" if path == MESSAGES else None)


# --- what passes ----------------------------------------------------------------------------------


def filled(unit: bytes, size: int, begin: bytes = ASK, end: bytes = b"}") -> bytes:
    """A body of `size` bytes, with much of `unit` in it."""
    body = begin + unit * ((size - len(begin) - len(end)) // len(unit))
    return body + b" " * (size - len(body) - len(end)) + end


SIZE = 32 * MIB
LARGE: dict[str, Callable[[], bytes]] = {
    "an image": lambda: filled(b"iVBORw0KGgoA", SIZE, ASK + b'"data:image/png;base64,', b'"}'),
    "source code": lambda: filled(b'if a == \\"\\u00e4\\":\\n\\t', SIZE, ASK + b'"', b'"}'),
    "other scripts": lambda: filled("наука 学问 😀 ".encode(), SIZE, ASK + b'"', b'"}'),
    "tokens": lambda: filled(b"17,4004,99999,", SIZE, ASK + b"[", b"1]}"),
    "vectors": lambda: filled(b"-0.03125,1.5e-7, ", SIZE, ASK + b"[[1],[", b"1]]}"),
    "space": lambda: filled(b" \t\r\n", SIZE, ASK + b"1"),
    "long messages": lambda: filled(
        b'{"role":"user","content":"' + b"word " * 1000 + b'"},',
        SIZE,
        b'{"model":"m","messages":[',
        b"{}]}",
    ),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", LARGE if LONG else ["long messages"])
@pytest.mark.parametrize(("path", "more"), [(CHAT, b""), (RESPONSES, b',"store":false')])
def test_the_largest_body_passes_in_twice_its_memory_and_on_no_disk(
    fresh: Measured, kind: str, path: str, more: bytes
) -> None:
    body = LARGE[kind]()
    assert len(body) == SIZE
    written = fresh.written()
    with fresh.pulse(), fresh.peak() as memory:
        answer = fresh.post(path, body)
        taken = memory()
    report(f"JSON of 32 MiB, {kind}, {path}", memory_mib=taken / MIB)
    assert answer.status == 200, answer.body
    assert fresh.digests[-1] == hashlib.sha256(body[:-1] + more + body[-1:]).hexdigest()
    assert taken < 2 * SIZE + 8 * MIB
    assert fresh.written() - written < MIB
    assert fresh.rig.query("SELECT state FROM ledger") == [("settled",)] * 2
    assert fresh.post(path, body + b" ").status == 413


SHORT = 64 * 1024 - 1
#: How many that are nested deeply may stand in a body.
DEEP = MAX_VALUES // LONG_VALUE // 1000
PARTS = b'{"content":[{"image_url":{"url":"data:,"}}]},'
#: As many values as a body may have.
COMPLEX = {
    "short arrays": filled(b"[[[]]],", SHORT, ASK + b"[", b"1]}"),
    "short objects": filled(b'{"a":{}},', SHORT, ASK + b"[", b"1]}"),
    "short strings": filled(b'"a\xc3\xa9",', SHORT, ASK + b"[", b"1]}"),
    "short escapes": filled(b'"\\n",', SHORT, ASK + b"[", b"1]}"),
    "short numbers": filled(b"999,", SHORT, ASK + b"[", b"1]}"),
    "arrays": ASK + b"[" + b"[]," * (MAX_VALUES // 2 - 99) + b"1]" + b" " * 65536 + b"}",
    "objects": ASK + b"[" + b'{"a":{}},' * (MAX_VALUES // 3 - 99) + b"1]}",
    "deep arrays": ASK + b"[" + (b"[" * 1000 + b"]" * 1000 + b",") * DEEP + b"1]}",
    "deep objects": ASK
    + b"["
    + (b'{"content":' * 1000 + b"1" + b"}" * 1000 + b",") * DEEP
    + b"1]}",
    "nameless objects": ASK + b"[" + (b'{"":' * 1000 + b"1" + b"}" * 1000 + b",") * DEEP + b"1]}",
    "strings": ASK + b"[" + b'"%b",' % (b"x" * 60) * (MAX_VALUES - 99) + b"1]}",
    "names": ASK + b"{" + b",".join(b'"%x":1' % n for n in range(MAX_VALUES - 99)) + b"}}",
    "messages": b'{"model":"m","messages":[' + PARTS * (MAX_VALUES // 5 - 99) + b"{}]}",
}


@pytest.mark.timeout(60)
def test_the_most_complex_bodies_that_pass_hold_up_nobody(proxy: Measured) -> None:
    with proxy.pulse():
        for name, body in COMPLEX.items():
            with proxy.peak() as memory:
                answer = proxy.post(CHAT, body)
                more = memory()
            report(f"complex JSON, {name}", memory_mib=more / MIB, of=len(body) / MIB)
            assert answer.status == 200, (name, answer.body)
            assert proxy.digests[-1] == hashlib.sha256(body).hexdigest()
            assert more < most_memory(body), name


CROWDS = [("deep objects", 8), ("messages", 40)]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("kind", "many"), CROWDS)
def test_many_of_them_at_once_are_read_one_by_one(proxy: Measured, kind: str, many: int) -> None:
    bodies = [COMPLEX[kind]] * many
    with proxy.pulse(), ThreadPoolExecutor(many) as crowd, proxy.peak() as memory:
        assert {answer.status for answer in crowd.map(partial(proxy.post, CHAT), bodies)} == {200}
        more = memory()
    report(f"complex JSON, {many} {kind}", memory_mib=more / MIB, of=sum(map(len, bodies)) / MIB)


WAITING = 80


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", [b"[],", b'{"a":{}},', b'"a",'])
def test_requests_that_wait_for_their_server_take_little_more_than_their_bytes(
    fresh: Measured, unit: bytes
) -> None:
    body = filled(unit, 60_000, ASK + b"[", b"1]}")
    with ThreadPoolExecutor(WAITING) as crowd, fresh.holding(), fresh.peak() as memory:
        answers = [crowd.submit(fresh.post, CHAT, body) for _ in range(WAITING)]
        while len(fresh.digests) < WAITING + 1:
            assert not any(answer.done() for answer in answers)
            time.sleep(0.02)
        more = memory()
    assert {answer.result().status for answer in answers} == {200}
    report(f"waiting JSON, {unit!r}", times=more / WAITING / len(body))
    assert more < 10 * WAITING * len(body)


# --- codings, chunks, forms -----------------------------------------------------------------------

ZEROS = gzip.compress(bytes(16 * MIB))
#: A frame of zstd (RFC 8878) whose blocks are each one byte that stands for 128 KiB.
ZSTD = b"\x28\xb5\x2f\xfd\x00\x58" + b"\x02\x00\x10\x00" * 1000 + b"\x03\x00\x00"


@pytest.mark.timeout(60)
def test_coded_bodies_are_refused_and_never_unpacked(proxy: Measured) -> None:
    coded = {
        "gzip": [ZEROS, gzip.compress(GOOD), gzip.compress(ZEROS), GOOD, b""],
        "x-gzip": [ZEROS],
        "deflate": [zlib.compress(bytes(16 * MIB)), zlib.compress(GOOD)],
        "br": [b"\x0b\x03\x80" + GOOD + b"\x03", bytes(1000)],
        "zstd": [ZSTD, GOOD],
        "gzip, gzip": [gzip.compress(ZEROS)],
        "identity": [GOOD],
        "GZIP": [ZEROS],
        "unknown": [GOOD],
        "": [GOOD],
    }
    passed = proxy.passed()
    with proxy.pulse(), proxy.peak() as memory:
        for coding, bodies in coded.items():
            for path, body in itertools.product((CHAT, MESSAGES), bodies):
                answer = proxy.post(path, body, Content_Encoding=coding)
                assert answer.status == 415, (coding, len(body))
                assert answer.json()["error"]["message"].startswith("A request's body can't have")
        assert memory() < 4 * MIB
    assert proxy.passed() == passed


def form(*parts: tuple[str, bytes], boundary: bytes = b"X") -> bytes:
    body = b"".join(
        b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
        % (boundary, name.encode(), content)
        for name, content in parts
    )
    return body + b"--" + boundary + b"--\r\n"


MODEL = ("model", b"m")
FORMS = {
    "near its boundary": form(("file", b"a--X" * (2 * MIB)), MODEL),
    "line ends": form(("file", b"\r\n" * (4 * MIB)), MODEL),
    "half boundaries": form(MODEL, ("file", b"\r\n-" * (8 * MIB // 3))),
    "the model last": form(("file", bytes(24 * MIB)), MODEL),
}


@pytest.mark.timeout(60)
def test_forms_hold_up_nobody_and_take_no_more_memory_than_they_account_for(
    proxy: Measured,
) -> None:
    for name, body in FORMS.items():
        with proxy.pulse(), proxy.peak() as memory:
            answer = proxy.post(AUDIO, body, Content_Type="multipart/form-data; boundary=X")
            more = memory()
        report(f"form, {name}", memory_mib=more / MIB, of=len(body) / MIB)
        assert answer.status == 200, answer.body
        assert more < 3 * len(body) + 8 * MIB


@pytest.mark.timeout(60)
def test_tiny_chunks_take_no_more_memory_than_they_account_for(fresh: Measured) -> None:
    # Smaller ones have more framing than is taken.
    for path, content_type, body in (
        (CHAT, "application/json", filled(b"word ", MIB, ASK + b'"', b'"}')),
        (AUDIO, "multipart/form-data; boundary=X", form(("file", bytes(MIB)), MODEL)),
    ):
        with fresh.pulse(), fresh.peak() as memory:
            answer = fresh.post_chunks(path, body, 3, content_type)
            more = memory()
        report(f"chunks of 3 bytes, {path}", memory_mib=more / MIB, of=len(body) / MIB)
        assert answer.status == 200, answer.body
        assert more < 4 * len(body) + 2 * MIB
