"""What a request's first line and fields must be like before anybody acts on them. Pure.

The parser has taken the message apart; here is refused what it lets through and what two servers
in a row could read differently (RFC 9112 sections 3.2 and 6; RFC 9110 section 7.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from llmproxy.errors import BadRequest, ExpectationFailed, HeaderTooLarge, TargetTooLong

#: Longest target of a request, in bytes.
MAX_TARGET = 8 * 1024
#: Largest header of a request, in bytes, and in fields.
MAX_HEADER = 32 * 1024
MAX_FIELDS = 100

#: Field values by their lower-case name, in the order in which they came.
Fields = dict[bytes, list[bytes]]

_NONE: list[bytes] = []
_VERSIONS = (b"HTTP/1.1", b"HTTP/1.0")
# RFC 3986 section 3.2.2, without user information.
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%!$&'()*+;=-]*)(?::[0-9]*)?")


def collected(fields: Iterable[tuple[bytes, bytes]]) -> Fields:
    """Fields as they came, by their lower-case name."""
    found: Fields = {}
    for name, value in fields:
        name, value = name.lower(), value.strip(b" \t")
        if name in found:
            found[name].append(value)
        else:
            found[name] = [value]
    return found


def check(target: bytes, version: bytes, fields: Fields) -> None:
    """Raises BadRequest, TargetTooLong, HeaderTooLarge, ExpectationFailed."""
    if version not in _VERSIONS:
        raise BadRequest("The request is not HTTP/1.1.")
    if len(target) > MAX_TARGET:
        raise too_long()
    if target[:1] != b"/" or b"#" in target:
        raise BadRequest("The request's target must be a path.")
    _check_host(version, fields.get(b"host", _NONE))
    if b"transfer-encoding" in fields:
        _check_coding(version, fields)
    if b"upgrade" in fields and any(b"upgrade" in v.lower() for v in fields.get(b"connection", [])):
        # It may be ignored (RFC 9110 section 7.8), but parsers disagree on whether a body follows.
        raise BadRequest("No other protocol than HTTP/1.1 is spoken here: send no Upgrade.")
    if b"expect" in fields and fields[b"expect"][-1].lower() != b"100-continue":
        raise ExpectationFailed("Only 'Expect: 100-continue' can be met.")


def _check_host(version: bytes, hosts: list[bytes]) -> None:
    if len(hosts) != 1 and (hosts or version != b"HTTP/1.0"):
        raise BadRequest("The request must have one Host field.")
    if hosts and _HOST.fullmatch(hosts[0]) is None:
        raise BadRequest("The request's Host field is not a host.")


def _check_coding(version: bytes, fields: Fields) -> None:
    codings = fields[b"transfer-encoding"]
    if len(codings) != 1 or codings[0].lower() != b"chunked" or version == b"HTTP/1.0":
        raise BadRequest("The request's Transfer-Encoding is not supported.")
    if b"content-length" in fields:
        raise BadRequest("The request has a Content-Length and a Transfer-Encoding.")


def too_long() -> TargetTooLong:
    """The refusal of a target over `MAX_TARGET` bytes."""
    return TargetTooLong("The request's target is too long.")


def too_large() -> HeaderTooLarge:
    """The refusal of a header over `MAX_HEADER` bytes or `MAX_FIELDS` fields."""
    return HeaderTooLarge("The request's header is too large.")
