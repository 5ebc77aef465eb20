"""The command line and the signals: what `twistd llmproxy` and `python -m llmproxy` start.

twistd -n llmproxy -c config.toml  -->  Options --> makeService --> Proxy, or Supervisor
SIGHUP --> Proxy.reload    SIGTERM, SIGINT --> the reactor stops, and the proxy with it
SIGUSR2 --> Handover: a new process is started, and once it serves, the reactor stops
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from twisted.application.service import IService
from twisted.python import usage

from llmproxy import __version__, config, logs
from llmproxy.errors import ConfigError
from llmproxy.garbage import collect_rarely
from llmproxy.handover import Handover, Pidfile, Predecessor
from llmproxy.proxy import Proxy
from llmproxy.reactor import install
from llmproxy.sharing import Sockets
from llmproxy.supervisor import Supervisor
from llmproxy.systemd import tell_systemd
from llmproxy.tryout import make_demo


class Options(usage.Options):
    """The command line of `twistd llmproxy` and `python -m llmproxy`."""

    synopsis = "[options]"
    optParameters: ClassVar = [
        ["config", "c", None, "Configuration file (default: LLMPROXY_CONFIG, then config.toml)."],
    ]
    optFlags: ClassVar = [
        ["create-config", None, "Write the default configuration file, and exit."],
        ["demo", None, "Serve a small stand-in LLM with a throwaway database and sample keys."],
    ]

    def opt_version(self) -> None:
        """Show the version, and exit."""
        print(f"llmproxy {__version__}")
        sys.exit(0)


def makeService(options: Options) -> IService:
    """What twistd runs. Ends the process with one clear line when the configuration is bad."""
    if "twisted.internet.reactor" not in sys.modules:  # twistd was not told which one
        install()
    from twisted.internet import reactor

    path = config.find(options["config"], os.environ)
    if options["create-config"]:
        _create_config(path)
    try:
        proxy = make_demo(reactor) if options["demo"] else _make_proxy(path, reactor)
        settings = proxy.config
        observer = logs.twistd_observer(options.parent, settings.log_format, settings.log_level)
        if observer is None and settings.workers > 1:
            raise ConfigError("workers: more than 1 need the log on stdout or in a --logfile")
    except ConfigError as error:
        raise SystemExit(f"llmproxy: {error}") from None
    proxy.log_observer = observer
    if observer is not None:
        observer.gather(reactor)
    if (predecessor := Predecessor.of(os.environ, reactor)) is not None:
        proxy.predecessor = predecessor
        proxy.sockets = Sockets(reactor, predecessor.sockets)
    else:  # that one tells systemd about us, as long as it is the main process
        proxy.started.addCallback(lambda _: tell_systemd("READY=1"))
    pidfile = Pidfile(options.parent) if options.parent else None
    signals = Signals(proxy, reactor, pidfile, relievable=not options["demo"])

    def running() -> None:
        signals.install()
        collect_rarely()

    proxy.on_running = running
    proxy.on_failure = lambda: exit_with(1, reactor)
    return proxy


def _make_proxy(path: Path, reactor: Any) -> Proxy | Supervisor:
    service = Supervisor if config.load(path).workers > 1 else Proxy
    return service(lambda: config.load(path), reactor)


def _create_config(path: Path) -> None:
    try:
        # Tokens will be in it.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(config.default_text())
    except OSError as error:
        raise SystemExit(f"llmproxy: {path}: can't be written: {error.strerror}") from None
    print(f"{path} written")
    sys.exit(0)


class Signals:
    """The signals that an operator sends: SIGHUP, SIGTERM, SIGINT, SIGUSR2.

    relievable: whether SIGUSR2 has an effect.
    """

    def __init__(
        self,
        proxy: Proxy | Supervisor,
        reactor: Any,
        pidfile: Pidfile | None = None,
        *,
        relievable: bool = True,
    ) -> None:
        self._proxy = proxy
        self._reactor = reactor
        self._relievable = relievable
        self._handover = Handover(proxy, reactor, self._relieved, pidfile=pidfile)
        self._stopping = False  # whatever the reason
        self._told = False  # by a signal

    def install(self) -> None:
        """Take the signals over. Twisted would end itself by the signal, not with status 0."""
        signal.signal(signal.SIGHUP, self._soon(self._proxy.reload))
        signal.signal(signal.SIGTERM, self._soon(self._stop))
        signal.signal(signal.SIGINT, self._soon(self._stop))
        signal.signal(signal.SIGUSR2, self._soon(self._be_relieved))

    def _soon(self, act: Callable[[], None]) -> Callable[[int, object], None]:
        return lambda number, frame: self._reactor.callFromThread(act)

    def _stop(self) -> None:
        """The first time: stop in order. The second time: wait for no stream any longer."""
        if self._told:
            self._proxy.cut()
        elif self._reactor.running:
            self._told = True
            if not self._stopping:
                self._handover.abandon()
                tell_systemd("STOPPING=1")
            self._leave()

    def _be_relieved(self) -> None:
        if self._relievable and self._proxy.started.called and not self._stopping:
            self._handover.begin()

    def _relieved(self) -> None:
        self._proxy.relieved = True
        self._leave()

    def _leave(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._reactor.stop()


def exit_with(status: int, reactor: Any) -> None:
    """End the process with this status; twistd itself knows only 0."""

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(leave)
    if reactor.running:
        reactor.stop()
    else:
        reactor.callWhenRunning(reactor.stop)
