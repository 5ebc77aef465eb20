"""The backend's side: one request, one answer, through treq.

This is the one place where Twisted's failures become ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, Protocol, cast

from hyperlink import EncodedURL
from OpenSSL import SSL
from service_identity import VerificationError
from treq.client import HTTPClient
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import (
    HostnameEndpoint,
    TCP4ClientEndpoint,
    TCP6ClientEndpoint,
    wrapClientTLS,
)
from twisted.internet.error import (
    ConnectError,
    ConnectingCancelledError,
    DNSLookupError,
    UserError,
)
from twisted.internet.error import TimeoutError as TwistedTimeoutError
from twisted.internet.interfaces import (
    IStreamClientEndpoint,
)
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent

from llmproxy import tls
from llmproxy.agent import BackendAgent, Response
from llmproxy.config import Backend
from llmproxy.errors import BackendError, BackendTimeout, ProxyError
from llmproxy.upload import ClientGone

#: Alerts about a certificate (RFC 8446 section 6.2), as OpenSSL names them.
_REFUSED = re.compile(
    "alert (certificate required|bad certificate|unsupported certificate|unknown ca"
    "|certificate (revoked|expired|unknown))"
)


class NotSent(BackendError):
    """No connection could be made: the backend has seen nothing of the request."""


class RequestBody(Protocol):
    """An `IBodyProducer` that says when it is sent: then the wait for the answer begins."""

    on_sent: Callable[[], None]

    def stopProducing(self) -> None:
        """Send no more."""


def drop(response: Any) -> None:
    """Close the connection of an answer whose body nobody wants."""
    response.deliverBody(_Dropped())


class _Dropped:
    def makeConnection(self, transport: Any) -> None:
        transport.stopProducing()

    def dataReceived(self, data: bytes) -> None:
        """Bytes can still come after stopProducing."""

    def connectionLost(self, reason: object) -> None:
        """As it was meant."""


class Client(HTTPClient):
    """treq's client on the shortest way to its agent.

    Its own way looks at the URL, makes a cookie jar, and wraps the agent and the answer for
    redirects, codings and buffering, none of which is wanted here.
    """

    def request(  # type: ignore[override]  # of treq's options only those that are used
        self, method: str, url: bytes, *, headers: Headers, data: Any
    ) -> Any:
        """See `treq.client.HTTPClient.request`; `url` as it is to be sent."""
        return self._agent.request(method.encode("ascii"), url, headers, data)


class Upstream:
    """The connections to one backend."""

    def __init__(
        self, backend: Backend, agent: IAgent, close: Callable[[], object] = lambda: None
    ) -> None:
        self.agent = agent
        self._client = Client(agent)
        self._base = EncodedURL.from_text(backend.url)
        self._urls: dict[str, bytes] = {}
        self.close = close

    def send(self, path: str, headers: Headers, body: RequestBody) -> Deferred[Response]:
        """POST `body` to `path`; fires with the answer's header, its body still to come.

        Fails with NotSent, BackendTimeout, BackendError. Cancel it to close the connection.
        """
        url = self._urls.get(path) or self._url(path)
        sent: Deferred[Response] = self._client.request("POST", url, headers=headers, data=body)
        return sent

    def _url(self, path: str) -> bytes:
        url = self._base.child(*path.strip("/").split("/")).to_text().encode("ascii")
        self._urls[path] = url
        return url


def translate(error: Exception) -> Exception:
    """A failure of the transport as the client may know it; ours and the client's own stay."""
    for failure in getattr(error, "reasons", ()):
        if isinstance(failure.value, (ProxyError, ClientGone)):
            return cast(Exception, failure.value)
    if isinstance(error, (ProxyError, ClientGone)):
        return error
    if any(_is_untrusted(failure.value) for failure in getattr(error, "reasons", ())):
        return NotSent("The model's server can't be trusted.")
    if any(_distrusts_us(failure.value) for failure in getattr(error, "reasons", ())):
        return NotSent("The model's server refused us.")
    if isinstance(error, (ConnectError, DNSLookupError, ConnectingCancelledError, UserError)):
        return NotSent("The model's server can't be reached.")
    if isinstance(error, (TwistedTimeoutError, CancelledError)):
        return BackendTimeout("The model's server did not answer in time.")
    return BackendError("The model's server broke the connection.")


def _is_untrusted(reason: object) -> bool:
    """A certificate was refused: the connection ended before the request could be sent on it."""
    if isinstance(reason, SSL.Error):
        return "certificate verify failed" in str(reason)
    return isinstance(reason, VerificationError)


def _distrusts_us(reason: object) -> bool:
    """Our certificate was refused. In TLS 1.3 the request may be on its way by then, but a server
    that ends a handshake so has not read it (RFC 8446 section 4.4.2.4)."""
    return isinstance(reason, SSL.Error) and _REFUSED.search(str(reason)) is not None


def connect(backend: Backend, reactor: Any, timeout_connect: float) -> Upstream:
    """The real connections to `backend`. Raises ConfigError when its certificates can't be used."""
    url = EncodedURL.from_text(backend.url)
    origin = url.replace(path=()).to_text().encode("ascii")
    endpoint = _endpoint(url, reactor, timeout_connect)
    if url.scheme == "https":
        sessions = tls.Sessions(backend, url.host)
        agent = BackendAgent(
            origin, wrapClientTLS(sessions, endpoint), reactor, served=sessions.remember
        )
    else:
        agent = BackendAgent(origin, endpoint, reactor)
    return Upstream(backend, agent, close=agent.close)


def _endpoint(url: EncodedURL, reactor: Any, timeout_s: float) -> IStreamClientEndpoint:
    port = url.port or 0  # never: http and https have their own
    # A name is looked up in a thread; an address need not wait for one.
    of = {4: TCP4ClientEndpoint, 6: TCP6ClientEndpoint}.get(_version(url.host), _NamedEndpoint)
    endpoint: IStreamClientEndpoint = of(reactor, url.host, port, timeout=timeout_s)
    return endpoint


class _NamedEndpoint(HostnameEndpoint):
    """Its timeout is for looking the name up too, and for all of its addresses together."""

    def __init__(self, reactor: Any, host: str, port: int, timeout: float) -> None:
        super().__init__(reactor, host, port, timeout=timeout)
        self._clock, self._timeout_s = reactor, timeout

    def connect(self, protocolFactory: Any) -> Deferred[Any]:
        """See `IStreamClientEndpoint.connect`."""
        connecting: Deferred[Any] = super().connect(protocolFactory)
        return connecting.addTimeout(self._timeout_s, self._clock)


def _version(host: str) -> int:
    """4 or 6 for an address, 0 for a name."""
    try:
        return ip_address(host).version
    except ValueError:
        return 0
