"""From what a meter read and how a request ended to the closing of its ledger row. Pure."""

from __future__ import annotations

from datetime import datetime

from llmproxy.model import Counts, Outcome, Reading, Settlement, State

# Python 3.11 takes longer to get a member of an enumeration than to do anything with it.
_SETTLED, _DISPUTED, _ESTIMATED = State.SETTLED, State.DISPUTED, State.ESTIMATED
_CLIENT_GONE, _COMPLETE = Outcome.CLIENT_GONE, Outcome.COMPLETE

#: What is known of a request that surely gave no result: there is nothing to charge.
NOTHING = Reading(exact=True)


def settlement(
    outcome: Outcome, reading: Reading, finished: datetime, status: int | None = None
) -> Settlement:
    """How the row of a request that ended as `outcome`, metered as `reading`, is closed.

    `status`: the backend's HTTP status, None if it gave none.
    """
    state, counts = _verdict(outcome, reading)
    return Settlement(state, outcome, counts, finished, status, reading.raw)


def _verdict(outcome: Outcome, reading: Reading) -> tuple[State, Counts]:
    if reading.exact:
        return _SETTLED, reading.counts
    if reading.raw is not None:
        return _DISPUTED, reading.counts
    if any(reading.counts.values()) or (reading.counts and outcome is _CLIENT_GONE):
        return _ESTIMATED, reading.counts
    if outcome is _COMPLETE:
        return _DISPUTED, {}  # a whole answer that says nothing of its usage
    return State.ORPHAN, {}
