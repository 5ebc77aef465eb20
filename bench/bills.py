"""Do the bills say what the backend itself counted?"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: How long the last rows may take to be settled.
SETTLE_S = 20.0


class WrongBills(Exception):
    """The bills differ from the backend's own count."""


# The ledger gave up waiting for these rows to be written, the client was told 503, and nothing was
# sent; when they turned out to be written after all, they were closed with nothing on the bill.
NEVER_SENT = """outcome = 'refused' AND status IS NULL AND state = 'settled'
    AND coalesce(prompt, 0) = 0 AND coalesce(completion, 0) = 0"""


def check(database: Path, stats: Mapping[str, int]) -> str:
    """Compare; a line for the reader. Raises WrongBills.

    `stats`: the backend's `requests`, `prompt` and `completion` since both were started.
    """
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        _wait_until_settled(connection)

        def ask(question: str) -> list[tuple[Any, ...]]:
            return connection.execute(question).fetchall()

        sent = f"FROM ledger WHERE NOT ({NEVER_SENT})"
        found = {
            "rows": dict(ask(f"SELECT state, count(*) {sent} GROUP BY state")),
            "ledger": ask("SELECT sum(prompt), sum(completion) FROM ledger")[0],
            "billed": dict(ask("SELECT product, sum(quantity) FROM event_oneoff GROUP BY product")),
            "events": ask("SELECT count(*) FROM event_oneoff")[0][0],
        }
        [(unsent,)] = ask(f"SELECT count(*) FROM ledger WHERE {NEVER_SENT}")
    prompt, completion = stats["prompt"], stats["completion"]
    wanted = {
        "rows": {"settled": stats["requests"]},
        "ledger": (prompt, completion),
        "billed": {"bench/BENCH/prompt": prompt, "bench/BENCH/completion": completion},
        "events": 2 * stats["requests"],
    }
    if found != wanted:
        raise WrongBills(f"{found}, but the backend counted {wanted}; broken: {stats['broken']}")
    line = f"{stats['requests']} requests, {prompt} + {completion} tokens"
    return f"bills equal the backend's count: {line}" + (f"; {unsent} not sent" if unsent else "")


def _wait_until_settled(connection: sqlite3.Connection) -> None:
    deadline = time.monotonic() + SETTLE_S
    question = "SELECT count(*) FROM ledger WHERE state = 'open'"
    while connection.execute(question).fetchone()[0] and time.monotonic() < deadline:
        time.sleep(0.1)
