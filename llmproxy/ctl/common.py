"""What the groups of commands share: the store, times, and output."""

from __future__ import annotations

import argparse
import csv
import http.client
import json
import sqlite3
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from llmproxy.config import Config
from llmproxy.expiry import UNREADABLE, expiry_time
from llmproxy.model import MAX_COUNT, Kind, Price
from llmproxy.storage.sqlite import make_file, migrate, to_text

#: How long a statement waits for the proxy's commits.
BUSY_TIMEOUT_S = 5.0
#: How long a page may take, and how much of it is read.
FETCH_TIMEOUT_S, MAX_BYTES = 10.0, 2**24
FORMATS = ("table", "csv", "json")

Row = Sequence[object]


class CommandError(Exception):
    """What the operator asked for can't be done; the text is one line for them."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def store_path(config: Config) -> Path:
    """The file with the ledger: the database if it is SQLite, else the local journal."""
    return config.db.sqlite_path or config.ledger.path


def open_store(config: Config) -> sqlite3.Connection:
    """A connection to the file with the ledger.

    Makes the file if there is none, and brings an earlier one up to the schema. The connection
    commits each statement unless a transaction is begun. Raises CommandError.
    """
    path = store_path(config)
    fresh = not path.exists()
    make_file(path)
    try:
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        try:
            migrate(connection)
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as error:
        raise CommandError(f"database {path}: {error}") from error
    if fresh:
        say(f"made a new database: {path}")
    return connection


@contextmanager
def opened(config: Config) -> Iterator[sqlite3.Connection]:
    """`open_store`, closed at the end; errors of SQLite become CommandErrors with its file."""
    connection = open_store(config)
    try:
        yield connection
    except sqlite3.Error as error:
        raise CommandError(f"database {store_path(config)}: {error}") from error
    finally:
        connection.close()


def known_prices(connection: sqlite3.Connection) -> dict[int, Price]:
    """All prices that rows speak of, by their ids."""
    found = connection.execute(f"SELECT id, currency, {', '.join(Kind)} FROM price")
    return {row[0]: Price(*row) for row in found}


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, with nobody else writing in between."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def moment(text: str) -> datetime:
    """For argparse: a time in ISO 8601, taken as UTC where it has no offset."""
    found = expiry_time(text)
    if found is None or found == UNREADABLE:
        raise argparse.ArgumentTypeError(f"not a time in ISO 8601: {printable(text)}")
    return found


def count(text: str) -> int:
    """For argparse: a number that a bill can hold."""
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= MAX_COUNT):
        raise argparse.ArgumentTypeError(f"not a whole number, 0 to {MAX_COUNT}: {text}")
    return int(text)


def add_period(parser: argparse.ArgumentParser, what: str) -> None:
    """The options `--since` and `--until`, for when a request was `what`."""
    parser.add_argument(
        "--since", type=moment, metavar="TIME", help=f"{what} at this time (ISO 8601) or later"
    )
    parser.add_argument("--until", type=moment, metavar="TIME", help=f"{what} before this time")


def add_format(parser: argparse.ArgumentParser) -> None:
    """The option `--format`."""
    parser.add_argument("--format", choices=FORMATS, default="table")


def period(column: str, arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """`--since` and `--until` as a condition on `column`, and its parameters."""
    bounds = ((">=", arguments.since), ("<", arguments.until))
    given = [(sign, to_text(time)) for sign, time in bounds if time is not None]
    condition = " AND ".join(["1", *(f"{column} {sign} ?" for sign, _ in given)])
    return condition, [text for _, text in given]


def read_page(page: urllib.request.Request | str, *handlers: urllib.request.BaseHandler) -> str:
    """The text at a URL, past any proxy of the environment. Raises CommandError."""
    url = page if isinstance(page, str) else page.full_url
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), *handlers)
    try:
        with opener.open(page, timeout=FETCH_TIMEOUT_S) as response:
            content: bytes = response.read(MAX_BYTES)
    except urllib.error.HTTPError as error:
        error.close()
        raise CommandError(f"{url} answers with status {error.code}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise CommandError(f"{url}: {getattr(error, 'reason', None) or error}") from error
    return content.decode("utf-8", "replace")


def say(text: str) -> None:
    """Tell the operator something that is not the result."""
    sys.stderr.write(f"{printable(text)}\n")


def printable(text: str) -> str:
    """`text` with its control characters escaped, so that it can't play with the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def emit(columns: Sequence[str], rows: Iterable[Row], form: str) -> None:
    """Write a result to stdout: `form` is `table`, `csv`, `json` (one list) or `jsonl`."""
    if form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    elif form == "jsonl":
        for row in rows:
            sys.stdout.write(f"{json.dumps(dict(zip(columns, row, strict=True)))}\n")
    elif form == "json":
        listed = [dict(zip(columns, row, strict=True)) for row in rows]
        sys.stdout.write(f"{json.dumps(listed, indent=2)}\n")
    else:
        _emit_table(columns, list(rows))


def _emit_table(columns: Sequence[str], rows: Sequence[Row]) -> None:
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    numeric = [
        bool(rows) and all(value is None or isinstance(value, int) for value in column)
        for column in (zip(*rows, strict=True) if rows else [()] * len(columns))
    ]
    for line in [[name.upper() for name in columns], *cells]:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ]
        sys.stdout.write(f"{'  '.join(padded).rstrip()}\n")


def _cell(value: object) -> str:
    return "-" if value is None else printable(str(value))
