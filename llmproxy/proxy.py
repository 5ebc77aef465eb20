"""The running proxy: its parts wired together, started and stopped in order, and reloaded."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

from OpenSSL import crypto
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.endpoints import quoteStringArgument, serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from llmproxy import __version__, config, logs
from llmproxy.admin import AdminSite, admin_resource
from llmproxy.auth import Authenticator
from llmproxy.backends import Backends
from llmproxy.checkpoints import Checkpoints
from llmproxy.config import Config
from llmproxy.errors import ConfigError, StorageError
from llmproxy.exchange import Services
from llmproxy.health import HealthChecks, agent_fetch
from llmproxy.metrics import Metrics
from llmproxy.resource import make_root
from llmproxy.site import Site
from llmproxy.stores import Stores
from llmproxy.timeouts import Timeouts
from llmproxy.upstream import connect

log = Logger()

#: How often a drain looks whether all is done.
DRAIN_STEP_S = 0.05
#: How long exchanges that were cut may take to settle.
CUT_S = 5.0
#: How long clients may take the last bytes of their answers.
FLUSH_S = 2.0
#: Connections that wait to be accepted; 50, Twisted's default, makes a rush of clients wait.
BACKLOG = 4096


class Proxy(logs.LoggingService):
    """The service. `load` gives the configuration, at first and at each reload.

    Start: stores, then backends, then the admin site, then the public site; `started` fires.
    Stop: no new connections, exchanges end under `drain_deadline`, the ledger's last commits, the
    stores. `on_running` is called once the reactor runs, `on_failure` when a start fails.
    """

    def __init__(self, load: Callable[[], Config], reactor: Any) -> None:
        super().__init__()
        self._load = load
        self._reactor = reactor
        self.config = load()
        self.metrics = Metrics(__version__, self.config.backends)
        self.stores = Stores(self.config, reactor)
        self.ports: list[IListeningPort] = []
        self.admin_ports: list[IListeningPort] = []
        self.backends = Backends(
            lambda backend: connect(backend, reactor, self.config.timeout_connect)
        )
        self.started: Deferred[None] = Deferred()
        self._timeouts = Timeouts(reactor)
        self._services: Services | None = None
        self._site: Site | None = None
        self._cut = False
        self.on_running: Callable[[], None] = lambda: None
        self.on_failure: Callable[[], None] = lambda: None

    def startService(self) -> None:
        """Open everything; what can't be opened is told in one line."""
        super().startService()
        self._reactor.callWhenRunning(lambda: self.on_running())
        starting = Deferred.fromCoroutine(self._start())
        starting.addErrback(self._cannot_start)
        starting.chainDeferred(self.started)
        self.started.addErrback(lambda failure: None)

    async def _start(self) -> None:
        recovered = await self.stores.open(lambda seconds, _: self.metrics.ledger_commit(seconds))
        for state, count in recovered.items():
            self.metrics.ledger_rows(state, count)
        ledger = self.stores.ledger
        self.metrics.ledger_pending.follow(lambda: ledger.writer.pending)
        if (delivery := self.stores.delivery) is not None:
            self.metrics.delivery_backlog_rows.follow(lambda: delivery.backlog_rows)
            self.metrics.delivery_backlog_age.follow(lambda: delivery.backlog_age_s)
        self.backends.swap(self.config.backends)
        self._services = services = self._make_services()
        services.checkpoints.setServiceParent(self)
        self._health = HealthChecks(
            self.backends.all(),
            agent_fetch(lambda backend: self.backends.find(backend.name).upstream.agent),
            self._reactor,
            self.metrics.backend_up,
        )
        self._health.setServiceParent(self)
        await self._listen(services)
        self._announce()

    def _make_services(self) -> Services:
        clock = self._timeouts
        return Services(
            config=self.config,
            clock=clock,
            monotonic=time.monotonic,
            authenticator=Authenticator(
                self.stores.accounts,
                clock,
                fresh_s=self.config.auth_fresh,
                stale_max_s=self.config.auth_stale_max,
            ),
            backends=self.backends,
            ledger=self.stores.ledger,
            checkpoints=Checkpoints(self.stores.ledger, self._reactor),
            metrics=self.metrics,
        )

    async def _listen(self, services: Services) -> None:
        exposition = self.metrics.exposition if self.config.metrics.enabled else None
        admin = admin_resource(self._checks, lambda: self._health.states, exposition)
        for text in self.config.admin.listen:
            self.admin_ports.append(await self._open_port(text, AdminSite(admin, self._reactor)))
        self._site = Site(
            make_root(services, int(time.time())),
            self._timeouts,
            metrics=self.metrics,
            monotonic=time.monotonic,
            origin=self.config.http_origin,
        )
        for text in public_endpoints(self.config):
            self.ports.append(await self._open_port(text, self._site))

    async def _open_port(self, text: str, site: Any) -> IListeningPort:
        site.noisy = False
        try:
            port: IListeningPort = await serverFromString(self._reactor, text).listen(site)
        except CannotListenError as error:
            raise ConfigError(f"can't listen on {text}: {error.socketError}") from None
        except (ValueError, TypeError, KeyError, IndexError, OSError, crypto.Error) as error:
            raise ConfigError(f"can't listen on {text}: {error}") from None
        return port

    def _checks(self) -> dict[str, bool | str]:
        services = self._services
        return {
            "serving": services is not None and not services.draining,
            # Told, but no reason to take us out of service: known keys go on working.
            "keys": "ok" if services and services.authenticator.store_is_up else "store is down",
            "ledger": not self.stores.ledger.writer.failing,
            "version": __version__,
        }

    def _announce(self) -> None:
        log.info(
            "llmproxy {version} serves {addresses}; admin site {admin}; store {store};"
            " backends: {backends}",
            version=__version__,
            addresses=", ".join(map(_address, self.ports)),
            admin=", ".join(map(_address, self.admin_ports)) or "none",
            store=self.config.db.safe_uri,
            backends=", ".join(f"{b.name} at {b.url}" for b in self.backends.all()) or "none",
        )
        if not self.config.backends:
            log.warn("no backends are configured: every request gets model_not_found")

    def _cannot_start(self, failure: Failure) -> None:
        if failure.check(ConfigError, StorageError):
            log.critical("can't start: {reason}", reason=str(failure.value))
        else:
            log.failure("can't start", failure)
        self.on_failure()
        failure.raiseException()

    # -- reload ----------------------------------------------------------------------------

    def reload(self) -> None:
        """Read the configuration again and swap the backends; a bad file changes nothing."""
        if self._services is None:
            return
        try:
            fresh = self._load()
            if not fresh.backends and list(self.backends.all()):
                raise ConfigError("backends: none are left; a file that is cut short looks so")
            self.backends.swap(fresh.backends)
        except ConfigError as error:
            log.error("not reloaded: {reason}", reason="; ".join(str(error).splitlines()))
            return
        self.metrics.set_models(fresh.backends)
        self._health.update(self.backends.all())
        log.info("reloaded; backends: {backends}", backends=", ".join(fresh.backends) or "none")
        for name in config.restart_needed(self.config, fresh):
            log.warn("{setting} has changed; it takes a restart", setting=name)

    # -- stop ------------------------------------------------------------------------------

    def cut(self) -> None:
        """Wait for no stream any longer."""
        self._cut = True

    def stopService(self) -> Deferred[None]:
        """Stop in order; fires when every row is settled and everything is closed."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        services, site = self._services, self._site
        await DeferredList([_stopped(port) for port in self.ports])
        if services is not None and site is not None:
            services.draining = True
            for channel in list(site.connections):
                channel.retire()
            await self._drain(services, self.config.drain_deadline)
            for exchange in list(services.exchanges):
                exchange.cut()
            self._cut = False
            await self._drain(services, CUT_S)
            await self._disconnect(site)
        await DeferredList([_stopped(port) for port in self.admin_ports])
        await self._stop_children()
        self.backends.close()
        await self.stores.close()
        self._timeouts.close()
        log.info("stopped")

    async def _drain(self, services: Services, deadline_s: float) -> None:
        until = time.monotonic() + deadline_s
        if services.exchanges:
            log.info("waiting for {count} requests to end", count=len(services.exchanges))
        while services.exchanges and time.monotonic() < until and not self._cut:
            await deferLater(self._reactor, DRAIN_STEP_S)

    async def _disconnect(self, site: Site) -> None:
        """Close the clients' connections; what was written is sent if they take it in time."""
        for channel in list(site.connections):
            channel.close()
        until = time.monotonic() + FLUSH_S
        while site.connections and time.monotonic() < until:
            await deferLater(self._reactor, DRAIN_STEP_S)
        for channel in list(site.connections):
            channel.abort()

    async def _stop_children(self) -> None:
        stopping = super().stopService()
        if stopping is not None:
            await stopping


def public_endpoints(settings: Config) -> tuple[str, ...]:
    """The endpoint strings of the public site."""
    if settings.listen:
        return settings.listen
    place = f"{settings.port}:interface={quoteStringArgument(settings.host)}:backlog={BACKLOG}"
    if settings.cert is None:
        return (f"tcp:{place}",)
    cert, key = quoteStringArgument(str(settings.cert)), quoteStringArgument(str(settings.key))
    return (f"ssl:{place}:certKey={cert}:privateKey={key}",)


def port_of(port: IListeningPort) -> int:
    """The number of a TCP port that was opened, which its endpoint may have left to the system."""
    return cast(IPv4Address, port.getHost()).port


def _address(port: IListeningPort) -> str:
    host = port.getHost()
    if isinstance(host, (IPv4Address, IPv6Address)):
        return f"{host.host}:{host.port}"
    return str(getattr(host, "name", host))


def _stopped(port: IListeningPort) -> Deferred[None]:
    stopping = port.stopListening()
    return stopping if isinstance(stopping, Deferred) else Deferred.fromCoroutine(_nothing())


async def _nothing() -> None:
    """Some ports stop at once."""
