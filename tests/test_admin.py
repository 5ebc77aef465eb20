"""Tests of the admin site, over HTTP on an in-memory transport."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.web.resource import IResource

from llmproxy.admin import AdminSite, admin_resource, readiness_answer

GOOD = {"store": True, "ledger": True, "accepting": True}
ROOT = admin_resource(lambda: GOOD, dict, lambda: b"a 1\n")


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
    first, _, rest = request.partition(b"\n")
    return told(root, first + b" HTTP/1.1\r\nHost: h\r\nConnection: close\r\n" + rest + b"\r\n")


def told(root: IResource, data: bytes, wait_s: float = 0) -> Answer:
    """Send bytes, and take what has come `wait_s` later."""
    clock, transport = Clock(), StringTransport()
    channel = AdminSite(root, clock).buildProtocol(None)
    channel.makeConnection(transport)
    channel.dataReceived(data)
    clock.advance(wait_s)
    channel.connectionLost()
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
    assert (answer.status, answer.json["error"]["code"]) == (500, "internal_error")
    assert "division" not in answer.body.decode()
    assert len(flush_logged_errors(ZeroDivisionError)) == 1


@pytest.mark.parametrize(
    "path", [b"/metrics", b"/healthz", b"/readyz", b"/openapi.json", b"/nothing"]
)
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
    assert (answer.status, answer.json["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"DELETE", b"OPTIONS", b"TRACE"])
def test_other_methods_are_refused(method):
    answer = ask(method + b" /metrics")
    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD"
    assert answer.json["error"]["code"] == "method_not_allowed"


def test_a_query_is_ignored():
    assert ask(b"GET /healthz?a=b&c").status == 200


def test_a_body_is_dropped_and_the_connection_goes_on():
    channel, transport = AdminSite(ROOT, Clock()).buildProtocol(None), StringTransport()
    channel.makeConnection(transport)
    channel.dataReceived(b"POST /healthz HTTP/1.1\r\nHost: h\r\nContent-Length: 9999\r\n\r\n")
    channel.dataReceived(b"x" * 9999)
    channel.dataReceived(b"GET /nothing HTTP/1.1\r\nHost: h\r\n\r\n")
    assert re.findall(rb"HTTP/1.1 (\d+)", transport.value()) == [b"405", b"404"]
    channel.connectionLost()


def test_answers_are_not_kept_by_caches():
    assert ask(b"GET /readyz").headers["cache-control"] == "no-store"


def test_the_description_of_both_sites_is_shown():
    answer = ask(b"GET /openapi.json")
    assert answer.status == 200
    assert {"/v1/chat/completions", "/openapi.json"} <= answer.json["paths"].keys()


def test_no_page_of_another_site_may_read_the_answers():
    answer = ask(b"GET /metrics\nOrigin: https://example.org\r\n")
    assert not [name for name in answer.headers if name.startswith("access-control-")]


# What is no request, as on the public site

REFUSED = {
    "a large header": (431, b"GET /metrics HTTP/1.1\r\nHost: h\r\nA: %b\r\n\r\n" % (b"a" * 33_000)),
    "many fields": (431, b"GET /metrics HTTP/1.1\r\nHost: h\r\n%b\r\n" % (b"A: b\r\n" * 101)),
    "a long target": (414, b"GET /%b HTTP/1.1\r\nHost: h\r\n\r\n" % (b"a" * 9000)),
    "no host": (400, b"GET /metrics HTTP/1.1\r\n\r\n"),
    "two hosts": (400, b"GET /metrics HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
    "two lengths": (
        400,
        b"GET /metrics HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    ),
    "a length without end": (
        400,
        b"GET /metrics HTTP/1.1\r\nHost: h\r\nContent-Length: %b\r\n\r\n" % (b"9" * 400),
    ),
    "another host's target": (400, b"GET http://x/metrics HTTP/1.1\r\nHost: h\r\n\r\n"),
    "no method": (400, b"BREW /metrics HTTP/1.1\r\nHost: h\r\n\r\n"),
    "a tunnel": (400, b"CONNECT h:1 HTTP/1.1\r\nHost: h\r\n\r\n"),
    "an upgrade": (
        400,
        b"GET /metrics HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    ),
    "no HTTP": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_request_is_refused_with_an_answer(name):
    status, data = REFUSED[name]
    answer = told(ROOT, data)
    assert (answer.status, answer.headers["connection"]) == (status, "close")
    assert answer.json["error"]["message"]


def test_a_header_that_drips_is_not_waited_for():
    answer = told(ROOT, b"GET /metrics HTTP/1.1\r\nHost:", wait_s=10)
    assert (answer.status, answer.json["error"]["code"]) == (408, "request_timeout")
