"""What a key is told of its own use: the days that it asks for, and the answer. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from itertools import groupby
from typing import Any
from urllib.parse import parse_qs

import orjson

from llmproxy.errors import BadRequest
from llmproxy.model import BUDGETS, MAX_COUNT, Kind, Used
from llmproxy.prices import cost, shown

#: Most days of one answer.
MOST_DAYS = 366
#: How the counts are called there.
NAMES = {
    Kind.PROMPT: "prompt_tokens",
    Kind.COMPLETION: "completion_tokens",
    Kind.EMBEDDING: "embedding_tokens",
    Kind.TRANSCRIPTION: "audio_seconds",
}
#: Whose use it is: all that is billed, or what went through this proxy (and its workers).
SCOPES = ("all", "this proxy")

_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def period(query: bytes, today: date) -> tuple[date, date]:
    """The first day that is asked for, and the one after the last; else those of this month up to
    `today`. Raises BadRequest."""
    given = parse_qs(query.decode("ascii", "replace"), keep_blank_values=True)
    until = _day(given, "until") or today + timedelta(1)
    since = _day(given, "since") or (until - timedelta(1)).replace(day=1)
    if not 0 < (until - since).days <= MOST_DAYS:
        raise BadRequest(f"'until' must be 1 to {MOST_DAYS} days after 'since'.", param="until")
    return since, until


def _day(given: dict[str, list[str]], name: str) -> date | None:
    if name not in given:
        return None
    try:
        [text] = given[name]
        if _DAY.fullmatch(text):
            day = date.fromisoformat(text)
            if date(1970, 1, 1) <= day <= date(9000, 1, 1):
                return day
    except ValueError:
        pass
    raise BadRequest(f"'{name}' must be one day like 2026-01-31.", param=name)


def report(
    used: Sequence[Used],
    since: date,
    until: date,
    scope: str,
    limits: Mapping[str, int | None],
    left: Mapping[str, int] | None,
) -> bytes:
    """The answer's JSON; `scope` is one of `SCOPES`, `limits` are the key's, as in `KeyLimits`, and
    `left` is what is left of its budgets: None where that can't be known.

    What was used in several currencies, or without a price, has a line for each.
    """
    by_line = sorted(used, key=lambda each: (each.day, each.model, _currency(each)))
    by_currency = sorted(used, key=_currency)
    told = {
        "object": "list",
        "scope": scope,
        "since": str(since),
        "until": str(until),
        "limits": {
            name: limit if limit or name in BUDGETS else None for name, limit in limits.items()
        },
        "remaining": left,
        "data": [
            {"object": "usage", "day": day, "model": model, **_sums(list(group))}
            for (day, model, _), group in groupby(
                by_line, lambda each: (each.day, each.model, _currency(each))
            )
        ],
        "totals": [_sums(list(group)) for _, group in groupby(by_currency, _currency)],
    }
    return orjson.dumps(told)


def _currency(used: Used) -> str:
    return used.price.currency if used.price else ""


def _sums(used: Sequence[Used]) -> dict[str, Any]:
    """What these have used together, in one currency; amounts are rounded up once."""
    pico = sum(cost(each.counts, each.price) for each in used if each.price)
    counts = {
        name: min(sum(each.counts[kind] for each in used), MAX_COUNT)
        for kind, name in NAMES.items()
    }
    currency = _currency(used[0]) or None
    return {
        "requests": sum(each.requests for each in used),
        **counts,
        "cost": shown(pico) if currency else None,
        "currency": currency,
    }
