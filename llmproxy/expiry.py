"""When a key ends: the texts that `api_key.expires` may hold, read as time."""

from __future__ import annotations

from datetime import UTC, datetime

#: A time that is always past: what can't be read must not open a door.
UNREADABLE = datetime.min.replace(tzinfo=UTC)


def expiry_time(expires: object) -> datetime | None:
    """The end of validity as an aware datetime; None: never.

    Takes ISO 8601 with a date alone (its midnight), with a space or a `T`, with or without an
    offset (UTC when there is none). Anything else counts as expired (`UNREADABLE`).
    """
    if expires is None:
        return None
    try:
        moment = datetime.fromisoformat(str(expires))
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return UNREADABLE


def is_valid(expires: object, now: datetime) -> bool:
    """True while a key with this expiry may be used."""
    moment = expiry_time(expires)
    return moment is None or moment > now
