"""TLS towards clients: the certificates in force, what is spoken, how long a handshake may take.

    an `ssl:` endpoint   -->  a `tcp:` endpoint, with TLS of ours over it
    SIGHUP               -->  its files are read again; new connections get what is in them

With workers the supervisor reads the files, and hands over what was in them: a worker that is
started again has the certificate that is in force, whatever the files are by then.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast

from OpenSSL import SSL
from twisted.internet import endpoints
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator, IProtocolFactory
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.tls import BufferingTLSTransport, TLSMemoryBIOFactory
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy.certificates import Identity, read_identity
from llmproxy.errors import ConfigError
from llmproxy.tls import SUITES

#: How long a client may take from its connection to the end of the handshake.
HANDSHAKE_S = 10.0
#: How long before its end a certificate is warned of.
WARNING_TIME = timedelta(days=14)
#: What keys are exchanged on. OpenSSL's own list has finite fields too: see `tls.SUITES`.
GROUPS = b"X25519MLKEM768:X25519:prime256v1:secp384r1"
#: What is spoken inside (RFC 7301).
PROTOCOLS = (b"http/1.1", b"http/1.0")

log = Logger()


class Pem(NamedTuple):
    """What is in the files of an endpoint."""

    chain: str
    key: str


@dataclass(frozen=True, slots=True)
class Files:
    """The files that an endpoint names: certificates, the server's own first; its key."""

    certificates: tuple[Path, ...]
    key: Path

    def read(self) -> Pem:
        """What is in them. Raises ConfigError."""
        return Pem("\n".join(map(_read, self.certificates)), _read(self.key))

    def __str__(self) -> str:
        return str(self.certificates[0])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f'can\'t read "{path}": {error.strerror or error}') from None
    except UnicodeDecodeError:
        raise ConfigError(f'"{path}" is not PEM') from None


def without_tls(text: str) -> tuple[str, Files | None]:
    """An endpoint's text as it is without TLS, and the files that it names for that; None: there
    is no TLS in it. Raises ConfigError.

    `sslmethod` and `dhParameters` are read over: what is spoken is not for an endpoint to say.
    """
    found = re.search(r"(?:^|(?<=:))ssl:.*", text)
    if found is None:
        return text, None
    twisted = cast(Any, endpoints)
    try:
        positional, named = twisted._parse(found[0])
        given = inspect.signature(twisted._parseSSL).bind(None, *positional[1:], **named)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"can't listen on {text}: {error}") from None
    given.apply_defaults()
    of = given.arguments
    chain = [of["certKey"] or of["privateKey"], of["extraCertChain"]]
    interface = endpoints.quoteStringArgument(of["interface"])
    plain = f"tcp:{of['port']}:interface={interface}:backlog={of['backlog']}"
    return (
        text[: found.start()] + plain,
        Files(tuple(Path(each) for each in chain if each), Path(of["privateKey"])),
    )


@dataclass(frozen=True, slots=True)
class Loaded:
    """A certificate that can be used, in the context that uses it."""

    pem: Pem = field(repr=False)
    identity: Identity
    context: SSL.Context

    @classmethod
    def of(cls, pem: Pem) -> Loaded:
        """Raises ValueError when it can't be used."""
        identity = read_identity(*pem)
        try:
            return cls(pem, identity, _context(identity))
        except SSL.Error as error:  # a key that is too short, and the like
            reason = error.args[0][-1][-1] if error.args and error.args[0] else error
            raise ValueError(f"it can't be used: {reason}") from None


def _context(identity: Identity) -> SSL.Context:
    """TLS 1.2 and 1.3 with the suites of Mozilla's "intermediate" (version 5.7), in our order. No
    renegotiation and no compression. No sessions either: the key of their tickets would open all
    connections that were resumed by them."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_options(
        SSL.OP_CIPHER_SERVER_PREFERENCE
        | SSL.OP_NO_COMPRESSION
        | SSL.OP_NO_RENEGOTIATION
        | SSL.OP_NO_TICKET
    )
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    context.set_cipher_list(SUITES.encode())
    lib, of = cast(Any, SSL)._lib, cast(Any, context)._context  # pyOpenSSL has no name for it
    if lib.SSL_CTX_set1_curves_list(of, GROUPS) != 1:
        # An OpenSSL before 3.5 does not know the first one.
        lib.SSL_CTX_set1_curves_list(of, GROUPS.partition(b":")[2])
    context.set_alpn_select_callback(_protocol)
    own, *issuers = identity.chain
    context.use_certificate(own)
    context.use_privatekey(identity.key)
    for issuer in issuers:
        context.add_extra_chain_cert(issuer)
    return context


def _protocol(connection: SSL.Connection, offered: list[bytes]) -> bytes:
    for each in PROTOCOLS:
        if each in offered:
            return each
    # Of this kind, so that Twisted takes it for the failed handshake that it is.
    raise SSL.Error([("SSL routines", "", "no application protocol")])


@implementer(IOpenSSLServerConnectionCreator)
class Certificate:
    """The certificate of one endpoint. Connections keep the one with which they began."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded

    def serverConnectionForTLS(self, tlsProtocol: object) -> SSL.Connection:
        """See `IOpenSSLServerConnectionCreator.serverConnectionForTLS`."""
        return SSL.Connection(self.loaded.context, None)

    def over(self, factory: Any, reactor: Any) -> IProtocolFactory:
        """`factory` behind TLS with it."""
        return cast(IProtocolFactory, _Factory(self, False, factory, reactor))


class _Transport(BufferingTLSTransport):
    """A connection that is cut off when its handshake takes too long, however it drips."""

    _deadline: Any = None

    def makeConnection(self, transport: Any) -> None:
        """A client came."""
        clock = cast(Any, self.factory)._clock
        self._deadline = clock.callLater(HANDSHAKE_S, self._too_late)
        super().makeConnection(transport)

    def _too_late(self) -> None:
        self._deadline = None
        if not self._handshakeDone:
            self.abortConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """It went."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        super().connectionLost(reason)


class _Factory(TLSMemoryBIOFactory):
    protocol = _Transport


class Certificates:
    """The certificates of the endpoints that this process has opened, and their files.

    `show` is told the path of each and its end as Unix time, at start and at each reload.
    """

    def __init__(self, show: Callable[[str, float], None]) -> None:
        self._show = show
        self._all: list[tuple[Files, Certificate]] = []

    def load(self, files: Files) -> Certificate:
        """The certificate in `files`, from now on looked after. Raises ConfigError."""
        certificate = Certificate(_checked(files, files.read()))
        self._all.append((files, certificate))
        self._tell_end(files, certificate.loaded.identity)
        return certificate

    def read_again(self) -> list[Loaded]:
        """What is in all files now, for `put_in_force`. Raises ConfigError."""
        return [_again(files, certificate.loaded) for files, certificate in self._all]

    def put_in_force(self, found: Sequence[Loaded]) -> None:
        """Use these for connections from now on."""
        for (files, certificate), loaded in zip(self._all, found, strict=True):
            if loaded is not certificate.loaded:
                certificate.loaded = loaded
                log.info(
                    'certificate "{file}": renewed, until {end}',
                    file=str(files),
                    end=_text(loaded.identity.ends),
                )
            self._tell_end(files, loaded.identity)

    def _tell_end(self, files: Files, identity: Identity) -> None:
        self._show(str(files), identity.ends.timestamp())
        left = identity.ends - datetime.now(UTC)
        if left < WARNING_TIME:
            log.warn(
                'certificate "{file}": {days} days left, until {end}',
                file=str(files),
                days=max(left.days, 0),
                end=_text(identity.ends),
            )


def _again(files: Files, before: Loaded) -> Loaded:
    pem = files.read()
    # One that has not changed is not refused, whatever its date: that would change nothing for
    # clients, and hold up what else a reload is for.
    return before if pem == before.pem else _checked(files, pem)


def _checked(files: Files, pem: Pem) -> Loaded:
    try:
        loaded = Loaded.of(pem)
    except ValueError as error:
        raise ConfigError(f'certificate "{files}" with key "{files.key}": {error}') from None
    now, identity = datetime.now(UTC), loaded.identity
    if now > identity.ends:
        raise ConfigError(f'certificate "{files}": it ended at {_text(identity.ends)}')
    if now < identity.begins:
        raise ConfigError(f'certificate "{files}": it begins at {_text(identity.begins)}')
    return loaded


def _text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
