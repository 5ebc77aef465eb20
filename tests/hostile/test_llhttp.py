"""llhttp's own vectors for requests, and where we are stricter.

`llhttp_requests.tsv` has an input a line, after llhttp's test/request/*.md (nodejs/llhttp
at 01e105a): its file and number there; what the strict parser says (`upgrade` is where it stops for
another protocol), and how many requests it finds whole; the lenient flag with which llhttp tests
it, none of which we set; the bytes. Inputs that are there twice are here once, and such without a
Host have one, so that it is not the Host which we miss.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import httptools
from channels import only_ours
from reading import Reading, read
from tally import LONG, Tally

ABSOLUTE = "a proxy's form of a target; we are no proxy that is chosen by clients"
STRICTER = {
    "connection-5": "more than one empty line before a request",
    "content-length-9": "GET with a body",
    "method-5": "a target that is no path",
    "method-12": "another protocol",
    "method-13": "another protocol",
    "method-14": "another protocol",
    "sample-10": "HTTP/0.9",
    "transfer-encoding-6": "a trailer that says what the body is",
    "transfer-encoding-20": "another coding than chunked, which we could not undo",
    "transfer-encoding-21": "another coding than chunked, which we could not undo",
    "uri-3": ABSOLUTE,
    "uri-4": ABSOLUTE,
    "uri-6": ABSOLUTE,
    "uri-8": "a fragment, which no client may send",
    "uri-10": ABSOLUTE,
}


class Vector(NamedTuple):
    name: str
    llhttp: str
    whole: int
    flag: str
    data: bytes


def vectors() -> list[Vector]:
    lines = Path(__file__).with_name("llhttp_requests.tsv").read_text().splitlines()
    found = []
    for line in lines:
        name, llhttp, whole, flag, escaped = line.split("\t")
        data = escaped.encode().decode("unicode_escape").encode("latin-1")
        found.append(Vector(name, llhttp, int(whole), flag, data))
    return found


class Counting:
    def __init__(self) -> None:
        self.whole = 0

    def on_message_complete(self) -> None:
        self.whole += 1


def test_our_llhttp_takes_what_llhttp_says_it_takes() -> None:
    verdicts = Tally("llhttp, strict")
    for vector in vectors():
        counting, said = Counting(), "ok"
        try:
            httptools.HttpRequestParser(counting).feed_data(vector.data)
        except httptools.HttpParserUpgrade:
            said = "upgrade"
        except httptools.HttpParserError:
            said = "error"
        verdicts.add(vector.name, (said, counting.whole) == (vector.llhttp, vector.whole), said)
    verdicts.check(at_least=130)


def is_over(vector: Vector, reading: Reading) -> bool:
    """What is wrong was refused; or the request before it was the last one, and answered."""
    return reading.refused or (vector.whole > 0 and reading.served != [] and not reading.is_open)


def why_not(vector: Vector, size: int | None) -> str:
    """What is wrong with our reading; nothing, if all is well."""
    reading = read(vector.data, size)
    if vector.llhttp != "ok" or vector.name in STRICTER:
        if not is_over(vector, reading):
            return f"not refused: {reading}"
        return "served too many" if len(reading.served) > vector.whole else ""
    if len(reading.served) != vector.whole:
        return f"served {len(reading.served)}, not {vector.whole}"
    return "" if reading.statuses == [200] * vector.whole else f"answered {reading.statuses}"


@only_ours
def test_we_refuse_all_that_is_wrong_and_understand_the_rest() -> None:
    verdicts = Tally("llhttp")
    for vector in vectors():
        pieces = range(1, len(vector.data)) if LONG else (1, 7)
        for size in (None, *pieces):
            problem = why_not(vector, size)
            verdicts.add(f"{vector.name} in pieces of {size}", not problem, problem)
    verdicts.check(at_least=390)


@only_ours
def test_a_request_behind_a_refused_one_is_never_served() -> None:
    verdicts = Tally("llhttp, followed")
    for vector in vectors():
        if vector.llhttp == "ok" and vector.name not in STRICTER:
            continue
        for gap in (b"", b"\r\n", b"\r\n\r\n", b"0\r\n\r\n"):
            reading = read(vector.data + gap + b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")
            found = any(target == b"/smuggled" for _, target, _ in reading.served)
            verdicts.add(f"{vector.name} and {gap!r}", is_over(vector, reading) and not found)
    verdicts.check(at_least=300)
