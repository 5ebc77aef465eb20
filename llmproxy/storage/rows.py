"""The ledger's rows as they are written: many of a kind in one statement.

What a row needs is a tuple of parameters, made in the reactor's thread. The writer's thread shares
the interpreter's lock with the reactor, and SQLite gives it up and waits for it again at each
statement: so few statements are what makes a commit short while the proxy is busy.

Two kinds of statement can't be had for many rows at once without a trigger: an UPDATE that has its
own values for each row, and the lines of a bill that are added only if their row was changed. The
views and triggers are temporary: they exist on the writer's connection only.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from itertools import chain

from llmproxy.model import BILLED, Attempt, Counts, Entry, Event, Kind, Price, Settlement, State
from llmproxy.storage.sqlite import to_text

#: Rows in one statement at most. SQLite's compiler is run once for each smaller number, and Python
#: keeps the last 128 statements of a connection.
MOST_ROWS = 32

Row = tuple[str | int | None, ...]

_KINDS = tuple(Kind)
_COUNTS = ", ".join(_KINDS)
_BILLED = ", ".join(sorted(f"'{state}'" for state in BILLED))

# `orphan` may still become better known: another process may have taken us for dead.
CLOSE_TRIGGER = f"""
CREATE TEMP VIEW closing AS
    SELECT rid, state, outcome, status, finished, raw, {_COUNTS}, delivered FROM ledger;
CREATE TEMP TRIGGER close_row INSTEAD OF INSERT ON closing BEGIN
    UPDATE ledger SET state = new.state, outcome = new.outcome, status = new.status,
        finished = new.finished, raw = new.raw, delivered = new.delivered,
        {", ".join(f"{kind} = new.{kind}" for kind in Kind)}
    WHERE rid = new.rid AND state IN ('open', 'orphan');
END;"""
# It fires for a row that was really changed, so a row that was closed before gets no lines again.
# Where the bill is elsewhere, `delivered` is 0 for whatever puts a line on it.
BILL_TRIGGER = (
    f"""
CREATE TEMP TRIGGER bill_row AFTER UPDATE OF state ON main.ledger
WHEN new.delivered AND new.state IN ({_BILLED}) BEGIN
"""
    + "".join(
        f"""INSERT OR IGNORE INTO event_oneoff (created, api_key, product, quantity, rid)
        SELECT new.finished, new.api_key, new.model || '/' || new.device || '/{kind}',
            new.{kind}, new.rid WHERE new.{kind} IS NOT NULL;
"""
        for kind in Kind
    )
    + "END;"
)
CHECKPOINT_TRIGGER = f"""
CREATE TEMP VIEW running AS SELECT rid, {_COUNTS} FROM ledger;
CREATE TEMP TRIGGER checkpoint_row INSTEAD OF INSERT ON running BEGIN
    UPDATE ledger SET {", ".join(f"{kind} = new.{kind}" for kind in Kind)}
    WHERE rid = new.rid AND state = 'open';
END;"""

ADD_PRICE = "INSERT OR IGNORE INTO price VALUES (?, ?, ?, ?, ?, ?)"
ADD_EVENT = """INSERT OR IGNORE INTO event_oneoff (created, api_key, product, quantity, rid)
    VALUES (?, ?, ?, ?, ?)"""


class Statement:
    """A statement that takes any number of rows: `head`, `row` for each with commas, `tail`."""

    def __init__(self, head: str, row: str, tail: str = "") -> None:
        self._texts = [f"{head}{', '.join([row] * n)}{tail}" for n in range(MOST_ROWS + 1)]

    def write(self, connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
        """Write `rows` in their order."""
        for start in range(0, len(rows), MOST_ROWS):
            part = rows[start : start + MOST_ROWS]
            connection.execute(self._texts[len(part)], [*chain.from_iterable(part)])


# Not `OR IGNORE`, which would pass over a row with a NULL where none may be as if it were there.
OPEN = Statement(
    "INSERT INTO ledger"
    " (rid, state, owner, opened, api_key, user_id, path, model, device, price,"
    " held_tokens, held_cost) VALUES ",
    "(?, 'open', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    " ON CONFLICT (rid) DO NOTHING",
)
ATTEMPT = Statement(
    "INSERT INTO attempt VALUES ", "(?, ?, ?, ?, ?, ?)", " ON CONFLICT (rid, number) DO NOTHING"
)
CLOSE = Statement("INSERT INTO closing VALUES ", "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)")
CHECKPOINT = Statement("INSERT INTO running VALUES ", "(?, ?, ?, ?, ?)")
MARK_DELIVERED = Statement("UPDATE ledger SET delivered = 1 WHERE rid IN (", "?", ")")


def install(connection: sqlite3.Connection) -> None:
    """What CLOSE and CHECKPOINT need: once for each connection that writes rows."""
    connection.executescript(CLOSE_TRIGGER + BILL_TRIGGER + CHECKPOINT_TRIGGER)


def opening(entry: Entry, owner: str) -> Row:
    """The parameters of OPEN."""
    account, (held_tokens, held_cost) = entry.account, entry.held or (None, None)
    return (
        entry.rid,
        owner,
        to_text(entry.opened),
        account.key_id,
        account.user_id,
        entry.path,
        entry.model,
        entry.device,
        entry.price and entry.price.id,
        held_tokens,
        held_cost,
    )


def attempt(made: Attempt) -> Row:
    """The parameters of ATTEMPT."""
    return (
        made.rid,
        made.number,
        to_text(made.ended),
        made.server,
        made.outcome.value,
        made.status,
    )


def closing(rid: str, settlement: Settlement, *, bills_here: bool) -> Row:
    """The parameters of CLOSE. `bills_here`: the bill is in this file, and gets its lines too."""
    state, outcome, counts = settlement.state, settlement.outcome, settlement.counts
    return (
        rid,
        str(state),  # sqlite3 is slow with what is only nearly a str
        outcome and str(outcome),
        settlement.status,
        to_text(settlement.finished),
        settlement.raw,
        *map(counts.get, _KINDS),
        int(bills_here or (not counts and state is State.SETTLED)),
    )


def describe_closing(row: Row) -> str:
    """A row of CLOSE for the log."""
    rid, state, _, _, _, _, *counts, _ = row
    counted = [f"{kind} {n}" for kind, n in zip(Kind, counts, strict=True) if n is not None]
    return f"{rid} {state}: {', '.join(counted) or 'nothing'}"


def closing_for_nothing(opened: Row) -> Row:
    """The parameters of CLOSE for a row of OPEN that was given up before its request was sent."""
    rid, _, moment, *_ = opened
    return (rid, "settled", "refused", None, moment, None, None, None, None, None, 1)


def checkpoint(rid: str, counts: Counts) -> Row:
    """The parameters of CHECKPOINT."""
    return (rid, *map(counts.get, _KINDS))


def add_prices(connection: sqlite3.Connection, prices: Iterable[Price]) -> None:
    """Let rows speak of these prices; those that are there already stay as they are."""
    connection.executemany(ADD_PRICE, prices)


def add_events(connection: sqlite3.Connection, due: Iterable[Event]) -> None:
    """Put events on the bill in this file; those that are there already stay as they are."""
    connection.executemany(
        ADD_EVENT,
        [(to_text(e.created), e.account.key_id, e.product, e.quantity, e.rid) for e in due],
    )
