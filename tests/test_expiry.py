"""When a key ends, as its text says it; what can't be read is past."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from llmproxy.expiry import UNREADABLE, expiry_time, is_valid

NOON = datetime(2030, 6, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2030-06-01T12:00:00+00:00", NOON),
        ("2030-06-01T12:00:00Z", NOON),
        ("2030-06-01 12:00:00", NOON),
        ("2030-06-01T12:00", NOON),
        ("2030-06-01T12:00:00.000000", NOON),
        ("2030-06-01T14:00:00+02:00", NOON),
        ("2030-06-01 07:00:00-05:00", NOON),
        ("20300601T120000Z", NOON),
        ("2030-06-01", datetime(2030, 6, 1, tzinfo=UTC)),
    ],
)
def test_iso_8601_is_read_as_time_not_as_text(text, moment):
    read = expiry_time(text)
    assert read == moment
    assert read is not None
    assert read.utcoffset() == timedelta(0)


def test_a_time_without_an_offset_is_utc_wherever_the_server_stands(monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        assert expiry_time("2030-06-01 12:00:00") == NOON
    time.tzset()


@pytest.mark.parametrize(
    "unreadable",
    [
        "",
        "never",
        "01.06.2030",
        "2030-13-01",
        "2030-06-01T25:00",
        "9" * 40,
        0,
        1,
        2.5,
        b"2030-06-01",
        *("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2030-06-01; DROP"),
        *(True, [], {}),
    ],
)
def test_what_can_not_be_read_is_expired(unreadable):
    assert expiry_time(unreadable) == UNREADABLE
    assert not is_valid(unreadable, datetime.min.replace(tzinfo=UTC))


def test_no_expiry_is_for_ever():
    assert expiry_time(None) is None
    assert is_valid(None, datetime.max.replace(tzinfo=UTC))


@pytest.mark.parametrize(
    ("off_us", "valid"), [(-1, True), (0, False), (1, False), (3_600_000_000, False)]
)
def test_a_key_ends_exactly_then(off_us, valid):
    now = NOON + timedelta(microseconds=off_us)
    assert is_valid("2030-06-01T14:00:00+02:00", now) is valid
