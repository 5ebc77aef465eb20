"""What is billed when a backend's usage, or the end of its answer, is not as it should be.

Each table goes through a real proxy, to the ledger's rows and the lines of the bill: a number that
can't be a count is never billed, and never guessed in silence; a whole answer is never free.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
import pytest_twisted
from backend import (
    CHUNKED,
    DONE,
    JSON,
    LAST_CHUNK,
    SSE,
    Close,
    Flood,
    Pause,
    Reset,
    ScriptedBackend,
    Seen,
    Stall,
    chunk,
    head,
    json_answer,
    raw_answer,
    sse_event,
)
from proxy import Answer, ProxyHandle, reactor, request_bytes, running_proxy
from speech import ALL, CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES, Speech
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater

from llmproxy.model import MAX_COUNT

Steps = Sequence[Any]
#: State, outcome, prompt (or embedding), completion.
Row = tuple[str, str, int | None, int | None]


class Case(NamedTuple):
    """What a backend does, and the row that it leaves. `status`, `whole`: as the client sees it;
    `raw`: what stands in the row's text."""

    name: str
    speech: Speech
    stream: bool
    steps: Steps
    row: Row
    raw: str | None = None
    status: int = 200
    whole: bool = True


def proxy_for(folder: Path, backend: ScriptedBackend, **more: Any) -> Any:
    return running_proxy(folder, {"m": {"url": backend.url, **more}})


async def disputed(proxy: ProxyHandle) -> float:
    """How many rows the metrics say are disputed."""
    page = (await proxy.get("/metrics", port=proxy.admin_port)).body.decode()
    found = re.search(r'^llmproxy_ledger_rows_total\{state="disputed"\} (\S+)$', page, re.M)
    assert found is not None
    return float(found[1])


async def run(folder: Path, cases: Sequence[Case], **more: Any) -> list[Answer]:
    """Ask for each; each row and each line of the bill must be as its case says."""
    steps = iter(cases)
    async with ScriptedBackend(lambda seen: next(steps).steps) as backend:
        async with proxy_for(folder, backend, **more) as proxy:
            answers = [await one(proxy, case) for case in cases]
            assert len(backend.requests) == len(cases)
            columns = "rid, state, outcome, coalesce(prompt, embedding), completion, raw"
            rows = proxy.rows(columns)
            for case, (rid, *row, raw) in zip(cases, rows, strict=True):
                assert tuple(row) == case.row, (case.name, row)
                assert (raw is None) == (case.raw is None), (case.name, raw)
                assert case.raw is None or case.raw in raw, (case.name, raw)
                assert_billed(proxy, rid, case)
            counted = sum(case.row[0] == "disputed" for case in cases)
            assert await disputed(proxy) == counted
            return answers


async def one(proxy: ProxyHandle, case: Case) -> Answer:
    body = case.speech.request("m", "hi", stream=case.stream)
    answer = await proxy.send(request_bytes("POST", case.speech.path, body))
    assert (answer.status, answer.whole) == (case.status, case.whole), (case.name, answer.raw)
    return answer


def assert_billed(proxy: ProxyHandle, rid: str, case: Case) -> None:
    state, _, *counts = case.row
    lines = dict(proxy.query(f"SELECT product, quantity FROM event_oneoff WHERE rid = '{rid}'"))
    if state in ("settled", "estimated"):
        kinds = zip(case.speech.kinds, counts, strict=False)
        assert lines == {f"m/gpu/{kind}": n for kind, n in kinds if n is not None}, case.name
    else:
        assert lines == {}, case.name
    assert all(type(n) is int and 0 <= n <= MAX_COUNT for n in lines.values())


# --- odd usage ----------------------------------------------------------------------------------

NAMES = {
    MESSAGES: ("input_tokens", "output_tokens"),
    RESPONSES: ("input_tokens", "output_tokens"),
    EMBEDDINGS: ("prompt_tokens",),
}
#: No counts, as JSON has them.
ODD = ["-1", "3.0", "3.5", '"3"', "true", "1" + "0" * 30, "1e3", f"{MAX_COUNT + 1}", "[3]", "{}"]
#: Counts.
GOOD = {"0": 0, "1": 1, f"{MAX_COUNT}": MAX_COUNT}


def names_of(speech: Speech) -> tuple[str, ...]:
    return NAMES.get(speech, ("prompt_tokens", "completion_tokens"))


def whole(speech: Speech, usage: str | None) -> bytes:
    """An answer in one piece; `usage` is the report's text, None for no report."""
    more = "" if usage is None else f',"usage":{usage}'
    return raw_answer(200, b'{"object":"x"%s}' % more.encode(), JSON)


def stream(speech: Speech, usage: str | None) -> list[Any]:
    """A stream of one token; `usage` is the last report's text."""
    member = "" if usage is None else f',"usage":{usage}'
    if speech is MESSAGES:
        last = f'event: message_delta\ndata: {{"type":"message_delta"{member}}}\n\n'
    elif speech is RESPONSES:
        data = f'{{"type":"response.completed","response":{{"x":1{member}}}}}'
        last = f"event: response.completed\ndata: {data}\n\n"
    else:
        last = f'data: {{"choices":[]{member}}}\n\n'
    end = speech.last if speech.last != RESPONSES.last else b""
    parts = [*speech.begin(3), speech.token(None), last.encode(), end]
    return [head(200, CHUNKED), *map(chunk, filter(None, parts)), LAST_CHUNK]


def steps_of(speech: Speech, usage: str | None, *, streamed: bool) -> Steps:
    return stream(speech, usage) if streamed else [whole(speech, usage)]


def usage_with(speech: Speech, odd_at: int, value: str) -> str:
    values = ["5", "7"]
    values[odd_at] = value
    pairs = zip(names_of(speech), values, strict=False)
    return "{" + ",".join(f'"{name}":{value}' for name, value in pairs) + "}"


def ours(speech: Speech, *, streamed: bool) -> tuple[int | None, int | None]:
    """What we have counted ourselves by the end: it is kept, and not billed if there is a doubt."""
    if not streamed:
        return None, None
    return (3 if speech is MESSAGES else None), 1


def odd_counts(speech: Speech, streamed: bool) -> Iterable[Case]:
    for at, name in enumerate(names_of(speech)):
        for value in (*ODD, "NaN", *GOOD):
            usage = usage_with(speech, at, value)
            counts: list[int | None] = [5, 7 if len(names_of(speech)) > 1 else None]
            row: Row = ("disputed", "complete", *ours(speech, streamed=streamed))
            if value in GOOD:
                counts[at] = GOOD[value]
                if streamed and speech is MESSAGES and not counts[0]:
                    counts[0] = 3  # so some servers say that they don't repeat it
                row = ("settled", "complete", counts[0], counts[1])
            raw = None if value in GOOD else f'"{name}":'
            steps = steps_of(speech, usage, streamed=streamed)
            yield Case(f"{speech.name} {usage}", speech, streamed, steps, row, raw)


def odd_reports(speech: Speech, streamed: bool) -> Iterable[Case]:
    counted = ours(speech, streamed=streamed)
    nothing: Row = (
        ("estimated", "complete", *counted) if streamed else (("disputed", "complete", None, None))
    )
    for usage in (None, "null", "{}", "[]", '"none"', "5", "true", '{"total_tokens":9}'):
        said = usage not in (None, "null")
        # In a stream of messages a report may lack what an earlier one has told.
        absent = speech is MESSAGES and streamed and usage in ("{}", '{"total_tokens":9}')
        row: Row = ("disputed", "complete", *counted) if said and not absent else nothing
        raw: str | None = usage if said and not absent else None
        if usage == '{"total_tokens":9}' and speech is EMBEDDINGS:
            row, raw = ("settled", "complete", 9, None), None
        steps = steps_of(speech, usage, streamed=streamed)
        yield Case(f"{speech.name} usage {usage}", speech, streamed, steps, row, raw)


FORMS = [
    (speech, streamed) for speech in ALL for streamed in (False, True) if streamed <= speech.streams
]


@pytest.mark.parametrize(
    ("speech", "streamed"), FORMS, ids=[f"{s.name}{'-stream' * streamed}" for s, streamed in FORMS]
)
@pytest_twisted.ensureDeferred
async def test_usage_that_can_not_be_right_is_disputed_and_any_count_is_taken(
    tmp_path: Path, speech: Speech, streamed: bool
) -> None:
    await run(tmp_path, [*odd_counts(speech, streamed), *odd_reports(speech, streamed)])


def sums() -> Iterable[Case]:
    for more in ('"cache_read_input_tokens":1', '"cache_creation_input_tokens":1'):
        usage = f'{{"input_tokens":{MAX_COUNT},{more},"output_tokens":1}}'
        row: Row = ("disputed", "complete", None, None)
        yield Case(more, MESSAGES, False, [whole(MESSAGES, usage)], row, str(MAX_COUNT))
        row = ("disputed", "complete", 3, 1)
        yield Case(more, MESSAGES, True, stream(MESSAGES, usage), row, str(MAX_COUNT))
    for speech, stream_too in ((CHAT, True), (COMPLETIONS, False)):
        usage = '{"prompt_tokens":3,"completion_tokens":2,"total_tokens":99}'
        row = ("settled", "complete", 3, 2)
        yield Case(usage, speech, stream_too, steps_of(speech, usage, streamed=stream_too), row)


@pytest_twisted.ensureDeferred
async def test_a_sum_that_does_not_fit_is_disputed_and_one_that_is_wrong_is_nobodys(
    tmp_path: Path,
) -> None:
    await run(tmp_path, list(sums()))


DURATIONS: dict[str, Row] = {
    "1.5": ("settled", "complete", 2, None),
    '"1.5"': ("settled", "complete", 2, None),
    "0": ("settled", "complete", 0, None),
    "-1": ("disputed", "complete", None, None),
    "true": ("disputed", "complete", None, None),
    "1e300": ("disputed", "complete", None, None),
    '"NaN"': ("disputed", "complete", None, None),
    "[]": ("disputed", "complete", None, None),
    "null": ("disputed", "complete", None, None),
}


@pytest_twisted.ensureDeferred
async def test_odd_durations_of_audio_are_disputed(tmp_path: Path) -> None:
    form = (
        b'--X\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
        b'--X\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n--X--\r\n'
    )
    fields = {"Content-Type": "multipart/form-data; boundary=X"}
    request = request_bytes("POST", "/v1/audio/transcriptions", form, fields=fields)
    bodies = [b'{"text":"x","duration":%s}' % value.encode() for value in DURATIONS]
    scripts = [[raw_answer(200, body, JSON)] for body in bodies]
    async with ScriptedBackend(*scripts) as backend, proxy_for(tmp_path, backend) as proxy:
        for _ in DURATIONS:
            assert (await proxy.send(request)).json() == {"text": "x"}
        assert proxy.rows("state, outcome, transcription, NULL") == list(DURATIONS.values())
        assert proxy.bill() == {"m/gpu/transcription": 4}


# --- odd places ---------------------------------------------------------------------------------


def text(content: str = "x", **more: object) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}}], **more}


def used(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion}


def final(prompt: int, completion: int) -> dict[str, Any]:
    return {"choices": [], "usage": used(prompt, completion)}


FINISH = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
X = text()
SETTLED: Row = ("settled", "complete", 5, 7)
ESTIMATED: Row = ("estimated", "complete", None, 2)

#: The events of a chat stream, and its row.
PLACES: dict[str, tuple[list[Any], Row]] = {
    "at the end": ([X, X, final(5, 7), DONE], SETTLED),
    "in the middle": ([X, final(5, 7), X, DONE], SETTLED),
    "before all text": ([final(5, 7), X, X, DONE], SETTLED),
    "after the last event": ([X, X, DONE, final(5, 7)], SETTLED),
    "after the last event, without an empty line": (
        [X, X, DONE, sse_event(final(5, 7))[:-2]],
        SETTLED,
    ),
    "twice": ([X, final(1, 1), X, final(5, 7), DONE], SETTLED),
    "twice, and less the second time": ([X, final(9, 9), X, final(5, 7), DONE], SETTLED),
    "absurd, then right": ([X, final(-1, 7), X, final(5, 7), DONE], SETTLED),
    "in a chunk with text that ends it": ([X, {**FINISH, "usage": used(5, 7)}, DONE], SETTLED),
    "running, then final": (
        [text(usage=used(5, 1)), text(usage=used(5, 2)), final(5, 7), DONE],
        SETTLED,
    ),
    "running only": (
        [text(usage=used(5, 1)), text(usage=used(5, 2)), DONE],
        ("estimated", "complete", 5, 2),
    ),
    "running, and once less": (
        [text(usage=used(5, 9)), text(usage=used(4, 3)), DONE],
        ("estimated", "complete", 5, 9),
    ),
    "running, then finished": (
        [text(usage=used(5, 6)), {**FINISH, "usage": used(5, 7)}, DONE],
        SETTLED,
    ),
    "null in each, then final": ([text(usage=None), text(usage=None), final(5, 7), DONE], SETTLED),
    "in a text": ([text('{"usage":{"prompt_tokens":9}}'), X, DONE], ESTIMATED),
    "in a choice": ([{"choices": [{**X["choices"][0], "usage": used(9, 9)}]}, X, DONE], ESTIMATED),
    "under another name": ([X, {**X, "x_groq": {"usage": used(9, 9)}}, DONE], ESTIMATED),
    "in a comment": ([b': {"usage":{"prompt_tokens":9}}\n\n', X, X, DONE], ESTIMATED),
    "in a named event": ([X, b"event: usage\n" + sse_event(final(5, 7)), DONE], SETTLED),
    "in lines of its own": (
        [
            X,
            b'data: {"choices":[],\r\ndata: "usage":{"prompt_tokens":5,\r'
            b'data: "completion_tokens":7}}\n\n',
            DONE,
        ],
        SETTLED,
    ),
    "nowhere": ([X, X, DONE], ESTIMATED),
    "nowhere, and no text": ([DONE], ("disputed", "complete", None, None)),
    "zero": ([final(0, 0), DONE], ("settled", "complete", 0, 0)),
    "the end twice": ([X, X, final(5, 7), DONE, DONE], SETTLED),
}


@pytest_twisted.ensureDeferred
async def test_wherever_usage_stands_the_last_report_counts_and_none_is_made_up(
    tmp_path: Path,
) -> None:
    cases = []
    for name, (events, row) in PLACES.items():
        parts = [each if isinstance(each, bytes) else sse_event(each) for each in events]
        steps = [head(200, CHUNKED), *map(chunk, parts), LAST_CHUNK]
        cases.append(Case(name, CHAT, True, steps, row))
        joined = raw_answer(200, b"".join(parts), SSE)
        cases.append(Case(f"{name}, in one piece", CHAT, True, [joined], row))
        bare = [head(200, {**SSE, "Connection": "close"}), *parts, Close()]
        cases.append(Case(f"{name}, without a length", CHAT, True, bare, row))
    for case, answer in zip(cases, await run(tmp_path, cases), strict=True):
        assert answer.body.endswith(DONE), case.name
        assert b'"choices":[],"usage"' not in answer.body.replace(b" ", b""), case.name


# --- odd ends -----------------------------------------------------------------------------------

CUT: Row = ("estimated", "truncated", None, 2)
UNKNOWN: Row = ("orphan", "truncated", None, None)
BEGUN = sse_event(X) * 2
OPEN = head(200, CHUNKED)
UNFRAMED = head(200, {**SSE, "Connection": "close"})
BODY = orjson.dumps({"choices": [], "usage": used(5, 7)})


def sized(fields: dict[str, str], body: bytes, size: int) -> list[Any]:
    """An answer whose Content-Length is a lie."""
    return [head(200, {**fields, "Content-Length": str(size)}) + body, Pause(0.01)]


ENDS: list[Case] = [
    Case("closed", CHAT, True, [OPEN, chunk(BEGUN), Close()], CUT, whole=False),
    Case("reset", CHAT, True, [OPEN, chunk(BEGUN), Reset()], CUT, whole=False),
    Case("closed, no length", CHAT, True, [UNFRAMED, BEGUN, Close()], CUT, whole=False),
    Case("reset, no length", CHAT, True, [UNFRAMED, BEGUN, Reset()], CUT, whole=False),
    Case("in a chunk", CHAT, True, [OPEN, chunk(BEGUN)[:-2], Close()], CUT, whole=False),
    Case("in an event", CHAT, True, [OPEN, chunk(BEGUN + BEGUN[:9]), Close()], CUT, whole=False),
    Case("a clean end", CHAT, True, [OPEN, chunk(BEGUN), LAST_CHUNK], CUT, whole=False),
    Case("a broken chunk", CHAT, True, [OPEN, chunk(BEGUN), b"zz\r\n"], CUT, whole=False),
    Case("a short length", CHAT, True, sized(SSE, BEGUN + DONE, len(BEGUN)), CUT, whole=False),
    Case(
        "a long length",
        CHAT,
        True,
        [*sized(SSE, BEGUN, len(BEGUN) + 50), Close()],
        CUT,
        whole=False,
    ),
    Case(
        "silence before the end",
        CHAT,
        True,
        [OPEN, chunk(BEGUN), Stall()],
        ("estimated", "stalled", None, 2),
        whole=False,
    ),
    Case("half of the end", CHAT, True, [OPEN, chunk(BEGUN + DONE[:8]), Close()], CUT, whole=False),
    Case("no text at all", CHAT, True, [OPEN, Close()], UNKNOWN, whole=False),
    Case(
        "usage before the reset",
        CHAT,
        True,
        [OPEN, chunk(BEGUN + sse_event(final(5, 7))), Reset()],
        ("settled", "truncated", 5, 7),
        whole=False,
    ),
    Case(
        "a reset after the last event",
        CHAT,
        True,
        [OPEN, chunk(BEGUN + sse_event(final(5, 7)) + DONE), Reset()],
        SETTLED,
    ),
    Case(
        "no last chunk",
        CHAT,
        True,
        [OPEN, chunk(BEGUN + sse_event(final(5, 7)) + DONE), Close()],
        SETTLED,
    ),
    Case("json, closed", CHAT, False, [*sized(JSON, BODY, 999), Close()], UNKNOWN, status=502),
    Case("json, reset", CHAT, False, [*sized(JSON, BODY, 999), Reset()], UNKNOWN, status=502),
    Case(
        "json, silence",
        CHAT,
        False,
        [*sized(JSON, BODY, 999), Stall()],
        ("orphan", "stalled", None, None),
        status=504,
    ),
    Case(
        "json, a short length",
        CHAT,
        False,
        sized(JSON, BODY, len(BODY) - 1),
        ("disputed", "complete", None, None),
        '"prompt_tokens":5',
    ),
    Case(
        "json, no last chunk",
        CHAT,
        False,
        [head(200, {**JSON, "Transfer-Encoding": "chunked"}), chunk(BODY), Close()],
        UNKNOWN,
        status=502,
    ),
]


@pytest_twisted.ensureDeferred
async def test_an_answer_that_breaks_off_never_looks_whole_and_has_its_row(tmp_path: Path) -> None:
    answers = await run(tmp_path, ENDS, timeout=0.2)
    for case, answer in zip(ENDS, answers, strict=True):
        if not case.whole:
            assert DONE not in answer.body, case.name
            *_, last, rest = answer.body.split(b"\n\n")
            assert (b'"error"' in last, rest) == (True, b""), (case.name, answer.body)


def endless(begin: bytes, piece: bytes) -> list[Any]:
    """A stream with an event that does not end."""
    return [OPEN, chunk(BEGUN), chunk(begin), Flood(chunk(piece), 100_000)]


LONG_LINE = b"x" * 8000
ENDLESS = {
    "a line": endless(b"data: ", LONG_LINE),
    "a field": endless(b"x", LONG_LINE),
    "a comment": endless(b": ", LONG_LINE),
    "lines": endless(b": x\n", b"data: x\n" * 1000),
    "short lines": endless(b"x", b"\rx" * 4000),
    "chunk extensions": [OPEN, chunk(BEGUN), b"1;a=", Flood(LONG_LINE, 100_000)],
    "trailers": [OPEN, chunk(BEGUN), b"0\r\n", Flood(b"X: " + LONG_LINE + b"\r\n", 100_000)],
}


@pytest_twisted.ensureDeferred
async def test_what_does_not_end_is_cut_off_soon(tmp_path: Path) -> None:
    cases = [Case(name, CHAT, True, steps, CUT, whole=False) for name, steps in ENDLESS.items()]
    scripts = [case.steps for case in cases]
    async with ScriptedBackend(*scripts) as backend, proxy_for(tmp_path, backend) as proxy:
        for case in cases:
            await one(proxy, case)
            link = backend.requests[-1].connection
            await link.when_closed()
            assert link.sent < 24 * 1024 * 1024, case.name  # of it 4 MiB were read
        assert proxy.rows() == [CUT] * len(cases)


@pytest_twisted.ensureDeferred
async def test_a_line_of_a_mebibyte_passes_as_it_came(tmp_path: Path) -> None:
    long = sse_event(text("y" * 1024 * 1024)).replace(b"\n", b"\r\n")
    stream = long + sse_event(final(5, 7)) + DONE
    steps = [head(200, CHUNKED), *map(chunk, (stream[:7], stream[7:-9], stream[-9:])), LAST_CHUNK]
    [answer] = await run(tmp_path, [Case("a line", CHAT, True, steps, SETTLED)])
    assert answer.body == long + DONE


# --- odd answers --------------------------------------------------------------------------------

PAID = {"usage": used(9, 9)}
REFUSED: Row = ("settled", "refused", None, None)
NO_RESULT: Row = ("orphan", "refused", None, None)
FAILED: Row = ("orphan", "backend_failed", None, None)
HTML = {"Content-Type": "text/html"}
ERROR = sse_event({"error": {"message": "out of memory", "usage": used(9, 9)}})
TRAILER = b'0\r\nUsage: {"prompt_tokens":9,"completion_tokens":9}\r\n\r\n'
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"

ANSWERS: list[Case] = [
    *(
        Case(f"{status} with usage", CHAT, False, [json_answer(status, PAID)], REFUSED, status=told)
        for status, told in [(400, 400), (404, 404), (429, 429), (401, 502), (500, 502), (503, 502)]
    ),
    *(
        Case(
            f"{status} with usage", CHAT, False, [json_answer(status, PAID)], NO_RESULT, status=502
        )
        for status in (201, 202, 203, 206, 226)
    ),
    Case("204", CHAT, False, [head(204)], NO_RESULT, status=502),
    Case("304", CHAT, False, [head(304)], REFUSED, status=502),
    Case("a status of no kind", CHAT, False, [json_answer(999, PAID)], REFUSED, status=502),
    Case("a page", CHAT, False, [raw_answer(200, BODY, HTML)], FAILED, status=502),
    Case("no type", CHAT, False, [raw_answer(200, BODY)], FAILED, status=502),
    Case("a page for a stream", CHAT, True, [raw_answer(200, b"<p>", HTML)], FAILED, status=502),
    Case("json for a stream", CHAT, True, [raw_answer(200, BODY, JSON)], SETTLED),
    Case("a stream for json", CHAT, False, [raw_answer(200, BEGUN, SSE)], FAILED, status=502),
    Case(
        "interim ones first", CHAT, False, [INTERIM, Pause(0), raw_answer(200, BODY, JSON)], SETTLED
    ),
    Case("interim ones only", CHAT, False, [INTERIM, Close()], FAILED, status=502),
    Case(
        "an upgrade", CHAT, False, [b"HTTP/1.1 101 X\r\nUpgrade: h2c\r\n\r\n"], FAILED, status=502
    ),
    Case(
        "an error for a stream",
        CHAT,
        True,
        [raw_answer(200, ERROR + DONE, SSE)],
        ("settled", "backend_failed", None, None),
    ),
    Case(
        "an error in a stream",
        CHAT,
        True,
        [raw_answer(200, BEGUN + ERROR + DONE, SSE)],
        ("estimated", "backend_failed", None, 2),
    ),
    Case(
        "an error in a stream after usage",
        CHAT,
        True,
        [raw_answer(200, BEGUN + sse_event(final(5, 7)) + ERROR + DONE, SSE)],
        ("settled", "backend_failed", 5, 7),
    ),
    Case(
        "an error as the answer",
        CHAT,
        False,
        [json_answer(200, {"error": {"message": "x"}})],
        ("disputed", "complete", None, None),
    ),
    Case(
        "usage in a trailer",
        CHAT,
        False,
        [head(200, {**JSON, "Transfer-Encoding": "chunked"}), chunk(b'{"choices":[]}'), TRAILER],
        ("disputed", "complete", None, None),
    ),
    Case(
        "usage in a stream's trailer",
        CHAT,
        True,
        [OPEN, chunk(BEGUN + DONE), TRAILER],
        ESTIMATED,
    ),
]


@pytest_twisted.ensureDeferred
async def test_an_answer_that_is_no_result_is_never_billed(tmp_path: Path) -> None:
    for case, answer in zip(ANSWERS, await run(tmp_path, ANSWERS), strict=True):
        if answer.status == 502:
            assert answer.json()["error"]["code"] == "bad_gateway", case.name
            assert b"usage" not in answer.raw, case.name


# --- again and again ----------------------------------------------------------------------------


def numbered() -> Callable[[Seen], Steps]:
    """Each request costs a prompt of its own number."""
    numbers = iter(range(1_000_000))

    def script(seen: Seen) -> Steps:
        last = sse_event(final(next(numbers), 7))
        return [OPEN, chunk(BEGUN), Pause(0), chunk(last + DONE), LAST_CHUNK]

    return script


async def abort_again(proxy: ProxyHandle, times: int, turns: int) -> None:
    """The same request, and nobody waits for its answer."""
    request = request_bytes("POST", CHAT.path, CHAT.request("m", "the same", stream=True))
    for _ in range(times):
        client = await proxy.open()
        client.send(request)
        for _ in range(turns):
            await deferLater(reactor, 0)
        client.abort()
        await client.closed


@pytest.mark.parametrize("on_disconnect", ["drain", "cancel"])
@pytest_twisted.ensureDeferred
async def test_a_request_that_is_aborted_and_repeated_has_a_row_for_each_time_it_was_sent(
    tmp_path: Path, on_disconnect: str
) -> None:
    clients, times = 20, 50
    async with ScriptedBackend(numbered()) as backend:
        async with proxy_for(tmp_path, backend, on_disconnect=on_disconnect) as proxy:
            storm = [abort_again(proxy, times, turns) for turns in range(clients)]
            await gatherResults(map(Deferred.fromCoroutine, storm), consumeErrors=True)
            while proxy.proxy._services.exchanges:
                await deferLater(reactor, 0.01)
            rows = proxy.rows("state, outcome, prompt, completion")
            sent = len(backend.requests)
            assert 100 < sent <= clients * times
            states = Counter(row[0] for row in rows)
            unsent = rows.count(("settled", "client_gone", None, None))
            assert len(rows) == sent + unsent
            assert len({seen.at for seen in backend.requests}) == sent
            prompts = [prompt for _, _, prompt, _ in rows if prompt is not None]
            assert len(prompts) == len(set(prompts))
            if on_disconnect == "drain":
                assert sorted(prompts) == list(range(sent))
                assert states == {"settled": len(rows)}
            bills = proxy.query("SELECT rid, product FROM event_oneoff")
            assert len(bills) == len(set(bills))


FATES: list[Steps] = [
    [Reset()],
    [Close()],
    [b"HTTP/1.1 200 OK\r\nContent-", Reset()],
    [json_answer(500, {})],
    [json_answer(503, {}, {"Retry-After": "0"})],
    [json_answer(200, {"choices": [], "usage": used(5, 7)}), Close()],
    [json_answer(200, {"choices": [], "usage": used(5, 7)}), Reset()],
    [json_answer(200, {"choices": [], "usage": used(5, 7)}), Pause(0.005), Close()],
    [Stall()],
]


@pytest_twisted.ensureDeferred
async def test_no_request_is_sent_twice_whatever_becomes_of_it(tmp_path: Path) -> None:
    rounds = 8
    count = rounds * len(FATES)
    async with ScriptedBackend(*FATES * rounds) as backend:
        async with proxy_for(tmp_path, backend, timeout=0.05) as proxy:
            statuses: Counter[int] = Counter()
            for number in range(count):
                body = CHAT.request("m", f"{number}", stream=False)
                answer = await proxy.send(request_bytes("POST", CHAT.path, body))
                statuses[answer.status] += 1
            # One that was sent on a connection as it was being closed is heard by nobody.
            heard = [int(CHAT.heard(seen.json())) for seen in backend.requests]
            assert heard == sorted(set(heard))
            assert count - rounds <= len(heard) <= count
            assert len(proxy.rows()) == count == statuses[200] + statuses[502] + statuses[504]
            good = statuses[200]
            assert good >= 2 * rounds
            assert proxy.bill() == {"m/gpu/prompt": 5 * good, "m/gpu/completion": 7 * good}
