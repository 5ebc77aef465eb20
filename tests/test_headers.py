"""What crosses the proxy, both ways: the listed fields, and no other."""

from __future__ import annotations

import pytest
from twisted.web.http_headers import Headers

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


def canaries(names: list[bytes]) -> Headers:
    return Headers({name: [b"canary"] for name in names})


def fields(headers: Headers) -> dict[bytes, list[bytes]]:
    return {name.lower(): list(values) for name, values in headers.getAllRawHeaders()}


@pytest.mark.parametrize("name", HOP_BY_HOP + PRIVATE_TO_CLIENT)
def test_a_field_of_the_clients_own_never_reaches_the_backend(name):
    sent = for_backend(canaries([name]), b"application/json", "ours")
    assert fields(sent) == {
        b"content-type": [b"application/json"],
        b"authorization": [b"Bearer ours"],
    }


@pytest.mark.parametrize("name", TO_BACKEND)
def test_a_listed_field_reaches_the_backend_once(name):
    client = Headers({name: [b"one", b"two"]})
    assert for_backend(client, b"a/b", None).getRawHeaders(name) == [b"one"]


def test_connection_can_not_remove_a_field_of_ours():
    client = Headers({b"Connection": [b"authorization, content-type, accept"], b"Accept": [b"*/*"]})
    sent = fields(for_backend(client, b"application/json", "ours"))
    assert set(sent) == {b"content-type", b"authorization", b"accept"}


def test_without_a_token_the_backend_gets_no_credentials():
    client = Headers({b"Authorization": [b"Bearer canary"]})
    assert not for_backend(client, b"application/json", None).hasHeader(b"Authorization")


@pytest.mark.parametrize("name", HOP_BY_HOP + PRIVATE_TO_BACKEND)
def test_a_field_of_the_backends_own_never_reaches_the_client(name):
    assert for_client(canaries([name])) == []


@pytest.mark.parametrize("name", TO_CLIENT)
def test_a_listed_field_reaches_the_client_once(name):
    ((told, value),) = for_client(Headers({name: [b"one", b"two"]}))
    assert (told.lower(), value) == (name.lower(), b"one")


def test_the_clients_header_is_left_as_it_was():
    client = Headers({b"Accept": [b"a/b"], b"Cookie": [b"c"]})
    for_backend(client, b"application/json", "ours").setRawHeaders(b"Accept", [b"changed"])
    assert fields(client) == {b"accept": [b"a/b"], b"cookie": [b"c"]}


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
    headers = Headers({} if value is None else {b"Content-Type": [value]})
    assert media_type(headers) == expected
