"""TLS towards backends: whom we trust, who we are, and sessions that need no whole handshake."""

from __future__ import annotations

from typing import Any

from OpenSSL import SSL, crypto
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.internet.ssl import (
    AcceptableCiphers,
    Certificate,
    CertificateOptions,
    optionsForClientTLS,
    trustRootFromCertificates,
)
from zope.interface import implementer

from llmproxy.certificates import read_certificates, read_identity
from llmproxy.config import Backend
from llmproxy.errors import ConfigError

#: The suites of TLS 1.2 that both sides of the proxy speak: forward secrecy and authenticated
#: encryption (Mozilla's "intermediate", version 5.7, without those on finite fields, whose key
#: exchange costs a server far more than a client). Those of TLS 1.3 are all of that kind.
SUITES = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:"
    "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384:"
    "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305"
)


@implementer(IOpenSSLClientConnectionCreator)
class Sessions:
    """Makes TLS connections to one backend, each with the session of one before it (RFC 8446
    section 2.2). Raises ConfigError when OpenSSL does not take the backend's certificates."""

    def __init__(self, backend: Backend, host: str) -> None:
        try:
            self._creator = _creator(backend, host)
        except (SSL.Error, crypto.Error, ValueError) as error:
            raise ConfigError(
                f'backend "{backend.name}": ca or client_cert can\'t be used: {error}'
            ) from None
        self._session: SSL.Session | None = None

    def clientConnectionForTLS(self, tlsProtocol: Any) -> SSL.Connection:
        """See `IOpenSSLClientConnectionCreator.clientConnectionForTLS`."""
        connection: SSL.Connection = self._creator.clientConnectionForTLS(tlsProtocol)
        if self._session is not None:
            connection.set_session(self._session)
        return connection

    def remember(self, transport: Any) -> None:
        """Use the session of this connection, which has been used: by then its ticket is here."""
        handle: Any = transport.getHandle()
        self._session = handle.get_session() or self._session


@implementer(IOpenSSLClientConnectionCreator)
class _Unverified:
    """TLS without a look at the certificate (`verify_ssl = false`)."""

    def __init__(self, context: SSL.Context, host: str) -> None:
        self._context = context
        self._host = host

    def clientConnectionForTLS(self, tlsProtocol: object) -> SSL.Connection:
        """See `IOpenSSLClientConnectionCreator.clientConnectionForTLS`."""
        connection = SSL.Connection(self._context, None)
        if not (isIPAddress(self._host) or isIPv6Address(self._host)):  # RFC 6066 section 3
            connection.set_tlsext_host_name(self._host.encode("ascii"))
        return connection


def _creator(backend: Backend, host: str) -> IOpenSSLClientConnectionCreator:
    options: dict[str, Any] = {
        "acceptableCiphers": AcceptableCiphers.fromOpenSSLCipherString(SUITES)
    }
    if backend.client_cert is not None and backend.client_key is not None:
        options |= read_identity(backend.client_cert, backend.client_key).options()
    if not backend.verify_ssl:
        return _Unverified(CertificateOptions(**options).getContext(), host)
    return optionsForClientTLS(host, _trust_root(backend.ca), extraCertificateOptions=options)


def _trust_root(ca: str | None) -> Any:
    """The system's authorities, or those in `ca`."""
    if ca is None:
        return None
    found = (crypto.X509.from_cryptography(each) for each in read_certificates(ca))
    return trustRootFromCertificates([Certificate(each) for each in found])
