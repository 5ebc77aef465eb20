"""Which header fields cross the proxy. Both ways by allow-list: nothing else can leak.

What is hop-by-hop (RFC 9110 section 7.6.1), the client's key and cookies, addresses that a front
proxy added, and the body's framing and coding are therefore never copied.
"""

from __future__ import annotations

from twisted.web.http_headers import Headers

#: Fields of the client that a backend may see.
TO_BACKEND = (
    b"Accept",
    b"User-Agent",
    b"Anthropic-Version",
    b"Anthropic-Beta",
    b"Traceparent",
    b"Tracestate",
)
#: Fields of a backend that a client may see.
TO_CLIENT = (b"Content-Type", b"Content-Language", b"Retry-After", b"Openai-Processing-Ms")


def for_backend(client: Headers, content_type: bytes, token: str | None) -> Headers:
    """The header of a request to a backend, with the backend's own credentials."""
    headers = _copied(client, TO_BACKEND)
    headers.setRawHeaders(b"Content-Type", [content_type])
    if token is not None:
        headers.setRawHeaders(b"Authorization", [b"Bearer " + token.encode()])
    return headers


def for_client(backend: Headers) -> list[tuple[bytes, bytes]]:
    """The fields of a backend's answer that go on to the client."""
    return [(n, v) for n, values in _copied(backend, TO_CLIENT).getAllRawHeaders() for v in values]


def _copied(source: Headers, names: tuple[bytes, ...]) -> Headers:
    copied = Headers()
    for name in names:
        values = source.getRawHeaders(name)
        if values:
            copied.setRawHeaders(name, values[:1])
    return copied


def media_type(headers: Headers) -> bytes:
    """The media type without parameters, in lower case; empty if there is none."""
    values = headers.getRawHeaders(b"Content-Type") or [b""]
    return values[0].partition(b";")[0].strip().lower()
