"""The proxy as several processes (`workers` > 1): what opens the ports and speaks for all.

    supervisor: ports, admin site, health checks, signals, database made ready
      |-- worker 0: accepts from the same ports; with MongoDB delivers the bills of all
      |-- worker 1: accepts from the same ports
      ...

No request goes through the supervisor, so little can go wrong in it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure

from llmproxy import __version__, logs
from llmproxy.admin import AdminSite, admin_resource
from llmproxy.backends import Backends
from llmproxy.config import Config
from llmproxy.control import FIRST_LISTENER, FROM_SUPERVISOR, LOADS, TO_SUPERVISOR, config_to_json
from llmproxy.handover import Predecessor
from llmproxy.loads import GONE, Loads
from llmproxy.metrics import Metrics
from llmproxy.processes import Worker, Workers
from llmproxy.proxy import (
    PARTING_S,
    announce,
    health_checks,
    let_wait,
    open_endpoint,
    part,
    patience,
    public_endpoints,
    read_again,
    relieve,
    servers,
    stopped,
    tell_why_not_started,
)
from llmproxy.server_tls import Certificate, Certificates, Pem, without_tls
from llmproxy.sharing import Sockets, hold
from llmproxy.stores import prepare_database
from llmproxy.totals import joined_checks
from llmproxy.upstream import connect

log = Logger()


class Supervisor(logs.LoggingService):
    """The service, in the place of `Proxy` and used like it."""

    def __init__(self, load: Callable[[], Config], reactor: Any) -> None:
        super().__init__()
        self._load = load
        self._reactor = reactor
        self.config = self._in_force = load()
        self.metrics = Metrics(__version__, self.config.backends)
        self.backends = Backends(
            lambda backend: connect(backend, reactor, self.config.timeout_connect), reactor
        )
        self.sockets = Sockets(reactor)
        self.predecessor: Predecessor | None = None
        self.relieved = False
        self.ports: list[IListeningPort] = []
        self.admin_ports: list[IListeningPort] = []
        self._admin_sites: list[AdminSite] = []
        self.workers = Workers(
            reactor, self.config.workers, self._launch, lingers=self.config.db.is_mongodb
        )
        self.workers.on_change = self._count_workers
        self.started: Deferred[None] = Deferred()
        self.on_running: Callable[[], None] = lambda: None
        self.on_failure: Callable[[], None] = lambda: None
        self._serving = False
        self.certificates = Certificates(self.metrics.certificate)
        #: Endpoints without their TLS, the sockets' descriptors, and what TLS is over them.
        self._listeners: list[tuple[str, int, Certificate | None]] = []
        self._down: set[tuple[str, str]] = set()

    # -- start -----------------------------------------------------------------------------

    def startService(self) -> None:
        """Open everything, and start the workers; what can't be is told in one line."""
        super().startService()
        self._loads = Loads.create(self.config.workers)
        self._reactor.callWhenRunning(lambda: self.on_running())
        # Only a reactor that runs notices that a process has ended.
        self._reactor.callWhenRunning(self._begin)

    def _begin(self) -> None:
        starting = Deferred.fromCoroutine(self._start())
        starting.addErrback(self._cannot_start)
        starting.chainDeferred(self.started)
        self.started.addErrback(lambda failure: None)

    async def _start(self) -> None:
        prepare_database(self.config)
        self.backends.swap(self.config.backends)
        self._health = health_checks(self.backends, self._reactor, self._checked)
        await self._open_admin()
        for text in public_endpoints(self.config):
            plain, files = without_tls(text)
            certificate = self.certificates.load(files) if files is not None else None
            self.ports.append(await self.sockets.open(plain, Factory()))
            let_wait(self.ports[-1], text)
            self._listeners.append((plain, hold(self.ports[-1]), certificate))
        await self.workers.start()
        self._health.setServiceParent(self)
        self._serving = True
        if self.predecessor is not None:
            await relieve(
                self.predecessor,
                self.sockets,
                self.admin_ports,
                self._health,
                lambda: self.workers.send("recover"),
            )
        for port in self.admin_ports:
            port.startReading()  # type: ignore[attr-defined]
        announce(self.config, self.ports, self.admin_ports)

    async def _open_admin(self) -> None:
        """Nobody is answered there before the workers serve; but a port that is taken is told."""
        exposition = self._exposition if self.config.metrics.enabled else None
        admin = admin_resource(self.checks, lambda: self._health.states, exposition)
        for text in self.config.admin.listen:
            site = AdminSite(admin, self._reactor)
            self._admin_sites.append(site)
            port = await open_endpoint(self.sockets, text, site, self.certificates)
            self.admin_ports.append(port)
            port.stopReading()  # type: ignore[attr-defined]

    def _launch(self, worker: Worker) -> None:
        numbers = range(FIRST_LISTENER, FIRST_LISTENER + len(self._listeners))
        inherited = {
            number: descriptor
            for number, (_, descriptor, _) in zip(numbers, self._listeners, strict=True)
        }
        with open(os.devnull, "rb") as nothing:
            self._reactor.spawnProcess(
                worker,
                sys.executable,
                [sys.executable, "-m", "llmproxy.worker"],
                env={k: v for k, v in os.environ.items() if not k.startswith("LISTEN_")},
                childFDs={
                    0: nothing.fileno(),
                    1: logs.descriptor_of(self.log_observer),
                    2: 2,
                    FROM_SUPERVISOR: "w",
                    TO_SUPERVISOR: "r",
                    LOADS: self._loads.descriptor,
                    **inherited,
                },
            )
        worker.send(
            "start",
            number=worker.number,
            config=config_to_json(self._in_force),
            listeners=[
                (text, number)
                for number, (text, _, _) in zip(numbers, self._listeners, strict=True)
            ],
            pems=self._pems(),
        )
        worker.send("down", servers=[*self._down])

    def _checked(self, name: str, server: str, up: bool | None) -> None:
        self.metrics.backend_up(name, server, up)
        if (down := self._health.down) != self._down:
            self._down = down
            self.workers.send("down", servers=[*down])

    def _pems(self) -> list[Pem | None]:
        return [
            None if certificate is None else certificate.loaded.pem
            for _, _, certificate in self._listeners
        ]

    def _cannot_start(self, failure: Failure) -> None:
        tell_why_not_started(failure)
        self.on_failure()
        failure.raiseException()

    # -- what the admin site shows ---------------------------------------------------------

    def checks(self) -> dict[str, bool | str]:
        """What `/readyz` says: while one worker serves, requests are taken."""
        serving = self.workers.serving
        return {
            **joined_checks([each.checks for each in serving]),
            "serving": self._serving and bool(serving),
            "workers": f"{len(serving)} of {self.workers.count}",
            "version": __version__,
        }

    def _exposition(self) -> bytes:
        self.metrics.show(self.workers.totals.now(self.metrics.process_snapshot()))
        return self.metrics.exposition()

    def _count_workers(self) -> None:
        self.metrics.workers.set(len(self.workers.serving))
        self.metrics.worker_restarts.value = self.workers.restarts
        for number in self.workers.missing:  # those that start write their own number
            self._loads.set(number, GONE)

    # -- reload ----------------------------------------------------------------------------

    def reload(self) -> None:
        """Read the configuration again, and pass it on if it is good."""
        if not self._serving:
            return
        fresh = read_again(self._load, self.config, self.backends, self.certificates)
        if fresh is None:
            return
        self.metrics.set_models(fresh.backends)
        self._health.update(servers(self.backends))
        # What takes a restart must not come with a worker that is started again.
        self._in_force = replace(self.config, backends=fresh.backends, prices=fresh.prices)
        self.workers.send("reload", config=config_to_json(self._in_force), pems=self._pems())

    # -- stop ------------------------------------------------------------------------------

    def cut(self) -> None:
        """Wait for no stream any longer."""
        self.workers.send("cut")
        if self.predecessor is not None:
            self.predecessor.cut()

    def stopService(self) -> Deferred[None]:
        """Stop in order; fires when all workers have ended."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        self._serving = False
        if self.relieved:
            part(self._admin_sites, PARTING_S)
        ending = self.workers.stop(patience(self.config), relieved=self.relieved)
        await stopped(self.ports)
        await ending
        if self.predecessor is not None:
            await self.predecessor.ended(patience(self.config))
        await stopped(self.admin_ports)
        stopping = super().stopService()
        if stopping is not None:
            await stopping
        self.backends.close()
        self._loads.close()
        log.info("stopped")
