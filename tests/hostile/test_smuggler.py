"""smuggler's mutations of Transfer-Encoding beside a Content-Length, all three of its lists
(github.com/defparam/smuggler, 2d6930e: configs/default.py, exhaustive.py, doubles.py).

Each stands in two requests with a valid key:

- with a JSON body of the right length: it is refused, or the backend gets that body in a request
  that is framed anew, and nothing else;
- with a body that to a reader of chunks is empty, and followed by another request: whatever becomes
  of it, no backend hears of the other one.
"""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
import pytest_twisted
from backend import ScriptedBackend, json_answer
from proxy import KEY, ProxyHandle, request_bytes, running_proxy
from reading import read
from tally import LONG, Tally

CHAT = "/v1/chat/completions"
BODY = orjson.dumps({"model": "chat", "messages": []})
COMPLETION = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
SECOND = request_bytes("POST", CHAT, BODY)
EMPTY = b"0\r\n\r\n" + SECOND

NAME, VALUE = b"Transfer-Encoding", b"chunked"
CONTROLS, HIGH = range(0x01, 0x20), range(0x7F, 0x100)


def mutant(
    before: bytes = b"", name: bytes = b"", value: bytes = b" ", after: bytes = b""
) -> bytes:
    """The field with bytes in its four gaps: before it, behind its name, before and behind its
    value."""
    return before + NAME + name + b":" + value + VALUE + after


def default_list() -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for n in (0x1, 0x4, 0x8, 0x9, 0xA, 0xB, 0xC, 0xD, 0x1F, 0x20, 0x7F, 0xA0, 0xFF):
        c = bytes([n])
        found |= {
            f"before the value {n:#x}": mutant(value=c),
            f"behind the name {n:#x}": mutant(name=c),
            f"in front {n:#x}": mutant(before=c),
            f"behind the value {n:#x}": mutant(after=c),
            f"in another field {n:#x}": b"X: X" + c + mutant(),
            f"another field in it {n:#x}": mutant(after=c + b"X: X"),
            f"CR and in another field {n:#x}": b"X: X\r" + c + mutant(),
            f"in another field and LF {n:#x}": b"X: X" + c + b"\n" + mutant(),
            f"CR and another field in it {n:#x}": mutant(after=b"\r" + c + b"X: X"),
            f"another field in it and LF {n:#x}": mutant(after=c + b"\nX: X"),
        }
    return found


def words() -> dict[str, bytes]:
    return {
        "a space in front": mutant(before=b" "),
        "a tab before the value": mutant(value=b"\t"),
        "tabs around the colon": mutant(name=b"\t", value=b"\t"),
        "a space in the name": b"Transfer Encoding: chunked",
        "an underscore in the name": b"Transfer_Encoding: chunked",
        "a space in the name, none behind": b"Transfer Encoding:chunked",
        "a space behind the name": mutant(name=b" "),
        "two spaces": mutant(value=b"  "),
        "a vertical tab": mutant(value=b"\x0b"),
        "chunked, and one more": mutant(after=b", cow"),
        "one more, and chunked": mutant(value=b" cow, "),
        "another field": b"Content-Encoding: chunked",
        "a bare LF and a space": mutant(value=b"\n "),
        "quotes": mutant(value=b' "', after=b'"'),
        "apostrophes": mutant(value=b" '", after=b"'"),
        "the half of it": b"Transfer-Encoding: chunk",
        "mixed case": b"TrAnSFer-EnCODinG: cHuNkeD",
        "capitals": b"TRANSFER-ENCODING: CHUNKED",
        "CR behind": mutant(after=b"\r"),
        "a tab behind": mutant(after=b"\t"),
        "another one first": b"Transfer-Encoding: cow\r\n" + mutant(),
        "CR in the name": b"Transfer\r-Encoding: chunked",
        "between words": mutant(value=b" cow ", after=b" bar"),
        "a high byte": mutant(value=b"\xff"),
        "a high byte in the value": b"Transfer-Encoding: ch\x96nked",
        "a high byte in the name": b"Transf\x82r-Encoding: chunked",
        "behind another field's CR": b"X:X\r" + mutant(),
        "behind another field's LF": b"X:X\n" + mutant(),
    }


def exhaustive_list() -> dict[str, bytes]:
    found = words()
    for n in (*CONTROLS, *HIGH):
        c = bytes([n])
        found |= {
            f"before the value {n:#x}": mutant(value=c),
            f"behind the name {n:#x}": mutant(name=c),
            f"in front {n:#x}": mutant(before=c),
            f"behind the value {n:#x}": mutant(after=c),
        }
    return found


def doubles_list() -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for n in (*CONTROLS, 0x20, *HIGH):
        c = bytes([n])
        found |= {
            f"in front, behind the name {n:#x}": mutant(before=c, name=c),
            f"in front, before the value {n:#x}": mutant(before=c, value=c),
            f"in front, behind the value {n:#x}": mutant(before=c, after=c),
            f"around the colon {n:#x}": mutant(name=c, value=c),
            f"behind the name, behind the value {n:#x}": mutant(name=c, after=c),
            f"around the value {n:#x}": mutant(value=c, after=c),
        }
    return found


LISTS = {"default": default_list(), "exhaustive": exhaustive_list(), "doubles": doubles_list()}


def request(field: bytes, body: bytes, *, mutant_first: bool) -> bytes:
    fields = [field, b"Host: proxy", b"Content-Length: %d" % len(body)]
    if not mutant_first:
        fields.reverse()
    key = b"Authorization: Bearer " + KEY.encode()
    lines = [b"POST /v1/chat/completions HTTP/1.1", key, b"Content-Type: application/json", *fields]
    return b"\r\n".join([*lines, b"", b""]) + body


@pytest.mark.parametrize("name", LISTS)
def test_a_mutant_is_refused_or_the_length_holds(name: str) -> None:
    verdicts = Tally(f"smuggler, {name}")
    for gadget, field in LISTS[name].items():
        for mutant_first in (True, False):
            reading = read(request(field, BODY, mutant_first=mutant_first))
            plain = reading.statuses == [200] and [each[2] for each in reading.served] == [BODY]
            verdicts.add(gadget, plain or (reading.refused and not reading.served), f"{reading}")
            reading = read(request(field, EMPTY, mutant_first=mutant_first))
            plain = reading.statuses == [200] and [each[2] for each in reading.served] == [EMPTY]
            verdicts.add(gadget, plain or (reading.refused and not reading.served), f"{reading}")
    verdicts.check(at_least=500)


async def why_not(proxy: ProxyHandle, backend: ScriptedBackend, field: bytes, first: bool) -> str:
    """What is wrong, and nothing if no second request came through."""
    before = len(backend.requests)
    answer = await proxy.send(request(field, BODY, mutant_first=first))
    seen = backend.requests[before:]
    if answer.status == 200:
        if [(each.body, each.header("transfer-encoding")) for each in seen] != [(BODY, None)]:
            return f"the backend got {[each.raw for each in seen]}"
        if seen[0].header("content-length") != str(len(BODY)):
            return f"framed by {seen[0].head!r}"
    elif answer.status not in (400, 415) or seen:  # 415: a Content-Encoding
        return f"answered {answer.status}, the backend got {[each.raw for each in seen]}"
    before = len(backend.requests)
    answer = await proxy.send(request(field, EMPTY, mutant_first=first))
    if answer.status not in (400, 415) or len(backend.requests) > before:
        return f"the second: answered {answer.status}, {backend.requests[before:]}"
    return ""


@pytest.mark.parametrize("name", LISTS if LONG else ["default"])
@pytest_twisted.ensureDeferred
async def test_no_backend_hears_of_a_second_request(tmp_path: Path, name: str) -> None:
    verdicts = Tally(f"smuggler, {name}, to the backend")
    async with (
        ScriptedBackend([json_answer(200, COMPLETION)]) as backend,
        running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy,
    ):
        for gadget, field in LISTS[name].items():
            for first in (True, False) if LONG else (True,):
                problem = await why_not(proxy, backend, field, first)
                verdicts.add(gadget, not problem, problem)
        assert len(proxy.rows()) == len(backend.requests)
    verdicts.check(at_least=130)
