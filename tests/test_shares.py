"""How processes share the rates of one key: whoever comes when, no more than the limit in all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmproxy.config import KeyLimits
from llmproxy.model import Claim, Share
from llmproxy.shares import CLAIM_S, MOST_DEBT_S, NOTHING, PART, Slice, left, take, wait_s

NOW = 1_800_000_000.0


def taken(
    share: Share,
    limits: KeyLimits,
    wanted: Slice = NOTHING,
    *,
    now: float = NOW,
    me: str = "me",
    running: int = 0,
    kept: Slice = NOTHING,
    more: bool = True,
) -> tuple[Share, Slice]:
    return take(share, limits, now, me=me, running=running, kept=kept, wanted=wanted, more=more)


RATES = KeyLimits(requests_per_minute=600, tokens_per_minute=6000)


def test_a_slice_is_what_is_wanted_and_a_part_of_what_is_left_where_there_is_plenty() -> None:
    share, first = taken(Share(), RATES, Slice(requests=1, tokens=1000))
    assert first == Slice(600 // PART, 1000)
    assert left(share.requests_full_at, NOW, 600) == 600 - 600 // PART
    share, second = taken(share, RATES, Slice(requests=1))
    assert second == Slice((600 - 600 // PART) // PART, 5000 // PART)


def test_near_the_limit_it_is_what_is_wanted_and_no_more_than_there_is() -> None:
    few = KeyLimits(requests_per_minute=10)
    share, first = taken(Share(), few, Slice(requests=8))
    assert first.requests == 8
    share, second = taken(share, few, Slice(requests=3))
    assert second.requests == 2
    share, third = taken(share, few, Slice(requests=1))
    assert third.requests == 0
    assert wait_s(share.requests_full_at, NOW, 10, 1) == pytest.approx(6)
    _, later = taken(share, few, Slice(requests=3), now=NOW + 12)
    assert later.requests == 2


def test_what_is_kept_goes_back_and_none_is_taken_where_nothing_more_is_wanted() -> None:
    share, first = taken(Share(), RATES, Slice(requests=1, tokens=100))
    share, nothing = taken(share, RATES, kept=first, more=False)
    assert nothing == NOTHING
    assert (left(share.requests_full_at, NOW, 600), left(share.tokens_full_at, NOW, 6000)) == (
        600,
        6000,
    )


def test_a_bucket_that_has_filled_meanwhile_takes_nothing_back() -> None:
    share, first = taken(Share(), RATES, Slice(requests=30))
    share, second = taken(share, RATES, Slice(requests=50), kept=first, now=NOW + 60)
    assert second.requests == 50
    assert left(share.requests_full_at, NOW + 60, 600) == 550


def test_a_debt_is_owed_and_at_most_for_an_hour() -> None:
    share, _ = taken(Share(), RATES, kept=Slice(tokens=-600), more=False)
    assert left(share.tokens_full_at, NOW, 6000) == 5400
    share, _ = taken(share, RATES, kept=Slice(tokens=-(10**18)), more=False)
    assert wait_s(share.tokens_full_at, NOW, 6000, 0) == pytest.approx(MOST_DEBT_S)


def test_what_is_not_limited_is_neither_taken_nor_kept() -> None:
    share, nothing = taken(Share(5.0, 5.0), KeyLimits(), Slice(1, 1, 1), kept=Slice(9, 9, 9))
    assert (share, nothing) == (Share(), NOTHING)


PLACES = KeyLimits(concurrent_requests=4)


def test_places_are_claimed_by_all_together_no_more_than_there_are() -> None:
    share, mine = taken(Share(), PLACES, Slice(places=3), me="a")
    assert (mine.places, share.claims) == (3, {"a": Claim(3, NOW + CLAIM_S)})
    share, other = taken(share, PLACES, Slice(places=3), me="b")
    assert other.places == 1
    _, third = taken(share, PLACES, Slice(places=1), me="c")
    assert third.places == 0


def test_who_has_requests_in_flight_claims_them_and_spare_places_go_back() -> None:
    share, _ = taken(Share(), PLACES, Slice(places=3), me="a")
    share, spare = taken(share, PLACES, me="a", running=1, more=False)
    assert (spare.places, share.claims["a"].slots) == (0, 1)
    share, _ = taken(share, PLACES, me="a", more=False)
    assert share.claims == {}


def test_where_there_is_plenty_some_places_are_spare() -> None:
    many = KeyLimits(concurrent_requests=320)
    share, mine = taken(Share(), many, Slice(places=1))
    assert (mine.places, share.claims["me"].slots) == (20, 20)
    share, none = taken(share, many, running=1, more=False)
    assert (none.places, share.claims["me"].slots) == (0, 1)


def test_a_limit_that_was_lowered_takes_nothing_from_who_is_served() -> None:
    share, none = taken(Share(), PLACES, Slice(places=1), running=9)
    assert (none.places, share.claims["me"].slots) == (0, 9)


def test_claims_of_the_dead_end_and_also_if_the_clock_was_set_back() -> None:
    share, _ = taken(Share(), PLACES, Slice(places=4), me="dead")
    _, none = taken(share, PLACES, Slice(places=1), now=NOW + CLAIM_S - 1)
    assert none.places == 0
    _, some = taken(share, PLACES, Slice(places=1), now=NOW + CLAIM_S)
    assert some.places == 1
    share, none = taken(share, PLACES, Slice(places=1), now=NOW - 7200)
    assert none.places == 0
    _, some = taken(share, PLACES, Slice(places=1), now=NOW - 7200 + CLAIM_S)
    assert some.places == 1


@pytest.mark.parametrize("limit", ["requests_per_minute", "tokens_per_minute"])
def test_a_clock_that_was_set_back_keeps_nobody_out_for_longer_than_a_debt(limit: str) -> None:
    ahead = Share(NOW + 10**6, NOW + 10**6)
    share, _ = taken(ahead, KeyLimits(**{limit: 60}), more=False)
    full_at = max(share.requests_full_at, share.tokens_full_at)
    assert full_at <= NOW + 60 + MOST_DEBT_S


@dataclass
class Process:
    """One of several that give requests and tokens away, out of slices of one share."""

    name: str
    has: Slice = NOTHING
    running: int = 0
    given: Slice = NOTHING

    def give(self, wanted: Slice) -> None:
        self.has = Slice(*(a - b for a, b in zip(self.has, wanted, strict=True)))
        self.given = Slice(*(a + b for a, b in zip(self.given, wanted, strict=True)))
        self.running += wanted.places


@dataclass
class World:
    limits: KeyLimits
    share: Share = field(default_factory=Share)
    now: float = NOW
    processes: tuple[Process, ...] = ()

    def asks(self, process: Process, wanted: Slice, more: bool = True) -> None:
        self.share, taken_now = taken(
            self.share,
            self.limits,
            wanted,
            now=self.now,
            me=process.name,
            running=process.running,
            kept=process.has._replace(places=0),
            more=more,
        )
        process.has = taken_now


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "give", "back", "end", "wait"]),
        st.integers(0, 2),
        st.integers(1, 9),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(STEPS, st.integers(1, 200), st.integers(1, 200), st.integers(1, 9))
def test_however_they_take_turns_no_more_is_given_than_the_limit(
    steps: list[tuple[str, int, int]], requests: int, tokens: int, places: int
) -> None:
    limits = KeyLimits(
        requests_per_minute=requests, tokens_per_minute=tokens, concurrent_requests=places
    )
    world = World(limits, processes=tuple(Process(name) for name in "abc"))
    acts: dict[str, Callable[[Process, int], None]] = {
        "ask": lambda process, n: world.asks(process, Slice(n, n, 1)),
        "give": lambda process, n: process.give(Slice(*(min(n, has) for has in process.has))),
        "back": lambda process, n: world.asks(process, NOTHING, more=False),
    }
    for step, which, n in steps:
        process = world.processes[which]
        if step == "wait":
            world.now += n / 100  # in all less than a claim counts
        elif step == "end":
            process.running = max(process.running - n, 0)
        else:
            acts[step](process, n)
        passed = world.now - NOW
        given = [each.given for each in world.processes]
        assert sum(each.requests for each in given) <= requests + passed * requests / 60 + 1e-3
        assert sum(each.tokens for each in given) <= tokens + passed * tokens / 60 + 1e-3
        assert sum(each.running for each in world.processes) <= places
        claims = world.share.claims
        for each in world.processes:
            assert not each.running or claims[each.name].slots >= each.running
