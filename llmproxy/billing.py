"""From what a meter read and how a request ended to the closing of its ledger row. Pure."""

from __future__ import annotations

from datetime import datetime

from llmproxy.model import Counts, Outcome, Reading, Settlement, State

#: What is known of a request that surely gave no result: there is nothing to charge.
NOTHING = Reading(exact=True)


def settlement(
    outcome: Outcome, reading: Reading, finished: datetime, status: int | None = None
) -> Settlement:
    """How the row of a request that ended as `outcome`, metered as `reading`, is closed.

    `status`: the backend's HTTP status, None if it gave none.
    """
    state, counts = _verdict(outcome, reading)
    return Settlement(
        state=state,
        outcome=outcome,
        counts=counts,
        finished=finished,
        status=status,
        raw=reading.raw,
    )


def _verdict(outcome: Outcome, reading: Reading) -> tuple[State, Counts]:
    if reading.exact:
        return State.SETTLED, reading.counts
    if reading.raw is not None:
        return State.DISPUTED, reading.counts
    if any(reading.counts.values()) or (reading.counts and outcome is Outcome.CLIENT_GONE):
        return State.ESTIMATED, reading.counts
    if outcome is Outcome.COMPLETE:
        return State.DISPUTED, {}  # a whole answer that says nothing of its usage
    return State.ORPHAN, {}
