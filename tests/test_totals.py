"""Tests of the sums: what several processes count, as one."""

from __future__ import annotations

import json
import math
import random

import pytest

from llmproxy.metrics import Metrics
from llmproxy.model import Kind, State
from llmproxy.totals import Checks, Snapshot, Totals, joined_checks, summed

REQUESTS, ACTIVE = "llmproxy_requests", "llmproxy_active_requests"
GET, POST = ("GET", "/", "200"), ("POST", "/", "200")


def counted(*numbers: float, labels: tuple[str, ...] = GET) -> Snapshot:
    return Snapshot(counts={REQUESTS: {labels: [*numbers]}})


def gauge(name: str, number: float) -> Snapshot:
    return Snapshot(gauges={name: {(): [number]}})


def test_counters_are_added_label_by_label():
    total = summed([counted(1), counted(2), counted(5, labels=POST)])
    assert total.counts == {REQUESTS: {GET: [3], POST: [5]}}


def test_histograms_are_added_bucket_by_bucket():
    assert summed([counted(1, 0, 2, 0.5), counted(0, 4, 1, 2.5)]).counts[REQUESTS][GET] == [
        *(1, 4, 3),
        3.0,
    ]


def test_the_sum_of_none_is_empty_and_of_one_is_itself():
    assert summed([]) == Snapshot()
    assert summed([counted(7)]) == counted(7)


def test_the_sum_does_not_depend_on_the_order():
    snapshots = [counted(n, labels=(str(n % 3),)) for n in range(9)]
    total = summed(snapshots)
    random.Random(1).shuffle(snapshots)
    assert summed(snapshots) == total


def test_what_is_added_is_left_as_it_is():
    one, other = counted(1), counted(2)
    summed([one, other])
    assert (one, other) == (counted(1), counted(2))


@pytest.mark.parametrize(
    ("name", "total"),
    [
        (ACTIVE, 7),
        ("process_resident_memory_bytes", 7),
        ("process_open_fds", 4),
        ("process_max_fds", 3),
        ("process_start_time_seconds", 3),
    ],
)
def test_gauges_are_added_but_for_limits_and_the_start(name, total):
    assert summed([gauge(name, 3), gauge(name, 4)]).gauges[name][()] == [total]


def test_a_process_is_counted_by_what_it_said_last():
    totals = Totals()
    totals.update("a", counted(1))
    totals.update("b", counted(10))
    totals.update("a", counted(2))
    assert totals.now() == counted(12)


def test_the_counts_of_a_process_that_ended_stay_and_its_gauges_go():
    totals = Totals()
    for process in ("a", "b"):
        totals.update(process, Snapshot(counted(4).counts, gauge(ACTIVE, 3).gauges))
    totals.retire("a")
    assert totals.now() == Snapshot(counted(8).counts, gauge(ACTIVE, 3).gauges)
    totals.update("successor of a", counted(1))
    assert totals.now().counts == counted(9).counts


def test_a_process_that_never_said_anything_may_end():
    totals = Totals()
    totals.retire("a")
    assert totals.now() == Snapshot()


def test_no_count_falls_while_processes_come_and_go():
    dice, totals, counts, before = random.Random(2), Totals(), dict.fromkeys(range(3), 0), 0.0
    for _ in range(500):
        process = dice.choice(list(counts))
        if dice.random() < 0.1:
            totals.retire(process)
            del counts[process]
            counts[max(counts, default=process) + process + 1] = 0
        else:
            counts[process] += dice.randrange(5)
            totals.update(process, counted(counts[process]))
        now = totals.now().counts.get(REQUESTS, {GET: [0.0]})[GET][0]
        assert now >= before
        before = now


def test_more_can_be_added_for_once():
    totals = Totals()
    totals.update("a", counted(1))
    assert totals.now(counted(2)) == counted(3)
    assert totals.now() == counted(1)


def test_a_snapshot_survives_json():
    snapshot = Snapshot(counted(1, 2.5).counts, gauge(ACTIVE, 3).gauges)
    assert Snapshot.from_json(json.loads(json.dumps(snapshot.to_json()))) == snapshot


def test_a_number_that_is_none_survives_json():
    text = json.dumps(gauge(ACTIVE, math.nan).to_json(), allow_nan=False)
    assert math.isnan(Snapshot.from_json(json.loads(text)).gauges[ACTIVE][()][0])


# With the metrics themselves


def busy() -> Metrics:
    metrics = Metrics("1", ["m"])
    metrics.request_started()
    metrics.request_started()
    metrics.request_done(b"GET", b"/", 200, 0.2)
    backend = metrics.for_backend("m")
    backend.request_done(200, 1.0)
    backend.billed({Kind.PROMPT: 3})
    backend.chunk_gap(0.02)
    backend.chunk_gap(99.0)
    metrics.ledger_rows(State.SETTLED)
    metrics.ledger_pending.follow(lambda: 4.0)
    metrics.backend_up("m", "u", True)
    return metrics


def exposed(metrics: Metrics) -> dict[str, float]:
    lines = metrics.exposition().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith(("#", "process_"))]
    return {name: float(number) for name, number in pairs}


def test_two_processes_show_twice_what_one_shows_but_for_what_is_of_the_whole():
    one, shown = exposed(busy()), Metrics("1", ["m"])
    shown.show(summed([busy().snapshot(), busy().snapshot()]))
    shown.backend_up("m", "u", True)
    whole = ("llmproxy_backend_up", "llmproxy_build_info", "llmproxy_workers")
    assert exposed(shown) == {
        name: number if name.startswith(whole) else 2 * number for name, number in one.items()
    }


def test_showing_again_does_not_add():
    shown = Metrics("1", ["m"])
    shown.show(busy().snapshot())
    once = exposed(shown)
    shown.show(busy().snapshot())
    assert exposed(shown) == once


def test_what_the_kernel_says_is_shown_for_all():
    metrics = Metrics("1")
    memory, counts = "process_resident_memory_bytes", metrics.process_snapshot()
    metrics.show(summed([counts, counts]))
    [line] = [x for x in metrics.exposition().decode().splitlines() if x.startswith(memory)]
    assert float(line.split()[1]) == 2 * counts.gauges[memory][()][0]


def test_a_metric_that_is_not_known_here_is_passed_over():
    metrics = Metrics("1")
    before = exposed(metrics)
    metrics.show(Snapshot(counts={"llmproxy_of_tomorrow": {(): [1.0]}}))
    assert exposed(metrics) == before


# Readiness


GOOD: Checks = {"serving": True, "ledger": True, "keys": "ok"}


def test_what_holds_for_all_holds():
    assert joined_checks([GOOD, GOOD]) == GOOD


def test_what_fails_for_one_has_failed():
    bad: Checks = {**GOOD, "ledger": False, "keys": "store is down"}
    for each in ([GOOD, bad], [bad, GOOD]):
        joined = joined_checks(each)
        assert joined == {"serving": True, "ledger": False, "keys": "store is down"}


def test_of_nobody_nothing_is_known():
    assert joined_checks([]) == {}
