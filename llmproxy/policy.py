"""What a request may ask of a backend: how much work, and which fields. Pure.

Servers take many more fields than the APIs that they imitate. Most of them only change the answer,
and pass. Refused are those that reach other machines, choose what is not the client's to choose,
run its code, or make an answer that can't be metered. Looked up in vLLM 0.33, SGLang 0.5.23 and
llama.cpp (its server of 2026-11).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from llmproxy import media
from llmproxy.config import Backend
from llmproxy.endpoints import Endpoint, Shape
from llmproxy.errors import BadRequest
from llmproxy.model import Kind

_REASONS = {
    "it names a machine that the model's server would connect to": (
        "bootstrap_host",  # SGLang: where the prompt's cache is fetched from
        "bootstrap_port",
        "bootstrap_room",
        "kv_transfer_params",  # vLLM: the same
        "ec_transfer_params",
        "api_base",  # LiteLLM and others
        "base_url",
        "headers",
        "extra_headers",
    ),
    "which model answers is told by 'model' alone": (
        "lora",  # llama.cpp: adapters by request
        "lora_path",  # SGLang
        "adapter_id",
        "fallbacks",
        "custom_llm_provider",
        "mock_response",
    ),
    "where in the model's server a request runs is not for clients to say": (
        "data_parallel_rank",  # SGLang
        "routed_dp_rank",
        "disagg_prefill_dp_rank",
        "id_slot",  # llama.cpp
    ),
    "requests get their ids, and the server its key, from the proxy": (
        "request_id",  # vLLM; two requests with one id could be mixed up
        "rid",  # SGLang
        "session_params",
        "api_key",
    ),
    "a request can't bring a program": (
        "chat_template",  # Jinja: a loop in it holds up all users
        "custom_logit_processor",  # SGLang: a pickled class
        "logits_processors",  # vLLM, before 0.9
    ),
    "the answer could not be metered": (
        "response_fields",  # llama.cpp: leaves out what is not named, such as the usage
        "stream_interval",  # vLLM: many tokens in one chunk
    ),
}
#: Fields that no backend gets, and why.
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names}
#: And in a form with audio: vLLM takes `n` there, for beam search, others a URL instead of a file.
REFUSED_IN_FORMS = {
    **REFUSED,
    "n": "audio is answered once",
    "url": "send the file itself",
    "file_url": "send the file itself",
}

# The same by way of fields that are otherwise harmless.
_REFUSED_WITHIN = {
    "chat_template_kwargs": frozenset(["chat_template", "tokenize"]),
    "vllm_xargs": frozenset(["kv_transfer_params", "ec_transfer_params"]),
}
# vLLM's: the answer is not JSON, and tells its usage in a header.
_BINARY = ("bytes", "bytes_only")

_ANSWERS = ("n", "n_cmpl", "best_of")
_PROMPTS = ("prompt", "prompt_embeds")
_BATCHES = {
    Shape.EMBEDDING: (
        *("input", "messages", "documents", "items", "queries"),
        *("text_1", "text_2", "data_1", "data_2"),
    )
}
_LENGTHS = (
    *("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens"),
    *("n_predict", "min_tokens"),
)

#: Of text: what most tokenizers make of English.
BYTES_PER_TOKEN = 4


class Ask(NamedTuple):
    """What a request takes at most, in tokens: its prompt (or what it embeds: `kind`), and all its
    answers.

    `streamed`: they come piece by piece.
    """

    prompt: int = 0
    answer: int = 0
    kind: Kind = Kind.PROMPT
    streamed: bool = False


NOTHING_ASKED = Ask()

_WATCHED = frozenset([*REFUSED, *_REFUSED_WITHIN, "encoding_format"])
#: Names that are looked for in the objects that some fields are.
WATCHED_WITHIN = frozenset().union(*_REFUSED_WITHIN.values())
#: Fields that are looked at here, in the one spelling that they may have.
NAMES = _WATCHED.union(_ANSWERS, _PROMPTS, _LENGTHS, *_BATCHES.values(), media.NAMES)
_SEVERAL = frozenset([*_ANSWERS, *_PROMPTS])
# Python 3.11 takes longer to get a member of an enumeration than to do anything with it.
_EMBEDDING = Shape.EMBEDDING


class Items:
    """A list of which is known how many items it has, and whether it is one text in tokens."""

    __slots__ = ("_are_tokens", "_count")

    def __init__(self) -> None:
        self._count = 0
        self._are_tokens = False

    def add(self, items: list[Any]) -> None:
        """The next items of it."""
        if not self._count:
            self._are_tokens = _are_tokens(items)
        self._count += len(items)

    @property
    def texts(self) -> int:
        """How many texts there are."""
        return 1 if self._are_tokens else self._count


def check(
    endpoint: Endpoint, body: Mapping[str, Any], remote_url: str | None, backend: Backend
) -> None:
    """Raises BadRequest, with the field's name in `param`, if `backend` is not to get this body.

    `remote_url`: what `media.remote_url` says of it.
    """
    if not _WATCHED.isdisjoint(body):
        _check_fields(body)
    _check_amount(endpoint, body, backend)
    if remote_url is not None and not backend.media_urls:
        raise BadRequest(
            f"{remote_url!r} would have the model's server fetch something, which is not allowed"
            " for this model: send the content itself, in a 'data:' URL.",
            param=remote_url,
        )


def check_name(name: str, refused: Mapping[str, str] = REFUSED) -> None:
    """Raises BadRequest if no backend gets a field of this name."""
    if name in refused:
        raise BadRequest(f"{name!r} is not supported here: {refused[name]}.", param=name)


def choices(body: Mapping[str, Any]) -> int:
    """How many answers a body asks for: prompts, times answers for each.

    Raises BadRequest where their number is none.
    """
    if _SEVERAL.isdisjoint(body):
        return 1
    prompts = sum(_items(body.get(name)) for name in _PROMPTS)
    return max(prompts, 1) * max(_count(body, name) for name in _ANSWERS)


def ask(endpoint: Endpoint, body: Mapping[str, Any], size: int, backend: Backend) -> Ask:
    """What a request takes at most, estimated: a token for 4 of the body's `size` bytes, and the
    length that it asks for with each of its answers.

    Where it names none, that is the one that the model gives, if that is known. Nothing takes more
    than the model's context for an answer.
    """
    if endpoint.shape is Shape.FREE:
        return NOTHING_ASKED
    asked = [n for name in _LENGTHS if type(n := body.get(name)) is int and n >= 0]
    length = 0 if endpoint.shape is _EMBEDDING else max(asked, default=backend.max_tokens or 0)
    prompt, answers = size // BYTES_PER_TOKEN + 1, choices(body)
    if backend.max_model_len is not None:
        prompt, length = (min(n, backend.max_model_len) for n in (prompt, length))
    kind = Kind.EMBEDDING if endpoint.shape is _EMBEDDING else Kind.PROMPT
    return Ask(prompt, answers * length, kind, body.get("stream") is True)


def essence(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body for which `ask` gives the same, in little memory."""
    kept = {name: body[name] for name in _LENGTHS if type(body.get(name)) is int}
    return {**kept, "n": choices(body), "stream": body.get("stream") is True}


def _count(body: Mapping[str, Any], name: str) -> int:
    value = body.get(name)
    if value is None:
        return 1
    if type(value) is not int or value < 1:
        raise BadRequest(f"{name!r} must be a whole number, 1 at least.", param=name)
    return value


def _items(value: object) -> int:
    """How many texts there are: a list of numbers is one, in tokens."""
    if value is None:
        return 0
    if isinstance(value, list):
        return 1 if _are_tokens(value) else len(value)
    return value.texts if isinstance(value, Items) else 1


def _are_tokens(items: Any) -> bool:
    return bool(items) and isinstance(items[0], int)


def _check_fields(body: Mapping[str, Any]) -> None:
    for name in body:
        if body[name] is not None:
            check_name(name)
    for name, refused in _REFUSED_WITHIN.items():
        inner = body.get(name)
        if isinstance(inner, dict) and not refused.isdisjoint(inner):
            field = f"{name}.{min(refused.intersection(inner))}"
            raise BadRequest(f"{field!r} is not supported here.", param=field)
    if body.get("encoding_format") in _BINARY:
        raise BadRequest(
            '\'encoding_format\' must be one whose answer is JSON: "float" or "base64".',
            param="encoding_format",
        )


def _check_amount(endpoint: Endpoint, body: Mapping[str, Any], backend: Backend) -> None:
    if (asked := choices(body)) > backend.max_choices:
        raise BadRequest(
            f"The request asks for {asked} answers (prompts x the greatest of 'n' and 'best_of');"
            f" this model gives {backend.max_choices} at most.",
            param=next(name for name in (*_ANSWERS, *_PROMPTS) if name in body),
        )
    for name in _BATCHES[_EMBEDDING] if endpoint.shape is _EMBEDDING else _PROMPTS:
        if name in body and _items(body[name]) > backend.max_batch:
            raise BadRequest(
                f"{name!r} has more than {backend.max_batch} items, the most for this model.",
                param=name,
            )
    if backend.max_tokens is not None:
        for name in _LENGTHS:
            _check_length(name, body.get(name), backend.max_tokens)


def _check_length(name: str, value: object, most: int) -> None:
    # A negative number is no limit at all to llama.cpp.
    if value is not None and (type(value) is not int or not 0 <= value <= most):
        raise BadRequest(
            f"{name!r} must be a whole number, {most} at most for this model.", param=name
        )
