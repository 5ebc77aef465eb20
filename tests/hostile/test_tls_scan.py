"""What the public site speaks of TLS, found by asking for everything, as scanners do.

The short form sends first messages of our own making: each cipher suite that IANA has listed (and
the numbers between them), each version, what old attacks need. The long form has sslyze, as a
program of its own, look at a proxy in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from certificates import Authority, Issued
from cryptography.hazmat.primitives.asymmetric import rsa
from hello import (
    ALPN,
    CURVES,
    FINITE_FIELDS,
    HEARTBEAT,
    RENEGOTIATION,
    SSL3,
    TICKET,
    TLS1_0,
    TLS1_1,
    TLS1_2,
    TLS1_3,
    Said,
    ask,
    client_hello,
    sslv2_hello,
)
from ports import free_port
from proxy import running_proxy
from server_process import running
from tally import LONG, Tally
from twisted.internet.threads import deferToThread

ROOT = Path(__file__).parent.parent.parent
#: Every number that a suite of TLS 1.2 and before has, and those between them.
NUMBERS = (*range(0x0000, 0x0100), *range(0xC000, 0xC0B8), *range(0xCCA0, 0xCCB0), 0xD001, 0xD005)
#: ECDHE with AES-GCM or ChaCha20-Poly1305, by the kind of the certificate's key (RFC 5289, 7905).
GOOD = {"ec": {0xC02B, 0xC02C, 0xCCA9}, "rsa": {0xC02F, 0xC030, 0xCCA8}}
CURVE_NAMES = {"X25519", "secp256r1", "secp384r1"}
GOOD_SIGNS = {"supports_fallback_scsv", "supports_ems_extension"}
GOOD_1_3 = {0x1301, 0x1302, 0x1303}
HANDSHAKE_FAILURE, NO_PROTOCOL = 40, 120
#: Where `make hostile` puts it: a venv of its own, as it needs an older `cryptography` than we.
SSLYZE = Path(sys.prefix) / "sslyze" / "bin" / "sslyze"


def certificate(folder: Path, kind: str) -> Issued:
    key = rsa.generate_private_key(65537, 2048) if kind == "rsa" else None
    return Authority(folder).issue("server", "localhost", "127.0.0.1", key=key)


@contextlib.asynccontextmanager
async def tls_proxy(folder: Path, kind: str = "ec") -> AsyncIterator[int]:
    """The port of a proxy with a certificate of this kind."""
    issued = certificate(folder, kind)
    async with running_proxy(folder, {}, cert=str(issued.cert), key=str(issued.key)) as proxy:
        yield proxy.port


@pytest.mark.parametrize("kind", ["ec", "rsa"])
@pytest_twisted.ensureDeferred
async def test_of_all_suites_only_those_with_forward_secrecy_and_aead_are_taken(tmp_path, kind):
    tally = Tally(f"TLS 1.2 suites, one by one ({kind})")

    def scan(port: int) -> None:
        for number in NUMBERS:
            said = ask(port, client_hello(TLS1_2, [number]))
            good = number in GOOD[kind]
            right = said.suite == number if good else said.alert == HANDSHAKE_FAILURE
            tally.add(f"{number:#06x}", right, str(said))

    async with tls_proxy(tmp_path, kind) as port:
        await deferToThread(scan, port)
    tally.check(at_least=450)


def first_messages() -> Iterator[tuple[str, bytes, Any]]:
    """What it is, the message, and what holds of the answer."""

    def refused(said: Said) -> bool:
        return not said.agrees

    def names(version: int) -> Any:
        return lambda said: said.version == version

    for name, version in (("SSL 3", SSL3), ("TLS 1.0", TLS1_0), ("TLS 1.1", TLS1_1)):
        yield name, client_hello(version, NUMBERS), refused
        yield f"SSL 2's hello for {name}", sslv2_hello(version), refused
    yield "SSL 2", sslv2_hello(0x0002), refused
    yield "TLS 1.2", client_hello(TLS1_2, NUMBERS), names(TLS1_2)
    yield "TLS 1.3", client_hello(TLS1_3, GOOD_1_3), names(TLS1_3)
    for number in range(0x1301, 0x1308):
        wanted = names(TLS1_3) if number in GOOD_1_3 else refused
        yield f"TLS 1.3 with {number:#06x}", client_hello(TLS1_3, [number]), wanted
    for group in CURVES:
        wanted = refused if group == 25 else names(TLS1_3)
        yield f"TLS 1.3 on curve {group}", client_hello(TLS1_3, GOOD_1_3, groups=[group]), wanted
    for group in FINITE_FIELDS:
        yield f"TLS 1.3 on {group}", client_hello(TLS1_3, GOOD_1_3, groups=[group]), refused
    yield (
        "TLS 1.2 on finite fields",
        client_hello(TLS1_2, NUMBERS, groups=FINITE_FIELDS),
        refused,
    )
    yield (
        "compression (CRIME)",
        client_hello(TLS1_2, NUMBERS, compressions=b"\1\0"),
        lambda said: said.agrees and said.compression == 0,
    )
    yield (
        "heartbeat (Heartbleed)",
        client_hello(TLS1_2, NUMBERS, extensions={HEARTBEAT: b"\1"}),
        lambda said: said.agrees and HEARTBEAT not in said.extensions,
    )
    yield (
        "tickets",
        client_hello(TLS1_2, NUMBERS, extensions={TICKET: b""}),
        lambda said: said.agrees and TICKET not in said.extensions,
    )
    yield (
        "secure renegotiation is known (RFC 5746)",
        client_hello(TLS1_2, NUMBERS),
        lambda said: said.agrees and said.extensions.get(RENEGOTIATION) == b"\0",
    )
    yield (
        "ALPN with HTTP/2 first",
        client_hello(TLS1_2, NUMBERS, extensions={ALPN: b"\0\x0c\2h2\x08http/1.1"}),
        lambda said: said.agrees and said.extensions.get(ALPN) == b"\0\x09\x08http/1.1",
    )
    yield (
        "ALPN with HTTP/2 alone (RFC 7301 section 3.2)",
        client_hello(TLS1_2, NUMBERS, extensions={ALPN: b"\0\3\2h2"}),
        lambda said: said.alert == NO_PROTOCOL,
    )


@pytest_twisted.ensureDeferred
async def test_versions_groups_and_extensions_that_are_old_or_weak_are_not_spoken(tmp_path):
    tally = Tally("TLS versions, groups and extensions")

    def scan(port: int) -> None:
        for name, message, holds in first_messages():
            said = ask(port, message)
            tally.add(name, holds(said), str(said))

    async with tls_proxy(tmp_path) as port:
        await deferToThread(scan, port)
    tally.check(at_least=30)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """`data` with some of its bytes changed, or with a part that is missing, doubled or alien."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(changed))
        upto = min(len(changed), at + rng.choice((1, 2, 8, 64)))
        match rng.randrange(5):
            case 0:
                changed[at] = rng.choice(
                    (0, 1, 127, 128, 255, changed[at] ^ (1 << rng.randrange(8)))
                )
            case 1 if upto - at < len(changed):
                del changed[at:upto]
            case 2:
                changed[at:at] = changed[at:upto]
            case 3:
                changed[at:upto] = rng.randbytes(upto - at)
            case _:
                changed[at:at] = rng.randbytes(rng.randrange(300))
    return bytes(changed)


@pytest_twisted.ensureDeferred
async def test_broken_first_messages_end_in_silence_and_the_next_client_is_served(tmp_path, logged):
    tally, rng = Tally("broken first messages of TLS"), random.Random(7)
    messages = [
        client_hello(TLS1_2, NUMBERS, extensions={ALPN: b"\0\x0c\2h2\x08http/1.1", TICKET: b""}),
        client_hello(TLS1_3, GOOD_1_3, extensions={ALPN: b"\0\x09\x08http/1.1"}),
        sslv2_hello(TLS1_2),
    ]

    def scan(port: int) -> None:
        for number in range(20_000 if LONG else 400):
            data = mutated(rng, messages[number % len(messages)])
            ended = ended_by(port, data)
            tally.add(f"number {number}: {data.hex()}", ended)
        assert ask(port, client_hello(TLS1_3, GOOD_1_3)).agrees

    async with tls_proxy(tmp_path) as port:
        lines = len(logged)
        await deferToThread(scan, port)
        assert logged[lines:] == []
    tally.check(at_least=400)


def ended_by(port: int, data: bytes) -> bool:
    """The server ends the connection, once nothing more can come on it."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as link:
        try:
            link.sendall(data)
            link.shutdown(socket.SHUT_WR)
            while link.recv(4096):
                pass
        except TimeoutError:
            return False
        except OSError:  # it was reset, or has ended before that
            return True
    return True


@pytest.mark.skipif(not LONG, reason="the long form")
@pytest.mark.parametrize("kind", ["ec", "rsa"])
@pytest.mark.parametrize("workers", [1, 2])
def test_sslyze_finds_no_weak_protocol_suite_or_known_hole(tmp_path, kind, workers):
    issued, port, admin_port = certificate(tmp_path, kind), free_port(), free_port()
    (tmp_path / "config.toml").write_text(
        f'host = "127.0.0.1"\nport = {port}\nworkers = {workers}\n'
        f'cert = "{issued.cert}"\nkey = "{issued.key}"\n'
        f'[admin]\nlisten = ["tcp:{admin_port}:interface=127.0.0.1"]\n'
    )
    command = [sys.executable, "-m", "llmproxy", "-c", "config.toml"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with running(command, admin_port=admin_port, cwd=tmp_path, env=env):
        # Its exit code also tells that nothing differs from Mozilla's "intermediate".
        subprocess.run(
            [
                *(SSLYZE, "--certinfo_ca_file", tmp_path / "authority.pem", "--early_data"),
                "--mozilla_config=intermediate",
                *("--json_out", tmp_path / "found.json", f"127.0.0.1:{port}"),
            ],
            check=True,
            timeout=100,
        )
    [server] = json.loads((tmp_path / "found.json").read_text())["server_scan_results"]
    tally = Tally(f"sslyze ({kind}, {workers} workers)")
    for name, found in server["scan_result"].items():
        if found is not None and found["status"] != "NOT_SCHEDULED":
            tally.add(name, is_good(name, found["result"], GOOD[kind]), json.dumps(found)[:500])
    tally.check(at_least=15)
    assert "Traceback" not in (tmp_path / "server.log").read_text()


def is_good(name: str, result: Any, suites: set[int]) -> bool:
    """What holds of the result of one of sslyze's scans."""
    match name:
        case "tls_1_2_cipher_suites" | "tls_1_3_cipher_suites":
            return 1 <= len(result["accepted_cipher_suites"]) <= len(suites)
        case _ if name.endswith("_cipher_suites"):
            return not result["is_tls_version_supported"]
        case "robot":
            return str(result["robot_result"]).startswith("NOT_VULNERABLE")
        case "session_renegotiation":
            secure = result["supports_secure_renegotiation"]
            return secure and not result["is_vulnerable_to_client_renegotiation_dos"]
        case "elliptic_curves":
            return {each["name"] for each in result["supported_curves"]} == CURVE_NAMES
        case "certificate_info":
            return bool(result["certificate_deployments"])
    [(what, holds)] = result.items()  # one that is good, or one that is not
    return bool(holds) == (what in GOOD_SIGNS)
