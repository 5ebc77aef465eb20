"""One of several worker processes: a proxy that a supervisor starts, tells what to do, and hears.

`python -m llmproxy.worker`, with the pipes and sockets of `control.py` as descriptors, is for the
supervisor only. Where it is gone, in whichever way, the worker stops in order.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.defer import TimeoutError as DeferTimeoutError
from twisted.internet.stdio import StandardIO
from twisted.internet.task import LoopingCall
from twisted.logger import Logger, globalLogBeginner
from twisted.python.failure import Failure

from llmproxy import logs
from llmproxy.config import Admin, Config
from llmproxy.control import (
    FROM_SUPERVISOR,
    LOADS,
    TO_SUPERVISOR,
    Message,
    config_from_json,
)
from llmproxy.errors import ConfigError, StorageError
from llmproxy.garbage import collect_rarely
from llmproxy.link import Link
from llmproxy.loads import Loads
from llmproxy.proxy import Proxy
from llmproxy.reactor import install
from llmproxy.server_tls import Certificate, Loaded, Pem
from llmproxy.sharing import Adopting, adoptable, open_port
from llmproxy.site import Site
from llmproxy.stores import SHARED_POLL_S, Stores

#: How often the supervisor is told what was counted.
REPORT_S = 1.0
#: How long the last report may take.
LAST_REPORT_S = 2.0

# Named, as this module is what the process runs.
log = Logger("llmproxy.worker")


class WorkerProxy(Proxy):
    """A proxy on sockets that are open already, without an admin site and without health checks.

    `listeners` are the public endpoints' texts without TLS, with the descriptors of their sockets;
    `pems` has the certificate of each, or None where there is no TLS. Worker 0
    delivers the bills of all, where there is something to deliver; see `linger`. It calls
    `on_serving` once it serves, or `on_failure`, and then `why_not` says why it does not.
    """

    def __init__(
        self,
        settings: Config,
        number: int,
        listeners: list[tuple[str, int]],
        pems: list[Pem | None],
        loads: Loads,
        reactor: Any,
    ) -> None:
        super().__init__(lambda: replace(settings, admin=Admin(listen=())), reactor)
        self.stores = Stores(
            self.config, reactor, prepared=True, delivers=number == 0, poll_s=SHARED_POLL_S
        )
        self.why_not = ""
        self.on_serving: Callable[[], None] = lambda: None
        self._number, self._loads = number, loads
        self._listeners = listeners
        self._certificates = [None if pem is None else Certificate(Loaded.of(pem)) for pem in pems]
        self._last: Deferred[None] | None = None

    def put_in_force(self, settings: Config, pems: list[Pem | None]) -> None:
        """Take over the backends and certificates that the supervisor has found good."""
        self.backends.swap(settings.backends)
        self._take_over(settings)
        for certificate, pem in zip(self._certificates, pems, strict=True):
            if certificate is not None and pem is not None and pem != certificate.loaded.pem:
                certificate.loaded = Loaded.of(pem)

    def linger(self) -> None:
        """Keep the stores open, and deliver, until `leave`: others still have bills to write."""
        self._last = self._last or Deferred()

    def leave(self) -> None:
        """Nobody else writes any more."""
        last, self._last = self._last, None
        if last is not None:
            last.callback(None)

    def _check_backends(self) -> None:
        """The supervisor does, once for all workers."""

    async def _open_public(self, site: Site) -> None:
        site.on_count = partial(self._loads.set, self._number)
        site.on_count(0)

        def my_turn() -> bool:
            site.on_count(len(site.connections))
            return self._loads.take_turn(self._number)

        for (text, descriptor), certificate in zip(
            self._listeners, self._certificates, strict=True
        ):
            adopting = Adopting(self._reactor, descriptor, my_turn)
            factory = site if certificate is None else certificate.over(site, self._reactor)
            self.ports.append(await open_port(adopting, adoptable(text), factory))

    def _announce(self) -> None:
        self.on_serving()

    def _cannot_start(self, failure: Failure) -> None:
        if failure.check(ConfigError, StorageError):
            self.why_not = str(failure.value)
        else:
            log.failure("can't start", failure)
            self.why_not = f"{type(failure.value).__name__}, see the log"
        self.on_failure()
        failure.raiseException()

    async def _close_stores(self) -> None:
        if self._last is not None:
            await self._last
        await super()._close_stores()


class WorkerProcess:
    """The process: does what it is told, reports, and ends with `status`."""

    def __init__(self, reactor: Any) -> None:
        self.status = 0
        self._stopping = False
        self._reactor = reactor
        self._proxy: WorkerProxy | None = None
        self._fresh: tuple[Config, list[Pem | None]] | None = None
        self._reports = LoopingCall(self._report)
        self._link = Link(self._heard)
        self._link.gone.addCallback(lambda _: self._alone())
        cast(Any, StandardIO)(self._link, FROM_SUPERVISOR, TO_SUPERVISOR, reactor)
        reactor.addSystemEventTrigger("before", "shutdown", self._end)

    def stop(self) -> None:
        """Stop in order; once is enough."""
        if not self._stopping:
            self._stopping = True
            self._reactor.stop()

    def _heard(self, message: Message) -> None:
        match message.pop("kind"):
            case "start":
                self._start(**message)
            case "reload":
                self._reload(config_from_json(message["config"]), _pems(message["pems"]))
            case "down" if self._proxy is not None:
                self._proxy.backends.set_down({(name, url) for name, url in message["servers"]})
            case "stop":
                if self._proxy is not None:
                    self._proxy.relieved = message["relieved"]
                    if message["linger"]:
                        self._proxy.linger()
                self.stop()
            case "recover" if self._proxy is not None:
                self._proxy.recover()
            case "cut" if self._proxy is not None:
                self._proxy.cut()
            case "leave" if self._proxy is not None:
                self._proxy.leave()

    def _start(
        self, number: int, config: Mapping[str, Any], listeners: list[Any], pems: list[Any]
    ) -> None:
        settings = config_from_json(config)
        observer = logs.observer(sys.stdout, settings.log_format, settings.log_level, number)
        observer.gather(self._reactor)
        globalLogBeginner.beginLoggingTo([observer])
        self._proxy = proxy = WorkerProxy(
            settings, number, listeners, _pems(pems), Loads(LOADS), self._reactor
        )
        proxy.on_serving, proxy.on_failure = self._ready, self._cannot_start
        proxy.startService()

    def _ready(self) -> None:
        if self._proxy is not None and self._fresh is not None:
            self._proxy.put_in_force(*self._fresh)
        self._tell("ready")
        collect_rarely()
        self._reports.clock = self._reactor
        self._reports.start(REPORT_S, now=False)

    def _reload(self, settings: Config, pems: list[Pem | None]) -> None:
        self._fresh = settings, pems
        if self._proxy is not None and self._reports.running:
            self._proxy.put_in_force(*self._fresh)

    def _cannot_start(self) -> None:
        assert self._proxy is not None
        self._link.send("failed", reason=self._proxy.why_not)
        self.status = 1
        self.stop()

    def _report(self) -> None:
        self._tell("report")

    def _tell(self, kind: str) -> None:
        proxy = cast(WorkerProxy, self._proxy)
        metrics = proxy.metrics.snapshot().to_json()
        self._link.send(kind, metrics=metrics, checks=proxy.checks())

    def _alone(self) -> None:
        if self._proxy is not None:
            self._proxy.leave()
        self.stop()

    def _end(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._stop_in_order())

    async def _stop_in_order(self) -> None:
        if self._proxy is not None:
            await maybeDeferred(self._proxy.stopService)
            if self._reports.running:
                self._reports.stop()
                self._report()
        await self._hang_up()

    async def _hang_up(self) -> None:
        if self._link.transport is None:
            return
        self._link.transport.loseConnection()
        try:
            await self._link.gone.addTimeout(LAST_REPORT_S, self._reactor)
        except DeferTimeoutError:
            log.warn("the supervisor does not listen")


def _pems(given: list[Any]) -> list[Pem | None]:
    return [None if each is None else Pem(*each) for each in given]


def main() -> None:
    """Work until the supervisor says stop, or is gone."""
    # A terminal sends these to all of its processes; the supervisor passes on what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    install()
    from twisted.internet import reactor as global_reactor

    reactor: Any = global_reactor
    process = WorkerProcess(reactor)

    def take_signals() -> None:
        signal.signal(signal.SIGTERM, lambda *_: reactor.callFromThread(process.stop))

    reactor.callWhenRunning(take_signals)
    reactor.run()
    sys.exit(process.status)


if __name__ == "__main__":
    main()
