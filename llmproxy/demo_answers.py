"""What the stand-in LLM server says: pure functions from a request to an answer, per dialect.

Tokens are words. An answer depends on the request alone, so that the same question gets the same
objects, ids included, each time. The shapes follow vLLM's OpenAI-compatible server (docs.vllm.ai,
"OpenAI-Compatible Server"), the OpenAI and the Anthropic API references
(platform.openai.com/docs/api-reference, docs.anthropic.com/en/api), as their Python clients of
2026 parse them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import struct
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

Json = dict[str, Any]

_ECHOED_WORDS = 64
_MOST_CHOICES = 128
_SEGMENT_SECONDS = 5.0
_ASSUMED_BYTES_PER_SECOND = 16_000  # 128 kbit/s, for audio that is not WAV
_MOST_SECONDS = 6 * 3600.0
_DIMENSIONS = 16
_TRANSCRIPT = (
    "this",
    "is",
    "what",
    "the",
    "demo",
    "server",
    "makes",
    "of",
    "any",
    "sound",
    "at",
    "all",
)
_FORMATS = ("json", "text", "srt", "verbose_json", "vtt")


class Refusal(Exception):
    """A request that gets an error answer."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param


class Frame(NamedTuple):
    """A piece of a stream, and how many tokens were generated for it."""

    data: bytes
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """A request that was understood: `fields` is its JSON object or its form."""

    path: str
    model: str
    fields: Mapping[str, Any]
    created: int
    audio: bytes = b""

    def identity(self, prefix: str, *parts: object) -> str:
        """An id that depends on the question, not on how usage is reported."""
        text = repr((self.path, self.model, parts))
        return prefix + hashlib.sha256(text.encode()).hexdigest()[:32]

    def flag(self, name: str) -> bool:
        """A field that is true or false; 400 for anything else."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise Refusal(400, f"`{name}` must be a boolean.", name)
        return bool(value)

    def count(self, *names: str, least: int = 1) -> int | None:
        """The first of these fields that is set, a whole number; 400 for anything else."""
        for name in names:
            value = self.fields.get(name)
            if value is None:
                continue
            if type(value) is not int or value < least:
                raise Refusal(400, f"`{name}` must be an integer of at least {least}.", name)
            return value
        return None

    def required(self, name: str) -> Any:
        """A field that must be there."""
        value = self.fields.get(name)
        if value is None or value == []:
            raise Refusal(400, f"`{name}` is required.", name)
        return value


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call gets: a whole `body`, or `frames` for a stream."""

    prompt_tokens: int = 0
    body: bytes = b""
    completion_tokens: int = 0
    seconds: float = 0.0
    frames: Iterator[Frame] | None = None
    content_type: str = "application/json"


class Choice(NamedTuple):
    """One generated text. `prompt_tokens` are those of its own prompt."""

    words: Sequence[str]
    cut: bool
    prompt_tokens: int

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def tokens(self) -> Iterator[str]:
        """The text in the pieces in which it is generated."""
        return (word if not i else f" {word}" for i, word in enumerate(self.words))


def text_of(content: Any) -> str:
    """The text of a message, a content part, or a list of them; images and the like are empty."""
    match content:
        case str():
            return content
        case list():
            return " ".join(filter(None, map(text_of, content)))
        case {"text": str(text)}:
            return text
        case {"content": inner}:
            return text_of(inner)
    return ""


def count_tokens(*contents: Any) -> int:
    """How many tokens these texts are."""
    return sum(len(text_of(content).split()) for content in contents)


def generate(prompt: str, index: int, call: Call, prompt_tokens: int) -> Choice:
    """Answer number `index` to `prompt`.

    `max_tokens` (whatever the dialect calls it) cuts it, `min_tokens` (as in vLLM) repeats it.
    """
    most = call.count("max_completion_tokens", "max_output_tokens", "max_tokens")
    least = call.count("min_tokens", least=0) or 0
    said = prompt.split()
    echo = " ".join(said[-_ECHOED_WORDS:])
    words = f"Answer {index + 1}: you said <{echo}> which is {len(said)} words.".split()
    words = (words * (least // len(words) + 1))[: max(least, len(words))]
    return Choice(words[:most], most is not None and most < len(words), prompt_tokens)


def usage_of(prompt: int, completion: int) -> Json:
    """Usage as in OpenAI's chat completions."""
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": None,
    }


# --- OpenAI: chat and legacy completions ----------------------------------------------------


def _data(value: Any) -> bytes:
    return b"data: %s\n\n" % orjson.dumps(value)


def _event(value: Json) -> bytes:
    return b"event: %s\n%s" % (value["type"].encode(), _data(value))


def _stream_options(call: Call) -> tuple[bool, bool]:
    """(include_usage, continuous_usage_stats), where the second asks for the first, as in vLLM."""
    options = call.fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Refusal(400, "`stream_options` must be an object.", "stream_options")
    if options and not call.flag("stream"):
        message = "Stream options can only be defined when `stream=True`."
        raise Refusal(400, message, "stream_options")
    include = bool(options.get("include_usage"))
    return include, include and bool(options.get("continuous_usage_stats"))


def _choices_wanted(call: Call) -> int:
    wanted = call.count("n") or 1
    if wanted > _MOST_CHOICES:
        raise Refusal(400, f"`n` must be at most {_MOST_CHOICES}.", "n")
    return wanted


def _in_turns(choices: Sequence[Choice]) -> Iterator[tuple[int, int, str, bool]]:
    """(choice, tokens so far, token, is it the last): the choices grow side by side."""
    waiting = [(i, choice, choice.tokens()) for i, choice in enumerate(choices)]
    for number in range(1, max(len(choice.words) for choice in choices) + 1):
        for i, choice, tokens in waiting:
            if number <= len(choice.words):
                yield i, number, next(tokens), number == len(choice.words)


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to a chat or a legacy completion, before it is put into a dialect's words.

    `whole` and `part` make a choice of the body and of a chunk; `opening` is the choice that
    opens a stream, where there is one.
    """

    head: Json
    chunk_object: str
    choices: Sequence[Choice]
    prompt_tokens: int
    whole: Callable[[int, Choice], Json]
    part: Callable[[int, str, str | None], Json]
    opening: Callable[[int], Json] | None = None

    def answer(self, call: Call) -> Answer:
        include, continuous = _stream_options(call)
        if call.flag("stream"):
            return Answer(self.prompt_tokens, frames=self._frames(include, continuous))
        choices = [self.whole(i, choice) for i, choice in enumerate(self.choices)]
        body = {**self.head, "choices": choices, "usage": self._usage()}
        return Answer(self.prompt_tokens, orjson.dumps(body), self._generated())

    def _generated(self) -> int:
        return sum(len(choice.words) for choice in self.choices)

    def _usage(self) -> Json:
        return usage_of(self.prompt_tokens, self._generated())

    def _frames(self, include: bool, continuous: bool) -> Iterator[Frame]:
        head = {**self.head, "object": self.chunk_object}

        def chunk(i: int, choice: Json, tokens: int) -> bytes:
            # vLLM's running usage is that of the chunk's own choice, not of the whole answer.
            usage = usage_of(self.choices[i].prompt_tokens, tokens)
            return _data({**head, "choices": [choice], **({"usage": usage} if continuous else {})})

        if self.opening is not None:
            for i in range(len(self.choices)):
                yield Frame(chunk(i, self.opening(i), 0))
        for i, tokens, token, last in _in_turns(self.choices):
            part = self.part(i, token, _finish_reason(self.choices[i]) if last else None)
            yield Frame(chunk(i, part, tokens), 1)
        if include:
            yield Frame(_data({**head, "choices": [], "usage": self._usage()}))
        yield Frame(b"data: [DONE]\n\n")


def _finish_reason(choice: Choice) -> str:
    return "length" if choice.cut else "stop"


def _chat_choice(i: int, choice: Choice) -> Json:
    message = {"role": "assistant", "content": choice.text, "refusal": None, "tool_calls": None}
    reason = _finish_reason(choice)
    return {"index": i, "message": message, "logprobs": None, "finish_reason": reason}


def _chat_part(i: int, token: str, reason: str | None) -> Json:
    return {"index": i, "delta": {"content": token}, "logprobs": None, "finish_reason": reason}


def _chat_opening(i: int) -> Json:
    delta = {"role": "assistant", "content": ""}
    return {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}


def _messages_of(call: Call) -> list[Json]:
    messages = call.required("messages")
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise Refusal(400, "`messages` must be a list of objects.", "messages")
    return messages


def chat_completions(call: Call) -> Answer:
    messages = _messages_of(call)
    tokens = count_tokens(*messages)
    prompt = text_of(messages[-1])
    choices = [generate(prompt, i, call, tokens) for i in range(_choices_wanted(call))]
    head = {
        "id": call.identity("chatcmpl-", messages, choices),
        "object": "chat.completion",
        "created": call.created,
        "model": call.model,
    }
    kind = "chat.completion.chunk"
    completion = Completion(head, kind, choices, tokens, _chat_choice, _chat_part, _chat_opening)
    return completion.answer(call)


def _prompts_of(call: Call, name: str) -> list[tuple[str, int]]:
    """(text, tokens) of a text, a list of texts, a list of tokens or a list of those."""
    value = call.required(name)
    several = isinstance(value, list) and not all(type(one) is int for one in value)
    return [_prompt_of(one, name) for one in (value if several else [value])]


def _prompt_of(value: Any, name: str) -> tuple[str, int]:
    if isinstance(value, str):
        return value, count_tokens(value)
    if isinstance(value, list) and value and all(type(one) is int for one in value):
        return " ".join(map(str, value)), len(value)
    raise Refusal(400, f"`{name}` must be text, tokens, or a list of them.", name)


def _completion_choice(i: int, choice: Choice) -> Json:
    return _completion_part(i, choice.text, _finish_reason(choice))


def _completion_part(i: int, token: str, reason: str | None) -> Json:
    return {"index": i, "text": token, "logprobs": None, "finish_reason": reason}


def completions(call: Call) -> Answer:
    prompts = _prompts_of(call, "prompt")
    wanted = _choices_wanted(call)
    choices = [generate(text, i, call, tokens) for text, tokens in prompts for i in range(wanted)]
    head = {
        "id": call.identity("cmpl-", prompts, choices),
        "object": "text_completion",
        "created": call.created,
        "model": call.model,
    }
    total = sum(tokens for _, tokens in prompts)
    completion = Completion(
        head, "text_completion", choices, total, _completion_choice, _completion_part
    )
    return completion.answer(call)


# --- OpenAI: embeddings, and vLLM's rerank and score -----------------------------------------


def _number(*parts: object) -> float:
    """Between -1 and 1, the same each time, and exact as a 32 bit float."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return (int.from_bytes(digest[:2], "big") - 2**15) / 2**15


def embeddings(call: Call) -> Answer:
    prompts = _prompts_of(call, "input")
    size = call.count("dimensions") or _DIMENSIONS
    encoding = call.fields.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise Refusal(400, "`encoding_format` must be float or base64.", "encoding_format")

    def vector(text: str) -> list[float] | str:
        numbers = [_number(text, i) for i in range(size)]
        if encoding == "float":
            return numbers
        return base64.b64encode(struct.pack(f"<{size}f", *numbers)).decode("ascii")

    tokens = sum(count for _, count in prompts)
    body = {
        "id": call.identity("embd-", prompts),
        "object": "list",
        "created": call.created,
        "model": call.model,
        "data": [
            {"index": i, "object": "embedding", "embedding": vector(text)}
            for i, (text, _) in enumerate(prompts)
        ],
        "usage": usage_of(tokens, 0),
    }
    return Answer(tokens, orjson.dumps(body))


def rerank(call: Call) -> Answer:
    query, documents = text_of(call.required("query")), call.required("documents")
    texts = [text_of(one) for one in documents]
    scored = sorted(((_relevance(query, text), -i) for i, text in enumerate(texts)), reverse=True)
    results = [
        {"index": -i, "document": {"text": texts[-i]}, "relevance_score": score}
        for score, i in scored[: call.count("top_n", least=0) or None]
    ]
    tokens = _pair_tokens([(query, text) for text in texts])
    identity = call.identity("rerank-", query, texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    body = {"id": identity, "model": call.model, "usage": usage, "results": results}
    return Answer(tokens, orjson.dumps(body))


def score(call: Call) -> Answer:
    ones, others = _listed(call, "text_1"), _listed(call, "text_2")
    if len(ones) == 1:
        ones = ones * len(others)
    if len(ones) != len(others):
        raise Refusal(400, "`text_1` and `text_2` must be of one length.", "text_1")
    pairs = list(zip(ones, others, strict=True))
    tokens = _pair_tokens(pairs)
    body = {
        "id": call.identity("score-", pairs),
        "object": "list",
        "created": call.created,
        "model": call.model,
        "data": [
            {"index": i, "object": "score", "score": _relevance(*pair)}
            for i, pair in enumerate(pairs)
        ],
        "usage": usage_of(tokens, 0),
    }
    return Answer(tokens, orjson.dumps(body))


def _listed(call: Call, name: str) -> list[str]:
    value = call.required(name)
    return [text_of(one) for one in (value if isinstance(value, list) else [value])]


def _pair_tokens(pairs: Sequence[tuple[str, str]]) -> int:
    return sum(count_tokens(*pair) for pair in pairs)


def _relevance(query: str, text: str) -> float:
    """Half of it are the words in common, so that an order makes sense to who looks at it."""
    asked, told = set(query.lower().split()), set(text.lower().split())
    common = len(asked & told) / max(1, len(asked))
    return round(common / 2 + (_number(query, text) + 1) / 4, 6)


# --- OpenAI: responses ----------------------------------------------------------------------


def responses(call: Call) -> Answer:
    given, instructions = call.required("input"), call.fields.get("instructions")
    tokens = count_tokens(given, instructions)
    prompt = text_of(given[-1] if isinstance(given, list) else given)
    choice = generate(prompt, 0, call, tokens)
    identity = call.identity("", given, instructions, choice)
    if call.flag("stream"):
        return Answer(tokens, frames=_response_frames(call, identity, choice))
    return Answer(tokens, orjson.dumps(_response(call, identity, choice)), len(choice.words))


def _response(call: Call, identity: str, choice: Choice | None) -> Json:
    """A response object; without a `choice` it is one that has just begun."""
    status = "in_progress" if choice is None else "incomplete" if choice.cut else "completed"
    return {
        "id": f"resp_{identity}",
        "created_at": call.created,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if choice and choice.cut else None,
        "instructions": call.fields.get("instructions"),
        "max_output_tokens": call.fields.get("max_output_tokens"),
        "metadata": call.fields.get("metadata"),
        "model": call.model,
        "object": "response",
        "output": [_output_item(identity, status, choice.text)] if choice else [],
        "parallel_tool_calls": True,
        "temperature": call.fields.get("temperature", 1.0),
        "tool_choice": "auto",
        "tools": [],
        "top_p": call.fields.get("top_p", 1.0),
        "status": status,
        "text": {"format": {"type": "text"}},
        "truncation": "disabled",
        "usage": _response_usage(choice) if choice else None,
    }


def _response_usage(choice: Choice) -> Json:
    generated = len(choice.words)
    return {
        "input_tokens": choice.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": choice.prompt_tokens + generated,
    }


def _output_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _output_item(identity: str, status: str, text: str | None) -> Json:
    return {
        "id": f"msg_{identity}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [] if text is None else [_output_part(text)],
    }


def _response_events(call: Call, identity: str, choice: Choice) -> Iterator[tuple[str, Json, int]]:
    """(type, what it says, tokens generated for it)"""
    item_at: Json = {"output_index": 0}
    part_at = {"item_id": f"msg_{identity}", "output_index": 0, "content_index": 0}
    done = _response(call, identity, choice)
    begun = _response(call, identity, None)
    opened = _output_item(identity, "in_progress", None)
    yield "response.created", {"response": begun}, 0
    yield "response.in_progress", {"response": begun}, 0
    yield "response.output_item.added", {**item_at, "item": opened}, 0
    yield "response.content_part.added", {**part_at, "part": _output_part("")}, 0
    for token in choice.tokens():
        yield "response.output_text.delta", {**part_at, "delta": token, "logprobs": []}, 1
    yield "response.output_text.done", {**part_at, "text": choice.text, "logprobs": []}, 0
    yield "response.content_part.done", {**part_at, "part": _output_part(choice.text)}, 0
    yield "response.output_item.done", {**item_at, "item": done["output"][0]}, 0
    yield f"response.{done['status']}", {"response": done}, 0


def _response_frames(call: Call, identity: str, choice: Choice) -> Iterator[Frame]:
    for number, (name, said, tokens) in enumerate(_response_events(call, identity, choice)):
        yield Frame(_event({"type": name, "sequence_number": number, **said}), tokens)


# --- Anthropic: messages --------------------------------------------------------------------


def messages(call: Call) -> Answer:
    asked, system = _messages_of(call), call.fields.get("system")
    call.required("max_tokens")
    tokens = count_tokens(system, *asked)
    choice = generate(text_of(asked[-1]), 0, call, tokens)
    identity = call.identity("msg_", asked, system, choice)
    if call.flag("stream"):
        return Answer(tokens, frames=_message_frames(call, identity, choice))
    return Answer(tokens, orjson.dumps(_message(call, identity, choice)), len(choice.words))


def _message(call: Call, identity: str, choice: Choice, *, whole: bool = True) -> Json:
    """A message; one that is not `whole` opens a stream."""
    return {
        "id": identity,
        "type": "message",
        "role": "assistant",
        "model": call.model,
        "content": [{"type": "text", "text": choice.text}] if whole else [],
        "stop_reason": _stop_reason(choice) if whole else None,
        "stop_sequence": None,
        "stop_details": None,
        "usage": {
            "input_tokens": choice.prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": len(choice.words) if whole else 1,
        },
    }


def _stop_reason(choice: Choice) -> str:
    return "max_tokens" if choice.cut else "end_turn"


def _message_frames(call: Call, identity: str, choice: Choice) -> Iterator[Frame]:
    start = _message(call, identity, choice, whole=False)
    block = {"type": "text", "text": ""}
    yield Frame(_event({"type": "message_start", "message": start}))
    yield Frame(_event({"type": "content_block_start", "index": 0, "content_block": block}))
    yield Frame(_event({"type": "ping"}))
    for token in choice.tokens():
        delta = {"type": "text_delta", "text": token}
        yield Frame(_event({"type": "content_block_delta", "index": 0, "delta": delta}), 1)
    yield Frame(_event({"type": "content_block_stop", "index": 0}))
    stop = {"stop_reason": _stop_reason(choice), "stop_sequence": None, "stop_details": None}
    usage = {"output_tokens": len(choice.words)}
    yield Frame(_event({"type": "message_delta", "delta": stop, "usage": usage}))
    yield Frame(_event({"type": "message_stop"}))


def message_tokens(call: Call) -> Answer:
    tokens = count_tokens(call.fields.get("system"), *_messages_of(call))
    return Answer(body=orjson.dumps({"input_tokens": tokens}))


# --- OpenAI: audio --------------------------------------------------------------------------


def audio_seconds(audio: bytes) -> float:
    """How long it plays: what a WAV header says, else a guess from the size."""
    try:
        with wave.open(io.BytesIO(audio)) as file:
            seconds: float = file.getnframes() / file.getframerate()
    except (wave.Error, EOFError, ZeroDivisionError):
        seconds = len(audio) / _ASSUMED_BYTES_PER_SECOND
    return float(round(min(seconds, _MOST_SECONDS), 3))


def _segments(seconds: float) -> list[Json]:
    """The transcript, two words a second, in segments of some seconds."""
    found: list[Json] = []
    start, number = 0.0, 0
    while start < seconds:
        end = min(start + _SEGMENT_SECONDS, seconds)
        spoken = max(1, round((end - start) * 2))
        words = [_TRANSCRIPT[(number + i) % len(_TRANSCRIPT)] for i in range(spoken)]
        found.append(_segment(len(found), start, end, " " + " ".join(words)))
        start, number = end, number + spoken
    return found


def _segment(identity: int, start: float, end: float, text: str) -> Json:
    return {
        "id": identity,
        "seek": int(start * 100),
        "start": start,
        "end": end,
        "text": text,
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": -0.25,
        "compression_ratio": 1.0,
        "no_speech_prob": 0.01,
    }


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{point}{rest % 1000:03}"


def _cue(segment: Json, point: str) -> str:
    start, end = _clock(segment["start"], point), _clock(segment["end"], point)
    return f"{start} --> {end}\n{segment['text'].strip()}\n\n"


def _subtitles(kind: str, segments: Sequence[Json]) -> str:
    if kind == "vtt":
        return "WEBVTT\n\n" + "".join(_cue(segment, ".") for segment in segments)
    return "".join(f"{segment['id'] + 1}\n{_cue(segment, ',')}" for segment in segments)


def _speech(call: Call, extra: Callable[[float], Json]) -> Answer:
    wanted = call.fields.get("response_format") or "json"
    if wanted not in _FORMATS:
        raise Refusal(400, f"`response_format` must be one of {_FORMATS}.", "response_format")
    if not call.audio:
        raise Refusal(400, "`file` is required.", "file")
    seconds = audio_seconds(call.audio)
    segments = _segments(seconds)
    text = "".join(segment["text"] for segment in segments).strip()
    if wanted in ("text", "srt", "vtt"):
        body = f"{text}\n" if wanted == "text" else _subtitles(wanted, segments)
        plain = "text/plain; charset=utf-8"
        return Answer(body=body.encode(), seconds=seconds, content_type=plain)
    full = {"language": "english", "duration": seconds, "text": text, "segments": segments}
    said = {**(full if wanted == "verbose_json" else {"text": text}), **extra(seconds)}
    return Answer(body=orjson.dumps(said), seconds=seconds)


def transcriptions(call: Call) -> Answer:
    return _speech(
        call, lambda seconds: {"usage": {"type": "duration", "seconds": math.ceil(seconds)}}
    )


def translations(call: Call) -> Answer:
    return _speech(call, lambda seconds: {})


#: Who answers at which path.
HANDLERS: Mapping[str, Callable[[Call], Answer]] = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/v1/embeddings": embeddings,
    "/v1/messages": messages,
    "/v1/messages/count_tokens": message_tokens,
    "/v1/responses": responses,
    "/v1/audio/transcriptions": transcriptions,
    "/v1/audio/translations": translations,
    "/v1/rerank": rerank,
    "/v1/score": score,
}
