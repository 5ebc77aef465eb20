"""The first message of a TLS handshake as bytes, and what a server says to it.

No library of TLS offers what is too old or too weak any more, so it is written here: RFC 8446
sections 4.1.2 and 4.1.3 (and RFC 5246 section 7.4.1 for those before it).
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

SSL3, TLS1_0, TLS1_1, TLS1_2, TLS1_3 = 0x0300, 0x0301, 0x0302, 0x0303, 0x0304
#: Extensions by their numbers (IANA, TLS ExtensionType Values).
GROUPS, POINTS, SIGNATURES, HEARTBEAT, ALPN, TICKET = 10, 11, 13, 15, 16, 35
VERSIONS, KEY_SHARE, RENEGOTIATION = 43, 51, 0xFF01
#: Named groups: X25519, P-256, P-384, P-521, and finite fields of 2048 to 8192 bits.
CURVES = (29, 23, 24, 25)
FINITE_FIELDS = (256, 257, 258, 259, 260)
#: ECDSA and RSA (PSS and PKCS #1) with SHA-256, -384 and -512, and the two with SHA-1.
ALGORITHMS = (
    0x0403,
    0x0503,
    0x0603,
    0x0804,
    0x0805,
    0x0806,
    0x0401,
    0x0501,
    0x0601,
    0x0203,
    0x0201,
)
ALERT, HANDSHAKE, SERVER_HELLO = 21, 22, 2
TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Said:
    """What a server says first: an alert's number, or what it has chosen; or nothing at all."""

    alert: int | None = None
    version: int | None = None
    suite: int | None = None
    compression: int = 0
    extensions: Mapping[int, bytes] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """The handshake goes on."""
        return self.version is not None


def client_hello(
    version: int,
    suites: Iterable[int],
    *,
    groups: Sequence[int] = CURVES,
    compressions: bytes = b"\0",
    extensions: Mapping[int, bytes] | None = None,
) -> bytes:
    """A ClientHello of this version, in a record of its own.

    That of TLS 1.3 shares no key, which a server that agrees asks for then (HelloRetryRequest).
    """
    offered = {
        GROUPS: _vector(2, _shorts(groups)),
        POINTS: _vector(1, b"\0"),
        SIGNATURES: _vector(2, _shorts(ALGORITHMS)),
        RENEGOTIATION: b"\0",
    }
    if version == TLS1_3:
        offered |= {VERSIONS: _vector(1, _shorts([TLS1_3])), KEY_SHARE: _vector(2, b"")}
    offered |= extensions or {}
    listed = _vector(2, b"".join(_extension(*each) for each in offered.items()))
    body = b"".join(
        (
            min(version, TLS1_2).to_bytes(2, "big"),
            bytes(range(32)),
            _vector(1, b""),
            _vector(2, _shorts(suites)),
            _vector(1, compressions),
            b"" if version == SSL3 else listed,
        )
    )
    message = b"\x01" + _vector(3, body)
    return bytes([HANDSHAKE]) + min(version, TLS1_0).to_bytes(2, "big") + _vector(2, message)


def sslv2_hello(version: int) -> bytes:
    """A hello in SSL 2's own format (RFC 5246 appendix E.2), with seven of its suites."""
    suites = bytes.fromhex("010080 020080 030080 040080 050080 060040 0700c0")
    lengths = len(suites).to_bytes(2, "big") + b"\0\0" + b"\0\x10"
    body = b"\x01" + version.to_bytes(2, "big") + lengths + suites + bytes(range(16))
    return (0x8000 | len(body)).to_bytes(2, "big") + body


def ask(port: int, data: bytes) -> Said:
    """Send `data` to a server, and take what it says."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as link:
        link.sendall(data)
        try:
            return _said(link)
        except ConnectionError:
            return Said()


def _said(link: socket.socket) -> Said:
    header = _take(link, 5)
    if len(header) < 5:
        return Said()
    body = _take(link, int.from_bytes(header[3:], "big"))
    if header[0] == ALERT:
        return Said(alert=body[1])
    assert (header[0], body[0]) == (HANDSHAKE, SERVER_HELLO), (header, body)
    return _server_hello(body[4:])


def _server_hello(body: bytes) -> Said:
    at = 35 + body[34]
    suite, compression = int.from_bytes(body[at : at + 2], "big"), body[at + 2]
    rest, found = body[at + 5 :], {}
    while rest:
        kind, length = int.from_bytes(rest[:2], "big"), int.from_bytes(rest[2:4], "big")
        found[kind], rest = rest[4 : 4 + length], rest[4 + length :]
    version = int.from_bytes(found.get(VERSIONS, body[:2]), "big")
    return Said(None, version, suite, compression, found)


def _take(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := link.recv(size - len(data))):
        data += more
    return data


def _extension(kind: int, content: bytes) -> bytes:
    return kind.to_bytes(2, "big") + _vector(2, content)


def _shorts(numbers: Iterable[int]) -> bytes:
    return b"".join(number.to_bytes(2, "big") for number in numbers)


def _vector(width: int, content: bytes) -> bytes:
    return len(content).to_bytes(width, "big") + content
