"""Requests' bodies read in both ways, as small ones and as large ones are, whatever their size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise, product

from llmproxy.endpoints import Endpoint
from llmproxy.errors import BadRequest
from llmproxy.jsonbytes import InvalidJSON
from llmproxy.outline import Outline, Outliner
from llmproxy.rewrite import JSONRequest, body_for, plan, refusal


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
    if isinstance(small, BadRequest):
        assert isinstance(large, BadRequest), f"only large ones are taken: {small}"
        assert large.param == small.param
        raise small
    assert not isinstance(large, BadRequest), f"only small ones are taken: {large}"
    assert large[2:-1] == small[2:-1]
    for model, continuous in product((None, small.model, "org/x"), (False, True)):
        body = body_for(small, endpoint, model=model, continuous=continuous)
        assert body_for(large, endpoint, model=model, continuous=continuous) == body
    return small


def _outcome(reading: Callable[[], JSONRequest]) -> JSONRequest | BadRequest:
    try:
        return reading()
    except BadRequest as error:
        return error
