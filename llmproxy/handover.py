"""A new process takes the place of the one that runs, on the same sockets, without a pause.

    the old one                                   the new one
       starts it, with the sockets          --->
                                                  opens everything, accepts nobody yet
                                            <---  ready (pid)
       accepts nobody any more; go          --->  accepts
       lets its requests end, as after SIGTERM
                                            <---  cut: it is to stop at once, too
       ends                                 --->  closes the rows that may have been left open

Clients that wait to be accepted do so at the sockets, which are never closed. Nothing has changed
before `go`: where the new process ends, or says nothing for long, the old one serves on. Each also
notices when the other one is gone, as the link between them closes then.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as DeferTimeoutError
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import Factory
from twisted.logger import Logger

from llmproxy.control import Message
from llmproxy.errors import ConfigError
from llmproxy.link import Link
from llmproxy.sharing import Sockets
from llmproxy.systemd import knows_only_this_process, tell_systemd

#: What a new process is told by: the descriptors of the link and of the sockets.
VARIABLE = "LLMPROXY_HANDOVER"
#: How long a new process may take until it is ready.
PATIENCE_S = 60.0

log = Logger()


class Predecessor:
    """The process whose place this one takes, as seen from here.

    `sockets`: see `Sockets`. `gone` fires when it has ended.
    """

    def __init__(self, link: int, sockets: Sequence[tuple[str, int]], reactor: Any) -> None:
        self.sockets = sockets
        self._descriptor, self._reactor = link, reactor
        self._link = Link(self._heard)
        self._room: Deferred[None] = Deferred()
        self._waiting: Deferred[None] | None = None
        self.gone = self._link.gone
        self.gone.addCallback(lambda _: self._lost())

    @classmethod
    def of(cls, environment: MutableMapping[str, str], reactor: Any) -> Predecessor | None:
        """The one that started this process, if one did so to be relieved."""
        given = environment.pop(VARIABLE, None)
        return None if given is None else cls(**json.loads(given), reactor=reactor)

    async def makes_room(self) -> None:
        """Tell it that we are ready; it accepts nobody when this returns.

        Raises ConfigError when it has changed its mind.
        """
        _connect(self._link, self._descriptor, self._reactor)
        self._link.send("ready", pid=os.getpid())
        await self._room

    async def ended(self, timeout_s: float) -> None:
        """Wait until it has ended, if we have relieved it."""
        if self._room.called and self._link.transport is not None:
            waiting: Deferred[None] = Deferred()
            self._waiting = waiting
            try:
                await waiting.addTimeout(timeout_s, self._reactor)
            except DeferTimeoutError:
                log.warn("the process before this one does not end")

    def cut(self) -> None:
        """It is not to wait for its streams any longer."""
        self._link.send("cut")

    def _heard(self, message: Message) -> None:
        self._room.callback(None)  # the only thing that it says

    def _lost(self) -> None:
        if self._waiting is not None and not self._waiting.called:
            self._waiting.callback(None)
        if not self._room.called:
            self._room.errback(ConfigError("the process to be relieved is gone, or waits no more"))


class Relieved(Protocol):
    """A service whose process can be relieved: `Proxy`, `Supervisor`."""

    sockets: Sockets

    def cut(self) -> None:
        """Wait for no stream any longer."""


class Handover:
    """What a running process does to be relieved: `begin`, each time that it is asked to.

    idle -> begin: a new process is started -> it is ready: handed over
      ^                 |  it ends, or takes longer than `patience_s`; `abandon`
      +-----------------+

    `on_relieved` is called once the new process accepts the clients in our place. `pidfile` is the
    one that we have written, if any: it is moved aside, so that the new process can write its own.
    """

    def __init__(
        self,
        service: Relieved,
        reactor: Any,
        on_relieved: Callable[[], None],
        *,
        pidfile: Pidfile | None = None,
        command: Sequence[str] = (),
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._service, self._reactor, self._on_relieved = service, reactor, on_relieved
        self._pidfile = pidfile
        # As it was started; twistd may change the folder.
        self._command = [*(command or [sys.executable, *sys.orig_argv[1:]])]
        self._folder = Path.cwd()
        self._patience_s = patience_s
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._late: IDelayedCall | None = None

    def begin(self) -> None:
        """Start a new process, unless one is starting. What is in the way is told in one line."""
        if self._link is not None:
            return
        if (reason := _why_never()) is not None:
            log.error("not handed over: {reason}", reason=reason)
            return
        if self._pidfile is not None:
            self._pidfile.move_aside()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._start(theirs.fileno())
            self._link = link = Link(self._heard)
            link.gone.addCallback(lambda _: self._fail("it has ended; what it said tells why"))
            _connect(link, ours.detach(), self._reactor)
        self._late = self._reactor.callLater(self._patience_s, self._fail, "it takes too long")

    def abandon(self) -> None:
        """This process is to stop; a new one that is not ready yet is to stop, too."""
        if self._late is not None:
            self._fail("this process is told to stop")

    def _start(self, link: int) -> None:
        sockets = self._service.sockets.descriptors()
        told = json.dumps({"link": link, "sockets": sockets})
        log.info("a new process is started, to take this one's place")
        self._process = subprocess.Popen(
            self._command,
            cwd=self._folder,
            env={**os.environ, VARIABLE: told},
            pass_fds=[link, *(descriptor for _, descriptor in sockets)],
        )

    def _heard(self, message: Message) -> None:
        match message:
            case {"kind": "ready", "pid": pid} if self._late is not None:
                self._hand_over(pid)
            case {"kind": "cut"}:
                self._service.cut()

    def _hand_over(self, pid: int) -> None:
        assert self._link is not None
        self._wait_no_more()
        self._service.sockets.hand_on(pid)
        self._link.send("go")
        tell_systemd(f"MAINPID={pid}")
        log.info("handed over to process {pid}", pid=pid)
        self._on_relieved()

    def _wait_no_more(self) -> None:
        assert self._late is not None
        if self._late.active():
            self._late.cancel()
        self._late = None

    def _fail(self, reason: str) -> None:
        if self._late is None:
            return
        self._wait_no_more()
        link, self._link = self._link, None
        if link is not None and link.transport is not None:
            link.transport.loseConnection()
        if self._process is not None:
            self._process.terminate()
        if self._pidfile is not None:
            self._pidfile.move_back()
        log.error("not handed over: {reason}", reason=reason)


class Pidfile:
    """The file that twistd writes: `options["pidfile"]`, an empty text if there is none."""

    def __init__(self, options: MutableMapping[str, Any]) -> None:
        self._options = options
        self._path: str = options["pidfile"]

    def move_aside(self) -> None:
        """To PATH.old; twistd removes it at the end."""
        self._move(f"{self._path}.old")

    def move_back(self) -> None:
        """As it was."""
        self._move(self._path)

    def _move(self, path: str) -> None:
        if not self._path:
            return
        try:
            os.replace(self._options["pidfile"], path)
        except OSError as error:
            log.warn("{path} can't be written: {error}", path=path, error=error.strerror)
        self._options["pidfile"] = path


def _why_never() -> str | None:
    if os.getpid() == 1:
        return "as process 1 of a container this one has to stay; start another container"
    if knows_only_this_process():
        return "systemd would end the new process with this one; the unit needs Type=notify"
    return None


def _connect(link: Link, descriptor: int, reactor: Any) -> None:
    factory = Factory.forProtocol(lambda: link)
    factory.noisy = False
    reactor.adoptStreamConnection(descriptor, socket.AF_UNIX, factory)
    os.close(descriptor)
