"""Token buckets: against the plain way to keep them, which counts every token that was taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy import buckets
from llmproxy.buckets import MOST_BUCKETS, Buckets

NOW = 1_000_000.3


def test_a_full_bucket_gives_all_it_has_at_once_and_then_one_at_a_time() -> None:
    bucket = Buckets(60)
    assert [bucket.take("a", NOW) for _ in range(60)] == [0.0] * 60
    assert bucket.take("a", NOW) == pytest.approx(1.0)
    assert bucket.take("a", NOW + 0.25) == pytest.approx(0.75)
    assert bucket.take("a", NOW + 1.0) == 0.0
    assert bucket.take("a", NOW + 1.0) == pytest.approx(1.0)


def test_it_is_full_again_after_a_minute_and_no_fuller_later() -> None:
    bucket = Buckets(5)
    for later in (0.0, 60.0, 6000.0):
        assert [bucket.take("a", NOW + later) for _ in range(5)] == [0.0] * 5
        assert bucket.take("a", NOW + later) == pytest.approx(12.0)


def test_to_ask_takes_nothing_and_to_be_refused_neither() -> None:
    bucket = Buckets(1)
    assert [bucket.wait_s("a", NOW) for _ in range(9)] == [0.0] * 9
    assert bucket.take("a", NOW) == 0.0
    assert [bucket.take("a", NOW + 30) for _ in range(9)] == [pytest.approx(30.0)] * 9
    assert bucket.take("a", NOW + 60) == 0.0


def test_each_name_has_a_bucket_of_its_own() -> None:
    bucket = Buckets(1)
    assert (bucket.take("a", NOW), bucket.take("b", NOW)) == (0.0, 0.0)
    assert bucket.take("a", NOW) > 0


def test_a_large_rate_is_met_to_the_last_token() -> None:
    bucket = Buckets(100_000)
    taken = sum(bucket.take("a", NOW) == 0.0 for _ in range(101_000))
    assert taken == 100_000


def test_the_number_of_buckets_is_bounded_and_the_idle_ones_go_first() -> None:
    bucket = Buckets(1)
    bucket.take("idle", NOW)
    bucket.take("busy", NOW)
    for number in range(MOST_BUCKETS - 1):
        bucket.take(f"{number}", NOW + 0.001)
    assert len(bucket) == MOST_BUCKETS
    assert bucket.wait_s("busy", NOW) > 0
    assert bucket.wait_s("idle", NOW) == 0.0


def test_a_bucket_that_is_used_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "MOST_BUCKETS", 10)
    bucket = Buckets(600)
    for number in range(100):
        bucket.take("busy", NOW)
        bucket.take(f"{number}", NOW)
    assert bucket.wait_s("busy", NOW) == 0.0
    taken = sum(bucket.take("busy", NOW) == 0.0 for _ in range(600))
    assert taken == 500


@given(
    per_minute=st.integers(1, 200),
    steps=st.lists(st.integers(0, 40_000), max_size=300),  # milliseconds
)
def test_it_is_what_counting_every_token_gives(per_minute: int, steps: list[int]) -> None:
    bucket = Buckets(per_minute)
    tokens, now_ms = per_minute * 60_000, 0  # in units of which a token has 60,000
    for step in steps:
        now_ms += step
        tokens = min(tokens + step * per_minute, per_minute * 60_000)
        wait_s = bucket.take("a", now_ms / 1000)
        if tokens >= 60_000:
            assert wait_s == 0.0
            tokens -= 60_000
        else:
            assert wait_s == pytest.approx((60_000 - tokens) / per_minute / 1000, abs=1e-5)
