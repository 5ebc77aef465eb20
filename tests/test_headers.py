"""What crosses the proxy, both ways: the listed fields, and no other."""

from __future__ import annotations

import pytest
from twisted.web.http_headers import Headers

from llmproxy.framing import Fields, combined
from llmproxy.headers import TO_BACKEND, TO_CLIENT, for_backend, for_client, media_type

HOP_BY_HOP = [
    *(b"Connection", b"Keep-Alive", b"Proxy-Authenticate", b"Proxy-Authorization", b"TE"),
    *(b"Trailer", b"Transfer-Encoding", b"Upgrade", b"Proxy-Connection"),
]
PRIVATE_TO_CLIENT = [
    *(b"Authorization", b"X-Api-Key", b"Cookie", b"Forwarded", b"X-Forwarded-For", b"X-Real-Ip"),
    *(b"Host", b"Content-Length", b"Accept-Encoding", b"Content-Encoding", b"Expect", b"Origin"),
    *(b"X-Request-Id", b"OpenAI-Organization", b"X-Canary", b"Range", b"If-None-Match"),
]
PRIVATE_TO_BACKEND = [
    *(b"Set-Cookie", b"Server", b"Location", b"Access-Control-Allow-Origin", b"Content-Length"),
    *(b"Content-Encoding", b"X-Accel-Buffering", b"Www-Authenticate", b"Date", b"Etag", b"Via"),
    *(b"X-Request-Id", b"Alt-Svc", b"Strict-Transport-Security", b"X-Canary", b"Link"),
]


def canaries(names: list[bytes]) -> Fields:
    return combined([(name, b"canary") for name in names])


def fields(headers: Headers) -> Fields:
    return {name.lower(): b"|".join(values) for name, values in headers.getAllRawHeaders()}


@pytest.mark.parametrize("name", HOP_BY_HOP + PRIVATE_TO_CLIENT)
def test_a_field_of_the_clients_own_never_reaches_the_backend(name):
    sent = for_backend(canaries([name]), b"application/json", "ours")
    assert fields(sent) == {
        b"content-type": b"application/json",
        b"authorization": b"Bearer ours",
    }


@pytest.mark.parametrize("name", TO_BACKEND)
def test_a_listed_field_reaches_the_backend_in_one_line(name):
    client = combined([(name, b"one"), (name, b"two")])
    assert fields(for_backend(client, b"a/b", None))[name.lower()] == b"one, two"


def test_connection_can_not_remove_a_field_of_ours():
    client = combined(
        [(b"Connection", b"authorization, content-type, accept"), (b"Accept", b"*/*")]
    )
    sent = fields(for_backend(client, b"application/json", "ours"))
    assert set(sent) == {b"content-type", b"authorization", b"accept"}


def test_without_a_token_the_backend_gets_no_credentials():
    client = combined([(b"Authorization", b"Bearer canary")])
    assert b"authorization" not in fields(for_backend(client, b"application/json", None))


@pytest.mark.parametrize("name", HOP_BY_HOP + PRIVATE_TO_BACKEND)
def test_a_field_of_the_backends_own_never_reaches_the_client(name):
    assert for_client(canaries([name])) == []


@pytest.mark.parametrize("name", TO_CLIENT)
def test_a_listed_field_reaches_the_client_once(name):
    ((told, value),) = for_client({name.lower(): b"one", b"x-other": b"two"})
    assert (told.lower(), value) == (name.lower(), b"one")


def test_the_clients_header_is_left_as_it_was():
    client = combined([(b"Accept", b"a/b"), (b"Cookie", b"c")])
    for_backend(client, b"application/json", "ours").setRawHeaders(b"Accept", [b"changed"])
    assert client == {b"accept": b"a/b", b"cookie": b"c"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"application/json", b"application/json"),
        (b"Application/JSON; charset=utf-8", b"application/json"),
        (b" text/event-stream ;x", b"text/event-stream"),
        (b"", b""),
        (None, b""),
    ],
)
def test_the_media_type_is_without_parameters_and_in_lower_case(value, expected):
    assert media_type({} if value is None else {b"content-type": value}) == expected


def test_lines_are_headers_and_do_not_show_the_backends_key():
    sent = for_backend(combined([(b"accept", b"a: b")]), b"application/json", "canary")
    assert list(sent.getAllRawHeaders()) == [
        (b"Content-Type", [b"application/json"]),
        (b"Authorization", [b"Bearer canary"]),
        (b"Accept", [b"a: b"]),
    ]
    assert "canary" not in repr(sent)
