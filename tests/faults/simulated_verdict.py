"""The judgement on one request of a history: did every promise hold?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from simulated_traffic import DRAIN_S, Ask

from llmproxy.endpoints import Shape
from llmproxy.forward import KEEPALIVE
from llmproxy.model import Kind, Outcome, State

if TYPE_CHECKING:
    from simulation import History


class Verdict:
    """The promises, for one request of a history that is over."""

    def __init__(self, history: History, ask: Ask, rows: list[dict[str, Any]]) -> None:
        self._history, self._ask, self._rows = history, ask, rows
        self._plan = ask.plan
        self._seen = history.seen[ask.number]
        self._arrived = ask.number in history.log
        self._body = bytes(self._seen.body).replace(KEEPALIVE, b"")

    def _broken(self, text: str) -> None:
        row = self._rows[0] if self._rows else {}
        brief = {name: row.get(name) for name in ("state", "outcome", *Kind)}
        self._history.broken(f"request {self._ask.number}: {text}; row {brief}")

    def check(self) -> None:
        """All of them."""
        if self._ask.refusal is not None:
            self._check_refused()
            return
        if len(self._rows) > 1:
            self._broken(f"has {len(self._rows)} rows")
        reached = self._arrived or self._ask.number in self._history.in_part
        if reached and not self._rows:
            self._broken("was sent and has no row")
        if self._seen.status == 200:
            self._check_answer()
        if self._rows:
            self._check_row(self._rows[0])

    def _check_refused(self) -> None:
        if self._rows:
            self._broken("was refused, and has a row")
        if self._seen.status not in (0, self._ask.refusal, 503):
            self._broken(f"got {self._seen.status} instead of {self._ask.refusal}")

    def _check_answer(self) -> None:
        """A client saw nothing that the backend did not send, and no false end."""
        if not self._arrived:
            self._broken("got an answer that no backend sent")
        elif self._seen.whole:
            # Where only the last line ends are missing, the last event has come all the same.
            ending = b"\n" if self._plan.broken else b""
            if self._body.rstrip(ending) != self._plan.shown.rstrip(ending):
                self._broken(f"got {self._body!r} instead of {self._plan.shown!r}")
            if not self._rows:
                self._broken("got a whole answer for nothing")
        elif not self._plan.shown.startswith(_without_error(self._body)):
            self._broken(f"got {self._body!r}, which is no part of {self._plan.shown!r}")

    def _check_row(self, row: Mapping[str, Any]) -> None:
        state, outcome = State(row["state"]), row["outcome"]
        counts = {kind: row[kind] for kind in Kind if row[kind] is not None}
        if state is State.OPEN:
            self._broken("is open for ever")
        elif state is State.SETTLED:
            self._check_settled(counts, outcome)
        if state in (State.SETTLED, State.ESTIMATED):
            self._check_bounds(counts, outcome)
        if self._plan.is_result and (self._seen.whole and self._seen.status == 200):
            self._check_complete(state, counts)
        if self._must_be_drained(outcome):
            self._check_complete(state, counts)

    def _check_settled(self, counts: Mapping[Kind, int], outcome: str | None) -> None:
        plan = self._plan
        if counts == plan.truth and self._told:
            return
        if not counts:
            result = 200 <= plan.status < 300 and not plan.error
            if self._arrived and result and self._ask.endpoint.shape is not Shape.FREE:
                self._broken("was settled for nothing, though the backend answered")
        elif not plan.continuous or outcome == Outcome.COMPLETE:
            self._broken(f"was settled wrong, the truth is {dict(plan.truth)} {plan.lie}")

    def _check_bounds(self, counts: Mapping[Kind, int], outcome: str | None) -> None:
        """Never more than the truth; never less than what the client saw."""
        for kind, count in counts.items():
            if count > self._plan.truth.get(kind, 0):
                self._broken(f"has more than the truth, {dict(self._plan.truth)}")
        if outcome is None or self._seen.status != 200 or not self._plan.stream:
            return  # after a crash, the last checkpoint is what is known
        events, tokens = self._plan.seen(len(_without_error(self._body)))
        least = tokens if self._plan.continuous else events
        if counts.get(Kind.COMPLETION, 0) < least:
            self._broken(f"has less than the client saw, {least}")

    @property
    def _told(self) -> bool:
        """The backend told the truth: running counts tell it too."""
        return not self._plan.lie or (self._plan.continuous and self._plan.lie != "absurd")

    def _check_complete(self, state: State, counts: Mapping[Kind, int]) -> None:
        """A whole answer: the backend's number, or marked as not known."""
        if self._told:
            if state is not State.SETTLED or counts != self._plan.truth:
                self._broken(f"is complete, and the truth is {dict(self._plan.truth)}")
        elif self._plan.lie == "absurd" and state is not State.DISPUTED:
            self._broken("is complete with an absurd usage, and not disputed")
        elif state is State.SETTLED:
            self._broken("is complete without usage, and was settled")

    def _must_be_drained(self, outcome: str | None) -> bool:
        """The client left, and the backend's answer is read to its end all the same."""
        plan = self._plan
        return (
            outcome == Outcome.CLIENT_GONE
            and self._ask.number not in self._history.crashed
            and self._arrived
            and self._ask.model.endswith("drain")
            and plan.is_result
            and not plan.broken
            and plan.seconds < DRAIN_S / 4
            and len(plan.sent) < 1000
        )


def _without_error(body: bytes) -> bytes:
    """A cut stream without the error event at its end."""
    for start in (b'event: error\ndata: {"type":"error"', b'data: {"error":{"message"'):
        body = body.partition(start)[0]
    return body
