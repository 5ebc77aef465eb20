"""`llmproxyctl user`: keys in SQLite. Only a key's hash is stored; hash prefixes name keys."""

from __future__ import annotations

import argparse
import hashlib
import re
import secrets
import sqlite3
import sys
import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import partial
from typing import Any

from llmproxy.config import Config
from llmproxy.ctl.common import (
    CommandError,
    add_format,
    emit,
    moment,
    opened,
    say,
    transaction,
)
from llmproxy.expiry import UNREADABLE, expiry_time, is_valid
from llmproxy.model import BUDGETS, LARGEST, MAX_BUDGET, utcnow

#: Random bytes in a key.
KEY_BYTES = 64
#: Digits of a hash that are shown in a table: enough to tell keys apart.
SHOWN_DIGITS = 16

NEVER = "never"
DEFAULT = "default"
_TOKENS, _COST = "tokens of this key", "cost of this key"
_RATE, _BUDGET = "0: no limit", "0: nothing"
_MICRO = "in micro-units (25_000_000: 25 of the currency)"
LIMITS = {
    "requests_per_minute": f"requests of this key in a minute; {_RATE}",
    "concurrent_requests": f"requests of this key in flight at once; {_RATE}",
    "tokens_per_minute": f"{_TOKENS} in a minute; {_RATE}",
    "tokens_per_day": f"{_TOKENS} in a day (UTC); {_BUDGET}",
    "tokens_per_month": f"{_TOKENS} in a month (UTC); {_BUDGET}",
    "tokens_total": f"{_TOKENS} ever; {_BUDGET}",
    "cost_per_day": f"{_COST} in a day (UTC), {_MICRO}; {_BUDGET}",
    "cost_per_month": f"{_COST} in a month (UTC), {_MICRO}; {_BUDGET}",
    "cost_total": f"{_COST} ever, {_MICRO}; {_BUDGET}",
}
#: What `credit` adds to, by its options.
CREDITS = {"cost": "cost_total", "tokens": "tokens_total"}
RATES = tuple(name for name in LIMITS if name not in BUDGETS)


def add_parser(groups: Any) -> None:
    """Add the command and its own ones."""
    group = groups.add_parser("user", help="API keys (SQLite)")
    commands = group.add_subparsers(required=True, metavar="COMMAND")

    create = commands.add_parser("create", help="make a key; it is printed once, and not kept")
    create.add_argument("-e", "--expires", type=moment, metavar="TIME", help="ISO 8601, UTC")
    create.add_argument("-t", "--comment", help="whose it is, and what for")
    _add_models(create)
    _add_limits(create)
    create.set_defaults(run=_on_sqlite(_create))

    listing = commands.add_parser("list", help="show the keys")
    listing.add_argument("prefix", nargs="?", type=_prefix, metavar="PREFIX")
    add_format(listing)
    listing.set_defaults(run=_on_sqlite(_list))

    update = commands.add_parser("update", help="change a key's end or comment")
    update.add_argument("prefix", type=_prefix, metavar="PREFIX", help="of the key's hash")
    update.add_argument("-e", "--expires", type=_end, metavar="TIME", help="ISO 8601, or never")
    update.add_argument("-t", "--comment")
    _add_models(update)
    _add_limits(update)
    update.add_argument("--all-models", action="store_true", help="end a limit to some models")
    update.set_defaults(run=_on_sqlite(_update))

    credit = commands.add_parser("credit", help="add to what a key may use up ever")
    credit.add_argument("prefix", type=_prefix, metavar="PREFIX", help="of the key's hash")
    for option, name in CREDITS.items():
        unit = f", {_MICRO}" if option == "cost" else ""
        text = f"how much is added to {name}{unit}; below 0: taken away"
        credit.add_argument(f"--{option}", type=_change, metavar="N", help=text)
    credit.set_defaults(run=_on_sqlite(_credit))

    delete = commands.add_parser("delete", help="remove a key; its bills stay")
    delete.add_argument("prefix", type=_prefix, metavar="PREFIX", help="of the key's hash")
    delete.set_defaults(run=_on_sqlite(_delete))


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        action="append",
        metavar="NAME",
        help="the only model that it may ask for, by name or alias; may be repeated",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    for name, what in LIMITS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=partial(_number_or_default, getattr(LARGEST, name)),
            metavar="N",
            help=f"{what}, default: that of the configuration",
        )


def _number_or_default(most: int, text: str) -> int | str:
    if text == DEFAULT:
        return text
    number = _whole(text)
    if number is None or not 0 <= number <= most:
        raise argparse.ArgumentTypeError(f"not a whole number, 0 to {most}, or default")
    return number


def _change(text: str) -> int:
    number = _whole(text)
    if number is None or abs(number) > MAX_BUDGET:
        raise argparse.ArgumentTypeError(f"not a whole number, {-MAX_BUDGET} to {MAX_BUDGET}")
    return number


def _whole(text: str) -> int | None:
    """A whole number, which may have underscores as in the configuration."""
    plain = len(text) < 30 and re.fullmatch(r"-?[0-9]+(_[0-9]+)*", text)
    return int(text) if plain else None


def _prefix(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Fa-f]{1,64}", text):
        raise argparse.ArgumentTypeError("a key is named by the first hex digits of its hash")
    return text.lower()


def _end(text: str) -> datetime | str:
    return NEVER if text == NEVER else moment(text)


def _on_sqlite(command: Any) -> Any:
    def run(arguments: argparse.Namespace, config: Config) -> int:
        if config.db.is_mongodb:
            raise CommandError(
                f"keys are managed in MongoDB ({config.db.safe_uri}), not by this command", code=2
            )
        with opened(config) as connection:
            command(arguments, connection)
        return 0

    return run


def _stored(expires: datetime | str | None) -> str | None:
    """A time in UTC as text; None for a key that never ends."""
    if not isinstance(expires, datetime):
        return None
    return expires.isoformat(timespec="seconds")


def _create(arguments: argparse.Namespace, connection: sqlite3.Connection) -> None:
    key = secrets.token_urlsafe(KEY_BYTES)
    secret = hashlib.sha256(key.encode()).hexdigest()
    key_id = str(uuid.uuid4())
    row = (key_id, secret, _stored(arguments.expires), arguments.comment)
    with transaction(connection):
        connection.execute(
            "INSERT INTO api_key (id, secret, type, expires, comment) VALUES (?, ?, 'LLM', ?, ?)",
            row,
        )
        _limit(connection, key_id, arguments.model or ())
        _set_limits(connection, key_id, _limits_given(arguments))
    say(f"key {secret[:SHOWN_DIGITS]} made; {_end_in_words(arguments.expires)}")
    sys.stdout.write(f"{key}\n")


def _end_in_words(expires: datetime | str | None) -> str:
    if not isinstance(expires, datetime):
        return "it does not expire"
    tense = "expires" if expires > utcnow() else "has EXPIRED already,"
    return f"it {tense} at {_stored(expires)}"


def _list(arguments: argparse.Namespace, connection: sqlite3.Connection) -> None:
    is_table = arguments.format == "table"
    digits = SHOWN_DIGITS if is_table else 64
    limits = ("limits", "comment") if is_table else (*RATES, "comment", *BUDGETS)
    columns = ("hash", "id", "status", "expires", "models", *limits)
    keys = [_described(*key) for key in _find(connection, arguments.prefix or "")]
    for key in keys:
        key["hash"] = key["hash"][:digits]
    emit(columns, [[key[name] for name in columns] for key in keys], arguments.format)


def _described(
    key_id: str, secret: str, expires: object, comment: str, models: str, *limits: int | None
) -> dict[str, Any]:
    """All that is shown of a key; `limits` in single columns, and together."""
    own = dict(zip(LIMITS, limits, strict=True))
    given = [f"{name}={value}" for name, value in own.items() if value is not None]
    return {
        "hash": secret,
        "id": key_id,
        "status": _status(expires, utcnow()),
        "expires": _shown(expires),
        "models": models,
        "limits": ", ".join(given) or None,
        "comment": comment,
        **own,
    }


def _status(expires: object, now: datetime) -> str:
    return "active" if is_valid(expires, now) else "expired"


def _shown(expires: object) -> str | None:
    """The end of a key in one spelling, whichever way it is stored."""
    end = expiry_time(expires)
    return "???" if end == UNREADABLE else _stored(end)


def _update(arguments: argparse.Namespace, connection: sqlite3.Connection) -> None:
    changes: dict[str, str | None] = {}
    if arguments.expires is not None:
        changes["expires"] = _stored(arguments.expires)
    if arguments.comment is not None:
        changes["comment"] = arguments.comment
    limits = _limits_given(arguments)
    models = arguments.model is not None or arguments.all_models
    if arguments.model and arguments.all_models:
        raise CommandError("give either --model or --all-models", code=2)
    if not (changes or models or limits):
        raise CommandError(
            "nothing to change: give --expires, --comment, --model or a limit", code=2
        )
    with transaction(connection):
        key_id, secret = _find_one(connection, arguments.prefix)
        for column, value in changes.items():
            connection.execute(f"UPDATE api_key SET {column} = ? WHERE id = ?", (value, key_id))
        if models:
            _limit(connection, key_id, arguments.model or ())
        _set_limits(connection, key_id, limits)
    end = f"; {_end_in_words(arguments.expires)}" if "expires" in changes else ""
    say(f"key {secret[:SHOWN_DIGITS]} changed{end}")


def _limit(connection: sqlite3.Connection, key_id: str, models: Iterable[str]) -> None:
    """Let the key ask for these models and no others; for all, if there are none."""
    connection.execute("DELETE FROM key_model WHERE api_key = ?", (key_id,))
    connection.executemany(
        "INSERT OR IGNORE INTO key_model (api_key, model) VALUES (?, ?)",
        [(key_id, model) for model in models],
    )


def _limits_given(arguments: argparse.Namespace) -> dict[str, int | str]:
    given = {name: getattr(arguments, name) for name in LIMITS}
    return {name: value for name, value in given.items() if value is not None}


def _set_limits(
    connection: sqlite3.Connection, key_id: str, limits: Mapping[str, int | str]
) -> None:
    """Give the key these limits of its own, and leave the others as they are."""
    for name, value in limits.items():
        connection.execute(
            f"INSERT INTO key_limit (api_key, {name}) VALUES (?, ?)"
            f" ON CONFLICT DO UPDATE SET {name} = excluded.{name}",
            (key_id, None if value == DEFAULT else value),
        )


def _credit(arguments: argparse.Namespace, connection: sqlite3.Connection) -> None:
    given = {name: getattr(arguments, option) for option, name in CREDITS.items()}
    changes = {name: change for name, change in given.items() if change is not None}
    if not changes:
        raise CommandError("nothing to add: give --cost or --tokens", code=2)
    with transaction(connection):
        key_id, secret = _find_one(connection, arguments.prefix)
        before = {name: _own_limit(connection, key_id, name) for name in changes}
        totals = {name: (before[name] or 0) + change for name, change in changes.items()}
        for name, total in totals.items():
            if not 0 <= total <= MAX_BUDGET:
                raise CommandError(f"{name} would be {total}; it may be 0 to {MAX_BUDGET}")
        _set_limits(connection, key_id, totals)
    for name, total in totals.items():
        was = DEFAULT if before[name] is None else before[name]
        say(f"key {secret[:SHOWN_DIGITS]}: {name} was {was}")
        sys.stdout.write(f"{name} {total}\n")


def _own_limit(connection: sqlite3.Connection, key_id: str, name: str) -> int | None:
    found = connection.execute(f"SELECT {name} FROM key_limit WHERE api_key = ?", (key_id,))
    row: tuple[int | None] | None = found.fetchone()
    return row[0] if row else None


def _delete(arguments: argparse.Namespace, connection: sqlite3.Connection) -> None:
    with transaction(connection):
        key_id, secret = _find_one(connection, arguments.prefix)
        connection.execute("DELETE FROM api_key WHERE id = ?", (key_id,))
        _limit(connection, key_id, ())
        connection.execute("DELETE FROM key_limit WHERE api_key = ?", (key_id,))
        connection.execute("DELETE FROM key_share WHERE api_key = ?", (key_id,))
    say(f"key {secret[:SHOWN_DIGITS]} deleted; its id on bills was {key_id}")


def _find(connection: sqlite3.Connection, prefix: str) -> list[Any]:
    return connection.execute(
        "SELECT id, secret, expires, comment, (SELECT group_concat(model, ', ') FROM key_model "
        f"WHERE key_model.api_key = api_key.id), {', '.join(LIMITS)} "
        "FROM api_key LEFT JOIN key_limit ON key_limit.api_key = api_key.id "
        "WHERE type = 'LLM' AND secret IS NOT NULL AND substr(secret, 1, ?) = ? "
        "ORDER BY api_key.rowid",
        (len(prefix), prefix),
    ).fetchall()


def _find_one(connection: sqlite3.Connection, prefix: str) -> tuple[str, str]:
    """The id and hash of the one key whose hash begins with `prefix`."""
    found = _find(connection, prefix)
    if not found:
        raise CommandError(f"no key's hash begins with {prefix}")
    if len(found) > 1:
        raise CommandError(f"{len(found)} keys' hashes begin with {prefix}: give more digits")
    key_id, secret, *_ = found[0]
    return key_id, secret
