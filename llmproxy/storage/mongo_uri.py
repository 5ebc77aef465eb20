"""What a MongoDB connection string asks for.

Forms: https://www.mongodb.com/docs/manual/reference/connection-string/ (2025). An option that we
would ignore and that changes what is read, written or trusted is refused; options which only tune
a driver are ignored.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

from pymongo.errors import PyMongoError
from pymongo.uri_parser import parse_uri
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.names import dns
from twisted.names.client import Resolver as NamesResolver
from twisted.names.error import DNSNameError, DomainError, ResolverError

from llmproxy.errors import ConfigError, StorageError
from llmproxy.storage.scram import SHA_1, SHA_256

KEY = "db.uri"
X509 = "MONGODB-X509"
MECHANISMS = ("DEFAULT", SHA_1, SHA_256, X509)

#: A host and its port; the port is None for the path of a Unix socket.
Host = tuple[str, int | None]

_SCHEME = "mongodb://"
_SRV_SCHEME = "mongodb+srv://"
_SRV_OPTIONS = frozenset({"srvservicename", "srvmaxhosts"})

_HONOURED = _SRV_OPTIONS | {
    "appname",
    "authmechanism",
    "authsource",
    "directconnection",
    "readconcernlevel",
    "replicaset",
    "ssl",
    "tls",
    "tlsallowinvalidcertificates",
    "tlsallowinvalidhostnames",
    "tlscafile",
    "tlscertificatekeyfile",
    "tlscertificatekeyfilepassword",
    "tlsinsecure",
}
# Accepted with the value that we have anyway.
_FIXED: Mapping[str, tuple[str, ...]] = {
    "authmechanismproperties": (),
    "journal": ("true",),
    "loadbalanced": ("false",),
    "readpreference": ("primary",),
    "w": ("majority",),
}
_IGNORED = frozenset(
    {
        "compressors",
        "connecttimeoutms",
        "heartbeatfrequencyms",
        "localthresholdms",
        "maxconnecting",
        "maxidletimems",
        "maxpoolsize",
        "minpoolsize",
        "retryreads",
        "retrywrites",
        "servermonitoringmode",
        "serverselectiontimeoutms",
        "sockettimeoutms",
        "timeoutms",
        "tlsdisablecertificaterevocationcheck",
        "tlsdisableocspendpointcheck",
        "uuidrepresentation",
        "waitqueuetimeoutms",
        "wtimeout",
        "wtimeoutms",
        "zlibcompressionlevel",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Who we are to the server. `mechanism` is one of `MECHANISMS`; `source` is a database."""

    mechanism: str
    source: str
    username: str | None
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TLSSettings:
    """Files in PEM form, and what of the server's certificate is checked."""

    ca_file: str | None = None
    key_file: str | None = None
    key_password: str | None = field(default=None, repr=False)
    check_certificate: bool = True
    check_hostname: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MongoAddress:
    """A connection string, understood. `srv_name` is set as long as hosts are to be resolved."""

    hosts: tuple[Host, ...]
    srv_name: str | None = None
    srv_service: str = "mongodb"
    srv_max_hosts: int = 0
    replica_set: str | None = None
    direct: bool = False
    credentials: Credentials | None = None
    tls: TLSSettings | None = None
    app_name: str = "llmproxy"
    read_concern: str | None = None
    given: frozenset[str] = frozenset()


class Resolver(Protocol):
    """What is used of twisted.names' resolvers."""

    def lookupService(self, name: str, timeout: Sequence[int] = ...) -> Deferred[Any]:
        """SRV records."""

    def lookupText(self, name: str, timeout: Sequence[int] = ...) -> Deferred[Any]:
        """TXT records."""


def parse(uri: str) -> MongoAddress:
    """Understand a connection string.

    Raises `ConfigError`. Its text repeats nothing of the string but option names, since a
    password that is not escaped can end up in any part of it.
    """
    if _misplaced_at(uri):
        raise _malformed()
    if uri.startswith(_SRV_SCHEME):
        return _parse_srv(uri)
    if not uri.startswith(_SCHEME):
        raise ConfigError(f"{KEY}: expected {_SCHEME} or {_SRV_SCHEME}")
    given = _option_names(uri)
    if srv := _SRV_OPTIONS & given.keys():
        raise ConfigError(f"{KEY}: option {given[min(srv)]} goes with {_SRV_SCHEME} only")
    return _address(_parsed(uri), frozenset(given))


def _parse_srv(uri: str) -> MongoAddress:
    given = _option_names(uri)
    rest, _, query = uri.removeprefix(_SRV_SCHEME).partition("?")
    pairs = [pair for pair in query.split("&") if pair]
    srv = dict(parse_qsl("&".join(p for p in pairs if _name(p) in _SRV_OPTIONS)))
    plain = "&".join(p for p in pairs if _name(p) not in _SRV_OPTIONS)
    parsed = _parsed(_SCHEME + rest + (f"?{plain}" if plain else ""))
    address = _address(parsed, frozenset(given))
    netloc = rest.partition("/")[0].rpartition("@")[2]
    ((name, _),) = address.hosts if len(address.hosts) == 1 else (("", None),)
    if not name or ":" in netloc or "." not in name or address.direct:
        raise ConfigError(f"{KEY}: {_SRV_SCHEME} takes one host name, without a port")
    options = {key.lower(): value for key, value in srv.items()}
    return replace(
        address,
        hosts=(),
        srv_name=name,
        srv_service=options.get("srvservicename", "mongodb"),
        srv_max_hosts=_number("srvMaxHosts", options.get("srvmaxhosts", "0")),
        tls=address.tls if {"tls", "ssl"} & given.keys() else _tls(parsed["options"]),
    )


def system_resolver(reactor: IReactorTime, path: str = "/etc/resolv.conf") -> Resolver:
    """The name servers of resolv.conf(5), asked without blocking; IPv4 only, as twisted.names."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        lines = []
    words = [line.split() for line in lines]
    names = [word[1] for word in words if len(word) > 1 and word[0] == "nameserver"]
    servers = [(name, dns.PORT) for name in names if ":" not in name] or [("127.0.0.1", dns.PORT)]
    # Given a file, the library's resolver would look at it again for ever.
    resolver: Resolver = NamesResolver(servers=servers, timeout=(1, 2), reactor=reactor)
    return resolver


async def resolve(address: MongoAddress, resolver: Resolver) -> MongoAddress:
    """Replace an SRV name by the hosts and options that DNS has for it; others stay as they are.

    Rules: MongoDB's "Initial DNS Seedlist Discovery". Raises `StorageError` where DNS does not
    answer, `ConfigError` where its answer must not be used.
    """
    name = address.srv_name
    if name is None:
        return address
    hosts = _srv_hosts(name, await _records(resolver, address))
    if address.srv_max_hosts:
        hosts = random.sample(hosts, min(len(hosts), address.srv_max_hosts))
    options = _txt_options(await _texts(resolver, name))
    credentials = address.credentials
    if credentials is not None and "authsource" in options and "authsource" not in address.given:
        credentials = replace(credentials, source=options["authsource"])
    return replace(
        address,
        srv_name=None,
        hosts=tuple(hosts),
        credentials=credentials,
        replica_set=address.replica_set or options.get("replicaset"),
    )


def _misplaced_at(uri: str) -> bool:
    """Whether an '@' is not the end of user and password: then no part is what it seems to be."""
    authority = re.split("[/?]", uri.partition("://")[2], maxsplit=1)
    return authority[0].count("@") > 1 or "@" in "".join(authority[1:])


def _malformed() -> ConfigError:
    return ConfigError(
        f"{KEY}: not a valid MongoDB connection string (in user and password, write"
        " ':', '/', '?', '#', '[', ']', '@' and '%' as percent escapes)"
    )


def _name(pair: str) -> str:
    return pair.partition("=")[0].lower()


def _option_names(uri: str) -> dict[str, str]:
    """The options' names, lower case, and as they are written; raises for what can't be done."""
    query = uri.partition("?")[2].replace(";", "&")
    names = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        key = name.lower()
        names[key] = name
        if key in _FIXED and value.lower() not in _FIXED[key]:
            allowed = " or ".join(_FIXED[key]) or "nothing"
            raise ConfigError(f"{KEY}: option {name} can only be {allowed}")
        if key not in _HONOURED and key not in _IGNORED and key not in _FIXED:
            raise ConfigError(f"{KEY}: option {name} is not supported")
    return names


def _parsed(uri: str) -> dict[str, Any]:
    """pymongo's reading of the string, with option names in lower case."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            parsed = parse_uri(uri, validate=True, warn=False)
    except OSError as error:
        raise ConfigError(f"{KEY}: {error.filename}: {error.strerror}") from None
    except (PyMongoError, ValueError, TypeError, UserWarning):
        raise _malformed() from None
    options = {key.lower(): value for key, value in parsed["options"].items()}
    return {**parsed, "options": options}


def _address(parsed: Mapping[str, Any], given: frozenset[str]) -> MongoAddress:
    options = parsed["options"]
    tls = options.get("tls", options.get("ssl"))
    implied = any(name.startswith("tls") for name in given - {"tls"}) and tls is not False
    return MongoAddress(
        hosts=tuple(parsed["nodelist"]),
        replica_set=options.get("replicaset"),
        direct=bool(options.get("directconnection", False)),
        credentials=_credentials(parsed),
        tls=_tls(options) if tls or implied else None,
        app_name=options.get("appname") or "llmproxy",
        read_concern=options.get("readconcernlevel"),
        given=given,
    )


def _credentials(parsed: Mapping[str, Any]) -> Credentials | None:
    options = parsed["options"]
    mechanism = options.get("authmechanism", "DEFAULT")
    username, password = parsed["username"], parsed["password"]
    if mechanism not in MECHANISMS:
        raise ConfigError(f"{KEY}: authMechanism can only be {', '.join(MECHANISMS[1:])}")
    if mechanism == X509:
        if not options.get("tlscertificatekeyfile"):
            raise ConfigError(f"{KEY}: authMechanism {X509} needs tlsCertificateKeyFile")
        return Credentials(mechanism=X509, source="$external", username=username)
    if username is None:
        if mechanism != "DEFAULT" or "authsource" in options:
            raise ConfigError(f"{KEY}: authMechanism and authSource need a user and a password")
        return None
    if not password:
        raise ConfigError(f"{KEY}: the user has no password")
    source = options.get("authsource") or parsed["database"] or "admin"
    return Credentials(mechanism=mechanism, source=source, username=username, password=password)


def _tls(options: Mapping[str, Any]) -> TLSSettings:
    insecure = bool(options.get("tlsinsecure", False))
    trusting = insecure or bool(options.get("tlsallowinvalidcertificates", False))
    any_name = trusting or bool(options.get("tlsallowinvalidhostnames", False))
    return TLSSettings(
        ca_file=options.get("tlscafile"),
        key_file=options.get("tlscertificatekeyfile"),
        key_password=options.get("tlscertificatekeyfilepassword"),
        check_certificate=not trusting,
        check_hostname=not any_name,
    )


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{KEY}: option {name}: expected a number of hosts")
    return int(text)


async def _records(resolver: Resolver, address: MongoAddress) -> Iterable[Any]:
    query = f"_{address.srv_service}._tcp.{address.srv_name}"
    try:
        answers, _, _ = await resolver.lookupService(query)
    except (DomainError, ResolverError, OSError) as error:
        raise StorageError(f"{query}: no SRV records ({type(error).__name__})") from error
    return [record.payload for record in answers if record.type == dns.SRV]


def _srv_hosts(name: str, records: Iterable[Any]) -> list[Host]:
    hosts: list[Host] = []
    labels = name.split(".")
    parent = "." + (name if len(labels) < 3 else ".".join(labels[1:]))
    for record in records:
        target = record.target.name.decode("ascii").rstrip(".").lower()
        # Whoever can forge DNS answers shall not send us, and our password, somewhere else.
        if not target.endswith(parent.lower()):
            raise ConfigError(f"{KEY}: the SRV record names {target}, which is not in {parent[1:]}")
        hosts.append((target, record.port))
    if not hosts:
        raise StorageError(f"{name}: no SRV records")
    return hosts


async def _texts(resolver: Resolver, name: str) -> list[str]:
    try:
        answers, _, _ = await resolver.lookupText(name)
    except DNSNameError:
        return []
    except (DomainError, ResolverError, OSError) as error:
        raise StorageError(f"{name}: no TXT records ({type(error).__name__})") from error
    records = [record.payload for record in answers if record.type == dns.TXT]
    return [b"".join(record.data).decode("utf-8", "replace") for record in records]


def _txt_options(texts: Sequence[str]) -> dict[str, str]:
    if len(texts) > 1:
        raise ConfigError(f"{KEY}: the SRV name has more than one TXT record")
    options = {key.lower(): value for text in texts for key, value in parse_qsl(text)}
    if options.keys() - {"authsource", "replicaset", "loadbalanced"}:
        raise ConfigError(f"{KEY}: the SRV name's TXT record has options that it must not have")
    if options.get("loadbalanced", "false") != "false":
        raise ConfigError(f"{KEY}: option loadBalanced is not supported")
    return options
