"""The error tree: what can go wrong with a request, as the client is told it.

Every `ProxyError` carries its HTTP status, and the `code` and `type` which the OpenAI and
Anthropic dialects show (https://platform.openai.com/docs/guides/error-codes,
https://docs.anthropic.com/en/api/errors). The text is safe to show: no secret, no prompt, and
nothing of a backend's own answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

#: The status in logs and metrics of a request whose client left before any answer.
CLIENT_GONE = 499


def _retry_after(wait_s: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(wait_s)))}


class ProxyError(Exception):
    """An ending that has an HTTP answer of ours."""

    status = 500
    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status or type(self).status
        self.code = code or type(self).code
        self.param = param
        self.headers = dict(headers or {})


class BadRequest(ProxyError):
    """The request's body or form was not understood."""

    status, code = 400, "invalid_request_error"


class InvalidKey(ProxyError):
    """No key, or not one that is valid now (RFC 6750 section 3)."""

    status, code = 401, "invalid_api_key"

    def __init__(self) -> None:
        # One text for all: what is wrong with a key is nothing that its sender should learn.
        super().__init__(
            "No valid API key was provided: send 'Authorization: Bearer KEY'.",
            headers={"WWW-Authenticate": "Bearer"},
        )


class InsufficientQuota(ProxyError):
    """A budget of the key is used up (RFC 9110 section 15.5.3).

    `wait_s`: how long until the next day or month brings more; None: it has to be raised.
    """

    status, code = 402, "insufficient_quota"

    def __init__(self, message: str, *, wait_s: float | None = None) -> None:
        super().__init__(message, headers={} if wait_s is None else _retry_after(wait_s))


class NotFound(ProxyError):
    """No such path."""

    status, code = 404, "not_found"


class ModelNotFound(ProxyError):
    """The model is not served here."""

    status, code = 404, "model_not_found"


class MethodNotAllowed(ProxyError):
    """The path exists, with another method (RFC 9110 section 15.5.6)."""

    status, code = 405, "method_not_allowed"


class RequestTimeout(ProxyError):
    """The client was too slow in sending its request."""

    status, code = 408, "request_timeout"


class BodyTooLarge(ProxyError):
    """The request's body is over the limit."""

    status, code = 413, "request_too_large"


class UnsupportedMediaType(ProxyError):
    """The request's body has a type or an encoding that is not taken here."""

    status, code = 415, "unsupported_media_type"


class TargetTooLong(ProxyError):
    """The request's target is over the limit (RFC 9110 section 15.5.15)."""

    status, code = 414, "uri_too_long"


class ExpectationFailed(ProxyError):
    """An expectation other than `100-continue` (RFC 9110 section 10.1.1)."""

    status, code = 417, "expectation_failed"


class HeaderTooLarge(ProxyError):
    """The request's header is over the limit (RFC 6585 section 5)."""

    status, code = 431, "request_header_fields_too_large"


class TooManyRequests(ProxyError):
    """Nothing is wrong with the request but that it is one too many (RFC 6585 section 4)."""

    status, code = 429, "rate_limit_exceeded"

    def __init__(self, message: str, *, wait_s: float) -> None:
        super().__init__(message, headers=_retry_after(wait_s))


class Unavailable(ProxyError):
    """We can't know now (a store is down, or we are stopping): try again later."""

    status, code = 503, "service_unavailable"

    def __init__(self, message: str, *, retry_after: int = 2) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after)})


class BackendError(ProxyError):
    """The backend failed, or gave an answer that must not be shown."""

    status, code = 502, "bad_gateway"


class BackendTimeout(BackendError):
    """The backend did not answer in time."""

    status, code = 504, "gateway_timeout"


class StorageError(Exception):
    """A store did not answer, or could not do what it was asked. The effect is unknown."""


class ConfigError(Exception):
    """The configuration can't be used; the text starts with the key's path or the file's name."""
