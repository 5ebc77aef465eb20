"""A few authenticated connections to the primary of a MongoDB deployment.

The wire protocol is txmongo's. Its pool is not used: that one swallows failed authentications,
hands out dead connections in turn, verifies all members of a replica set under one name, and can't
reach IPv6 members.

A slot of the pool goes round:

    connect -> hello -> (not the primary: next host) -> authenticate -> ready -> lost -> connect

and waits a little, longer each time, where no host could be used. A call takes a ready connection
for itself; when none is free it waits in a bounded queue, and when the deployment has been out of
reach for `GRACE_S` it fails at once.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, DeferredList
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IReactorTime, IStreamClientEndpoint
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from llmproxy.errors import ConfigError, StorageError
from llmproxy.storage.mongo_tls import TLSClient
from llmproxy.storage.mongo_uri import KEY, Host, MongoAddress
from llmproxy.storage.mongo_wire import (
    Disconnected,
    Document,
    Login,
    Wire,
    WireFactory,
    describe,
    host_text,
    reason_text,
    write_concern,
)

POOL_SIZE = 4
MAX_WAITING = 1000  # calls
GRACE_S = 2.0
CONNECT_TIMEOUT_S = 2.0
ATTEMPT_DELAY_S = 0.05
RETRY_S, RETRY_MAX_S = 0.5, 2.0
CLOSE_TIMEOUT_S = 2.0
PING_S = 2.0  # both between pings and for an answer


class MongoPool:
    """Connections to the primary, made anew whenever they are lost, until `close()`.

    `ask()` and `write()` fail with `StorageError` and nothing else, but for a caller's own
    cancellation.
    """

    log = Logger()

    def __init__(
        self,
        reactor: IReactorTime,
        address: MongoAddress,
        *,
        size: int = POOL_SIZE,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self._reactor = reactor
        self._address = address
        self._size = size
        self._max_waiting = max_waiting
        self._tls = TLSClient(address.tls) if address.tls is not None else None
        self._login = Login(address.credentials)
        self._hosts: list[Host] = list(address.hosts)
        self._primary: Host | None = None
        self._open: set[Wire] = set()
        self._ready: set[Wire] = set()
        self._free: list[Wire] = []
        self._waiting: deque[Deferred[Wire]] = deque()
        self._slots: list[Deferred[None]] = []
        self._pings: LoopingCall | None = None
        self._closing = False
        self._down_since = 0.0
        self._reason: Exception | None = None
        self._started: list[Deferred[None]] = []

    @property
    def read_concern(self) -> str | None:
        """The level that reads are to have; None: the server's default."""
        return self._address.read_concern

    def set_address(self, address: MongoAddress) -> None:
        """Take the hosts that were resolved; before `start()`."""
        self._address = address
        self._login = Login(address.credentials)
        self._hosts = list(address.hosts)

    @property
    def connected(self) -> bool:
        """Whether at least one connection is ready."""
        return bool(self._ready)

    async def start(self, timeout_s: float) -> None:
        """Begin to connect, and return when a first connection is ready.

        Raises `ConfigError` if a server refuses us, `StorageError` if none could be used in time.
        """
        self._down_since = self._reactor.seconds()
        first: Deferred[None] = Deferred()
        self._started.append(first)
        for _ in range(self._size):
            self._slots.append(Deferred.fromCoroutine(self._keep_connected()))
        self._pings = LoopingCall(self._ping_idle)
        self._pings.clock = self._reactor
        self._pings.start(PING_S, now=False).addErrback(self._bug)
        try:
            await first.addTimeout(timeout_s, self._reactor)
        except DeferredTimeout as error:
            raise self._unavailable() from error

    async def close(self) -> None:
        """Close all connections, fail what waits, and return when all are gone."""
        self._closing = True
        # Our caller may run on top of a slot, and a coroutine can't be cancelled while it runs.
        await self._sleep(0)
        if self._pings is not None and self._pings.running:
            self._pings.stop()
        for waiting in list(self._waiting):
            waiting.errback(StorageError("MongoDB: the connections are closed"))
        self._waiting.clear()
        slots, self._slots = self._slots, []
        for slot in slots:
            slot.cancel()
        gone = [wire.when_closed() for wire in self._open]
        for wire in list(self._open):
            wire.abort()
        ends = DeferredList([*gone, *slots], consumeErrors=True)
        with suppress(DeferredTimeout):
            await ends.addTimeout(CLOSE_TIMEOUT_S, self._reactor)

    async def ask(self, database: str, command: Document, *, timeout_s: float) -> Document:
        """Run a command on the primary, within `timeout_s`; returns its reply.

        The reply can be an error. If the connection is lost, another one is tried, once: the
        command must have no effect, or none that changes when it is carried out again.
        """
        deadline = self._reactor.seconds() + timeout_s
        try:
            return await self._call(database, command, (), timeout_s)
        except Disconnected:
            left = deadline - self._reactor.seconds()
            return await self._call(database, command, (), max(left, 0.001))

    async def write(
        self, database: str, command: Document, documents: Sequence[Document], *, timeout_s: float
    ) -> Document:
        """Run an insert of `documents`, to be acknowledged when it is there to stay.

        Like `ask()`, but never sent twice. A failure says nothing of the effect.
        """
        return await self._call(database, command, documents, timeout_s)

    async def _call(
        self, database: str, command: Document, documents: Sequence[Document], timeout_s: float
    ) -> Document:
        deadline = self._reactor.seconds() + timeout_s
        wire = await self._take(timeout_s)
        try:
            left = max(deadline - self._reactor.seconds(), 0.001)
            if documents:
                command = {**command, "writeConcern": write_concern(wire, left)}
            return await wire.run(database, command, documents, timeout_s=left)
        except Disconnected:
            self._drop(wire.host)
            raise
        except (StorageError, CancelledError):
            raise
        except Exception as error:
            raise StorageError(f"MongoDB: {type(error).__name__}") from error
        finally:
            self._give_back(wire)

    # Taking and giving back

    async def _take(self, timeout_s: float) -> Wire:
        while self._free:
            wire = self._free.pop()
            if not wire.dead:
                return wire
        wait_s = timeout_s
        if not self._ready:
            wait_s = min(timeout_s, self._down_since + GRACE_S - self._reactor.seconds())
        if self._closing or wait_s <= 0:
            raise self._unavailable()
        if len(self._waiting) >= self._max_waiting:
            raise StorageError("MongoDB: too many calls wait for a connection")
        waiting: Deferred[Wire] = Deferred(self._waiting.remove)
        self._waiting.append(waiting)
        try:
            return await waiting.addTimeout(wait_s, self._reactor)
        except DeferredTimeout as error:
            raise self._unavailable() from error

    def _give_back(self, wire: Wire) -> None:
        if wire.dead:
            return
        if self._waiting:
            self._waiting.popleft().callback(wire)
        else:
            self._free.append(wire)

    def _unavailable(self) -> StorageError:
        if self._ready:
            return StorageError("MongoDB: all connections are busy")
        return StorageError(f"MongoDB: no primary can be used: {self._reason or 'no answer yet'}")

    # Connecting

    async def _keep_connected(self) -> None:
        """The life of one slot; ends when it is cancelled."""
        delay_s = RETRY_S
        while True:
            try:
                wire = await self._connect()
            except CancelledError:
                raise
            except Exception as error:  # a slot that ends would never be filled again
                self._failed(error)
                if self._closing:  # an endpoint's way to say that its connecting was cancelled
                    return
                await self._sleep(delay_s * random.uniform(0.5, 1.0))
                delay_s = min(delay_s * 2, RETRY_MAX_S)
                continue
            delay_s = RETRY_S
            gone = wire.when_closed()
            self._add(wire)
            await gone
            self._remove(wire)

    async def _connect(self) -> Wire:
        """A ready connection to the primary, wherever it is now."""
        tried: set[Host] = set()
        error: Exception = StorageError("no host is known")
        while (host := self._next_host(tried)) is not None:
            tried.add(host)
            try:
                wire = await self._open_wire(host)
                if wire is not None:
                    self._primary = host
                    return wire
                error = StorageError(f"{host_text(host)}: not a primary")
            except StorageError as failure:
                error = failure
            if self._primary == host:
                self._primary = None
        raise error

    def _next_host(self, tried: set[Host]) -> Host | None:
        hosts = [self._primary, *self._hosts, *self._address.hosts]
        return next((host for host in hosts if host is not None and host not in tried), None)

    async def _open_wire(self, host: Host) -> Wire | None:
        """A connection to `host`, logged in; None if that is not a primary."""
        wire = await self._dial(host)
        self._open.add(wire)
        wire.when_closed().addCallback(lambda _: self._open.discard(wire))
        try:
            hello = await self._hello(wire)
            self._learn(hello)
            if hello.get("isWritablePrimary", hello.get("ismaster")):
                await self._login.authenticate(wire, hello)
                return wire
        except BaseException:
            wire.abort()
            raise
        wire.abort()
        return None

    async def _dial(self, host: Host) -> Wire:
        endpoint = self._endpoint(host)
        try:
            connecting = endpoint.connect(WireFactory(self._reactor, host))
            wire = await connecting.addTimeout(CONNECT_TIMEOUT_S, self._reactor)
        except CancelledError:
            raise
        except Exception as error:  # every reason why a connection can't be made
            raise StorageError(f"{host_text(host)}: {reason_text(error)}") from error
        assert isinstance(wire, Wire)
        return wire

    def _endpoint(self, host: Host) -> IStreamClientEndpoint:
        name, port = host
        endpoint: IStreamClientEndpoint
        if port is None:
            endpoint = UNIXClientEndpoint(self._reactor, name, CONNECT_TIMEOUT_S)
            return endpoint
        # The delay is also how late a refusal is noticed, and it is a pause between two families.
        endpoint = HostnameEndpoint(
            self._reactor, name, port, timeout=CONNECT_TIMEOUT_S, attemptDelay=ATTEMPT_DELAY_S
        )
        if self._tls is not None:
            endpoint = wrapClientTLS(self._tls.creator(name), endpoint)
        return endpoint

    async def _hello(self, wire: Wire) -> Document:
        # The old name of hello is the one that every server from 3.6 on understands.
        command = {"isMaster": 1, "helloOk": True, **self._login.question()}
        command["client"] = {
            "application": {"name": self._address.app_name[:128]},
            "driver": {"name": "llmproxy", "version": "1"},
            "os": {"type": "Linux"},
        }
        hello = await wire.run("admin", command, timeout_s=CONNECT_TIMEOUT_S)
        if not hello.get("ok"):
            raise StorageError(f"{host_text(wire.host)}: {describe(hello)}")
        self._check_set(wire, hello)
        wire.replicated = "setName" in hello or hello.get("msg") == "isdbgrid"
        return hello

    def _check_set(self, wire: Wire, hello: Mapping[str, Any]) -> None:
        wanted, found = self._address.replica_set, hello.get("setName")
        # A member that does not know its set yet says `isreplicaset`.
        if wanted is None or wanted == found or hello.get("isreplicaset"):
            return
        member = f"a member of {found!r}" if found else "no member of a replica set"
        raise ConfigError(
            f"{KEY}: replicaSet is {wanted!r}, but {host_text(wire.host)} is {member}"
        )

    def _learn(self, hello: Mapping[str, Any]) -> None:
        """Take the members and the primary from what one of them says."""
        if self._address.direct or not hello.get("setName"):
            return
        members = [*hello.get("hosts", ()), *hello.get("passives", ())]
        self._hosts = [_host(member) for member in members] or self._hosts
        if hello.get("primary"):
            self._primary = _host(hello["primary"])

    # What the slots tell the pool

    def _add(self, wire: Wire) -> None:
        if not self._ready:
            self.log.info("MongoDB: connected to the primary {host}", host=host_text(wire.host))
        self._ready.add(wire)
        self._give_back(wire)
        self._report(None)

    def _remove(self, wire: Wire) -> None:
        self._ready.discard(wire)
        if wire in self._free:
            self._free.remove(wire)
        if not self._ready and not self._closing:
            self._down_since = self._reactor.seconds()
            self.log.warn(
                "MongoDB: the last connection to {host} is lost", host=host_text(wire.host)
            )

    def _failed(self, error: Exception) -> None:
        self._reason = error
        if isinstance(error, ConfigError):
            self._report(error)
        elif not isinstance(error, StorageError):
            self._bug(Failure(error))

    def _report(self, error: Exception | None) -> None:
        started, self._started = self._started, []
        for deferred in started:
            if error is None:
                deferred.callback(None)
            else:
                deferred.errback(error)

    def _drop(self, host: Host) -> None:
        """Give up all connections to a server that has lost its place or its process."""
        if self._primary == host:
            self._primary = None
        for wire in self._ready:
            if wire.host == host:
                wire.abort()

    # Pings

    def _ping_idle(self) -> None:
        """Ask the connections that nobody uses whether they lead to a primary still."""
        now = self._reactor.seconds()
        idle = [w for w in self._free if not w.dead and now - w.used_at >= PING_S / 2]
        for wire in idle:
            self._free.remove(wire)
            Deferred.fromCoroutine(self._ping(wire)).addErrback(self._bug)

    async def _ping(self, wire: Wire) -> None:
        try:
            hello = await wire.run("admin", {"isMaster": 1}, timeout_s=PING_S)
        except StorageError as error:
            self._reason = error
            wire.abort()
            return
        if hello.get("isWritablePrimary", hello.get("ismaster")):
            self._give_back(wire)
            return
        self._learn(hello)
        wire.abort()

    def _sleep(self, seconds: float) -> Awaitable[None]:
        return deferLater(self._reactor, seconds)

    def _bug(self, failure: Failure) -> None:
        self.log.failure("MongoDB: an error of the pool itself", failure)


def _host(text: str) -> Host:
    name, _, port = text.rpartition(":")
    return name.strip("[]"), int(port)
