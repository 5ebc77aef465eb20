"""The configuration: a TOML file, read into frozen values.

`parse` turns a mapping into a `Config` and reports everything that is wrong with it at once;
`load` does the same for a file. Relative paths are taken from the folder of the file, so that
the proxy and `llmproxyctl` mean the same database wherever they are started from.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Annotated
from urllib.parse import urlsplit

from llmproxy.certificates import read_certificates, read_identity, read_key
from llmproxy.errors import ConfigError
from llmproxy.expiry import UNREADABLE, expiry_time
from llmproxy.model import MAX_BUDGET, MAX_COUNT

DEFAULT_PATH = "config.toml"
PATH_VARIABLE = "LLMPROXY_CONFIG"
DB_URI_VARIABLE = "LLMPROXY_DB_URI"

T = typing.TypeVar("T")
#: A key's path.
Where = tuple[str, ...]

#: 23 days. The reactor's epoll counts milliseconds in 32 bits.
MAX_SECONDS = 2_000_000
#: How one of several servers is chosen: see `balancing.py`.
POLICIES = ("least_in_flight", "round_robin", "weighted", "prefix")
MIB = 2**20
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Rule:
    """What a setting may be. `read` returns the setting's value, or raises ValueError.

    What is `secret`, or long, may stand in a file named by `SETTING_file`. What is `hidden` may
    hold a secret and is never shown in an error.
    """

    expected: str
    read: Callable[[object], object]
    secret: bool = False
    hidden: bool = False


def _typed(value: object, *types: type) -> typing.Any:
    # A bool is an int to isinstance, and `port = true` is a mistake.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ValueError
    return value


def _require(condition: object) -> None:
    if not condition:
        raise ValueError


def _whole(low: int, high: int) -> Rule:
    def read(value: object) -> int:
        number: int = _typed(value, int)
        _require(low <= number <= high)
        return number

    return Rule(f"a whole number, {low} to {high}", read)


def _seconds(*, zero: bool) -> Rule:
    def read(value: object) -> float:
        number = _typed(value, int, float)
        _require((0 if zero else math.ulp(0.0)) <= number <= MAX_SECONDS)
        return float(number)

    return Rule(f"a number {'>=' if zero else '>'} 0, at most {MAX_SECONDS}", read)


def _one_of(*words: str, fold: Callable[[str], str] = str) -> Rule:
    def read(value: object) -> str:
        word = fold(_typed(value, str))
        _require(word in words)
        return word

    listed = ", ".join(f'"{word}"' for word in words)
    return Rule(f"one of {listed}", read)


def _is_label(text: str) -> bool:
    return bool(text) and text.isprintable() and text.strip() == text


def _read_labels(value: object) -> tuple[str, ...]:
    listed = _typed(value, list)
    _require(all(isinstance(text, str) and _is_label(text) for text in listed))
    return tuple(listed)


def _matching(expected: str, accepts: Callable[[str], object], *, secret: bool = False) -> Rule:
    def read(value: object) -> str:
        text: str = _typed(value, str)
        _require(accepts(text))
        return text

    return Rule(expected, read, secret, hidden=secret)


def _pem(expected: str, check: Callable[[str], object]) -> Rule:
    def read(value: object) -> str:
        text: str = _typed(value, str)
        check(text)
        return text

    return Rule(expected, read, secret=True, hidden=True)


def _read_path(value: object) -> Path:
    text: str = _typed(value, str)
    _require(text and text.isprintable())
    return Path(text)


def _read_endpoints(value: object) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else _typed(value, list)
    for text in listed:
        _require(re.fullmatch(r"[A-Za-z][\w.-]*:\S.*", _typed(text, str)))
    return tuple(listed)


# Without underscores: Twisted looks no such name up.
_HOST_NAME = re.compile(r"(?:(?!-)[a-z0-9-]{1,63}(?<!-)(?:\.|$))+")


def _read_url(value: object) -> str:
    text: str = _typed(value, str)
    _require(text.isprintable() and text.isascii() and " " not in text)
    parts = urlsplit(text)
    _require(parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
    _require("@" not in parts.netloc and "?" not in text and "#" not in text)
    _require("[" in parts.netloc or _HOST_NAME.fullmatch(parts.hostname or ""))
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}"


def _read_urls(value: object) -> tuple[str, ...]:
    found = tuple(_read_url(each) for each in _typed(value, list))
    _require(found and len(set(found)) == len(found))
    return found


def _read_moment(value: object) -> datetime:
    if isinstance(value, datetime):
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
    moment = expiry_time(_typed(value, str))
    _require(moment is not None and moment != UNREADABLE)
    return typing.cast(datetime, moment)


def _is_database(text: str) -> bool:
    scheme, _, rest = text.partition("://")
    if scheme == "sqlite":
        return rest.isprintable() and rest not in ("", "/", ":memory:", "/:memory:")
    return scheme in ("mongodb", "mongodb+srv") and rest.rpartition("@")[2][:1] not in ("", "/")


BOOLEAN = Rule("true or false", lambda value: _typed(value, bool))
PATH = Rule("a path", _read_path)
TIMEOUT = _seconds(zero=False)
INTERVAL = _seconds(zero=True)
SIZE = _whole(1, MAX_COUNT)
LIMIT = _whole(0, 1_000_000)
TOKENS = _whole(0, 1_000_000_000)
BUDGET = _whole(0, MAX_BUDGET)
LEVEL = _one_of("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG", fold=str.upper)
HOST = _matching("an address or a host's name", lambda text: re.fullmatch(r"[^\s/]+", text))
LABEL = _matching("a text without control characters or outer spaces", _is_label)
LABELS = Rule("a list of texts without control characters or outer spaces", _read_labels)
DEVICE = _matching(
    'a text without "/", control characters or outer spaces',
    lambda text: _is_label(text) and "/" not in text,
)
ORIGIN = _matching(
    '"*" or an origin like "https://example.org"',
    lambda text: re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[!-.0-~]+", text),
)
TOKEN = _matching(
    "a text of visible ASCII characters",
    lambda text: re.fullmatch(r"[!-~]+", text),
    secret=True,
)
CURRENCY = _matching(
    'a currency\'s code like "EUR" (ISO 4217)', lambda text: re.fullmatch(r"[A-Z]{3}", text)
)
MOMENT = Rule("a time like 2026-01-01T00:00:00Z", _read_moment)
AMOUNT = _whole(0, 10**15)
CERTIFICATES = _pem("certificates in PEM", read_certificates)
PRIVATE_KEY = _pem("a private key in PEM, without a password", read_key)
ENDPOINTS = Rule('Twisted endpoint strings like ["tcp:8080"]', _read_endpoints)
URL = Rule(
    'a URL like "http://host:8000", without credentials, query or fragment',
    _read_url,
    hidden=True,
)
URLS = Rule("a list of URLs like those of url, each once", _read_urls, hidden=True)
DATABASE = _matching(
    "sqlite://PATH (a file), mongodb://... or mongodb+srv://...", _is_database, secret=True
)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Database:
    """Where keys and bills are kept. `uri` may hold a password: show `safe_uri`."""

    uri: Annotated[str, DATABASE] = "sqlite://db.sqlite"

    def __repr__(self) -> str:
        return f"Database(uri={self.safe_uri!r})"

    @property
    def safe_uri(self) -> str:
        """`uri` with its passwords and tokens replaced by `***`."""
        scheme, _, rest = self.uri.partition("://")
        if self.sqlite_path is None:
            # Up to the last "@": an unescaped one in a password must not cut it short.
            rest = re.sub(r"^([^:@]*):.*@", r"\1:***@", rest)
            rest = re.sub(r"(?i)((?:password|token):?=?)[^&,]*", r"\1***", rest)
        return f"{scheme}://{rest}"

    @property
    def sqlite_path(self) -> Path | None:
        """The database's file; None with MongoDB."""
        scheme, _, rest = self.uri.partition("://")
        return Path(rest) if scheme == "sqlite" else None

    @property
    def is_mongodb(self) -> bool:
        """Whether keys and bills are in MongoDB, and the ledger in a local journal."""
        return self.sqlite_path is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Admin:
    """The site for operators: metrics and health. Without `listen` there is none."""

    listen: Annotated[tuple[str, ...], ENDPOINTS] = ("tcp:8081:interface=127.0.0.1",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Prometheus metrics on the admin site."""

    enabled: Annotated[bool, BOOLEAN] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerConfig:
    """The local journal, used with MongoDB only."""

    path: Annotated[Path, PATH] = Path("ledger.sqlite")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """What each key may ask for; 0: as much as it likes.

    The others are budgets, in tokens or in micro-units (1e-6) of the currency, of days and months
    in UTC or for ever. None: there is none; 0: nothing.
    """

    requests_per_minute: Annotated[int, LIMIT] = 0
    concurrent_requests: Annotated[int, LIMIT] = 0
    tokens_per_minute: Annotated[int, TOKENS] = 0
    tokens_per_day: Annotated[int | None, BUDGET] = None
    tokens_per_month: Annotated[int | None, BUDGET] = None
    tokens_total: Annotated[int | None, BUDGET] = None
    cost_per_day: Annotated[int | None, BUDGET] = None
    cost_per_month: Annotated[int | None, BUDGET] = None
    cost_total: Annotated[int | None, BUDGET] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One of several servers of a model. `token` and `model` are the backend's where they are None;
    `weight` is its share."""

    url: Annotated[str, URL]
    token: Annotated[str | None, TOKEN] = field(default=None, repr=False)
    model: Annotated[str | None, LABEL] = None
    weight: Annotated[int, _whole(1, 1000)] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A model, and the LLM servers that have it. `name` is the model's name as clients and bills
    have it.

    The servers are one `url`, several `urls`, or `replicas`: see `servers_of`. `url` has no
    trailing slash and no `/v1`. `model` is the server's own name for the model,
    where it has another one. `timeout` and `drain_timeout` are in seconds. `ca`, `client_cert` and
    `client_key` are PEM: what was in their files when they were read.
    """

    name: str
    url: Annotated[str, URL] = ""
    urls: Annotated[tuple[str, ...], URLS] = ()
    replicas: tuple[Replica, ...] = ()
    token: Annotated[str | None, TOKEN] = field(default=None, repr=False)
    device: Annotated[str, DEVICE]
    model: Annotated[str | None, LABEL] = None
    aliases: Annotated[tuple[str, ...], LABELS] = ()
    verify_ssl: Annotated[bool, BOOLEAN] = True
    ca: Annotated[str | None, CERTIFICATES] = field(default=None, repr=False)
    client_cert: Annotated[str | None, CERTIFICATES] = field(default=None, repr=False)
    client_key: Annotated[str | None, PRIVATE_KEY] = field(default=None, repr=False)
    timeout: Annotated[float | None, TIMEOUT] = None
    max_model_len: Annotated[int | None, SIZE] = None
    usage: Annotated[str, _one_of("final", "continuous")] = "final"
    on_disconnect: Annotated[str, _one_of("drain", "cancel")] = "drain"
    drain_timeout: Annotated[float, TIMEOUT] = 300.0
    drain_max_tokens: Annotated[int, SIZE] = 32_768
    policy: Annotated[str, _one_of(*POLICIES)] = "least_in_flight"
    retry_begun: Annotated[bool, BOOLEAN] = False
    circuit_failures: Annotated[int, SIZE] = 5
    circuit_pause: Annotated[float, TIMEOUT] = 10.0
    max_concurrent: Annotated[int | None, SIZE] = None
    queue_size: Annotated[int, _whole(0, 1_000_000)] = 0
    queue_timeout: Annotated[float, TIMEOUT] = 30.0
    media_urls: Annotated[bool, BOOLEAN] = False
    max_choices: Annotated[int, SIZE] = 128
    max_batch: Annotated[int, SIZE] = 2048
    max_tokens: Annotated[int | None, SIZE] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceEntry:
    """What a million tokens, or seconds of audio, of a model cost from a moment on, in micro-units
    (1e-6) of the currency. Without `valid_from`: since ever. What is not named costs nothing.
    """

    valid_from: Annotated[datetime | None, MOMENT] = None
    prompt: Annotated[int, AMOUNT] = 0
    completion: Annotated[int, AMOUNT] = 0
    embedding: Annotated[int, AMOUNT] = 0
    transcription: Annotated[int, AMOUNT] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """The price list: for each model its prices, one after the other in time."""

    currency: Annotated[str, CURRENCY] = "USD"
    models: Mapping[str, tuple[PriceEntry, ...]] = field(
        default_factory=lambda: MappingProxyType({})
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings. Times are in seconds, sizes in bytes, paths relative to the file's folder.

    `listen` takes the place of `host`, `port`, `cert` and `key` when it is not empty.
    """

    log_level: Annotated[str, LEVEL] = "INFO"
    log_format: Annotated[str, _one_of("text", "json")] = "text"
    host: Annotated[str, HOST] = "0.0.0.0"
    port: Annotated[int, _whole(0, 65535)] = 8080
    cert: Annotated[Path | None, PATH] = None
    key: Annotated[Path | None, PATH] = None
    listen: Annotated[tuple[str, ...], ENDPOINTS] = ()
    workers: Annotated[int, _whole(1, 1024)] = 1
    timeout_connect: Annotated[float, TIMEOUT] = 5.0
    timeout_read: Annotated[float, TIMEOUT] = 60.0
    client_max_size: Annotated[int, SIZE] = 2 * GIB
    max_json_body: Annotated[int, SIZE] = 32 * MIB
    http_origin: Annotated[str, ORIGIN] = "*"
    keepalive_interval: Annotated[float, INTERVAL] = 15.0
    drain_deadline: Annotated[float, INTERVAL] = 30.0
    auth_stale_max: Annotated[float, INTERVAL] = 300.0
    auth_fresh: Annotated[float, INTERVAL] = 1.0
    failed_keys_per_minute: Annotated[int, LIMIT] = 60
    max_connections: Annotated[int, LIMIT] = 0
    max_connections_per_address: Annotated[int, LIMIT] = 0
    db: Database = field(default_factory=Database)
    admin: Admin = field(default_factory=Admin)
    metrics: Metrics = field(default_factory=Metrics)
    ledger: LedgerConfig = field(default_factory=LedgerConfig)
    prices: Prices = field(default_factory=Prices)
    limits: KeyLimits = field(default_factory=KeyLimits)
    backends: Mapping[str, Backend] = field(default_factory=lambda: MappingProxyType({}))


def servers_of(backend: Backend) -> tuple[Replica, ...]:
    """The servers of a model, one at least."""
    return backend.replicas or tuple(Replica(url=url) for url in backend.urls or (backend.url,))


def member(backend: Backend, server: Replica) -> Backend:
    """The backend as if this were its one server, without what holds for all of them together: two
    that are equal can share connections."""
    of_all: dict[str, typing.Any] = {name: _DEFAULTS[name] for name in OF_ALL}
    return replace(
        backend,
        url=server.url,
        token=server.token or backend.token,
        model=server.model or backend.model,
        **of_all,
    )


#: What a backend's servers have in common: where they are, how one is chosen, and its names.
OF_ALL = (
    *("urls", "replicas", "aliases", "policy", "retry_begun"),
    *("max_concurrent", "queue_size", "queue_timeout"),
)
_DEFAULTS = {each.name: each.default for each in fields(Backend)}

#: What a running proxy takes over when it reads its configuration again.
RELOADED = ("backends", "prices")


def restart_needed(old: Config, new: Config) -> list[str]:
    """The settings that differ and that a running proxy does not take over."""
    names = (each.name for each in fields(Config) if each.name not in RELOADED)
    return [name for name in names if getattr(old, name) != getattr(new, name)]


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def find(path: str | None, environ: Mapping[str, str]) -> Path:
    """The configuration file to use: `path` (the option `-c`), `LLMPROXY_CONFIG`, or
    `config.toml`.
    """
    return Path(path or environ.get(PATH_VARIABLE) or DEFAULT_PATH)


def default_text() -> str:
    """The commented example, which has every setting at its default."""
    return resources.files("llmproxy").joinpath(DEFAULT_PATH).read_text(encoding="utf-8")


def load(path: Path, environ: Mapping[str, str] = os.environ, *, check: bool = True) -> Config:
    """Read the file at `path`; `LLMPROXY_DB_URI` in `environ` takes the place of `db.uri`.

    With `check` the public site's certificate must be readable, too. Raises ConfigError.
    """
    try:
        mapping = tomllib.loads(_read_text(path))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    db_uri = environ.get(DB_URI_VARIABLE) or None
    config = parse(mapping, path.absolute().parent, db_uri=db_uri)
    if check:
        check_files(config)
    return config


def parse(
    mapping: Mapping[str, object],
    base: Path = Path("."),
    *,
    db_uri: str | None = None,
    read_text: Callable[[Path], str] = _read_text,
) -> Config:
    """The configuration that `mapping` holds, in the shape that `tomllib` gives.

    `base` is the folder of relative paths, `db_uri` takes the place of `db.uri`, `read_text`
    reads the files that hold secrets. Raises ConfigError with one line for each mistake.
    """
    if db_uri is not None:
        mapping = _with_db_uri(mapping, db_uri)
    reader = _Reader(base, read_text)
    config = reader.section(Config, mapping)
    reader.errors.extend(_conflicts(mapping))
    if config is not None:
        reader.errors.extend(_misfits(config))
    if reader.errors or config is None:
        raise ConfigError("\n".join(reader.errors))
    return config


def _with_db_uri(mapping: Mapping[str, object], uri: str) -> Mapping[str, object]:
    if not _is_database(uri):
        raise ConfigError(f"{DB_URI_VARIABLE}: expected {DATABASE.expected}")
    section = mapping.get("db", {})
    if not isinstance(section, Mapping):
        return mapping
    kept = {name: value for name, value in section.items() if name != "uri_file"}
    return {**mapping, "db": {**kept, "uri": uri}}


def check_files(config: Config) -> None:
    """Raises ConfigError unless the public site's certificate and key are readable."""
    named = {"cert": config.cert, "key": config.key}
    errors = [
        f'{where}: can\'t read "{path}": {error}'
        for where, path in named.items()
        if path is not None and (error := _unreadable(path))
    ]
    if errors:
        raise ConfigError("\n".join(errors))


def _unreadable(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _conflicts(mapping: Mapping[str, object]) -> Iterator[str]:
    if mapping.get("listen"):
        for name in ("host", "port"):
            if name in mapping:
                yield f"{name}: can't be given together with listen"
        for name in ("cert", "key"):
            if name in mapping:
                yield f"{name}: can't be given together with listen; use an ssl: endpoint"
    if ("cert" in mapping) != ("key" in mapping):
        there, missing = ("cert", "key") if "cert" in mapping else ("key", "cert")
        yield f"{missing}: missing, as {there} is given"
    backends = mapping.get("backends")
    for name, backend in backends.items() if isinstance(backends, Mapping) else ():
        given = [
            each
            for each in ("client_cert", "client_key")
            if isinstance(backend, Mapping) and (each in backend or f"{each}_file" in backend)
        ]
        if len(given) == 1:
            [missing] = {"client_cert", "client_key"} - {*given}
            yield f"{_dotted(('backends', name, missing))}: missing, as {given[0]} is given"


def _misfits(config: Config) -> Iterator[str]:
    for name, backend in config.backends.items():
        if backend.client_cert is not None and backend.client_key is not None:
            try:
                read_identity(backend.client_cert, backend.client_key)
            except ValueError as error:
                yield f"{_dotted(('backends', name, 'client_key'))}: {error}"


class _Reader:
    """Reads sections, and keeps what is wrong with them in `errors`."""

    def __init__(self, base: Path, read_text: Callable[[Path], str]) -> None:
        self.errors: list[str] = []
        self._base = base
        self._read_text = read_text

    def section(
        self, cls: type[T], section: object, where: Where = (), name: str | None = None
    ) -> T | None:
        """`section` as a `cls` with this `name`, if it has one; None where it has errors."""
        if not isinstance(section, Mapping):
            self._refuse(where, "expected a table")
            return None
        before = len(self.errors)
        hints = typing.get_type_hints(cls, include_extras=True)
        values: dict[str, object] = {}
        if name is not None:
            values["name"] = name
            del hints["name"]
        known = set(hints)
        for key, hint in hints.items():
            rule = _rule(hint)
            if rule is None:
                values[key] = self._nested(hint, section.get(key, {}), (*where, key))
                continue
            if rule.secret:
                known.add(f"{key}_file")
            values |= self._setting(rule, section, where, key)
        self._check_unknown(section, known, where)
        if cls is Backend:
            self._check_servers(section, where)
        self._check_missing(cls, values, where)
        return _anchored(cls(**values), self._base) if len(self.errors) == before else None

    def _nested(self, hint: typing.Any, section: object, where: Where) -> object:
        if typing.get_origin(hint) is tuple:
            return self._replicas(section or [], where)
        if typing.get_origin(hint) is not Mapping:
            return self.section(hint, section, where)
        if typing.get_args(hint)[1] is not Backend:
            return self._named(section, where, self._price_entries)
        backends = self._named(section, where, self._backend)
        self._check_aliases(backends, where)
        return backends

    def _named(
        self, section: object, where: Where, of_each: Callable[[object, Where], T]
    ) -> Mapping[str, T]:
        """A table of models' names, with what `of_each` makes of its values."""
        if not isinstance(section, Mapping):
            self._refuse(where, "expected a table")
            return {}
        for name in section:
            if not _is_label(name):
                self._refuse((*where, name), f"expected a name that is {LABEL.expected}")
        return MappingProxyType(
            {name: of_each(value, (*where, name)) for name, value in section.items()}
        )

    def _backend(self, section: object, where: Where) -> Backend | None:
        return self.section(Backend, section, where, where[-1])

    def _check_servers(self, section: Mapping[str, object], where: Where) -> None:
        given = [key for key in ("url", "urls", "replicas") if key in section]
        if not given:
            self._refuse((*where, "url"), "missing")
        if "replicas" in section and not section["replicas"]:
            self._refuse((*where, "replicas"), "there are none")
        for other in given[1:]:
            self._refuse((*where, other), f"can't be given together with {given[0]}")

    def _replicas(self, section: object, where: Where) -> tuple[Replica, ...]:
        if not isinstance(section, list):
            self._refuse(where, "expected a list of tables")
            return ()
        replicas = self._listed(Replica, section, where)
        if len({each.url for each in replicas}) < len(replicas):
            self._refuse(where, "two of them have the same url")
        return replicas

    def _check_aliases(self, backends: Mapping[str, Backend | None], where: Where) -> None:
        """Each name has one owner."""
        owners = {name: name for name in backends}
        for name, backend in backends.items():
            for alias in backend.aliases if backend else ():
                if alias in owners:
                    what = f'"{alias}" is a name of {_dotted((*where, owners[alias]))} already'
                    self._refuse((*where, name, "aliases"), what)
                owners[alias] = name

    def _price_entries(self, section: object, where: Where) -> tuple[PriceEntry, ...]:
        listed = section if isinstance(section, list) else [section]
        entries = self._listed(PriceEntry, listed, where)
        if len({each.valid_from for each in entries}) < len(entries):
            self._refuse(where, "two prices are valid from the same time on")
        return entries

    def _listed(self, cls: type[T], sections: list[object], where: Where) -> tuple[T, ...]:
        """A list of tables, each as a `cls`; those with errors are left out."""
        found = [
            self.section(cls, each, (*where[:-1], f"{where[-1]}[{n}]"))
            for n, each in enumerate(sections)
        ]
        return tuple(each for each in found if each is not None)

    def _setting(
        self, rule: Rule, section: Mapping[str, object], where: Where, key: str
    ) -> dict[str, object]:
        """The setting `key` as a field's value; nothing where it is not given or is wrong."""
        value = section.get(key, MISSING)
        where = (*where, key)
        if rule.secret and f"{key}_file" in section:
            if value is not MISSING:
                self._refuse(where, f"can't be given together with {key}_file")
            where = (*where[:-1], f"{key}_file")
            value = self._secret(section[f"{key}_file"], where)
        if value is MISSING:
            return {}
        try:
            result = rule.read(value)
        except ValueError:
            got = "" if rule.hidden else f", got {_shown(value)}"
            self._refuse(where, f"expected {rule.expected}{got}")
            # Not missing, though it is wrong.
            return {key: None}
        return {key: result}

    def _secret(self, value: object, where: Where) -> object:
        try:
            path = self._base / _read_path(value)
        except ValueError:
            self._refuse(where, f"expected a path, got {_shown(value)}")
            return MISSING
        try:
            return self._read_text(path).strip()
        except OSError as error:
            self._refuse(where, f'can\'t read "{path}": {error.strerror or error}')
        except UnicodeDecodeError:
            self._refuse(where, f'"{path}" is not UTF-8 text')
        return MISSING

    def _check_unknown(self, section: Mapping[str, object], known: set[str], where: Where) -> None:
        for key in section:
            if key in known:
                continue
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            if where[:1] == ("backends",) and isinstance(section[key], Mapping):
                quoted = _dotted((f"{where[-1]}.{key}",))
                hint = f"; a name with a dot is written in quotes: [backends.{quoted}]"
            self._refuse((*where, key), f"unknown setting{hint}")

    def _check_missing(self, cls: type, values: Mapping[str, object], where: Where) -> None:
        for each in fields(cls):
            needed = each.default is MISSING and each.default_factory is MISSING
            if needed and each.name not in values:
                self._refuse((*where, each.name), "missing")

    def _refuse(self, where: Where, problem: str) -> None:
        self.errors.append(f"{_dotted(where)}: {problem}")


def _rule(hint: typing.Any) -> Rule | None:
    metadata = getattr(hint, "__metadata__", ())
    return next((each for each in metadata if isinstance(each, Rule)), None)


def _anchored(section: T, base: Path) -> T:
    """`section` with its relative paths taken from `base`."""
    changes: dict[str, object] = {}
    for each in fields(typing.cast(typing.Any, section)):
        value = getattr(section, each.name)
        if isinstance(value, Path):
            changes[each.name] = base / value
    if isinstance(section, Database) and section.sqlite_path is not None:
        changes["uri"] = f"sqlite://{base / section.sqlite_path}"
    return replace(typing.cast(typing.Any, section), **changes) if changes else section


def _dotted(where: Where) -> str:
    """A key's path as TOML writes it."""
    bare = re.compile(r"[A-Za-z0-9_-]+")
    return ".".join(part if bare.fullmatch(part) else _quoted(part) for part in where)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _shown(value: object) -> str:
    """A short text for a value in an error."""
    if isinstance(value, Mapping):
        return "a table"
    try:
        text = _quoted(value) if isinstance(value, str) else json.dumps(value, default=str)
    except ValueError:  # an integer with more digits than Python turns into text
        text = "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."
