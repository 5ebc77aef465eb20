"""TLS towards backends: whom we trust, and sessions that need no whole handshake."""

from __future__ import annotations

import re
from typing import Any

from OpenSSL import SSL, crypto
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.internet.ssl import Certificate, CertificateOptions, trustRootFromCertificates
from twisted.web.client import BrowserLikePolicyForHTTPS
from twisted.web.iweb import IPolicyForHTTPS
from zope.interface import implementer

from llmproxy.config import Backend
from llmproxy.errors import ConfigError

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


@implementer(IOpenSSLClientConnectionCreator)
class Sessions:
    """Makes TLS connections to one backend, each with the session of one before it (RFC 8446
    section 2.2). Raises ConfigError when the backend's `ca_file` can't be used."""

    def __init__(self, backend: Backend, host: str, port: int) -> None:
        self._creator = _policy(backend).creatorForNetloc(host.encode("ascii"), port)
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


@implementer(IPolicyForHTTPS)
class _Unverified:
    """TLS without a look at the certificate (`verify_ssl = false`)."""

    def __init__(self) -> None:
        self._options = CertificateOptions()  # which verify nothing

    def creatorForNetloc(self, hostname: bytes, port: int) -> IOpenSSLClientConnectionCreator:
        """See `IPolicyForHTTPS.creatorForNetloc`."""
        return _UnverifiedCreator(self._options, hostname)


@implementer(IOpenSSLClientConnectionCreator)
class _UnverifiedCreator:
    def __init__(self, options: CertificateOptions, hostname: bytes) -> None:
        self._options = options
        self._hostname = hostname

    def clientConnectionForTLS(self, tlsProtocol: object) -> SSL.Connection:
        """See `IOpenSSLClientConnectionCreator.clientConnectionForTLS`."""
        connection = SSL.Connection(self._options.getContext(), None)
        name = self._hostname.decode("ascii")
        if not (isIPAddress(name) or isIPv6Address(name)):  # RFC 6066 section 3
            connection.set_tlsext_host_name(self._hostname)
        return connection


def _policy(backend: Backend) -> IPolicyForHTTPS:
    if not backend.verify_ssl:
        return _Unverified()
    if backend.ca_file is None:
        return BrowserLikePolicyForHTTPS()
    return BrowserLikePolicyForHTTPS(trustRootFromCertificates(_authorities(backend)))


def _authorities(backend: Backend) -> list[Certificate]:
    path = backend.ca_file
    assert path is not None
    try:
        found = [Certificate.loadPEM(pem) for pem in _PEM.findall(path.read_bytes())]
    except (OSError, crypto.Error) as error:
        raise ConfigError(f'backend "{backend.name}": can\'t use "{path}": {error}') from None
    if not found:
        raise ConfigError(f'backend "{backend.name}": there is no certificate in "{path}"')
    return found
