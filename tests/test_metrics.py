"""Tests of the metrics: names, labels and numbers, as Prometheus reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmproxy import metrics
from llmproxy.balancing import Standing
from llmproxy.metrics import Metrics
from llmproxy.model import Kind, State
from llmproxy.queueing import FairQueue

CHAT = "/v1/chat/completions"


@pytest.fixture
def counted() -> Metrics:
    return Metrics("1.2.3", ["m1", "m2"])


def samples(counted: Metrics) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in text_string_to_metric_families(counted.exposition().decode()):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def value(counted: Metrics, name: str, **labels: str) -> float | None:
    """The sample's value; None when it isn't exposed."""
    found = [number for each, given, number in samples(counted) if (each, given) == (name, labels)]
    return found[0] if found else None


def labels_of(counted: Metrics, name: str, label: str) -> set[str]:
    return {labels[label] for each, labels, _ in samples(counted) if each == name}


def test_every_promised_name_is_exposed_with_its_type(counted):
    families = text_string_to_metric_families(counted.exposition().decode())
    types = {family.name: family.type for family in families if "llmproxy" in family.name}
    assert types == {
        "llmproxy_requests": "counter",
        "llmproxy_request_duration_seconds": "histogram",
        "llmproxy_active_requests": "gauge",
        "llmproxy_limited_requests": "counter",
        "llmproxy_loop_lag_seconds": "histogram",
        "llmproxy_connections": "gauge",
        "llmproxy_limited_connections": "counter",
        "llmproxy_backend_requests": "counter",
        "llmproxy_backend_duration_seconds": "histogram",
        "llmproxy_backend_errors": "counter",
        "llmproxy_backend_up": "gauge",
        "llmproxy_server_in_flight": "gauge",
        "llmproxy_server_circuit_open": "gauge",
        "llmproxy_queue_length": "gauge",
        "llmproxy_failovers": "counter",
        "llmproxy_tokens": "counter",
        "llmproxy_audio_seconds": "counter",
        "llmproxy_time_to_first_token_seconds": "histogram",
        "llmproxy_chunk_gap_seconds": "histogram",
        "llmproxy_ledger_rows": "counter",
        "llmproxy_ledger_commit_seconds": "histogram",
        "llmproxy_ledger_pending": "gauge",
        "llmproxy_delivery_backlog_rows": "gauge",
        "llmproxy_delivery_backlog_age_seconds": "gauge",
        "llmproxy_certificate_expiry_seconds": "gauge",
        "llmproxy_build_info": "gauge",
        "llmproxy_workers": "gauge",
        "llmproxy_worker_restarts": "counter",
    }


def test_a_request_is_counted_under_its_method_path_and_status(counted):
    counted.request_started()
    counted.request_done(b"POST", CHAT.encode(), 200, 0.3)
    labels = {"method": "POST", "path": CHAT, "status": "200"}
    assert value(counted, "llmproxy_requests_total", **labels) == 1
    assert value(counted, "llmproxy_request_duration_seconds_sum") == 0.3


def test_requests_in_flight_are_those_started_and_not_done(counted):
    counted.request_started()
    counted.request_started()
    counted.request_done(b"GET", b"/v1/models", 200, 0.1)
    assert value(counted, "llmproxy_active_requests") == 1


def test_a_flood_of_made_up_names_adds_no_more_than_one_label_each(counted):
    for number in range(1000):
        counted.request_done(b"M%d" % number, b"/v1/%d\n" % number, 1000 + number, 0.1)
        backend = counted.for_backend(f"model-{number}")
        backend.request_done(600 + number, 0.1)
        backend.error(f"error-{number}")
        backend.billed({Kind.PROMPT: 1})
        counted.backend_up(f"model-{number}", "u", True)
    for name, label in [
        ("llmproxy_requests_total", "method"),
        ("llmproxy_requests_total", "path"),
        ("llmproxy_requests_total", "status"),
        ("llmproxy_backend_requests_total", "model"),
        ("llmproxy_backend_requests_total", "status"),
        ("llmproxy_backend_errors_total", "model"),
        ("llmproxy_backend_errors_total", "error_type"),
    ]:
        assert labels_of(counted, name, label) == {"other"}
    assert labels_of(counted, "llmproxy_tokens_total", "model") == {"m1", "m2", "other"}
    assert labels_of(counted, "llmproxy_backend_up", "model") == set()


def test_only_requests_that_are_labelled_as_they_were_sent_are_found_again(counted):
    for method, path in [(b"POST", b"/v1/x"), (b"X", CHAT.encode()), (b"GET", b"/v1/models/m1")]:
        counted.request_done(method, path, 200, 0.1)
    assert counted._request_cells == {}
    for _ in range(2):
        counted.request_done(b"POST", CHAT.encode(), 200, 0.1)
    [cell] = counted._request_cells.values()
    assert cell.value == 2


def test_all_models_by_id_are_one_path(counted):
    counted.request_done(b"GET", b"/v1/models/m1", 200, 0.1)
    counted.request_done(b"GET", b"/v1/models/m2", 200, 0.1)
    labels = {"method": "GET", "path": "/v1/models", "status": "200"}
    assert value(counted, "llmproxy_requests_total", **labels) == 2


def test_an_answer_of_a_backend_is_counted_with_its_status_and_duration(counted):
    backend = counted.for_backend("m1")
    backend.request_done(200, 2.0)
    backend.request_done(200, 3.0)
    backend.request_done(None, 1.0)
    name = "llmproxy_backend_requests_total"
    assert value(counted, name, model="m1", status="200") == 2
    assert value(counted, name, model="m1", status="none") == 1
    assert value(counted, "llmproxy_backend_duration_seconds_sum", model="m1") == 6.0


def test_an_error_is_counted_by_its_type(counted):
    counted.for_backend("m2").error("stalled")
    assert value(counted, "llmproxy_backend_errors_total", model="m2", error_type="stalled") == 1


def test_tokens_and_seconds_of_audio_are_counted_apart(counted):
    backend = counted.for_backend("m1")
    backend.billed({Kind.PROMPT: 7, Kind.COMPLETION: 5})
    backend.billed({Kind.PROMPT: 3, Kind.EMBEDDING: 2})
    backend.billed({Kind.TRANSCRIPTION: 61})
    name = "llmproxy_tokens_total"
    assert value(counted, name, model="m1", type="prompt") == 10
    assert value(counted, name, model="m1", type="completion") == 5
    assert value(counted, name, model="m1", type="embedding") == 2
    assert value(counted, "llmproxy_audio_seconds_total", model="m1") == 61
    assert labels_of(counted, name, "type") == {"prompt", "completion", "embedding"}


def test_a_bucket_takes_the_values_up_to_its_bound_and_that(counted):
    backend = counted.for_backend("m1")
    for gap in (0.0009, 0.001, 0.0011, 10.0, 10.1):
        backend.chunk_gap(gap)

    def bucket(bound: str) -> float | None:
        return value(counted, "llmproxy_chunk_gap_seconds_bucket", model="m1", le=bound)

    assert [bucket(bound) for bound in ("0.001", "0.0025", "10.0", "+Inf")] == [2, 3, 4, 5]
    assert value(counted, "llmproxy_chunk_gap_seconds_count", model="m1") == 5


def test_the_time_to_the_first_token_is_a_histogram_of_the_backend(counted):
    counted.for_backend("m2").first_token(0.2)
    assert value(counted, "llmproxy_time_to_first_token_seconds_sum", model="m2") == 0.2
    assert value(counted, "llmproxy_time_to_first_token_seconds_count", model="m1") == 0


def test_ledger_rows_are_counted_by_state_and_start_at_zero(counted):
    counted.ledger_rows(State.SETTLED)
    counted.ledger_rows(State.ORPHAN, 3)
    states = {state: value(counted, "llmproxy_ledger_rows_total", state=state) for state in State}
    assert states == {"open": 0, "settled": 1, "estimated": 0, "disputed": 0, "orphan": 3}


def test_commits_and_what_waits_are_shown(counted):
    counted.ledger_commit(0.004)
    counted.ledger_pending.set(12)
    assert value(counted, "llmproxy_ledger_commit_seconds_count") == 1
    assert value(counted, "llmproxy_ledger_pending") == 12


def test_a_followed_gauge_is_asked_at_each_scrape(counted):
    ages = iter([5.0, 20.0])
    counted.delivery_backlog_age.follow(lambda: next(ages))
    name = "llmproxy_delivery_backlog_age_seconds"
    assert [value(counted, name), value(counted, name)] == [5.0, 20.0]


def test_a_followed_gauge_that_fails_is_nan_and_breaks_nothing(counted):
    counted.delivery_backlog_rows.follow(lambda: 1 // 0)
    shown = value(counted, "llmproxy_delivery_backlog_rows")
    assert shown is not None
    assert math.isnan(shown)


def test_the_state_of_a_backend_is_absent_until_it_is_known(counted):
    counted.backend_up("m1", "u", False)
    counted.backend_up("m2", "u", True)
    assert value(counted, "llmproxy_backend_up", model="m1", server="u") == 0
    assert value(counted, "llmproxy_backend_up", model="m2", server="u") == 1
    counted.backend_up("m1", "u", None)
    assert value(counted, "llmproxy_backend_up", model="m1", server="u") is None


def test_a_reload_keeps_what_was_counted_and_forgets_who_was_up(counted):
    before = counted.for_backend("m1")
    before.request_done(200, 1.0)
    counted.backend_up("m1", "u", True)
    counted.set_models(["m2", "m3"])
    before.request_done(200, 1.0)  # one that was in flight
    assert value(counted, "llmproxy_backend_requests_total", model="m1", status="200") == 2
    assert value(counted, "llmproxy_backend_up", model="m1", server="u") is None
    assert counted.for_backend("m1") is counted.for_backend("never configured")
    counted.set_models(["m1"])
    counted.for_backend("m1").request_done(200, 1.0)
    assert value(counted, "llmproxy_backend_requests_total", model="m1", status="200") == 3


def test_two_instances_share_nothing(counted):
    other = Metrics("1.2.3", ["m1"])
    other.ledger_rows(State.SETTLED)
    assert value(counted, "llmproxy_ledger_rows_total", state="settled") == 0


def test_the_version_is_shown(counted):
    assert value(counted, "llmproxy_build_info", version="1.2.3") == 1


def test_a_name_with_quotes_and_newlines_is_one_label():
    name = 'a"b\\c\nd'
    counted = Metrics("1", [name])
    counted.for_backend(name).request_done(200, 1.0)
    assert value(counted, "llmproxy_backend_requests_total", model=name, status="200") == 1


@pytest.mark.parametrize(
    "bounds",
    [
        metrics.DURATION_BUCKETS,
        metrics.FIRST_TOKEN_BUCKETS,
        metrics.GAP_BUCKETS,
        metrics.COMMIT_BUCKETS,
    ],
)
def test_bounds_of_buckets_rise(bounds):
    assert list(bounds) == sorted(set(bounds))


def test_servers_and_queues_are_shown_as_they_are_at_the_scrape(counted, clock):
    server, queue = Standing("u", failures=1), FairQueue(clock)
    queue.most, queue.size, queue.timeout_s = 0, 5, 9
    counted.watch({("m1", "u"): server}, {"m1": queue})
    at = {"model": "m1", "server": "u"}
    assert value(counted, "llmproxy_server_in_flight", **at) == 0
    server.enter()
    queue.wait("k").addErrback(lambda failure: None)
    assert value(counted, "llmproxy_server_in_flight", **at) == 1
    assert value(counted, "llmproxy_queue_length", model="m1") == 1
    assert value(counted, "llmproxy_server_circuit_open", **at) == 0
    server.leave(False, 0.0)
    assert value(counted, "llmproxy_server_circuit_open", **at) == 1
    counted.watch({}, {})
    assert value(counted, "llmproxy_server_in_flight", **at) is None
    queue.let_in()
    clock.advance(9)
