"""Which server gets a request: the policies, and circuits that open and close."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.balancing import LONGEST, Balancer, Standing
from llmproxy.config import POLICIES

FAILURES, PAUSE_S = 3, 10.0


def servers(*weights: int) -> list[Standing]:
    return [
        Standing(f"http://gpu{n}", weight=weight, failures=FAILURES, pause_s=PAUSE_S)
        for n, weight in enumerate(weights)
    ]


def order(policy: str, standings: Sequence[Standing], count: int, affinity: bytes = b"") -> str:
    """Who is chosen, one after the other; each stays in flight."""
    balancer, found = Balancer(policy), ""
    for _ in range(count):
        chosen = balancer.choose(standings, 0.0, affinity=affinity)
        assert chosen is not None
        chosen.enter()
        found += "abcdefgh"[standings.index(chosen)]
    return found


def fail(standing: Standing, now: float, times: int = 1) -> None:
    for _ in range(times):
        standing.enter()
        standing.leave(False, now)


# -- policies --------------------------------------------------------------------------------------


def test_who_has_least_in_flight_is_next_and_equals_take_turns() -> None:
    found = servers(1, 1, 1)
    found[0].in_flight = 2
    assert order("least_in_flight", found, 6) == "bcbcab"


def test_in_flight_counts_by_weight() -> None:
    assert Counter(order("least_in_flight", servers(3, 1), 40)) == {"a": 30, "b": 10}


def test_round_robin_asks_one_after_the_other_whatever_they_do() -> None:
    found = servers(5, 1, 1)
    found[1].in_flight = 9
    assert order("round_robin", found, 6) == "abcabc"


def test_weighted_turns_are_well_mixed() -> None:
    assert order("weighted", servers(3, 1), 8) == "aabaaaba"
    assert Counter(order("weighted", servers(5, 2, 1), 80)) == {"a": 50, "b": 20, "c": 10}


def conversations(standings: Sequence[Standing], count: int = 3000) -> list[int]:
    """Where each of them goes, one at a time."""
    balancer = Balancer("prefix")
    chosen = [balancer.choose(standings, 0.0, affinity=b"c%d" % n) for n in range(count)]
    return [standings.index(each) for each in chosen if each is not None]


def test_a_conversation_stays_where_it_is_and_all_share_them() -> None:
    found = servers(1, 1, 1)
    first = conversations(found)
    assert conversations(found) == first
    assert all(800 < count < 1200 for count in Counter(first).values())


def test_conversations_are_shared_by_weight() -> None:
    counts = Counter(conversations(servers(3, 1), 4000))
    assert 2800 < counts[0] < 3200


def test_a_server_that_goes_moves_its_own_conversations_only() -> None:
    found = servers(1, 1, 1, 1)
    before = conversations(found)
    found[2].up = False
    for old, new in zip(before, conversations(found), strict=True):
        assert new == old or old == 2
        assert new != 2


def test_a_hot_conversation_spills_over() -> None:
    counts = Counter(order("prefix", servers(1, 1, 1, 1), 100, b"the same"))
    assert len(counts) == 4
    assert max(counts.values()) <= 1.25 * 100 / 4 + 1


def test_without_a_prefix_who_has_least_in_flight_is_next() -> None:
    assert order("prefix", servers(1, 1), 4) == "abab"


@pytest.mark.parametrize("policy", POLICIES)
def test_one_that_was_tried_is_not_chosen_again(policy: str) -> None:
    one, other = found = servers(1, 1)
    balancer = Balancer(policy)
    assert balancer.choose(found, 0.0, affinity=b"x", tried=[one]) is other
    assert balancer.choose(found, 0.0, affinity=b"x", tried=[one, other]) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_one_that_is_down_or_open_is_left_alone_while_others_are_there(policy: str) -> None:
    down, opened, good = found = servers(9, 9, 1)
    down.up = False
    fail(opened, 0.0, FAILURES)
    assert {order(policy, found, 1, b"%d" % n) for n in range(20)} == {"c"}
    # Health checks are older news than what requests met.
    assert Balancer(policy).choose(found, 0.0, tried=[good]) is down
    fail(down, 0.0, FAILURES)
    assert Balancer(policy).choose(found, 0.0, tried=[good]) in (down, opened)


# -- circuits --------------------------------------------------------------------------------------


def test_a_circuit_opens_at_so_many_failures_in_a_row() -> None:
    (server,) = servers(1)
    fail(server, 0.0, FAILURES - 1)
    server.enter()
    server.leave(True, 0.0)
    fail(server, 0.0, FAILURES - 1)
    assert server.allows(0.0)
    assert not server.is_open
    fail(server, 0.0)
    assert server.is_open
    assert not server.allows(PAUSE_S - 0.1)


def test_what_says_nothing_about_a_server_changes_nothing() -> None:
    (server,) = servers(1)
    fail(server, 0.0, FAILURES - 1)
    for _ in range(9):
        server.enter()
        server.leave(None, 0.0)
    assert server.allows(0.0)
    fail(server, 0.0)
    assert not server.allows(0.0)


def test_after_the_pause_one_request_is_let_through_at_a_time() -> None:
    (server,) = servers(1)
    fail(server, 0.0, FAILURES)
    assert server.allows(PAUSE_S)
    server.enter()
    assert not server.allows(PAUSE_S)
    server.leave(None, PAUSE_S)
    assert server.allows(PAUSE_S)
    server.enter()
    server.leave(True, PAUSE_S)
    assert not server.is_open
    server.enter()
    assert server.allows(PAUSE_S)


def test_a_failed_probe_doubles_the_pause_up_to_a_bound() -> None:
    (server,) = servers(1)
    fail(server, 0.0, FAILURES)
    now, pause = PAUSE_S, PAUSE_S
    for _ in range(8):
        assert server.allows(now)
        fail(server, now)
        pause = min(2 * pause, LONGEST * PAUSE_S)
        assert not server.allows(now + pause - 0.1)
        now += pause
    assert pause == LONGEST * PAUSE_S


def test_failures_of_before_an_opening_do_not_double_its_pause() -> None:
    (server,) = servers(1)
    for _ in range(9):
        server.enter()
    for _ in range(9):
        server.leave(False, 0.0)
    assert server.allows(PAUSE_S)


@given(
    st.sampled_from(POLICIES),
    st.lists(st.integers(1, 100), min_size=1, max_size=6),
    st.lists(
        st.tuples(st.sampled_from([True, False, None]), st.integers(0, 5), st.binary(max_size=2))
    ),
)
def test_there_is_always_one_and_no_count_is_lost(
    policy: str, weights: list[int], story: list[tuple[bool | None, int, bytes]]
) -> None:
    found, now = servers(*weights), 0.0
    balancer, running = Balancer(policy), []
    for went_well, seconds, affinity in story:
        now += seconds
        chosen = balancer.choose(found, now, affinity=affinity)
        assert chosen is not None
        chosen.enter()
        running.append((chosen, went_well))
        if len(running) > 3:
            ended, how = running.pop(0)
            ended.leave(how, now)
    for ended, how in running:
        ended.leave(how, now)
    assert [each.in_flight for each in found] == [0] * len(found)
