"""Values that travel through the stages of a request. Frozen, and free of I/O.

They are named tuples, as each request makes some: a frozen dataclass takes twice as long.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from datetime import UTC, date, datetime
from types import MappingProxyType
from typing import NamedTuple

#: Largest count that a bill can hold (signed 64 bit, as SQLite and BSON store it).
MAX_COUNT = 2**63 - 1
#: Largest budget: a double, as MongoDB's shells make them, still has each whole number up to it.
MAX_BUDGET = 9 * 10**15


class Kind(enum.StrEnum):
    """What is counted: the last part of a product name `MODEL/DEVICE/KIND`."""

    PROMPT = "prompt"  # tokens
    COMPLETION = "completion"  # tokens
    EMBEDDING = "embedding"  # tokens
    TRANSCRIPTION = "transcription"  # seconds of audio, rounded up


class Outcome(enum.StrEnum):
    """How a forwarded request ended."""

    COMPLETE = "complete"  # the backend's answer came whole
    TRUNCATED = "truncated"  # the backend's answer broke off
    STALLED = "stalled"  # the backend fell silent for too long in mid-answer
    CLIENT_GONE = "client_gone"  # the client left before the end
    OUT_OF_BUDGET = "out_of_budget"  # a budget of its key was used up in mid-answer
    REFUSED = "refused"  # no result: the backend said no, or the request was never whole
    BACKEND_FAILED = "backend_failed"  # no answer that could be understood


class State(enum.StrEnum):
    """What is known about the bill of one ledger row."""

    OPEN = "open"  # in flight
    SETTLED = "settled"  # the backend's own number
    ESTIMATED = "estimated"  # our count; delivered, and listed for the operator
    DISPUTED = "disputed"  # the backend's number is missing or absurd; waits for the operator
    ORPHAN = "orphan"  # nothing is known; waits for the operator


# Python 3.11 takes long to go through an enumeration.
_KINDS = tuple(Kind)

#: The states whose counts are on the bill.
BILLED = frozenset({State.SETTLED, State.ESTIMATED})


class OwnLimits(NamedTuple):
    """What one key may ask for, in the place of the setting of that name; None: the setting holds.

    Of the first three 0 is as much as it likes. The others are budgets, in tokens or in micro-units
    (1e-6) of the currency; there 0 is nothing.
    """

    requests_per_minute: int | None = None
    concurrent_requests: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    tokens_total: int | None = None
    cost_per_day: int | None = None
    cost_per_month: int | None = None
    cost_total: int | None = None


NO_LIMITS = OwnLimits()
#: The names of those that are budgets.
BUDGETS = OwnLimits._fields[3:]
#: The largest ones.
LARGEST = OwnLimits(1_000_000, 1_000_000, 1_000_000_000, *(MAX_BUDGET for _ in BUDGETS))


class Account(NamedTuple):
    """Whom a key belongs to. `key_id` names the key's record, never the key itself.

    `models`: those that it may ask for, by name or alias; None: all. `limits`: its own ones, if it
    has any.
    """

    key_id: str
    user_id: str | None = None
    expires: datetime | None = None  # None: never
    models: frozenset[str] | None = None
    limits: OwnLimits | None = None


class Price(NamedTuple):
    """What a million of each kind cost, in micro-units (1e-6) of the currency.

    `id` is made from the rest: the same price has the same one everywhere, and for ever.
    """

    id: int
    currency: str
    prompt: int
    completion: int
    embedding: int
    transcription: int


class Amount(NamedTuple):
    """What budgets are in: tokens of prompts, answers and embeddings; micro-units (1e-6) of the
    currency, rounded up."""

    tokens: int = 0
    cost: int = 0


Counts = Mapping[Kind, int]
NO_COUNTS: Counts = MappingProxyType({})


class Reading(NamedTuple):
    """What a meter knows about an answer.

    `counts`: the best numbers known, possibly partial. `exact`: they are the backend's own and
    final. `raw`: the text of a usage report that could not be used (at most 2 KiB), None if
    there was none. `answered`: something of a result was seen.
    """

    counts: Counts = NO_COUNTS
    exact: bool = False
    raw: str | None = None
    answered: bool = False


class Entry(NamedTuple):
    """A ledger row as it is opened, before the request goes to the backend."""

    rid: str
    opened: datetime
    account: Account
    path: str
    model: str
    device: str
    price: Price | None = None  # the one that applies; None: none is set
    held: Amount | None = None  # the most that it takes; None: its key has no budget


class Settlement(NamedTuple):
    """How a ledger row is closed. Only `settled` and `estimated` rows are charged now."""

    state: State
    outcome: Outcome | None  # None: the process died, nobody knows
    counts: Counts
    finished: datetime
    status: int | None = None
    raw: str | None = None


class Used(NamedTuple):
    """What one key has used of a model on one day (`YYYY-MM-DD`, UTC), at one price."""

    day: str
    model: str
    requests: int
    counts: Counts
    price: Price | None


class Spending(NamedTuple):
    """What one key has used up to now: on `today` (UTC), in its month, and ever.

    Requests in flight are in it, with what they have been given so far. `held`: what these may
    still take. `number` grows with each reading of the same file.
    """

    today: date
    day: Amount
    month: Amount
    ever: Amount
    held: Amount = Amount()
    number: int = 0


class Claim(NamedTuple):
    """How many requests at once a process may have in flight, and until when that counts (Unix
    time in s)."""

    slots: int
    until: float


class Share(NamedTuple):
    """What all processes share of one key's rates: the Unix times (s) at which its buckets of
    requests and of tokens are full again, and what each process claims, by its id."""

    requests_full_at: float = 0.0
    tokens_full_at: float = 0.0
    claims: Mapping[str, Claim] = MappingProxyType({})


class Attempt(NamedTuple):
    """One server's part in a request, of a model that has several; `number` counts from 1."""

    rid: str
    number: int
    ended: datetime
    server: str  # its URL
    outcome: Outcome
    status: int | None


class Event(NamedTuple):
    """One line of a bill, as delivered: identity is (`rid`, `product`)."""

    rid: str
    created: datetime
    account: Account
    product: str
    quantity: int


def product(model: str, device: str, kind: Kind) -> str:
    """The product's name on a bill: `MODEL/DEVICE/KIND`."""
    return f"{model}/{device}/{kind}"


def events(entry: Entry, settlement: Settlement) -> tuple[Event, ...]:
    """The lines that a closed row puts on the bill; none for rows that wait for the operator."""
    if settlement.state not in BILLED:
        return ()
    return tuple(
        Event(
            rid=entry.rid,
            created=settlement.finished,
            account=entry.account,
            product=product(entry.model, entry.device, kind),
            quantity=settlement.counts[kind],
        )
        for kind in _KINDS
        if kind in settlement.counts
    )


def utcnow() -> datetime:
    """The time for ledger rows: UTC, aware."""
    return datetime.now(UTC)
