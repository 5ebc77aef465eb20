"""Which header fields cross the proxy. Both ways by allow-list: nothing else can leak.

What is hop-by-hop (RFC 9110 section 7.6.1), the client's key and cookies, addresses that a front
proxy added, and the body's framing and coding are therefore never copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from twisted.web.http_headers import Headers

from llmproxy.framing import Fields

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

_TO_BACKEND = [(name.lower(), b"\r\n%b: " % name) for name in TO_BACKEND]
_TO_CLIENT = [(name.lower(), name) for name in TO_CLIENT]


class Lines(Headers):
    """Fields as they are sent, each after a line's end: for those who only write them down.

    Twisted's `Headers` take apart, look up and put together again what is a line before and after.
    """

    def __init__(self, lines: bytes) -> None:
        super().__init__()
        self.lines = lines

    def getAllRawHeaders(self) -> Iterator[tuple[bytes, Any]]:
        """See `Headers.getAllRawHeaders`."""
        for line in self.lines.split(b"\r\n")[1:]:
            name, _, value = line.partition(b": ")
            yield name, [value]

    def __repr__(self) -> str:
        return "<Lines>"  # they hold the backend's key


def for_backend(client: Fields, content_type: bytes, token: str | None) -> Lines:
    """The header of a request to a backend, with the backend's own credentials."""
    lines = [b"\r\nContent-Type: ", content_type]
    if token is not None:
        lines += (b"\r\nAuthorization: Bearer ", token.encode())
    for key, start in _TO_BACKEND:
        if key in client:
            lines += (start, client[key])
    return Lines(b"".join(lines))


def for_client(backend: Fields) -> list[tuple[bytes, bytes]]:
    """The fields of a backend's answer that go on to the client."""
    return [(name, backend[key]) for key, name in _TO_CLIENT if key in backend]


def media_type(fields: Fields) -> bytes:
    """The media type without parameters, in lower case; empty if there is none."""
    return _without_parameters(fields.get(b"content-type", b""))


@lru_cache(64)  # nearly all have one of a few
def _without_parameters(content_type: bytes) -> bytes:
    return content_type.partition(b";")[0].strip().lower()
