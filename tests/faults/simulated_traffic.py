"""What clients ask and what backends answer, drawn at random, and what each is worth.

An `Ask` is a request with the bytes that a client sends; its `Plan` is what the backend does with
it, if it gets there: the bytes it sends, what of them the client may see, and the true usage.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from llmproxy.endpoints import ENDPOINTS, Endpoint, Shape
from llmproxy.model import Kind

#: Models of the simulated proxy: how usage is told, and what happens when the client leaves.
MODELS = {
    "final-drain": ("final", "drain"),
    "final-cancel": ("final", "cancel"),
    "continuous-drain": ("continuous", "drain"),
    "continuous-cancel": ("continuous", "cancel"),
}
#: How long the proxy reads on for a client that has left.
DRAIN_S = 20.0
STREAMS = [e for e in ENDPOINTS.values() if e.streams]
WHOLES = list(ENDPOINTS.values())
ABSURD: Sequence[bytes] = (
    *(b"{}", b"-1", b"3", b'"many"', b"[]", b"true"),
    b'{"%s":-1,"%s":2}',
    b'{"%s":3.0,"%s":2}',
    b'{"%s":"3","%s":2}',
    b'{"%s":1000000000000000000000,"%s":2}',
    b'{"%s":NaN,"%s":2}',
    b'{"%s":true,"%s":2}',
)
FIELDS = {
    Shape.CHAT: (b"prompt_tokens", b"completion_tokens"),
    Shape.MESSAGES: (b"input_tokens", b"output_tokens"),
    Shape.RESPONSES: (b"input_tokens", b"output_tokens"),
    Shape.EMBEDDING: (b"prompt_tokens", b"total_tokens"),
}


@dataclass
class Plan:
    """What a backend does with a request.

    `pieces`: delay in seconds and bytes, in order. `after`: what it does when all is sent.
    `sent`, `shown`: the body, and what of it a client may see. `truth`: the usage, by kind.
    `lie`: how the usage is told wrongly ("" if it is told). `marks`: for a stream, the length of
    `shown` up to each event of content, and how many tokens there were by then.
    """

    status: int = 200
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    after: str = "keep"
    sent: bytes = b""
    shown: bytes = b""
    truth: Mapping[Kind, int] = field(default_factory=dict)
    lie: str = ""
    stream: bool = False
    continuous: bool = False
    framed: bool = True
    broken: bool = False
    error: bool = False
    marker: bytes = b""
    marks: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """How long it takes to send it all."""
        return sum(delay for delay, _ in self.pieces)

    @property
    def is_result(self) -> bool:
        """There is an answer to bill."""
        return self.status == 200 and not self.error

    def seen(self, shown: int) -> tuple[int, int]:
        """Events of content and tokens in the first `shown` bytes that a client saw."""
        events = [(n, tokens) for length, n, tokens in self.marks if length <= shown]
        return events[-1] if events else (0, 0)


@dataclass
class Ask:
    """A request. `refusal`: the status it must get without reaching a backend, None if valid."""

    number: int
    data: bytes
    refusal: int | None = None
    endpoint: Endpoint = ENDPOINTS["/v1/chat/completions"]
    model: str = "final-drain"
    show_usage: bool = False
    plan: Plan = field(default_factory=Plan)
    http_1_0: bool = False


def make_ask(rng: random.Random, number: int) -> Ask:
    """A request, now and then one that is refused."""
    if rng.random() < 0.12:
        return _bad(rng, number)
    stream = rng.random() < 0.6
    endpoint = rng.choice(STREAMS if stream else WHOLES)
    ask = Ask(number, b"", endpoint=endpoint, model=rng.choice(list(MODELS)))
    ask.show_usage = rng.random() < 0.3
    body: dict[str, Any] = {"model": ask.model, "user": f"mark-{number}-", "input": "x"}
    if endpoint.shape is Shape.AUDIO:
        body_bytes, content_type = _form(ask)
    else:
        if stream:
            body["stream"] = True
            if ask.show_usage and endpoint.shape is Shape.CHAT:
                body["stream_options"] = {"include_usage": True}
        if rng.random() < 0.1:
            body["padding"] = "p" * rng.choice((100, 5000, 70_000))
        body_bytes, content_type = orjson.dumps(body), b"application/json"
    ask.http_1_0 = not stream and rng.random() < 0.05
    ask.data = request(rng, ask, body_bytes, content_type, f"key-{number}")
    usage, _ = MODELS[ask.model]
    continuous = usage == "continuous" and endpoint.shape is Shape.CHAT and stream
    ask.plan = make_plan(rng, endpoint.shape, stream, ask.show_usage, continuous)
    return ask


def request(
    rng: random.Random, ask: Ask, body: bytes, content_type: bytes, key: str | None
) -> bytes:
    """The bytes of a POST."""
    version = b"1.0" if ask.http_1_0 else b"1.1"
    lines = [b"POST %s HTTP/%s" % (ask.endpoint.path.encode(), version), b"Host: proxy"]
    if key is not None and ask.endpoint.dialect == "anthropic" and rng.random() < 0.5:
        lines.append(b"x-api-key: " + key.encode())
    elif key is not None:
        lines.append(b"Authorization: Bearer " + key.encode())
    lines.append(b"Content-Type: " + content_type)
    if rng.random() < 0.1 and not ask.http_1_0:
        lines.append(b"Expect: 100-continue")
    if rng.random() < 0.1 and not ask.http_1_0:
        lines.append(b"Transfer-Encoding: chunked")
        cut = rng.randint(1, len(body) - 1)
        parts = [body[:cut], body[cut:]]
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    else:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, b"", b""]) + body


def _form(ask: Ask) -> tuple[bytes, bytes]:
    fields = {
        b"model": ask.model.encode(),
        b"user": b"mark-%d-" % ask.number,
        b"response_format": b"verbose_json",
        b'file"; filename="a.wav': b"RIFF" * 50,
    }
    parts = [
        b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % part
        for part in fields.items()
    ]
    return b"".join(parts) + b"--b--\r\n", b"multipart/form-data; boundary=b"


BAD_BODIES = ("model", "json", "twice", "type")


def _bad(rng: random.Random, number: int) -> Ask:
    ask = Ask(number, b"")
    body = b'{"model":"final-drain","user":"mark-%d-"}' % number
    key: str | None = f"key-{number}"
    kind = rng.choice(("unknown key", "unknown key", "expired", "no key", *BAD_BODIES))
    content_type = b"application/json"
    if kind in ("unknown key", "no key", "expired"):
        key = {"unknown key": f"wrong-{number}", "no key": None, "expired": "expired"}[kind]
        ask.refusal = 401
    elif kind == "model":
        ask.refusal, body = 404, b'{"model":"none","user":"mark-%d-"}' % number
    elif kind == "json":
        ask.refusal, body = 400, body[:-1]
    elif kind == "twice":
        ask.refusal, body = 400, body[:-1] + b',"model":"final-cancel"}'
    else:
        ask.refusal, content_type = 415, b"text/plain"
    ask.data = request(rng, ask, body, content_type, key)
    return ask


# -- answers -------------------------------------------------------------------------------


def make_plan(
    rng: random.Random, shape: Shape, stream: bool, show_usage: bool, continuous: bool
) -> Plan:
    """What the backend does: mostly what it should."""
    roll = rng.random()
    if roll < 0.08:
        return _refusal(rng)
    plan = Plan(stream=stream, continuous=continuous)
    plan.lie = rng.choice(("absent", "absurd", "falling")) if rng.random() < 0.15 else ""
    if stream:
        events = _EVENTS[shape](rng, plan, show_usage)
        if roll < 0.11:
            events = _with_error(rng, plan, events, shape)
        _add_events(plan, events)
        content_type = b"text/event-stream; charset=utf-8"
    else:
        plan.sent = plan.shown = _whole(rng, plan, shape)
        content_type = b"application/json"
    _send(rng, plan, content_type)
    return plan


def _refusal(rng: random.Random) -> Plan:
    status = rng.choice((204, 302, 400, 401, 403, 404, 422, 429, 500, 503))
    body = b"" if status == 204 else b'{"error":{"message":"no"}}'
    plan = Plan(status=status, sent=body, shown=body)
    _send(rng, plan, b"application/json")
    return plan


def _counts(rng: random.Random) -> tuple[int, int]:
    return rng.choice((0, 1, 7, 5000)), rng.choice((0, 1, 2, 3, 5, 8))


def _usage(rng: random.Random, plan: Plan, shape: Shape, prompt: int, completion: int) -> bytes:
    """The usage as told; an empty text where it is not."""
    one, other = FIELDS[shape]
    if plan.lie == "absent":
        return b""
    if plan.lie == "absurd":
        absurd = rng.choice(ABSURD)
        return absurd % (one, other) if b"%s" in absurd else absurd
    if shape is Shape.EMBEDDING:
        return b'{"prompt_tokens":%d,"total_tokens":%d}' % (prompt, prompt)
    total = b',"total_tokens":%d' % (prompt + completion)
    return b'{"%s":%d,"%s":%d%s}' % (one, prompt, other, completion, total)


def _whole(rng: random.Random, plan: Plan, shape: Shape) -> bytes:
    prompt, completion = _counts(rng)
    if plan.lie == "falling":
        plan.lie = ""
    if shape is Shape.FREE:
        plan.lie = ""
        return b'{"input_tokens":%d}' % prompt
    if shape is Shape.AUDIO:
        plan.truth = {Kind.TRANSCRIPTION: prompt + 1}
        told = {"": b',"duration":%d.25' % prompt, "absent": b"", "absurd": b',"duration":-3'}
        return b'{"text":"hi"%s}' % told[plan.lie]
    if shape is Shape.EMBEDDING:
        plan.truth = {Kind.EMBEDDING: prompt}
    else:
        plan.truth = {Kind.PROMPT: prompt, Kind.COMPLETION: completion}
    usage = _usage(rng, plan, shape, prompt, completion)
    text = b"t" * rng.choice((0, 10, 300, 3000))
    return b'{"id":"a","text":"%s"%s}' % (text, b',"usage":' + usage if usage else b"")


#: An event of a stream: what is sent, what is shown, tokens in it, and whether it is content.
SSE = tuple[bytes, bytes, int, bool]


def _data(payload: bytes, name: bytes = b"") -> bytes:
    return (b"event: %s\n" % name if name else b"") + b"data: " + payload + b"\n\n"


def _tokens(rng: random.Random, completion: int) -> list[int]:
    """The tokens of each chunk: servers put several into one when they are fast."""
    chunks = []
    while completion:
        chunks.append(rng.randint(1, min(3, completion)))
        completion -= chunks[-1]
    return chunks


def _chat_events(rng: random.Random, plan: Plan, show_usage: bool) -> list[SSE]:
    prompt, completion = _counts(rng)
    plan.truth = {Kind.PROMPT: prompt, Kind.COMPLETION: completion}
    plan.marker = b"data: [DONE]"
    if plan.lie == "falling" and not plan.continuous:
        plan.lie = ""
    events: list[SSE] = []
    so_far = 0
    null = rng.random() < 0.5  # vLLM says `null` in all chunks but the last

    def add(choices: bytes, tokens: int, content: bool, told: int | None = None) -> None:
        start = b'{"id":"c","choices":[%s]' % choices
        nothing = start + b',"usage":null}' if show_usage else start + b"}"
        if plan.continuous:
            count = so_far if told is None else told
            total = prompt + count
            usage = b'{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d}'
            sent = start + b',"usage":' + usage % (prompt, total, count) + b"}"
        elif null:
            sent = start + b',"usage":null}'
        else:
            sent, nothing = start + b"}", start + b"}"
        events.append((_data(sent), _data(nothing), tokens, content))

    add(b'{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}', 0, False)
    for tokens in _tokens(rng, completion):
        so_far += tokens
        add(b'{"index":0,"delta":{"content":"%s"}}' % (b"w" * 5 * tokens), tokens, True)
    last = max(0, so_far - 2) if plan.lie == "falling" else None
    add(b'{"index":0,"delta":{},"finish_reason":"stop"}', 0, False, last)
    usage = b"" if plan.lie == "falling" else _usage(rng, plan, Shape.CHAT, prompt, completion)
    if usage:
        chunk = _data(b'{"id":"c","choices":[],"usage":%s}' % usage)
        # What can't be read is passed on as it is.
        shown = show_usage or b"NaN" in usage
        events.append((chunk, chunk if shown else b"", 0, False))
    events.append((b"data: [DONE]\n\n", b"data: [DONE]\n\n", 0, False))
    return events


def _named_event(payload: bytes, tokens: int = 0, content: bool = False) -> SSE:
    name = payload.split(b'"', 4)[3]  # {"type":"NAME"...
    event = _data(payload, name)
    return event, event, tokens, content


def _messages_events(rng: random.Random, plan: Plan, show_usage: bool) -> list[SSE]:
    prompt, completion = _counts(rng)
    plan.truth = {Kind.PROMPT: prompt, Kind.COMPLETION: completion}
    plan.marker = b"event: message_stop"
    if plan.lie == "falling":
        plan.lie = ""
    begun = b'{"input_tokens":%d,"output_tokens":0}' % prompt
    start = b'{"type":"message_start","message":{"id":"m","usage":%s}}' % begun
    events = [_named_event(start)]
    for tokens in _tokens(rng, completion):
        text = b"w" * 5 * tokens
        delta = b'{"type":"content_block_delta","index":0,"delta":{"text":"%s"}}' % text
        events.append(_named_event(delta, tokens, True))
    usage = _usage(rng, plan, Shape.MESSAGES, prompt, completion)
    told = b',"usage":' + usage if usage else b""
    events.append(_named_event(b'{"type":"message_delta","delta":{}%s}' % told))
    events.append(_named_event(b'{"type":"message_stop"}'))
    if usage == b"{}":  # a report of nothing is no lie here: the fields may come in any event
        plan.lie = "absent"
    return events


def _responses_events(rng: random.Random, plan: Plan, show_usage: bool) -> list[SSE]:
    prompt, completion = _counts(rng)
    plan.truth = {Kind.PROMPT: prompt, Kind.COMPLETION: completion}
    plan.marker = b"event: response.completed"
    if plan.lie == "falling":
        plan.lie = ""
    events = [_named_event(b'{"type":"response.created","response":{"usage":null}}')]
    for tokens in _tokens(rng, completion):
        text = b"w" * 5 * tokens
        delta = b'{"type":"response.output_text.delta","delta":"%s"}' % text
        events.append(_named_event(delta, tokens, True))
    usage = _usage(rng, plan, Shape.RESPONSES, prompt, completion)
    told = b',"usage":' + usage if usage else b""
    events.append(_named_event(b'{"type":"response.completed","response":{"id":"r"%s}}' % told))
    return events


_EVENTS: Mapping[Shape, Callable[[random.Random, Plan, bool], list[SSE]]] = {
    Shape.CHAT: _chat_events,
    Shape.MESSAGES: _messages_events,
    Shape.RESPONSES: _responses_events,
}


def _with_error(rng: random.Random, plan: Plan, events: list[SSE], shape: Shape) -> list[SSE]:
    """The backend fails in its stream, and says so."""
    plan.error = True
    payload = b'{"type":"error","error":{"message":"out of memory","type":"server_error"}}'
    error = _data(payload, b"" if shape is Shape.CHAT else b"error")
    kept = events[: rng.randint(0, len(events) - 1)]
    return [*kept, (error, error, 0, False)]


def _add_events(plan: Plan, events: Sequence[SSE]) -> None:
    count = total = 0
    for sent, shown, tokens, content in events:
        plan.sent += sent
        plan.shown += shown
        count += content
        total += tokens
        if content:
            plan.marks.append((len(plan.shown), count, total))


def _send(rng: random.Random, plan: Plan, content_type: bytes) -> None:
    """Frame the body, cut it into pieces, and let something go wrong now and then."""
    head = b"HTTP/1.1 %d X\r\nContent-Type: %s\r\n" % (plan.status, content_type)
    framing = rng.choice(("chunked", "chunked", "length", "close"))
    body = plan.sent
    if plan.status == 204:
        head, framing = b"HTTP/1.1 204 X\r\n", "none"
    elif framing == "chunked":
        head += b"Transfer-Encoding: chunked\r\n"
        cut = rng.randint(0, len(body))
        parts = [part for part in (body[:cut], body[cut:]) if part]
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    elif framing == "length":
        head += b"Content-Length: %d\r\n" % len(body)
    else:
        head += b"Connection: close\r\n"
        plan.framed, plan.after = False, "close"
    if framing != "none" and rng.random() < 0.03:
        head = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + head
    data = head + b"\r\n" + body
    if framing in ("chunked", "length") and rng.random() < 0.15:
        plan.after = "close"
    if rng.random() < 0.12:
        data = data[: rng.randint(0, len(data) - 1)]
        plan.broken, plan.after = True, rng.choice(("close", "reset", "stall"))
    elif framing in ("chunked", "length") and rng.random() < 0.03:  # an answer to the next request
        data += b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
        plan.broken = True
    plan.pieces = _cut(rng, data)


def _cut(rng: random.Random, data: bytes) -> list[tuple[float, bytes]]:
    if not data:
        return []
    count = rng.choice((0, 0, 1, 2, 5, 12))
    cuts = sorted(rng.randint(0, len(data)) for _ in range(count))
    edges = zip([0, *cuts], [*cuts, len(data)], strict=True)
    pace = rng.choice((0.0, 0.001, 0.05, 0.05, 0.4))
    return [(rng.random() * pace, data[start:end]) for start, end in edges]
