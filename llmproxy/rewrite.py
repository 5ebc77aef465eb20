"""The request's body: what it asks for, and what the backend gets of it.

The backend gets the client's bytes, but for the model's name and for what metering needs. A body
that a backend could read in another way than we did is refused, not repaired.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from llmproxy import media, policy
from llmproxy.affinity import affinity, affinity_of_large
from llmproxy.endpoints import Endpoint, Shape
from llmproxy.errors import BadRequest
from llmproxy.jsonbytes import (
    InvalidJSON,
    Member,
    append,
    duplicate,
    has_duplicates,
    members,
    members_of,
    parse_object,
    refuse_too_many,
    replace,
)
from llmproxy.survey import Survey

#: Longest name of a model, in characters.
MAX_MODEL = 256
#: Longest value of a field that decides on routing or metering, in bytes of JSON.
MAX_VALUE = 4096

# Fields that decide on routing and metering. Servers written in Go (Ollama) take `Model` for
# `model`: with the wrong case these are refused, or the bill would be for another model.
_OURS = policy.NAMES | {"model", "stream", "stream_options", "background", "store"}
# Those of them that a backend may get with another value.
_REPLACED = ("model", "stream_options", "store")
# Those of them whose values count, and not only whether they are true.
_WHOLE = ("model", "stream_options")
_OPTIONS = frozenset(["include_usage", "continuous_usage_stats"])
# No longer name is one of these in another case; to look at 32 MiB of names would take 60 ms.
_LONGEST = max(map(len, _OURS | _OPTIONS))
# What the options are where the client has none; many have just the first.
_LAST_COUNT = b'{"include_usage":true}'
_RUNNING_COUNTS = b'{"include_usage":true,"continuous_usage_stats":true}'
# Python 3.11 takes longer to get a member of an enumeration than to do anything with it.
_CHAT, _RESPONSES = Shape.CHAT, Shape.RESPONSES


@dataclasses.dataclass(slots=True)  # see `forward.Order`
class JSONRequest:
    """A request's body, understood.

    `body`: its members, or after `lightened` what is asked for later.
    `show_usage`, `show_continuous`: the client asked for the usage chunk, for running counts.
    `several`: it may ask for several answers, whose running counts are not those of the whole.
    `remote_url`: a field that would have the backend fetch something.
    `members`: where those are that could have to be replaced, if there are others than its model.
    `in_short`: `body` is that of a survey, and `members` are all.
    """

    raw: bytes
    body: Mapping[str, Any]
    model: str
    stream: bool = False
    show_usage: bool = False
    show_continuous: bool = False
    several: bool = False
    remote_url: str | None = None
    members: Sequence[Member] = ()
    in_short: bool = False

    def opening(self) -> bytes:
        """What the requests of one conversation have in common; of one before it is `lightened`."""
        if self.in_short:
            return affinity_of_large(self.raw, self.members)
        return affinity(self.body)

    def __repr__(self) -> str:
        return f"JSONRequest(model={self.model!r}, stream={self.stream})"  # and not the prompt


def plan(endpoint: Endpoint, raw: bytes, survey: Survey | None = None) -> JSONRequest:
    """Read a request's body. Raises BadRequest (400) with the field's name in `param`.

    `survey`: that of a large body, which it has gone through.
    """
    found: Sequence[Member] = ()
    try:
        if survey is not None:
            body, found = _read_survey(raw, survey)
            remote_url = survey.remote_url
        else:
            body = parse_object(raw)
            _refuse_ambiguous(raw, body, _OURS, "")
            if "stream_options" in body or "store" in body:
                found = members_of(raw, [key for key in _REPLACED if key in body])
            remote_url = media.remote_url(endpoint, body)
    except InvalidJSON as error:
        raise refusal(error) from None
    stream = _stream(endpoint, body)
    options = _stream_options(raw, body, found)
    show_usage = options.get("include_usage") is True
    background = body.get("background")
    if endpoint.shape is _RESPONSES and background is not None and background is not False:
        raise BadRequest("'background' is not supported here.", param="background")
    return JSONRequest(
        raw,
        body,
        _model(body),
        stream,
        show_usage,
        show_usage and options.get("continuous_usage_stats") is True,
        policy.choices(body) > 1,
        remote_url,
        found,
        survey is not None,
    )


def lightened(request: JSONRequest) -> JSONRequest:
    """A request of which only `body_for` and `policy.ask` want to know any more.

    What was read of it can take fifty times its bytes.
    """
    present = {key: None for key in _REPLACED if key in request.body}
    return dataclasses.replace(
        request,
        body=present | policy.essence(request.body),
        members=[member for member in request.members if member.key in _REPLACED],
    )


def refusal(error: InvalidJSON) -> BadRequest:
    """The error for a body that is not understood."""
    return BadRequest(f"The request body is {error}.")


def _read_survey(raw: bytes, survey: Survey) -> tuple[dict[str, Any], list[Member]]:
    body, found = survey.body, survey.members
    if len(found) != len(body):
        raise _twice(found)
    _refuse_spelling(body, _OURS)
    for key in _WHOLE:
        if key in body:
            value = _value(raw, found, key)
            if len(value) > MAX_VALUE:
                raise BadRequest(f"{key!r} is too long.", param=key)
            body[key] = orjson.loads(value)
    return body, found


def body_for(
    request: JSONRequest, endpoint: Endpoint, *, model: str | None = None, continuous: bool = False
) -> bytes:
    """The body for a backend: `request.raw` itself when nothing has to change.

    `model`: the backend's own name of the model, None if it is the same. `continuous`: ask for
    running counts.
    """
    changes: dict[str, bytes | None] = {}
    if endpoint.shape is _CHAT and request.stream:
        changes["stream_options"] = _forced_options(request, continuous)
    if endpoint.shape is _RESPONSES:
        changes["store"] = b"false"
    if model is not None and model != request.model:
        changes["model"] = orjson.dumps(model)
    if not changes:
        return request.raw
    raw, there = request.raw, {key: changes.pop(key) for key in [*changes] if key in request.body}
    if there:
        raw = replace(raw, there, request.members or members_of(raw, there))
    return append(raw, changes)


def _forced_options(request: JSONRequest, continuous: bool) -> bytes:
    if not request.members:
        return _RUNNING_COUNTS if continuous else _LAST_COUNT
    raw = _value(request.raw, request.members, "stream_options")
    if raw == _LAST_COUNT and not continuous:
        return raw
    forced: dict[str, bytes | None] = {"include_usage": b"true"}
    if continuous:
        forced["continuous_usage_stats"] = b"true"
    elif not request.show_continuous:
        # Without `include_usage` it had no effect; now it would.
        forced["continuous_usage_stats"] = None
    return replace(raw if raw.startswith(b"{") else b"{}", forced)


def _refuse_ambiguous(raw: bytes, value: dict[str, Any], ours: frozenset[str], prefix: str) -> None:
    if has_duplicates(raw, value):
        raise _twice(members(raw), prefix)
    _refuse_spelling(value, ours, prefix)


def _twice(found: Sequence[Member], prefix: str = "") -> BadRequest:
    name = prefix + str(duplicate(found))[:64]
    return BadRequest(f"The field {name!r} stands twice in the request body.", param=name)


def _refuse_spelling(value: dict[str, Any], ours: frozenset[str], prefix: str = "") -> None:
    refuse_too_many(value)
    for key in value:
        if key not in ours and len(key) <= _LONGEST and (name := key.casefold()) in ours:
            name = prefix + name
            raise BadRequest(f"The field {name!r} must be spelled like this.", param=name)


def _model(body: dict[str, Any]) -> str:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("'model' must be the name of a model.", param="model")
    if len(model) > MAX_MODEL:
        raise BadRequest(f"'model' is longer than {MAX_MODEL} characters.", param="model")
    return model


def _stream(endpoint: Endpoint, body: dict[str, Any]) -> bool:
    stream = body.get("stream", False)
    if not isinstance(stream, bool):
        raise BadRequest("'stream' must be true or false.", param="stream")
    if stream and not endpoint.streams:
        raise BadRequest("'stream' is not supported on this path.", param="stream")
    return stream


def _stream_options(raw: bytes, body: dict[str, Any], found: Sequence[Member]) -> dict[str, Any]:
    options = body.get("stream_options")
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise BadRequest("'stream_options' must be an object.", param="stream_options")
    inner = _value(raw, found, "stream_options")
    if len(inner) > MAX_VALUE:
        raise BadRequest("'stream_options' is too long.", param="stream_options")
    _refuse_ambiguous(inner, options, _OPTIONS, "stream_options.")
    return options


def _value(raw: bytes, found: Sequence[Member], key: str) -> bytes:
    for member in found:
        if member.key == key:
            return raw[member.value_start : member.value_end]
    return b""
