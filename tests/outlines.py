"""Requests' bodies read in both ways, as small ones and as large ones are, whatever their size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise, product

from llmproxy import policy
from llmproxy.config import Backend
from llmproxy.endpoints import Endpoint
from llmproxy.errors import BadRequest
from llmproxy.jsonbytes import InvalidJSON
from llmproxy.outline import Outline, Outliner
from llmproxy.rewrite import JSONRequest, body_for, lightened, plan, refusal

BACKEND = Backend(name="m", url="http://llm:1", device="gpu", max_choices=1000)


def outlined(raw: bytes, cuts: Iterable[int] = ()) -> Outline:
    """The outline of a text that comes in blocks with these ends. Raises InvalidJSON."""
    outliner = Outliner()
    for start, end in pairwise([0, *sorted(cuts), len(raw)]):
        outliner.feed(raw[start:end])
    return outliner.finish()


def plan_large(endpoint: Endpoint, raw: bytes, cuts: Iterable[int] = ()) -> JSONRequest:
    """What `plan` gives for a body by way of its outline."""
    try:
        outline = outlined(raw, cuts)
    except InvalidJSON as error:
        raise refusal(error) from None
    return plan(endpoint, raw, outline)


def plan_both(endpoint: Endpoint, raw: bytes, cuts: Iterable[int] = ()) -> JSONRequest:
    """What `plan` gives for a body; fails unless both ways agree in all that they can tell."""
    small = _outcome(lambda: plan(endpoint, raw))
    large = _outcome(lambda: plan_large(endpoint, raw, cuts))
    if isinstance(large, BadRequest) and "a name in it is longer" in large.message:
        raise large  # small ones may have such
    if isinstance(small, BadRequest):
        assert isinstance(large, BadRequest), f"only large ones are taken: {small}"
        # Of two faults, large ones are told first of a long value.
        assert large.param == small.param or "is too long" in large.message
        raise small
    assert not isinstance(large, BadRequest), f"only small ones are taken: {large}"
    assert large[2:-1] == small[2:-1]
    assert _refused(endpoint, large) == _refused(endpoint, small)
    for model, continuous in product((None, small.model, "org/x"), (False, True)):
        body = body_for(small, endpoint, model=model, continuous=continuous)
        for other in (large, lightened(small), lightened(large)):
            assert body_for(other, endpoint, model=model, continuous=continuous) == body
    return small


def _refused(endpoint: Endpoint, request: JSONRequest) -> str | None:
    """The field for which the policy refuses a request, or None."""
    try:
        policy.check(endpoint, request.body, BACKEND)
    except BadRequest as error:
        return str(error.param)
    return None


def _outcome(reading: Callable[[], JSONRequest]) -> JSONRequest | BadRequest:
    try:
        return reading()
    except BadRequest as error:
        return error
