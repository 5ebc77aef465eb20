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
    headers = Headers()
    for name in TO_BACKEND:
        values = client.getRawHeaders(name)
        if values:
            headers.setRawHeaders(name, values[:1])
    headers.setRawHeaders(b"Content-Type", [content_type])
    if token is not None:
        headers.setRawHeaders(b"Authorization", [b"Bearer " + token.encode()])
    return headers


def for_client(backend: Headers) -> list[tuple[bytes, bytes]]:
    """The fields of a backend's answer that go on to the client."""
    found = [(name, backend.getRawHeaders(name)) for name in TO_CLIENT]
    return [(name, values[0]) for name, values in found if values]


def media_type(headers: Headers) -> bytes:
    """The media type without parameters, in lower case; empty if there is none."""
    values = headers.getRawHeaders(b"Content-Type") or [b""]
    return values[0].partition(b";")[0].strip().lower()
