"""From an ending and a reading to the closing of a row: the whole table."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from llmproxy.billing import NOTHING, settlement
from llmproxy.model import Kind, Outcome, Reading, State

FINISHED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
COUNTS = {Kind.PROMPT: 3, Kind.COMPLETION: 2}
ZERO = {Kind.PROMPT: 0, Kind.COMPLETION: 0}
RUNNING_ZERO = {Kind.COMPLETION: 0}

EXACT = Reading(COUNTS, exact=True, answered=True)
EXACT_ZERO = Reading(ZERO, exact=True, answered=True)
ABSURD = Reading({}, raw='{"prompt_tokens":-1}', answered=True)
ABSURD_AFTER_RUNNING = Reading({Kind.COMPLETION: 7}, raw="null", answered=True)
RUNNING = Reading({Kind.COMPLETION: 7}, answered=True)
NO_TOKEN_YET = Reading(RUNNING_ZERO, answered=True)
SILENT = Reading()


def verdict(outcome: Outcome, reading: Reading) -> tuple[State, dict[Kind, int]]:
    closing = settlement(outcome, reading, FINISHED, 200)
    return closing.state, dict(closing.counts)


@pytest.mark.parametrize("outcome", Outcome)
@pytest.mark.parametrize("reading", [EXACT, EXACT_ZERO], ids=["counts", "zero"])
def test_the_backends_own_number_settles_however_it_ended(outcome, reading):
    assert verdict(outcome, reading) == (State.SETTLED, reading.counts)


@pytest.mark.parametrize("outcome", Outcome)
def test_nothing_that_could_cost_settles_at_nothing(outcome):
    assert verdict(outcome, NOTHING) == (State.SETTLED, {})


@pytest.mark.parametrize("outcome", Outcome)
@pytest.mark.parametrize("reading", [ABSURD, ABSURD_AFTER_RUNNING])
def test_absurd_usage_is_disputed_with_its_text_and_never_estimated(outcome, reading):
    closing = settlement(outcome, reading, FINISHED)
    assert (closing.state, closing.raw) == (State.DISPUTED, reading.raw)
    assert closing.counts == reading.counts


@pytest.mark.parametrize("outcome", Outcome)
def test_our_own_count_is_an_estimate_however_it_ended(outcome):
    assert verdict(outcome, RUNNING) == (State.ESTIMATED, {Kind.COMPLETION: 7})


@pytest.mark.parametrize(
    ("outcome", "state", "counts"),
    [
        (Outcome.COMPLETE, State.DISPUTED, {}),
        (Outcome.TRUNCATED, State.ORPHAN, {}),
        (Outcome.STALLED, State.ORPHAN, {}),
        (Outcome.CLIENT_GONE, State.ESTIMATED, RUNNING_ZERO),
        (Outcome.REFUSED, State.ORPHAN, {}),
        (Outcome.BACKEND_FAILED, State.ORPHAN, {}),
    ],
)
def test_an_answer_without_a_token_is_no_true_zero(outcome, state, counts):
    assert verdict(outcome, NO_TOKEN_YET) == (state, counts)


@pytest.mark.parametrize("outcome", Outcome)
def test_what_nobody_knows_waits_for_the_operator(outcome):
    expected = State.DISPUTED if outcome is Outcome.COMPLETE else State.ORPHAN
    assert verdict(outcome, SILENT) == (expected, {})


def test_outcome_status_and_time_are_kept():
    closing = settlement(Outcome.TRUNCATED, RUNNING, FINISHED, 200)
    assert (closing.outcome, closing.status, closing.finished) == (
        Outcome.TRUNCATED,
        200,
        FINISHED,
    )
    assert settlement(Outcome.BACKEND_FAILED, SILENT, FINISHED).status is None
