"""What a request's first line and fields must be like before anybody acts on them. Pure.

The parser has taken the message apart; here is refused what it lets through and what two servers
in a row could read differently (RFC 9112 sections 3.2 and 6; RFC 9110 section 7.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from llmproxy.errors import (
    BadRequest,
    ExpectationFailed,
    HeaderTooLarge,
    ProxyError,
    TargetTooLong,
)

#: Longest target of a request, in bytes.
MAX_TARGET = 8 * 1024
#: Largest header of a request, in bytes, and in fields.
MAX_HEADER = 32 * 1024
MAX_FIELDS = 100

#: Field values by their lower-case name.
Fields = dict[bytes, bytes]

_VERSIONS = (b"HTTP/1.1", b"HTTP/1.0")
# RFC 9112 section 3: single spaces. One empty line may come before it (section 2.2).
_LINE = re.compile(rb"(?:\r\n)?([!-~]+) ([!-~]+) (HTTP/[0-9]\.[0-9])\r\n")
# What stands in it around the target, and more.
_AROUND_TARGET = 64
_WITHOUT_BODY = (b"GET", b"HEAD")
# RFC 3986 section 3.2.2, without user information.
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%!$&'()*+;=-]*)(?::[0-9]*)?")

# What frames, routes or authorizes a request, or says what its body is, has come too late in a
# trailer (RFC 9110 section 6.5.1): nobody here would heed it, but somebody else might.
_NOT_IN_TRAILER = re.compile(
    rb"(?i)(?:content|proxy|if|x-forwarded)-.*|transfer-encoding|te|trailer|connection|keep-alive"
    rb"|upgrade|host|authorization|x-api-key|cookie|expect|range|max-forwards|forwarded"
)


def first_line(head: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Method, target and version in the header's first line; None: it is not proper."""
    line = _LINE.match(head)
    return None if line is None else (line[1], line[2], line[3])


def problem_so_far(head: bytes) -> ProxyError | None:
    """What is wrong with a request that begins with these bytes; None: it may yet be good."""
    end = head.find(b"\r\n", 2)  # of its first line
    if (end if end >= 0 else len(head)) > MAX_TARGET + _AROUND_TARGET:
        return too_long()
    if end >= 0 and first_line(head) is None:
        return bad_line()
    return too_large() if len(head) > MAX_HEADER else None


def combined(fields: Sequence[tuple[bytes, bytes]]) -> Fields:
    """Fields as they came, those of one name combined (RFC 9110 section 5.2).

    Of those that may stand but once, two make a value that none of their readers takes.
    """
    found = {name.lower(): value.strip(b" \t") for name, value in fields}
    if len(found) == len(fields):
        return found
    values: dict[bytes, list[bytes]] = {}
    for name, value in fields:
        values.setdefault(name.lower(), []).append(value.strip(b" \t"))
    return {name: b", ".join(all) for name, all in values.items()}


def check(method: bytes, target: bytes, version: bytes, fields: Fields) -> None:
    """Raises BadRequest, TargetTooLong, HeaderTooLarge, ExpectationFailed."""
    if version not in _VERSIONS:
        raise BadRequest("The request is not HTTP/1.1.")
    if len(target) > MAX_TARGET:
        raise too_long()
    if target[:1] != b"/" or b"#" in target or method == b"CONNECT":
        raise BadRequest("The request's target must be a path.")
    _check_host(version, fields.get(b"host"))
    if b"transfer-encoding" in fields:
        _check_coding(version, fields)
    if method in _WITHOUT_BODY and _has_body(fields):
        # Servers in a row disagree on whether there is one (RFC 9110 section 9.3.1).
        raise BadRequest("A GET or HEAD request must have no body.")
    if b"upgrade" in fields and b"upgrade" in fields.get(b"connection", b"").lower():
        # It may be ignored (RFC 9110 section 7.8), but parsers disagree on whether a body follows.
        raise BadRequest("No other protocol than HTTP/1.1 is spoken here: send no Upgrade.")
    if b"expect" in fields and fields[b"expect"].lower() != b"100-continue":
        raise ExpectationFailed("Only 'Expect: 100-continue' can be met.")


def _check_host(version: bytes, host: bytes | None) -> None:
    if host is None:
        if version != b"HTTP/1.0":
            raise BadRequest("The request must have a Host field.")
    elif _HOST.fullmatch(host) is None:
        raise BadRequest("The request's Host field is not one host.")


def _check_coding(version: bytes, fields: Fields) -> None:
    if fields[b"transfer-encoding"].lower() != b"chunked" or version == b"HTTP/1.0":
        raise BadRequest("The request's Transfer-Encoding is not supported.")
    if b"content-length" in fields:
        raise BadRequest("The request has a Content-Length and a Transfer-Encoding.")


def _has_body(fields: Fields) -> bool:
    return b"transfer-encoding" in fields or bool(fields.get(b"content-length", b"").strip(b"0"))


def may_trail(fields: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether all these fields may come after the body."""
    return not any(_NOT_IN_TRAILER.fullmatch(name) for name, _ in fields)


def bad_trailer() -> BadRequest:
    """The refusal of fields that may not trail."""
    return BadRequest("The request's trailer has a field that must be in its header.")


def bad_line() -> BadRequest:
    """The refusal of what does not begin well."""
    return BadRequest("The request's first line is malformed.")


def too_long() -> TargetTooLong:
    """The refusal of a target over `MAX_TARGET` bytes."""
    return TargetTooLong("The request's target is too long.")


def too_large() -> HeaderTooLarge:
    """The refusal of a header over `MAX_HEADER` bytes or `MAX_FIELDS` fields."""
    return HeaderTooLarge("The request's header is too large.")
