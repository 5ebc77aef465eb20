"""The smallest requests and answers of each dialect, with numbers of the caller's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"


def _event(data: Json, *, named: bool = False) -> bytes:
    name = b"event: %s\n" % data["type"].encode() if named else b""
    return name + b"data: %s\n\n" % orjson.dumps(data)


def usage_of(prompt: int, completion: int) -> Json:
    """A usage report of chat and completions."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _io_usage(prompt: int, completion: int) -> Json:
    return {"input_tokens": prompt, "output_tokens": completion}


@dataclass(frozen=True)
class Speech:
    """How one endpoint speaks.

    ask: a request's fields for a text. heard: the text of a request. begin: the events before
    the first token. token: the event of a token (with the usage so far, if given). end: the events
    after the last one, with the usage. whole: an answer that is no stream. last: how a whole
    stream ends. kinds: of what is billed.
    """

    name: str
    path: str
    ask: Callable[[str], Json]
    heard: Callable[[Json], str]
    whole: Callable[[int, int], Json]
    begin: Callable[[int], Sequence[bytes]] = lambda prompt: ()
    token: Callable[[Json | None], bytes] = lambda usage: b""
    end: Callable[[int, int], Sequence[bytes]] = lambda prompt, completion: ()
    last: bytes = b""
    kinds: tuple[str, ...] = ("prompt", "completion")

    @property
    def streams(self) -> bool:
        return bool(self.last)

    def request(self, model: str, text: str, *, stream: bool) -> bytes:
        """The body of a request."""
        body = {"model": model, **self.ask(text)}
        return orjson.dumps(body | {"stream": True} if stream else body)

    def json(self, prompt: int, tokens: int) -> bytes:
        """A whole answer that is no stream."""
        return orjson.dumps(self.whole(prompt, tokens))

    def bill(self, prompt: int, tokens: int) -> dict[str, int]:
        """What is on the bill for it, by kind."""
        return dict(zip(self.kinds, (prompt, tokens), strict=False))


def _with_usage(chunk: Json, usage: Json | None) -> bytes:
    return _event(chunk if usage is None else chunk | {"usage": usage})


def _turn(text: str) -> list[Json]:
    return [{"role": "user", "content": text}]


CHAT = Speech(
    "chat",
    "/v1/chat/completions",
    ask=lambda text: {"messages": _turn(text)},
    heard=lambda body: body["messages"][0]["content"],
    whole=lambda p, c: {"object": "chat.completion", "choices": [], "usage": usage_of(p, c)},
    token=lambda usage: _with_usage({"choices": [{"index": 0, "delta": {"content": "x"}}]}, usage),
    end=lambda p, c: (_event({"choices": [], "usage": usage_of(p, c)}), DONE),
    last=DONE,
)
COMPLETIONS = Speech(
    "completions",
    "/v1/completions",
    ask=lambda text: {"prompt": text},
    heard=lambda body: body["prompt"],
    whole=lambda p, c: {"object": "text_completion", "choices": [], "usage": usage_of(p, c)},
    token=lambda usage: _with_usage({"choices": [{"index": 0, "text": "x"}]}, usage),
    end=lambda p, c: (_event({"choices": [], "usage": usage_of(p, c)}), DONE),
    last=DONE,
)
MESSAGES = Speech(
    "messages",
    "/v1/messages",
    ask=lambda text: {"max_tokens": 99, "messages": _turn(text)},
    heard=lambda body: body["messages"][0]["content"],
    whole=lambda p, c: {"type": "message", "content": [], "usage": _io_usage(p, c)},
    begin=lambda p: (
        _event({"type": "message_start", "message": {"usage": _io_usage(p, 0)}}, named=True),
    ),
    token=lambda usage: _event(
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "x"}}, named=True
    ),
    end=lambda p, c: (
        _event({"type": "message_delta", "delta": {}, "usage": {"output_tokens": c}}, named=True),
        _event({"type": "message_stop"}, named=True),
    ),
    last=_event({"type": "message_stop"}, named=True),
)
RESPONSES = Speech(
    "responses",
    "/v1/responses",
    ask=lambda text: {"input": text},
    heard=lambda body: body["input"],
    whole=lambda p, c: {"object": "response", "output": [], "usage": _io_usage(p, c)},
    begin=lambda p: (_event({"type": "response.created", "response": {}}, named=True),),
    token=lambda usage: _event({"type": "response.output_text.delta", "delta": "x"}, named=True),
    end=lambda p, c: (
        _event({"type": "response.completed", "response": {"usage": _io_usage(p, c)}}, named=True),
    ),
    last=b"}}}\n\n",
)
EMBEDDINGS = Speech(
    "embeddings",
    "/v1/embeddings",
    ask=lambda text: {"input": text},
    heard=lambda body: body["input"],
    whole=lambda p, c: {"object": "list", "data": [], "usage": {"prompt_tokens": p}},
    kinds=("embedding",),
)
ALL = (CHAT, COMPLETIONS, MESSAGES, RESPONSES, EMBEDDINGS)
BY_PATH = {speech.path: speech for speech in ALL}
