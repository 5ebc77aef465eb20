"""The running proxy: its parts wired together, started and stopped in order, and reloaded."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, cast

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, DeferredList, maybeDeferred
from twisted.internet.endpoints import quoteStringArgument
from twisted.internet.interfaces import IListeningPort
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from llmproxy import __version__, config, logs
from llmproxy.admin import AdminSite, admin_resource
from llmproxy.auth import Authenticator
from llmproxy.backends import Backends
from llmproxy.budgets import Budgets
from llmproxy.checkpoints import Checkpoints
from llmproxy.config import Backend, Config
from llmproxy.connections import Connections, bounds, descriptors
from llmproxy.errors import ConfigError, StorageError
from llmproxy.exchange import Services
from llmproxy.handover import Predecessor
from llmproxy.health import Health, HealthChecks, agent_fetch
from llmproxy.heartbeat import Heartbeat
from llmproxy.limits import Limits
from llmproxy.metrics import Metrics
from llmproxy.model import State
from llmproxy.prices import PriceList
from llmproxy.resource import make_root
from llmproxy.server_tls import Certificates, without_tls
from llmproxy.sharing import Sockets, adoptable
from llmproxy.site import Site
from llmproxy.stores import Stores
from llmproxy.throttle import Throttle
from llmproxy.timeouts import Timeouts
from llmproxy.upstream import connect

log = Logger()

#: How often is looked whether all is done, or known.
STEP_S = 0.05
#: How long exchanges that were cut may take to settle.
CUT_S = 5.0
#: How long after the end of a process its lock is looked at: the kernel may close others first.
RECOVER_S = 1.0
#: How long a connection must be silent that is closed because the port is served by another
#: process, or soon will be (a socket of systemd's, where new clients wait meanwhile).
PARTING_S, PARTING_SOON_S = 5.0, 0.5
#: How much longer than `drain_deadline` a process may take to stop: to cut, to write, to deliver.
PATIENCE_S = CUT_S + 25.0
#: How long clients may take the last bytes of their answers.
FLUSH_S = 2.0
#: Connections that wait to be accepted; 50, Twisted's default, makes a rush of clients wait.
BACKLOG = 4096


class Proxy(logs.LoggingService):
    """The service. `load` gives the configuration, at first and at each reload.

    Start: stores, then backends, then the admin site, then the public site; `started` fires.
    Stop: no new connections, exchanges end under `drain_deadline`, the ledger's last commits, the
    stores. `on_running` is called once the reactor runs, `on_failure` when a start fails.
    `predecessor`: whose place this process takes. `relieved`: another one has taken its place.
    """

    def __init__(self, load: Callable[[], Config], reactor: Any) -> None:
        super().__init__()
        self._load = load
        self._reactor = reactor
        self.config = load()
        self.metrics = Metrics(__version__, self.config.backends)
        self.stores = Stores(self.config, reactor)
        self.sockets = Sockets(reactor)
        self.predecessor: Predecessor | None = None
        self.relieved = False
        self.ports: list[IListeningPort] = []
        self.admin_ports: list[IListeningPort] = []
        self._admin_sites: list[AdminSite] = []
        self.backends = Backends(
            lambda backend: connect(backend, reactor, self.config.timeout_connect), reactor
        )
        self.certificates = Certificates(self.metrics.certificate)
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
        self._count(await self.stores.open(lambda seconds, _: self.metrics.ledger_commit(seconds)))
        ledger = self.stores.ledger
        self.metrics.ledger_pending.follow(lambda: ledger.writer.pending)
        if (delivery := self.stores.delivery) is not None:
            self.metrics.delivery_backlog_rows.follow(lambda: delivery.backlog_rows)
            self.metrics.delivery_backlog_age.follow(lambda: delivery.backlog_age_s)
        self.backends.swap(self.config.backends)
        self._services = services = self._make_services()
        services.checkpoints.setServiceParent(self)
        if services.limits is not None:
            services.limits.setServiceParent(self)
        Heartbeat(self._reactor, self.metrics.loop_lag).setServiceParent(self)
        self._watch_servers()
        self._health = health_checks(self.backends, self._reactor, self._checked)
        self._check_backends()
        await self._listen(services)
        await self._relieve()
        self._announce()

    def _count(self, recovered: Mapping[State, int]) -> None:
        for state, count in recovered.items():
            self.metrics.ledger_rows(state, count)

    def recover(self) -> None:
        """Close what a process that has ended meanwhile left open."""
        if not self.running:
            return
        recovering = Deferred.fromCoroutine(self.stores.recover()).addCallback(self._count)
        recovering.addErrback(lambda failure: log.failure("recovery failed", failure))

    def _check_backends(self) -> None:
        self._health.setServiceParent(self)

    def _checked(self, name: str, server: str, up: bool | None) -> None:
        self.metrics.backend_up(name, server, up)
        self.backends.set_down(self._health.down)

    def _watch_servers(self) -> None:
        queues = {model.backend.name: model.queue for model in self.backends.models()}
        self.metrics.watch(self.backends.routes(), queues)

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
                throttle=self._make_throttle(),
            ),
            backends=self.backends,
            ledger=self.stores.ledger,
            checkpoints=Checkpoints(self.stores.ledger, self._reactor),
            metrics=self.metrics,
            prices=self._priced(self.config),
            limits=Limits(
                self.config.limits,
                self.stores.shares,
                secrets.token_hex(8),
                self._reactor,
                time.time,
                self.metrics.limited,
            ),
            budgets=Budgets(
                self.config.limits,
                self.stores.spending,
                clock,
                time.monotonic,
                self.metrics.limited,
            ),
        )

    def _priced(self, settings: Config) -> PriceList:
        """The price list in force, which the ledger knows before a row speaks of it."""
        self.stores.currency = settings.prices.currency
        prices = PriceList(settings.prices)
        known = self.stores.ledger.know(prices.all())
        known.addErrback(lambda failure: log.failure("prices are not written down", failure))
        return prices

    def _make_throttle(self) -> Throttle | None:
        per_minute = self.config.failed_keys_per_minute
        refused = partial(self.metrics.limited, "failed_keys_per_minute")
        return Throttle(per_minute, time.monotonic, refused) if per_minute else None

    async def _listen(self, services: Services) -> None:
        exposition = self.metrics.exposition if self.config.metrics.enabled else None
        admin = admin_resource(self.checks, lambda: self._health.states, exposition)
        for text in self.config.admin.listen:
            site = AdminSite(admin, self._reactor)
            self._admin_sites.append(site)
            self.admin_ports.append(await self._open(text, site))
        self._site = public = Site(
            make_root(services, int(time.time()), self.stores.usage),
            self._timeouts,
            metrics=self.metrics,
            monotonic=time.monotonic,
            origin=self.config.http_origin,
            room=self._make_room(),
        )
        self.metrics.connections.follow(lambda: len(public.connections))
        await self._open_public(public)

    def _make_room(self) -> Connections:
        files, wanted = descriptors(), self.config.max_connections
        most, per_address = bounds(files, wanted, self.config.max_connections_per_address)
        if wanted > most:
            log.warn(
                "max_connections is {wanted}, but {files} file descriptors are enough for {most}",
                wanted=wanted,
                files=files,
                most=most,
            )
        return Connections(most, per_address, self.metrics.connection_limited)

    async def _open_public(self, site: Site) -> None:
        for text in public_endpoints(self.config):
            self.ports.append(await self._open(text, site))
            let_wait(self.ports[-1], text)

    async def _open(self, text: str, factory: Any) -> IListeningPort:
        return await open_endpoint(self.sockets, text, factory, self.certificates)

    def checks(self) -> dict[str, bool | str]:
        """What `/readyz` says of this process."""
        services = self._services
        return {
            "serving": services is not None and not services.draining,
            # Told, but no reason to take us out of service: known keys go on working.
            "keys": "ok" if services and services.authenticator.store_is_up else "store is down",
            "ledger": not self.stores.ledger.writer.failing,
            "version": __version__,
        }

    async def _relieve(self) -> None:
        if self.predecessor is not None:
            ports = self.ports + self.admin_ports
            await relieve(self.predecessor, self.sockets, ports, self._health, self.recover)

    def _announce(self) -> None:
        announce(self.config, self.ports, self.admin_ports)

    def _cannot_start(self, failure: Failure) -> None:
        tell_why_not_started(failure)
        self.on_failure()
        failure.raiseException()

    # -- reload ----------------------------------------------------------------------------

    def reload(self) -> None:
        """Read the configuration and the certificates again; a bad file changes nothing."""
        if self._services is None:
            return
        fresh = read_again(self._load, self.config, self.backends, self.certificates)
        if fresh is not None:
            self._take_over(fresh)
            self._health.update(servers(self.backends))

    def _take_over(self, fresh: Config) -> None:
        """Put in force what a reload brings, the backends aside."""
        assert self._services is not None
        self.metrics.set_models(fresh.backends)
        self._watch_servers()
        self._services.prices = self._priced(fresh)

    # -- stop ------------------------------------------------------------------------------

    def cut(self) -> None:
        """Wait for no stream any longer."""
        self._cut = True
        if self.predecessor is not None:
            self.predecessor.cut()

    def stopService(self) -> Deferred[None]:
        """Stop in order; fires when every row is settled and everything is closed."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        services, site = self._services, self._site
        until = time.monotonic() + self.config.drain_deadline
        await stopped(self.ports)
        if services is not None and site is not None:
            if self.relieved:
                await self._part(site, PARTING_S, until)
            elif any(adoptable(text) != text for text in public_endpoints(self.config)):
                await self._part(site, PARTING_SOON_S, until)
            services.draining = True
            for channel in list(site.connections):
                channel.retire()
            await self._drain(services, until)
            for exchange in list(services.exchanges):
                exchange.cut()
            self._cut = False
            await self._drain(services, time.monotonic() + CUT_S)
            await self._disconnect(site)
        if self.predecessor is not None:
            await self.predecessor.ended(patience(self.config))
        await stopped(self.admin_ports)
        await self._stop_children()
        self.backends.close()
        await self._close_stores()
        self._timeouts.close()
        log.info("stopped")

    async def _part(self, site: Site, idle_s: float, until: float) -> None:
        part([site, *self._admin_sites], idle_s)
        while site.connections and time.monotonic() < until and not self._cut:
            await deferLater(self._reactor, STEP_S)

    async def _drain(self, services: Services, until: float) -> None:
        if services.exchanges:
            log.info("waiting for {count} requests to end", count=len(services.exchanges))
        while services.exchanges and time.monotonic() < until and not self._cut:
            await deferLater(self._reactor, STEP_S)

    async def _disconnect(self, site: Site) -> None:
        """Close the clients' connections; what was written is sent if they take it in time."""
        for channel in list(site.connections):
            channel.close()
        until = time.monotonic() + FLUSH_S
        while site.connections and time.monotonic() < until:
            await deferLater(self._reactor, STEP_S)
        for connection in [*site.connections, *site.refused]:
            connection.abort()

    async def _close_stores(self) -> None:
        await self.stores.close()

    async def _stop_children(self) -> None:
        stopping = super().stopService()
        if stopping is not None:
            await stopping


async def relieve(
    predecessor: Predecessor,
    sockets: Sockets,
    ports: Iterable[IListeningPort],
    health: HealthChecks[Backend],
    recover: Callable[[], None],
) -> None:
    """Accept clients from these ports once the predecessor accepts none; `recover` what it leaves.

    Raises ConfigError.
    """
    sockets.pause()
    while health.running and Health.UNKNOWN in health.states.values():
        await deferLater(sockets.reactor, STEP_S)  # else nobody would be ready for a moment
    await predecessor.makes_room()
    sockets.own()
    predecessor.gone.addCallback(lambda _: sockets.reactor.callLater(RECOVER_S, recover))
    for port in ports:
        cast(Any, port).startReading()


def part(sites: Iterable[Site], idle_s: float) -> None:
    """Let the clients of these sites go to another process, each when it has been told so, or has
    been silent for `idle_s`."""
    for site in sites:
        for channel in list(site.connections):
            channel.part(idle_s)


def patience(settings: Config) -> float:
    """How many seconds a process may take to stop."""
    return settings.drain_deadline + PATIENCE_S


async def open_endpoint(
    sockets: Sockets, text: str, factory: Any, certificates: Certificates
) -> IListeningPort:
    """Listen on the endpoint that `text` names, with a certificate if it is an `ssl:` one. Raises
    ConfigError."""
    plain, files = without_tls(text)
    if files is not None:
        factory = certificates.load(files).over(factory, sockets.reactor)
    return await sockets.open(plain, factory)


def let_wait(port: IListeningPort, text: str) -> None:
    """Let `BACKLOG` connections wait to be accepted, where the endpoint's `text` (or the unit of a
    `systemd:` socket) does not say how many."""
    if re.search(r"(?:^|:)(?:backlog=|systemd:)", text) is None:
        cast(Any, port).socket.listen(BACKLOG)


def health_checks(
    backends: Backends, reactor: Any, report: Callable[[str, str, bool | None], None]
) -> HealthChecks[Backend]:
    """The checks of these backends' servers, each through its own connections."""
    return HealthChecks(
        servers(backends),
        agent_fetch(lambda server: backends.routes()[server.name, server.url].upstream.agent),
        reactor,
        report,
    )


def servers(backends: Backends) -> list[Backend]:
    """All servers, as if each were its backend's only one."""
    return [route.backend for route in backends.routes().values()]


def read_again(
    load: Callable[[], Config],
    running: Config,
    backends: Backends,
    certificates: Certificates,
) -> Config | None:
    """Read the configuration and the certificates, and put its backends and them in force.

    None, and nothing has changed, where the file is bad.
    """
    try:
        fresh = load()
        if not fresh.backends and list(backends.all()):
            raise ConfigError("backends: none are left; a file that is cut short looks so")
        found = certificates.read_again()
        backends.swap(fresh.backends)
    except ConfigError as error:
        log.error("not reloaded: {reason}", reason="; ".join(str(error).splitlines()))
        return None
    certificates.put_in_force(found)
    log.info("reloaded; backends: {backends}", backends=", ".join(fresh.backends) or "none")
    for name in config.restart_needed(running, fresh):
        log.warn("{setting} has changed; it takes a restart", setting=name)
    return fresh


def announce(
    settings: Config, ports: Iterable[IListeningPort], admin_ports: Iterable[IListeningPort]
) -> None:
    """Say that we serve, and where."""
    log.info(
        "llmproxy {version} serves {addresses}; admin site {admin}; store {store};"
        " backends: {backends}",
        version=__version__,
        addresses=", ".join(map(_address, ports)),
        admin=", ".join(map(_address, admin_ports)) or "none",
        store=settings.db.safe_uri,
        backends=", ".join(map(_places, settings.backends.values())) or "none",
    )
    if not settings.backends:
        log.warn("no backends are configured: every request gets model_not_found")


def _places(backend: Backend) -> str:
    return f"{backend.name} at {' and '.join(each.url for each in config.servers_of(backend))}"


def tell_why_not_started(failure: Failure) -> None:
    """One line where the reason is not ours, else a traceback."""
    if failure.check(ConfigError, StorageError):
        log.critical("can't start: {reason}", reason=str(failure.value))
    else:
        log.failure("can't start", failure)


def public_endpoints(settings: Config) -> tuple[str, ...]:
    """The endpoint strings of the public site."""
    if settings.listen:
        return settings.listen
    place = f"{settings.port}:interface={quoteStringArgument(settings.host)}"
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


async def stopped(ports: Iterable[IListeningPort]) -> None:
    """Stop them all; some do it at once, some need a moment."""
    await DeferredList([maybeDeferred(port.stopListening) for port in ports])
