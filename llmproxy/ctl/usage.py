"""`llmproxyctl usage`: what was billed, summed up."""

from __future__ import annotations

import argparse
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

from llmproxy.config import Config
from llmproxy.ctl.common import Row, add_format, add_period, emit, opened, period
from llmproxy.model import Kind

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
        rows = list(summed(connection, GROUPS[arguments.by], when, bounds))
    emit((arguments.by, "requests", *Kind), rows, arguments.format)
    return 0


def summed(
    connection: sqlite3.Connection, group: str, condition: str, parameters: Sequence[object]
) -> Iterator[Row]:
    """The billed rows under `condition` by `group`: its value, requests, and a sum per kind."""
    sums = ", ".join(f"sum({kind} / {BASE}), sum({kind} % {BASE})" for kind in Kind)
    statement = (
        f"SELECT {group}, count(*), {sums} FROM ledger WHERE {BILLED} AND {condition} "
        "GROUP BY 1 ORDER BY 1"
    )
    for name, requests, *parts in connection.execute(statement, parameters):
        totals = [
            (high or 0) * BASE + (low or 0)
            for high, low in zip(parts[::2], parts[1::2], strict=True)
        ]
        yield (name, requests, *totals)
