"""How each dialect's clients are told of errors. Pure.

OpenAI: https://platform.openai.com/docs/guides/error-codes
Anthropic: https://docs.anthropic.com/en/api/errors
"""

from __future__ import annotations

import orjson

from llmproxy.endpoints import Dialect
from llmproxy.errors import ProxyError

_OPENAI_TYPES = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(dialect: Dialect, error: ProxyError) -> bytes:
    """`error` as a JSON body that the dialect's client libraries understand."""
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(error.status, _family(error.status, "api_error"))
        return orjson.dumps({"type": "error", "error": {"type": kind, "message": error.message}})
    kind = _OPENAI_TYPES.get(error.status, _family(error.status, "server_error"))
    detail = {
        "message": error.message,
        "type": kind,
        "param": error.param,
        "code": error.code,
    }
    return orjson.dumps({"error": detail})


def error_event(dialect: Dialect, error: ProxyError) -> bytes:
    """`error` as a server-sent event, for a stream that has begun."""
    name = b"event: error\n" if dialect is Dialect.ANTHROPIC else b""
    return name + b"data: " + error_body(dialect, error) + b"\n\n"


def _family(status: int, server_side: str) -> str:
    return "invalid_request_error" if status < 500 else server_side


def error_answer(
    dialect: Dialect, error: ProxyError
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """`error` as an answer: status, header fields, body."""
    fields = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    fields.append((b"Content-Type", b"application/json"))
    return error.status, fields, error_body(dialect, error)
