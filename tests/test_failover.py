"""What an ending says of its server, and whether another one may be asked."""

from __future__ import annotations

import pytest

from llmproxy.answers import Answer
from llmproxy.billing import NOTHING
from llmproxy.errors import BackendError, BackendTimeout, BadRequest, ProxyError, Unavailable
from llmproxy.failover import may_be_repeated, went_well
from llmproxy.forward import Ending
from llmproxy.model import Outcome
from llmproxy.upstream import NotSent


def ending(outcome: Outcome, last: Answer | bytes | ProxyError, status: int | None) -> Ending:
    return Ending(outcome, NOTHING, last, status)


WHOLE = ending(Outcome.COMPLETE, Answer(200, b"{}"), 200)
NOT_THERE = ending(Outcome.BACKEND_FAILED, NotSent("x"), None)
BROKE = ending(Outcome.BACKEND_FAILED, BackendError("x"), None)
SILENT = ending(Outcome.BACKEND_FAILED, BackendTimeout("x"), None)
CUT = ending(Outcome.TRUNCATED, BackendError("x"), 200)
STALLED = ending(Outcome.STALLED, BackendTimeout("x"), 200)
OVERLOADED = ending(Outcome.REFUSED, BackendError("x"), 503)
LOCKED = ending(Outcome.REFUSED, BackendError("x"), 401)  # our own credentials
HTML = ending(Outcome.BACKEND_FAILED, BackendError("x"), 200)
WRONG = ending(Outcome.REFUSED, Answer(400, b"{}"), 400)
TOO_LONG = ending(Outcome.REFUSED, BadRequest("x"), 500)
BUSY = ending(Outcome.REFUSED, Answer(429, b"{}"), 429)
LEFT = ending(Outcome.CLIENT_GONE, Unavailable("x"), 200)
LEFT_AFTER_ALL = ending(Outcome.CLIENT_GONE, b"", 200)
HALF_SENT = ending(Outcome.REFUSED, BadRequest("x"), None)
ERROR_EVENT = ending(Outcome.BACKEND_FAILED, b"data: {}", 200)


@pytest.mark.parametrize(
    ("of", "well"),
    [
        (WHOLE, True), (WRONG, True), (TOO_LONG, True),
        (NOT_THERE, False), (BROKE, False), (SILENT, False), (CUT, False), (STALLED, False),
        (OVERLOADED, False), (LOCKED, False), (HTML, False),
        (BUSY, None), (LEFT, None), (LEFT_AFTER_ALL, None), (HALF_SENT, None), (ERROR_EVENT, None),
    ],
)  # fmt: skip
def test_only_what_is_the_server_s_own_fault_counts_against_it(of: Ending, well: bool | None):
    assert went_well(of) is well


@pytest.mark.parametrize("begun_too", [False, True])
def test_what_was_never_sent_may_go_elsewhere(begun_too: bool) -> None:
    assert may_be_repeated(NOT_THERE, begun_too=begun_too)


@pytest.mark.parametrize("of", [BROKE, SILENT, OVERLOADED, LOCKED, HTML])
def test_what_may_have_been_begun_goes_elsewhere_only_if_so_configured(of: Ending) -> None:
    assert not may_be_repeated(of, begun_too=False)
    assert may_be_repeated(of, begun_too=True)


@pytest.mark.parametrize(
    "of", [WHOLE, WRONG, TOO_LONG, BUSY, LEFT, LEFT_AFTER_ALL, HALF_SENT, ERROR_EVENT]
)
def test_an_answer_and_a_client_s_own_fault_are_never_repeated(of: Ending) -> None:
    assert not may_be_repeated(of, begun_too=True)
