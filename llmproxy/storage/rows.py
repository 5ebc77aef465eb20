"""The ledger's rows as they are written: many at once, of all kinds, in one statement.

What a row needs is a tuple of parameters, made in the reactor's thread. The writer's thread shares
the interpreter's lock with the reactor, and SQLite gives it up and waits for it again at each
statement: so few statements are what makes a commit short while the proxy is busy.

One statement can do different things to rows, and an UPDATE with its own values for each, only by
a trigger on a view. The view and the triggers are temporary: they exist on the writer's connection
only.
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
_BILLED = ", ".join(sorted(f"'{state}'" for state in BILLED))

#: What is done to a row: the first of its parameters. The others are for the columns below.
OPEN, CLOSE, ATTEMPT = range(3)
_OPENED = (
    "rid",
    "owner",
    "opened",
    "api_key",
    "user_id",
    "path",
    "model",
    "device",
    "price",
    "held_tokens",
    "held_cost",
)
_CLOSED = ("rid", "state", "outcome", "status", "finished", "raw", *_KINDS, "delivered")
_NOTED = ("rid", "number", "ended", "server", "outcome", "status")
#: Those that a kind has no use for are NULL.
_PARAMETERS = [f"p{number}" for number in range(len(_OPENED))]


def _values(columns: Sequence[str]) -> str:
    return ", ".join(f"new.{name}" for name in _PARAMETERS[: len(columns)])


def _settings(columns: Sequence[str]) -> str:
    """For all columns but the first, which says whose they are."""
    pairs = zip(columns[1:], _PARAMETERS[1:], strict=False)
    return ", ".join(f"{column} = new.{name}" for column, name in pairs)


CHANGE_VIEW = f"""
CREATE TEMP VIEW change(what, {", ".join(_PARAMETERS)}) AS
    VALUES (NULL, {", ".join("NULL" for _ in _PARAMETERS)});"""
# Not `OR IGNORE`, which would pass over a row with a NULL where none may be as if it were there.
OPEN_TRIGGER = f"""
CREATE TEMP TRIGGER open_row INSTEAD OF INSERT ON change WHEN new.what = {OPEN} BEGIN
    INSERT INTO ledger (state, {", ".join(_OPENED)}) VALUES ('open', {_values(_OPENED)})
    ON CONFLICT (rid) DO NOTHING;
END;"""
# `orphan` may still become better known: another process may have taken us for dead.
CLOSE_TRIGGER = f"""
CREATE TEMP TRIGGER close_row INSTEAD OF INSERT ON change WHEN new.what = {CLOSE} BEGIN
    UPDATE ledger SET {_settings(_CLOSED)} WHERE rid = new.p0 AND state IN ('open', 'orphan');
END;"""
ATTEMPT_TRIGGER = f"""
CREATE TEMP TRIGGER note_attempt INSTEAD OF INSERT ON change WHEN new.what = {ATTEMPT} BEGIN
    INSERT INTO attempt ({", ".join(_NOTED)}) VALUES ({_values(_NOTED)})
    ON CONFLICT (rid, number) DO NOTHING;
END;"""
# On a view of its own: each stream has one a second, and as a CHANGE, which has more parameters and
# conditions, it takes twice as long.
CHECKPOINT_TRIGGER = f"""
CREATE TEMP VIEW running AS SELECT rid, {", ".join(_KINDS)} FROM ledger;
CREATE TEMP TRIGGER checkpoint_row INSTEAD OF INSERT ON running BEGIN
    UPDATE ledger SET {", ".join(f"{kind} = new.{kind}" for kind in _KINDS)}
    WHERE rid = new.rid AND state = 'open';
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


CHANGE = Statement("INSERT INTO change VALUES ", f"({', '.join('?' * (1 + len(_PARAMETERS)))})")
CHECKPOINT = Statement("INSERT INTO running VALUES ", "(?, ?, ?, ?, ?)")
MARK_DELIVERED = Statement("UPDATE ledger SET delivered = 1 WHERE rid IN (", "?", ")")


def install(connection: sqlite3.Connection) -> None:
    """What CHANGE and CHECKPOINT need: once for each connection that writes rows."""
    connection.executescript(
        CHANGE_VIEW
        + OPEN_TRIGGER
        + CLOSE_TRIGGER
        + ATTEMPT_TRIGGER
        + CHECKPOINT_TRIGGER
        + BILL_TRIGGER
    )


def opening(entry: Entry, owner: str) -> Row:
    """The parameters of CHANGE that open a row."""
    account, (held_tokens, held_cost) = entry.account, entry.held or (None, None)
    return (
        OPEN,
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
    """The parameters of CHANGE that note an attempt."""
    return (
        ATTEMPT,
        made.rid,
        made.number,
        to_text(made.ended),
        made.server,
        made.outcome.value,
        made.status,
        *(None,) * (len(_PARAMETERS) - len(_NOTED)),
    )


def closing(rid: str, settlement: Settlement, *, bills_here: bool) -> Row:
    """The parameters of CHANGE that close a row. `bills_here`: the bill is in this file, and gets
    its lines too."""
    state, outcome, counts = settlement.state, settlement.outcome, settlement.counts
    return (
        CLOSE,
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
    """What closes a row, for the log."""
    _, rid, state, _, _, _, _, *counts, _ = row
    counted = [f"{kind} {n}" for kind, n in zip(Kind, counts, strict=True) if n is not None]
    return f"{rid} {state}: {', '.join(counted) or 'nothing'}"


def closing_for_nothing(opened: Row) -> Row:
    """The same for a row that was given up before its request was sent. `opened`: what opens it."""
    _, rid, _, moment, *_ = opened
    return (CLOSE, rid, "settled", "refused", None, moment, None, None, None, None, None, 1)


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
