"""TLS towards MongoDB, as a connection string's `tls` options ask for it."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL.crypto import X509
from OpenSSL.SSL import Connection, Context, Error
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.internet.ssl import (
    Certificate,
    CertificateOptions,
    optionsForClientTLS,
    platformTrust,
    trustRootFromCertificates,
)
from zope.interface import implementer

from llmproxy.errors import ConfigError
from llmproxy.storage.mongo_uri import KEY, TLSSettings


class TLSClient:
    """Makes TLS connections to the hosts of one connection string.

    Reads the files at once; raises `ConfigError` if one can't be read or understood.
    """

    def __init__(self, settings: TLSSettings) -> None:
        self._settings = settings
        self._trust_root = _trust_root(settings.ca_file)
        self._certificates: list[x509.Certificate] = []
        self._key: PrivateKeyTypes | None = None
        if settings.key_file is not None:
            self._key, self._certificates = _key_file(settings.key_file, settings.key_password)
            self._check_identity(settings.key_file)

    def creator(self, host: str) -> IOpenSSLClientConnectionCreator:
        """What `wrapClientTLS` needs for a connection to `host`."""
        if self._settings.check_certificate and self._settings.check_hostname:
            return optionsForClientTLS(
                host, trustRoot=self._trust_root, extraCertificateOptions=self._identity()
            )
        trust = {"trustRoot": self._trust_root} if self._settings.check_certificate else {}
        options = CertificateOptions(**trust, **self._identity())
        return _AnyHost(options.getContext(), host)

    def _check_identity(self, path: str) -> None:
        try:
            CertificateOptions(**self._identity()).getContext()
        except Error:
            raise ConfigError(f"{KEY}: {path}: key and certificate don't belong together") from None

    def _identity(self) -> dict[str, Any]:
        """Our own certificate, as `CertificateOptions` takes it."""
        if self._key is None:
            return {}
        own, *chain = self._certificates
        return {"privateKey": self._key, "certificate": own, "extraCertChain": chain}


@implementer(IOpenSSLClientConnectionCreator)
class _AnyHost:
    """Connections whose server may have a certificate for another name (the operator's wish)."""

    def __init__(self, context: Context, host: str) -> None:
        self._context = context
        self._host = host

    def clientConnectionForTLS(self, tlsProtocol: Any) -> Connection:
        connection = Connection(self._context, None)
        if not _is_address(self._host):
            connection.set_tlsext_host_name(self._host.encode("idna"))
        return connection


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{KEY}: {path}: {error.strerror}") from error


def _certificates_of(path: str, data: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        raise ConfigError(f"{KEY}: {path}: no PEM certificate") from None


def _trust_root(path: str | None) -> Any:
    if path is None:
        return platformTrust()
    certificates = [
        Certificate(X509.from_cryptography(certificate))
        for certificate in _certificates_of(path, _read(path))
    ]
    return trustRootFromCertificates(certificates)


def _key_file(path: str, password: str | None) -> tuple[PrivateKeyTypes, list[x509.Certificate]]:
    data = _read(path)
    certificates = _certificates_of(path, data)
    try:
        secret = password.encode() if password is not None else None
        return load_pem_private_key(data, secret), certificates
    except (ValueError, TypeError):
        # The library's own text could show a part of the file.
        raise ConfigError(f"{KEY}: {path}: no private key, or a wrong password") from None
