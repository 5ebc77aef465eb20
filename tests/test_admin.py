"""Tests of the admin site, over HTTP on an in-memory transport."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport

from llmproxy.admin import AdminSite, admin_resource, readiness_answer

GOOD = {"store": True, "ledger": True, "accepting": True}


class Answer:
    """What came back for one request."""

    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}

    @property
    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)


def ask(
    request: bytes,
    *,
    checks: Callable[[], Mapping[str, bool | str]] = lambda: GOOD,
    backends: Mapping[str, str] | None = None,
    exposition: Callable[[], bytes] | None = lambda: b"a 1\n",
) -> Answer:
    """Send `METHOD PATH`, with more lines after it where they are given."""
    root = admin_resource(checks, lambda: backends or {}, exposition)
    site, transport = AdminSite(root, Clock()), StringTransport()
    channel = site.buildProtocol(None)
    channel.makeConnection(transport)
    first, _, rest = request.partition(b"\n")
    channel.dataReceived(first + b" HTTP/1.1\r\nHost: h\r\nConnection: close\r\n" + rest + b"\r\n")
    channel.connectionLost(None)
    return Answer(transport.value())


def test_metrics_are_shown_as_the_text_format_of_prometheus():
    answer = ask(b"GET /metrics")
    assert (answer.status, answer.body) == (200, b"a 1\n")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_metrics_that_are_turned_off_are_not_there():
    assert ask(b"GET /metrics", exposition=None).status == 404


def test_a_process_that_answers_is_healthy_whatever_its_checks_say():
    answer = ask(b"GET /healthz", checks=lambda: {"store": False})
    assert (answer.status, answer.body) == (200, b"ok\n")


def test_it_is_ready_when_all_checks_hold_and_a_backend_is_up():
    answer = ask(b"GET /readyz", backends={"m1": "down", "m2": "up"})
    assert answer.status == 200
    assert answer.json == {
        "ready": True,
        "checks": {**GOOD, "backends": True},
        "backends": {"m1": "down", "m2": "up"},
    }


def test_it_is_ready_without_any_backend_configured():
    assert ask(b"GET /readyz", backends={}).status == 200


@pytest.mark.parametrize("failing", GOOD)
def test_it_is_not_ready_when_a_check_fails(failing):
    answer = ask(b"GET /readyz", checks=lambda: GOOD | {failing: False})
    assert answer.status == 503
    assert answer.json["ready"] is False
    assert answer.json["checks"][failing] is False


@pytest.mark.parametrize("states", [{"m": "down"}, {"m": "unknown"}])
def test_it_is_not_ready_when_no_backend_is_known_to_be_up(states):
    answer = ask(b"GET /readyz", backends=states)
    assert (answer.status, answer.json["checks"]["backends"]) == (503, False)


def test_a_check_that_is_a_text_is_shown_and_decides_nothing():
    status, _, body = readiness_answer({"store": "unreachable, known keys work"}, {})
    assert status == 200
    assert json.loads(body)["checks"]["store"] == "unreachable, known keys work"


def test_a_check_that_breaks_is_an_error_without_its_details(flush_logged_errors):
    answer = ask(b"GET /readyz", checks=lambda: {"store": 1 / 0 > 1})
    assert (answer.status, answer.json) == (500, {"error": {"code": "internal_error"}})
    assert len(flush_logged_errors(ZeroDivisionError)) == 1


@pytest.mark.parametrize("path", [b"/metrics", b"/healthz", b"/readyz", b"/nothing"])
def test_head_has_the_head_of_get_and_no_body(path):
    got, headed = ask(b"GET " + path), ask(b"HEAD " + path)
    assert headed.body == b""
    assert headed.status == got.status
    assert headed.headers["content-length"] == got.headers["content-length"] == str(len(got.body))
    assert headed.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/metrics/", "/metrics/x", "//metrics", "/METRICS", "/metrics%2f", "/metrics;x"),
        *("/readyz/../metrics", "/v1/models", "/healthz/%00", "/a" * 500),
    ],
)
def test_every_other_path_is_not_found(path):
    answer = ask(b"GET " + path.encode())
    assert (answer.status, answer.json) == (404, {"error": {"code": "not_found"}})


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"BREW"])
def test_other_methods_are_refused(method):
    answer = ask(method + b" /metrics")
    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD"
    assert answer.json == {"error": {"code": "method_not_allowed"}}


def test_a_query_is_ignored():
    assert ask(b"GET /healthz?a=b&c").status == 200


def test_a_body_is_dropped():
    root = admin_resource(lambda: GOOD, dict, None)
    channel, transport = AdminSite(root, Clock()).buildProtocol(None), StringTransport()
    channel.makeConnection(transport)
    channel.dataReceived(b"GET /healthz HTTP/1.1\r\nHost: h\r\nContent-Length: 9999\r\n\r\n")
    channel.dataReceived(b"x" * 5000)
    request = channel._channel.requests[0]
    assert request.content.tell() == 0
    channel.dataReceived(b"x" * 4999)
    assert transport.value().startswith(b"HTTP/1.1 200")
    transport.loseConnection()
    channel.connectionLost(None)


def test_answers_are_not_kept_by_caches():
    assert ask(b"GET /readyz").headers["cache-control"] == "no-store"
