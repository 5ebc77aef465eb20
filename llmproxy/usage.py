"""Usage from an answer's JSON, per dialect: what the backend says it counted.

Where the numbers stand: OpenAI API reference (chat completions, embeddings, responses), Anthropic
API reference (messages, streaming), Cohere and Jina API references (rerank), all 2025.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from llmproxy.endpoints import Shape
from llmproxy.model import MAX_COUNT, NO_COUNTS, Counts, Kind

# Python 3.11 takes longer to get a member of an enumeration than to do anything with it.
_EMBEDDING_SHAPE, _MESSAGES, _RESPONSES = Shape.EMBEDDING, Shape.MESSAGES, Shape.RESPONSES
_PROMPT, _COMPLETION, _EMBEDDING = Kind.PROMPT, Kind.COMPLETION, Kind.EMBEDDING

#: How much of a usage report that can't be used is kept, in bytes.
MAX_RAW = 2048

#: Members of an answer that may tell its usage, or in seconds of audio.
NAMES = frozenset(["usage", "meta", "duration"])
#: The parts of a messages answer's prompt count; `input_tokens` is without the cached tokens.
MESSAGE_INPUT = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


class Absurd(ValueError):
    """A count that is not an integer from 0 to 2^63-1, or a report without its counts."""


class Report(NamedTuple):
    """A usage report. Absent: no `counts` and no `raw`; absurd: only `raw`, at most 2 KiB."""

    counts: Counts = NO_COUNTS
    raw: str | None = None


ABSENT = Report()


def read_usage(shape: Shape, holder: object) -> Report:
    """The usage in `holder`: an answer, a chunk, or the `response` of a responses event."""
    if not isinstance(holder, dict):
        return ABSENT
    usage = holder.get("usage")
    if usage is None and shape is _EMBEDDING_SHAPE:
        usage = _cohere_usage(holder.get("meta"))
    if usage is None:
        return ABSENT
    try:
        return Report(_counts(shape, usage))
    except Absurd:
        return Report(raw=raw_text(usage))


def message_fields(usage: object) -> dict[str, int]:
    """The counts of a messages usage object that are there, by their names. Raises Absurd."""
    fields = _fields(usage)
    counts = {name: _optional(fields, name) for name in (*MESSAGE_INPUT, "output_tokens")}
    return {name: count for name, count in counts.items() if count is not None}


def total(*counts: int) -> int:
    """The sum of counts. Raises Absurd when it is more than a bill can hold."""
    if (result := sum(counts)) > MAX_COUNT:
        raise Absurd("too large")
    return result


def raw_text(usage: object) -> str:
    """A usage report as text for the operator, cut to `MAX_RAW` bytes."""
    try:
        return orjson.dumps(usage)[:MAX_RAW].decode("utf-8", "ignore")
    except TypeError:  # nested deeper than orjson writes, though not than it reads
        return "(nested too deep to show)"


# Not past the first closing brace: what follows could be part of an answer.
_FRAGMENT = re.compile(rb'"usage"\s*+:\s*+(\{[^}]{0,2047}+\}?|[-+.\w]{1,64}+)')


def raw_fragment(data: bytes) -> str | None:
    """The usage report in a text that is not valid JSON (`NaN`, say), or None if none is there."""
    match = _FRAGMENT.search(data)
    if match is None or match[1] == b"null":
        return None
    return match[1][:MAX_RAW].decode("utf-8", "ignore")


def _counts(shape: Shape, usage: object) -> Counts:
    fields = _fields(usage)
    if shape is _EMBEDDING_SHAPE:
        name = "prompt_tokens" if fields.get("prompt_tokens") is not None else "total_tokens"
        return {_EMBEDDING: _required(fields, name)}
    if shape is _MESSAGES:
        counts = message_fields(fields)
        _required(fields, "input_tokens")
        prompt = total(*(counts.get(name, 0) for name in MESSAGE_INPUT))
        return {_PROMPT: prompt, _COMPLETION: _required(fields, "output_tokens")}
    if shape is _RESPONSES:
        return _pair(fields, "input_tokens", "output_tokens")
    return _pair(fields, "prompt_tokens", "completion_tokens")


def _pair(fields: Mapping[str, Any], prompt: str, completion: str) -> Counts:
    return {_PROMPT: _required(fields, prompt), _COMPLETION: _required(fields, completion)}


def _fields(usage: object) -> Mapping[str, Any]:
    if not isinstance(usage, dict):
        raise Absurd("not an object")
    return usage


def _optional(fields: Mapping[str, Any], name: str) -> int | None:
    return None if fields.get(name) is None else _required(fields, name)


def _required(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise Absurd(name)
    return value


def _cohere_usage(meta: object) -> object:
    """Cohere's `meta.billed_units` or `meta.tokens` in the words of the others, or None.

    Its search units are no tokens: a report of nothing else is absurd, not absent.
    """
    if not isinstance(meta, dict):
        return None
    for name in ("billed_units", "tokens"):
        units = meta.get(name)
        if isinstance(units, dict) and units.get("input_tokens") is not None:
            return {"prompt_tokens": units["input_tokens"]}
    return meta if meta.get("billed_units") is not None else None
