"""Requests' bodies read in both ways, as short ones and as large ones are, whatever their size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from unittest.mock import patch

from llmproxy import parts, policy
from llmproxy.config import Backend
from llmproxy.endpoints import Endpoint
from llmproxy.errors import BadRequest
from llmproxy.jsonbytes import InvalidJSON
from llmproxy.rewrite import JSONRequest, body_for, lightened, plan, refusal
from llmproxy.survey import Survey

#: What a part may have; with the smallest nearly all values are long ones.
SIZES = [(parts.RUN, parts.BLOCK), (300, 64), (12, 12)]
BACKEND = Backend(name="m", url="http://llm:1", device="gpu", max_choices=1000)


def surveyed(endpoint: Endpoint, raw: bytes) -> Survey:
    """A body that was gone through. Raises InvalidJSON."""
    survey = Survey(endpoint, raw)
    for _ in survey.steps():
        pass
    return survey


def plan_large(endpoint: Endpoint, raw: bytes) -> JSONRequest:
    """What `plan` gives for a body by way of its survey."""
    try:
        survey = surveyed(endpoint, raw)
    except InvalidJSON as error:
        raise refusal(error) from None
    return plan(endpoint, raw, survey)


def plan_both(endpoint: Endpoint, raw: bytes) -> JSONRequest:
    """What `plan` gives for a body; fails unless all ways agree in all that they can tell."""
    for run, block in SIZES:
        with patch.multiple(parts, RUN=run, BLOCK=block):
            request = _plan_both(endpoint, raw)
    return request


def _plan_both(endpoint: Endpoint, raw: bytes) -> JSONRequest:
    small = _outcome(lambda: plan(endpoint, raw))
    large = _outcome(lambda: plan_large(endpoint, raw))
    if isinstance(large, BadRequest) and "a name in it is longer" in large.message:
        raise large  # short ones may have such
    if isinstance(small, BadRequest):
        assert isinstance(large, BadRequest), f"only large ones are taken: {small}"
        # Of two faults, large ones are told first of a long value.
        assert large.param == small.param or "is too long" in large.message
        raise small
    assert not isinstance(large, BadRequest), f"only short ones are taken: {large}"
    assert _told(large) == _told(small)
    assert _refused(endpoint, large) == _refused(endpoint, small)
    for model, continuous in product((None, small.model, "org/x"), (False, True)):
        body = body_for(small, endpoint, model=model, continuous=continuous)
        for other in (large, lightened(small), lightened(large)):
            assert body_for(other, endpoint, model=model, continuous=continuous) == body
    return small


def _told(request: JSONRequest) -> JSONRequest:
    """What it says of the body, and not where that was found."""
    return replace(request, raw=b"", body={}, members=(), in_short=False)


def _refused(endpoint: Endpoint, request: JSONRequest) -> str | None:
    """The field for which the policy refuses a request, or None."""
    try:
        policy.check(endpoint, request.body, request.remote_url, BACKEND)
    except BadRequest as error:
        return str(error.param)
    return None


def _outcome(reading: Callable[[], JSONRequest]) -> JSONRequest | BadRequest:
    try:
        return reading()
    except BadRequest as error:
        return error
