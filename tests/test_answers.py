"""What a client is told of a backend's answer that is not a result."""

from __future__ import annotations

import pytest

from llmproxy.answers import CONTEXT_PHRASES, Answer, refusal
from llmproxy.errors import BackendError, BadRequest

FIELDS = [(b"Retry-After", b"7")]
BODY = b'{"error":"canary"}'


@pytest.mark.parametrize("status", [400, 404, 408, 413, 422, 429, 451, 499])
def test_a_client_error_is_passed_on_as_it_is(status):
    assert refusal(status, BODY, FIELDS) == Answer(status, BODY, FIELDS)


@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_refusal_of_our_own_credentials_is_masked(status):
    told = refusal(status, BODY, FIELDS)
    assert isinstance(told, BackendError)
    assert told.status == 502


@pytest.mark.parametrize("status", [400, 422, 429])
def test_a_refusal_that_quotes_our_token_is_masked(status):
    quoting = b'{"error":"no: Authorization: Bearer our-own-secret"}'
    assert isinstance(refusal(status, quoting, [], "our-own-secret"), BackendError)
    assert isinstance(refusal(status, b'{"error":"no"}', [], "our-own-secret"), Answer)


def test_a_placeholder_for_a_token_may_stand_in_a_refusal():
    assert isinstance(refusal(400, b'{"error":null,"code":"none"}', [], "none"), Answer)


@pytest.mark.parametrize(
    "status", [100, 201, 202, 204, 206, 226, 300, 301, 302, 307, 308, 500, 502, 503, 529, 599]
)
def test_anything_else_is_masked_and_nothing_of_it_is_shown(status):
    told = refusal(status, BODY, FIELDS)
    assert isinstance(told, BackendError)
    assert told.status == 502
    assert told.headers == {}
    assert "canary" not in str(told)


@pytest.mark.parametrize("phrase", CONTEXT_PHRASES)
@pytest.mark.parametrize("status", [500, 503])
def test_a_5xx_about_the_context_is_the_clients_own_error(status, phrase):
    told = refusal(status, b'{"error":"The ' + phrase.upper() + b' is canary"}', FIELDS)
    assert isinstance(told, BadRequest)
    assert (told.status, told.code) == (400, "context_length_exceeded")
    assert "canary" not in told.message


def test_a_4xx_about_the_context_is_passed_on_as_it_is():
    body = b'{"error":"context length"}'
    assert refusal(400, body, []) == Answer(400, body, [])


@pytest.mark.parametrize("status", [201, 302, 401, 403])
def test_only_a_failure_of_the_server_speaks_of_the_context(status):
    told = refusal(status, b'{"error":"context length"}', [])
    assert isinstance(told, BackendError)
