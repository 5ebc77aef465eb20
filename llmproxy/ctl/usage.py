"""`llmproxyctl usage`: what was billed and what it costs, summed up."""

from __future__ import annotations

import argparse
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, cast

from llmproxy.config import Config
from llmproxy.ctl.common import Row, add_format, add_period, emit, known_prices, opened, period
from llmproxy.model import Kind
from llmproxy.prices import cost, shown

GROUPS = {"key": "api_key", "model": "model", "day": "substr(finished, 1, 10)"}
BILLED = "state IN ('settled', 'estimated')"
#: SQLite's sum() fails beyond 64 bits, so it sums multiples of this and remainders.
BASE = 10**9


def add_parser(groups: Any) -> None:
    """Add the command."""
    parser = groups.add_parser("usage", help="what was billed, by key, model or day (UTC)")
    parser.add_argument("--by", choices=tuple(GROUPS), required=True)
    add_period(parser, "finished")
    add_format(parser)
    parser.set_defaults(run=_usage)


def _usage(arguments: argparse.Namespace, config: Config) -> int:
    when, bounds = period("finished", arguments)
    with opened(config) as connection:
        rows = list(priced(connection, GROUPS[arguments.by], when, bounds))
    emit((arguments.by, "requests", *Kind, "cost", "currency"), rows, arguments.format)
    return 0


def priced(
    connection: sqlite3.Connection, group: str, condition: str, parameters: Sequence[object]
) -> Iterator[Row]:
    """The billed rows under `condition` by `group` and currency: the group's value, requests, a
    sum per kind, the cost as text, and its currency; both None where no price was set."""
    prices = known_prices(connection)
    sums: dict[tuple[Any, str], list[int]] = {}
    for row in summed(connection, (group, "price"), condition, parameters):
        name, number, requests, *totals = cast(Any, row)
        price = prices.get(number)
        pico = cost(dict(zip(Kind, totals, strict=True)), price) if price else 0
        found = [requests, *totals, pico]
        key = (name, price.currency if price else "")
        sums[key] = [a + b for a, b in zip(sums.get(key, [0] * len(found)), found, strict=True)]
    for (name, currency), (*counted, pico) in sorted(sums.items()):
        yield (name, *counted, shown(pico) if currency else None, currency or None)


def summed(
    connection: sqlite3.Connection,
    groups: Sequence[str],
    condition: str,
    parameters: Sequence[object],
) -> Iterator[Row]:
    """The billed rows under `condition` by `groups`: their values, requests, a sum per kind."""
    sums = ", ".join(f"sum({kind} / {BASE}), sum({kind} % {BASE})" for kind in Kind)
    places = ", ".join(str(n + 1) for n in range(len(groups)))
    statement = (
        f"SELECT {', '.join(groups)}, count(*), {sums} FROM ledger WHERE {BILLED} AND {condition} "
        f"GROUP BY {places} ORDER BY {places}"
    )
    first = len(groups) + 1
    for row in connection.execute(statement, parameters):
        totals = [
            (high or 0) * BASE + (low or 0)
            for high, low in zip(row[first::2], row[first + 1 :: 2], strict=True)
        ]
        yield (*row[:first], *totals)
