"""The values: what a closed row puts on the bill."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from llmproxy.model import (
    Account,
    Entry,
    Event,
    Kind,
    Outcome,
    Settlement,
    State,
    events,
    product,
    utcnow,
)

OPENED = datetime(2026, 1, 2, tzinfo=UTC)
FINISHED = OPENED + timedelta(seconds=9)
ACCOUNT = Account(key_id="7", user_id="u")
ENTRY = Entry(rid="r", opened=OPENED, account=ACCOUNT, path="/p", model="org/m", device="h100")


def closed(state: State, counts: dict[Kind, int]) -> Settlement:
    return Settlement(state=state, outcome=Outcome.COMPLETE, counts=counts, finished=FINISHED)


def test_a_product_is_model_device_and_kind():
    assert product("org/m", "h100", Kind.PROMPT) == "org/m/h100/prompt"


@pytest.mark.parametrize("kind", Kind)
def test_an_event_is_of_the_time_when_the_request_finished(kind):
    assert events(ENTRY, closed(State.SETTLED, {kind: 5})) == (
        Event(rid="r", created=FINISHED, account=ACCOUNT, product=f"org/m/h100/{kind}", quantity=5),
    )


def test_a_row_gives_one_event_for_each_kind_in_a_fixed_order():
    one = events(ENTRY, closed(State.SETTLED, {Kind.PROMPT: 1, Kind.COMPLETION: 2}))
    two = events(ENTRY, closed(State.SETTLED, {Kind.COMPLETION: 2, Kind.PROMPT: 1}))
    assert one == two
    assert [(event.product, event.quantity) for event in one] == [
        ("org/m/h100/prompt", 1),
        ("org/m/h100/completion", 2),
    ]


def test_a_true_zero_is_on_the_bill():
    (event,) = events(ENTRY, closed(State.SETTLED, {Kind.COMPLETION: 0}))
    assert event.quantity == 0


def test_an_estimate_is_on_the_bill_like_a_settled_row():
    counts = {Kind.COMPLETION: 4}
    assert events(ENTRY, closed(State.ESTIMATED, counts)) == events(
        ENTRY, closed(State.SETTLED, counts)
    )


@pytest.mark.parametrize("state", [State.OPEN, State.DISPUTED, State.ORPHAN])
def test_a_row_that_waits_puts_nothing_on_the_bill(state):
    assert events(ENTRY, closed(state, {Kind.PROMPT: 1, Kind.COMPLETION: 2})) == ()


def test_the_identity_of_an_event_is_unique_within_its_row():
    told = events(ENTRY, closed(State.SETTLED, dict.fromkeys(Kind, 1)))
    assert len({(event.rid, event.product) for event in told}) == len(Kind)


def test_values_can_not_be_changed():
    with pytest.raises(AttributeError):
        ENTRY.rid = "other"  # type: ignore[misc]


def test_now_is_aware_and_in_utc():
    assert utcnow().utcoffset() == timedelta(0)
