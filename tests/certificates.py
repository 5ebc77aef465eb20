"""Certificates: one for `localhost` that signs itself, and an authority that issues others."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PEM = serialization.Encoding.PEM
_USES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def make_certificate(folder: Path) -> Path:
    """A PEM file with the certificate and its key."""
    path = folder / "localhost.pem"
    path.write_text(self_signed())
    return path


def self_signed() -> str:
    """The same as text: the certificate, an empty line, the key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("localhost")
    builder = _builder(name, name, key, -1, 1)
    certificate = builder.add_extension(_names("localhost"), critical=False).sign(
        key, hashes.SHA256()
    )
    return (certificate.public_bytes(PEM) + b"\n" + key_bytes(key)).decode()


class Issued(NamedTuple):
    """Files of a certificate (with its chain) and of its key, and the certificate's number."""

    cert: Path
    key: Path
    serial: int


class Authority:
    """An authority in `folder`: `path` is its own certificate, that clients are to trust."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._name = _name(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        certificate = _signed_ca(self._name, self._name, self._key, self._key)
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(certificate.public_bytes(PEM))
        self._chain = b""

    def below(self, name: str) -> Authority:
        """Another one, whose own certificate is issued by this one and sent in the chain."""
        other = Authority(self._folder, name)
        certificate = _signed_ca(other._name, self._name, other._key, self._key)
        other._chain = certificate.public_bytes(PEM) + self._chain
        other.path = self.path
        return other

    def issue(
        self,
        name: str,
        *hosts: str,
        days: tuple[float, float] = (-1, 90),
        key: Any = None,
    ) -> Issued:
        """A certificate for these hosts (names or addresses), valid between these days from now.

        Its files are NAME.pem and NAME.key; they are written anew if they are there.
        """
        key = key or ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(name), self._name, key, *days)
        certificate = (
            builder.add_extension(_names(*hosts), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        cert_path, key_path = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        cert_path.write_bytes(certificate.public_bytes(PEM) + self._chain)
        key_path.write_bytes(key_bytes(key))
        return Issued(cert_path, key_path, certificate.serial_number)


def key_bytes(key: Any, password: bytes | None = None) -> bytes:
    """A private key in PEM."""
    hidden: Any = serialization.NoEncryption()
    if password is not None:
        hidden = serialization.BestAvailableEncryption(password)
    data: bytes = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, hidden)
    return data


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _names(*hosts: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([_general(host) for host in hosts])


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Any, begins: float, ends: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=begins))
        .not_valid_after(now + timedelta(days=ends))
    )


def _signed_ca(subject: x509.Name, issuer: x509.Name, key: Any, signer: Any) -> x509.Certificate:
    builder = _builder(subject, issuer, key, -2, 900)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    usage = {"key_cert_sign": True, "crl_sign": True}
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.KeyUsage(**dict.fromkeys(_USES, False) | usage), critical=True)
        .sign(signer, hashes.SHA256())
    )
