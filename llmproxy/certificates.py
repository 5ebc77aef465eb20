"""Certificates and keys in PEM: read, and checked against each other. No files are touched here."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

#: The keys that a certificate for TLS may have.
Key = RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey | Ed448PrivateKey


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate, then those of its issuers that are sent with it, and its private key."""

    chain: tuple[x509.Certificate, ...]
    key: Key = field(repr=False)

    @property
    def begins(self) -> datetime:
        """From when on the certificate is valid (UTC)."""
        return self.chain[0].not_valid_before_utc

    @property
    def ends(self) -> datetime:
        """Until when the certificate is valid (UTC)."""
        return self.chain[0].not_valid_after_utc

    def options(self) -> dict[str, Any]:
        """The arguments of Twisted's `CertificateOptions` for it."""
        own, *issuers = self.chain
        return {"privateKey": self.key, "certificate": own, "extraCertChain": issuers}


def read_identity(chain: str, key: str) -> Identity:
    """The certificates of `chain` with their key. Raises ValueError: one is none, or they do not
    fit."""
    certificates, private = read_certificates(chain), read_key(key)
    if certificates[0].public_key() != private.public_key():
        raise ValueError("the key is not that of the first certificate")
    return Identity(tuple(certificates), private)


def read_certificates(pem: str) -> list[x509.Certificate]:
    """All certificates in `pem`, at least one; other text between them is skipped. Raises
    ValueError."""
    try:
        return x509.load_pem_x509_certificates(pem.encode())
    except ValueError:
        raise ValueError("there is no certificate in PEM, or a broken one") from None


def read_key(pem: str) -> Key:
    """The private key in `pem`. Raises ValueError, which shows nothing of it."""
    try:
        found = load_pem_private_key(pem.encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password
        raise ValueError("there is no private key in PEM without a password") from None
    if not isinstance(found, Key):
        raise ValueError("the key is of a kind that TLS does not use")
    return found
