"""`llmproxyctl ledger`: the rows of the ledger, and what the operator decides about them."""

from __future__ import annotations

import argparse
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from llmproxy.config import Config
from llmproxy.ctl.common import (
    CommandError,
    Row,
    add_format,
    add_period,
    count,
    emit,
    known_prices,
    opened,
    period,
    say,
    transaction,
)
from llmproxy.endpoints import ENDPOINTS, Shape
from llmproxy.model import (
    BILLED,
    Account,
    Counts,
    Entry,
    Kind,
    Outcome,
    Settlement,
    State,
    events,
    utcnow,
)
from llmproxy.prices import cost, shown
from llmproxy.storage.rows import add_events
from llmproxy.storage.sqlite import from_text, to_text

COLUMNS = (
    "rid",
    "state",
    "opened",
    "finished",
    "api_key",
    "user_id",
    "path",
    "model",
    "device",
    "outcome",
    "status",
    "prompt",
    "completion",
    "embedding",
    "transcription",
    "delivered",
    "raw",
)
#: The ones that fit a terminal.
TABLE_COLUMNS = tuple(
    name for name in COLUMNS if name not in ("finished", "user_id", "delivered", "raw")
)
#: What is shown after them: in units of the currency, for what was billed at a price.
MONEY = ("cost", "currency")
#: What could not be billed exactly.
LISTED_STATES = (State.DISPUTED, State.ORPHAN, State.ESTIMATED)
#: Rows that `export` reads at a time: a longer read would keep SQLite from tidying its log.
PAGE_ROWS = 1000

#: What the bill of each kind of request counts.
KINDS: Mapping[Shape, tuple[Kind, ...]] = {
    Shape.CHAT: (Kind.PROMPT, Kind.COMPLETION),
    Shape.MESSAGES: (Kind.PROMPT, Kind.COMPLETION),
    Shape.RESPONSES: (Kind.PROMPT, Kind.COMPLETION),
    Shape.EMBEDDING: (Kind.EMBEDDING,),
    Shape.AUDIO: (Kind.TRANSCRIPTION,),
    Shape.FREE: (),
}
WHY_NOT = {
    State.OPEN: "is still in flight",
    State.SETTLED: "is settled already",
    State.ESTIMATED: "is estimated: its numbers are on the bill already, and stay",
}


def add_parser(groups: Any) -> None:
    """Add the command and its own ones."""
    group = groups.add_parser("ledger", help="the record of all requests")
    commands = group.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="show rows, the newest at the end")
    listing.add_argument(
        "--state",
        action="append",
        choices=[str(state) for state in State],
        help="may be repeated (default: disputed, orphan and estimated)",
    )
    add_period(listing, "opened")
    listing.add_argument("--limit", type=count, default=100, help="default: %(default)s")
    add_format(listing)
    listing.set_defaults(run=_list)

    resolve = commands.add_parser("resolve", help="put a number to a disputed or orphan row")
    resolve.add_argument("rid", metavar="ID", help="the request's id")
    for kind in Kind:
        unit = "seconds" if kind is Kind.TRANSCRIPTION else "tokens"
        resolve.add_argument(f"--{kind}", type=count, metavar="N", help=unit)
    resolve.add_argument("--nothing", action="store_true", help="bill nothing for it")
    resolve.set_defaults(run=_resolve)

    export = commands.add_parser("export", help="write out all rows")
    export.add_argument("--format", choices=("csv", "jsonl"), required=True)
    add_period(export, "opened")
    export.set_defaults(run=_export)


def _list(arguments: argparse.Namespace, config: Config) -> int:
    columns = TABLE_COLUMNS if arguments.format == "table" else COLUMNS
    states = arguments.state or [str(state) for state in LISTED_STATES]
    when, bounds = period("opened", arguments)
    marks = ", ".join("?" * len(states))
    with opened(config) as connection:
        found = connection.execute(
            f"SELECT {', '.join(columns)}, price FROM ledger WHERE state IN ({marks}) AND {when} "
            "ORDER BY rid DESC LIMIT ?",
            [*states, *bounds, min(arguments.limit + 1, 2**62)],
        ).fetchall()
        rows = list(_with_money(connection, columns, found))
    newest = rows[: arguments.limit]
    if len(rows) > len(newest):
        say(f"only the newest {len(newest)} rows are shown: see --limit, or ledger export")
    emit((*columns, *MONEY), reversed(newest), arguments.format)
    return 0


def _export(arguments: argparse.Namespace, config: Config) -> int:
    with opened(config) as connection:
        emit((*COLUMNS, *MONEY), _all_rows(connection, arguments), arguments.format)
    return 0


def _all_rows(connection: sqlite3.Connection, arguments: argparse.Namespace) -> Iterator[Row]:
    when, bounds = period("opened", arguments)
    statement = (
        f"SELECT {', '.join(COLUMNS)}, price FROM ledger WHERE rid > ? AND {when} "
        f"ORDER BY rid LIMIT {PAGE_ROWS}"
    )
    last = ""
    while page := connection.execute(statement, [last, *bounds]).fetchall():
        yield from _with_money(connection, COLUMNS, page)
        last = page[-1][0]


def _with_money(
    connection: sqlite3.Connection, columns: Sequence[str], rows: Iterable[Row]
) -> Iterator[Row]:
    """Rows of `columns` and a price's id, with `MONEY` in the place of the latter."""
    prices = known_prices(connection)
    for *row, number in cast(Any, rows):
        of: dict[str, Any] = dict(zip(columns, row, strict=True))
        price = prices.get(number) if of["state"] in BILLED else None
        counts = {kind: n for kind in Kind if (n := of[kind]) is not None}
        yield (*row, price and shown(cost(counts, price)), price and price.currency)


def _resolve(arguments: argparse.Namespace, config: Config) -> int:
    counts = {kind: n for kind in Kind if (n := getattr(arguments, kind)) is not None}
    if bool(counts) == arguments.nothing:
        raise CommandError("give either the numbers or --nothing", code=2)
    with opened(config) as connection, transaction(connection):
        settle(connection, arguments.rid, counts, bills_here=not config.db.is_mongodb)
    numbers = ", ".join(f"{kind} {number}" for kind, number in counts.items())
    later = "; the proxy delivers it to MongoDB" if config.db.is_mongodb and counts else ""
    say(f"{arguments.rid} settled: {numbers or 'nothing to pay'}{later}")
    return 0


def settle(connection: sqlite3.Connection, rid: str, counts: Counts, *, bills_here: bool) -> None:
    """Close a disputed or orphan row with these counts; its events are added if `bills_here`.

    Otherwise the row is left for the proxy to deliver. Part of the caller's transaction. Raises
    CommandError where the row is another, or `counts` are not what such a request is billed by.
    """
    entry, state, outcome, finished = _row(connection, rid)
    if state in WHY_NOT:
        raise CommandError(f"{rid} {WHY_NOT[state]}")
    _check_kinds(entry, counts)
    settlement = Settlement(
        state=State.SETTLED,
        outcome=outcome,
        counts=counts,
        finished=from_text(finished) if finished else utcnow(),
    )
    due = events(entry, settlement)
    connection.execute(
        "UPDATE ledger SET state = 'settled', finished = ?, prompt = ?, completion = ?, "
        "embedding = ?, transcription = ?, delivered = ? WHERE rid = ?",
        (
            to_text(settlement.finished),
            *(counts.get(kind) for kind in Kind),
            bills_here or not due,
            rid,
        ),
    )
    if bills_here:
        add_events(connection, due)


def _row(connection: sqlite3.Connection, rid: str) -> tuple[Entry, State, Any, str | None]:
    row = connection.execute(
        "SELECT opened, api_key, user_id, path, model, device, state, outcome, finished "
        "FROM ledger WHERE rid = ?",
        (rid,),
    ).fetchone()
    if row is None:
        raise CommandError(f"no row has the id {rid}")
    opened_at, key_id, user_id, path, model, device, state, outcome, finished = row
    entry = Entry(
        rid=rid,
        opened=from_text(opened_at),
        account=Account(key_id=key_id, user_id=user_id),
        path=path,
        model=model,
        device=device,
    )
    return entry, State(state), Outcome(outcome) if outcome else None, finished


def _check_kinds(entry: Entry, counts: Counts) -> None:
    endpoint = ENDPOINTS.get(entry.path)
    if endpoint is None or not counts:
        return
    kinds = KINDS[endpoint.shape]
    if set(counts) != set(kinds):
        needed = " ".join(f"--{kind} N" for kind in kinds) or "--nothing"
        raise CommandError(f"a request to {entry.path} is billed by {needed}")
