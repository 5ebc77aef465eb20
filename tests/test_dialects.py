"""Errors in the shapes that the client libraries understand."""

from __future__ import annotations

import orjson
import pytest

from llmproxy import errors
from llmproxy.dialects import error_answer, error_body, error_event
from llmproxy.endpoints import Dialect
from llmproxy.errors import ProxyError
from llmproxy.sse import Decoder

TYPES = [
    (400, "invalid_request_error", "invalid_request_error"),
    (401, "authentication_error", "authentication_error"),
    (402, "insufficient_quota", "billing_error"),
    (403, "permission_error", "permission_error"),
    (404, "invalid_request_error", "not_found_error"),
    (405, "invalid_request_error", "invalid_request_error"),
    (408, "invalid_request_error", "invalid_request_error"),
    (413, "invalid_request_error", "request_too_large"),
    (415, "invalid_request_error", "invalid_request_error"),
    (429, "rate_limit_error", "rate_limit_error"),
    (500, "server_error", "api_error"),
    (502, "server_error", "api_error"),
    (503, "server_error", "overloaded_error"),
    (504, "server_error", "timeout_error"),
]


@pytest.mark.parametrize(("status", "kind", "_"), TYPES)
def test_an_openai_error_has_message_type_param_and_code(status, kind, _):
    error = ProxyError("No \N{SNOWMAN}.", status=status, code="some_code", param="model")
    assert orjson.loads(error_body(Dialect.OPENAI, error)) == {
        "error": {
            "message": "No \N{SNOWMAN}.",
            "type": kind,
            "param": "model",
            "code": "some_code",
        }
    }


@pytest.mark.parametrize(("status", "_", "kind"), TYPES)
def test_an_anthropic_error_has_type_and_message(status, _, kind):
    body = error_body(Dialect.ANTHROPIC, ProxyError("No.", status=status, code="c"))
    assert orjson.loads(body) == {"type": "error", "error": {"type": kind, "message": "No."}}


@pytest.mark.parametrize(
    ("dialect", "name"), [(Dialect.OPENAI, b""), (Dialect.ANTHROPIC, b"error")]
)
def test_an_error_in_a_stream_is_one_whole_event(dialect, name):
    error = ProxyError("line\nbreak", status=502)
    (event,) = Decoder().feed(error_event(dialect, error))
    assert event.name == name
    assert event.data == error_body(dialect, error)


def test_an_answer_carries_the_errors_own_header_fields():
    status, fields, body = error_answer(Dialect.OPENAI, errors.Unavailable("Wait.", retry_after=9))
    assert status == 503
    assert sorted(fields) == [(b"Content-Type", b"application/json"), (b"Retry-After", b"9")]
    assert orjson.loads(body)["error"]["code"] == "service_unavailable"


@pytest.mark.parametrize(("wait_s", "told"), [(None, {}), (0.2, {"Retry-After": "1"})])
def test_who_has_no_credit_is_told_when_there_is_more_if_time_brings_it(
    wait_s: float | None, told: dict[str, str]
) -> None:
    error = errors.InsufficientQuota("Nothing is left.", wait_s=wait_s)
    assert (error.status, error.code, error.headers) == (402, "insufficient_quota", told)


def test_a_wrong_key_is_told_how_to_authenticate():
    status, fields, _ = error_answer(Dialect.ANTHROPIC, errors.InvalidKey())
    assert status == 401
    assert (b"WWW-Authenticate", b"Bearer") in fields
