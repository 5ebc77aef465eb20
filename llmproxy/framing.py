"""What a request's first line and fields must be like before anybody acts on them. Pure.

The parser has taken the message apart; here is refused what it lets through and what two servers
in a row could read differently (RFC 9112 sections 3.2 and 6; RFC 9110 section 7.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from llmproxy.errors import BadRequest, ExpectationFailed, HeaderTooLarge, TargetTooLong

#: Longest target of a request, in bytes.
MAX_TARGET = 8 * 1024
#: Largest header of a request, in bytes, and in fields.
MAX_HEADER = 32 * 1024
MAX_FIELDS = 100

#: Field values by their lower-case name.
Fields = dict[bytes, bytes]

_VERSIONS = (b"HTTP/1.1", b"HTTP/1.0")
# RFC 3986 section 3.2.2, without user information.
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%!$&'()*+;=-]*)(?::[0-9]*)?")


def combined(fields: Iterable[tuple[bytes, bytes]]) -> Fields:
    """Fields as they came, those of one name combined (RFC 9110 section 5.2).

    Of those that may stand but once, two make a value that none of their readers takes.
    """
    found: Fields = {}
    for name, value in fields:
        name, value = name.lower(), value.strip(b" \t")
        found[name] = b"%b, %b" % (found[name], value) if name in found else value
    return found


def check(target: bytes, version: bytes, fields: Fields) -> None:
    """Raises BadRequest, TargetTooLong, HeaderTooLarge, ExpectationFailed."""
    if version not in _VERSIONS:
        raise BadRequest("The request is not HTTP/1.1.")
    if len(target) > MAX_TARGET:
        raise too_long()
    if target[:1] != b"/" or b"#" in target:
        raise BadRequest("The request's target must be a path.")
    _check_host(version, fields.get(b"host"))
    if b"transfer-encoding" in fields:
        _check_coding(version, fields)
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


def is_too_large(fields: Sequence[tuple[bytes, bytes]], at_most: int) -> bool:
    """Whether a header, which has `at_most` so many bytes, is over `MAX_HEADER` bytes or
    `MAX_FIELDS` fields."""
    if len(fields) > MAX_FIELDS:
        return True
    if at_most <= MAX_HEADER:
        return False
    return sum(len(name) + len(value) + 4 for name, value in fields) > MAX_HEADER


def too_long() -> TargetTooLong:
    """The refusal of a target over `MAX_TARGET` bytes."""
    return TargetTooLong("The request's target is too long.")


def too_large() -> HeaderTooLarge:
    """The refusal of a header over `MAX_HEADER` bytes or `MAX_FIELDS` fields."""
    return HeaderTooLarge("The request's header is too large.")
