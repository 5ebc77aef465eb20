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

from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError
from pymongo.errors import NotPrimaryError, PyMongoError
from twisted.internet.defer import CancelledError, Deferred, DeferredList, succeed
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IReactorTime, IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from txmongo.protocol import MongoProtocol, Msg

from llmproxy.errors import ConfigError, StorageError
from llmproxy.storage.mongo_tls import TLSClient
from llmproxy.storage.mongo_uri import KEY, X509, Credentials, Host, MongoAddress
from llmproxy.storage.scram import SHA_1, SHA_256, ScramConversation, ScramError, ScramKey

POOL_SIZE = 4
MAX_WAITING = 1000  # calls
GRACE_S = 2.0
CONNECT_TIMEOUT_S = 2.0
ATTEMPT_DELAY_S = 0.05
LOGIN_TIMEOUT_S = 5.0
RETRY_S, RETRY_MAX_S = 0.5, 2.0
CLOSE_TIMEOUT_S = 2.0
PING_S = 2.0  # both between pings and for an answer

# AuthenticationFailed, UserNotFound, MechanismUnavailable
_REFUSALS = frozenset({18, 11, 334})

_CODEC: CodecOptions[dict[str, Any]] = CodecOptions(
    tz_aware=True, datetime_conversion=DatetimeConversion.DATETIME_AUTO
)

Document = dict[str, Any]


class Disconnected(StorageError):
    """The connection was lost, or leads to no primary any more; another one may do."""


class _NoClusterTime:
    """What txmongo's protocol tells its pool; we use no sessions, so nobody needs to know."""

    def _advance_cluster_time(self, session: object, reply: object) -> None:
        pass


class Wire(MongoProtocol):  # type: ignore[misc]
    """One connection to one server.

    `dead`: given up or lost, so that nobody may use it again. `replicated`: the server is no
    standalone one, but a member of a set, or mongos.
    """

    def __init__(self, clock: IReactorTime, host: Host) -> None:
        super().__init__()
        self.host = host
        self.used_at = clock.seconds()
        self.dead = False
        self.replicated = True
        self._clock = clock
        self._reason = ""
        self._lost = False
        self._closed: list[Deferred[None]] = []

    async def run(
        self,
        database: str,
        command: Mapping[str, Any],
        documents: Sequence[Mapping[str, Any]] = (),
        *,
        timeout_s: float,
    ) -> Document:
        """Send one command and return the server's reply, whatever it says.

        Fails with `Disconnected`, or with `StorageError` where no answer came in time: then the
        connection is given up, and the command may still be carried out.
        """
        payload = {"documents": list(documents)} if documents else None
        self.used_at = self._clock.seconds()
        try:
            message = Msg.create({**command, "$db": database}, payload, codec_options=_CODEC)
            reply = self.send_msg(message, _CODEC, None, check=False)
            answer: Document = await reply.addTimeout(timeout_s, self._clock)
        except DeferredTimeout as error:
            self.abort()
            raise StorageError(f"{_text(self.host)}: no answer within {timeout_s:.1f} s") from error
        except NotPrimaryError as error:
            raise Disconnected(f"{_text(self.host)}: not the primary any more") from error
        except (PyMongoError, BSONError) as error:
            raise Disconnected(f"{_text(self.host)}: {self._reason or error}") from error
        return answer

    def abort(self) -> None:
        """Close the connection at once."""
        self.dead = True
        if self.transport is not None:
            self.transport.abortConnection()

    def when_closed(self) -> Deferred[None]:
        """Fires when the connection is gone."""
        if self._lost:
            return succeed(None)
        waiting: Deferred[None] = Deferred()
        self._closed.append(waiting)
        return waiting

    def fail(self, reason: object) -> None:
        self._reason = f"the answer was not understood ({type(reason).__name__})"
        self.abort()

    def connectionLost(self, reason: Failure) -> None:
        self.dead = self._lost = True
        self._reason = self._reason or f"connection lost ({_reason(reason.value)})"
        super().connectionLost(reason)
        waiting, self._closed = self._closed, []
        for deferred in waiting:
            deferred.callback(None)


class _WireFactory(Factory):
    """Builds one `Wire`, and is what txmongo's protocol expects behind itself."""

    noisy = False
    pool = _NoClusterTime()

    def __init__(self, clock: IReactorTime, host: Host) -> None:
        self._clock = clock
        self._host = host

    def buildProtocol(self, addr: object) -> Wire:
        wire = Wire(self._clock, self._host)
        wire.factory = self
        return wire

    def setInstance(self, instance: object = None, reason: object = None) -> None:
        pass


class Login:
    """Authenticates connections as one user; keeps what can be computed once."""

    def __init__(self, credentials: Credentials | None) -> None:
        self._credentials = credentials
        self._keys: dict[str, ScramKey] = {}

    def question(self) -> Document:
        """What to add to hello in order to learn which mechanisms the user has."""
        who = self._credentials
        if who is None or who.mechanism != "DEFAULT":
            return {}
        return {"saslSupportedMechs": f"{who.source}.{who.username}"}

    async def authenticate(self, wire: Wire, hello: Mapping[str, Any]) -> None:
        """Raises `ConfigError` if the server refuses the user, else `StorageError`."""
        who = self._credentials
        if who is None:
            return
        if who.mechanism == X509:
            await self._x509(wire, who)
            return
        offered = hello.get("saslSupportedMechs") or (SHA_1,)
        default = SHA_256 if SHA_256 in offered else SHA_1
        mechanism = default if who.mechanism == "DEFAULT" else who.mechanism
        await self._scram(wire, who, mechanism)

    async def _x509(self, wire: Wire, who: Credentials) -> None:
        user = {} if who.username is None else {"user": who.username}
        await self._step(wire, who, {"authenticate": 1, "mechanism": X509, **user})

    async def _scram(self, wire: Wire, who: Credentials, mechanism: str) -> None:
        try:
            talk = ScramConversation(self._key(who, mechanism))
            start = {"saslStart": 1, "mechanism": mechanism, "payload": talk.first()}
            reply = await self._step(wire, who, {**start, "options": {"skipEmptyExchange": True}})
            proof = {"payload": talk.final(bytes(reply["payload"]))}
            reply = await self._step(wire, who, {**_continue(reply), **proof})
            talk.verify(bytes(reply["payload"]))
            if not reply.get("done"):
                reply = await self._step(wire, who, {**_continue(reply), "payload": b""})
        except ScramError as error:
            raise ConfigError(f"{KEY}: {mechanism} at {_text(wire.host)}: {error}") from error
        except (KeyError, TypeError) as error:
            raise StorageError(f"{_text(wire.host)}: {mechanism} was not understood") from error

    def _key(self, who: Credentials, mechanism: str) -> ScramKey:
        if mechanism not in self._keys:
            self._keys[mechanism] = ScramKey(mechanism, who.username or "", who.password or "")
        return self._keys[mechanism]

    async def _step(self, wire: Wire, who: Credentials, command: Document) -> Document:
        reply = await wire.run(who.source, command, timeout_s=LOGIN_TIMEOUT_S)
        if reply.get("ok"):
            return reply
        if reply.get("code") in _REFUSALS:
            raise ConfigError(
                f"{KEY}: MongoDB at {_text(wire.host)} refuses the user {who.username!r} of"
                f" database {who.source!r}: wrong password, user, authSource or authMechanism"
            )
        raise StorageError(f"{_text(wire.host)}: {describe(reply)}")


class MongoPool:
    """Connections to the primary, made anew whenever they are lost, until `close()`.

    `read()` and `write()` fail with `StorageError` and nothing else, but for a caller's own
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

    async def read(self, database: str, command: Document, *, timeout_s: float) -> Document:
        """Run a command without effect on the primary, within `timeout_s`; returns its reply.

        The reply can be an error. If the connection is lost, another one is tried, once.
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

        Like `read()`, but never sent twice. A failure says nothing of the effect.
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
                command = {**command, "writeConcern": _write_concern(wire, left)}
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
                error = StorageError(f"{_text(host)}: not a primary")
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
            connecting = endpoint.connect(_WireFactory(self._reactor, host))
            wire = await connecting.addTimeout(CONNECT_TIMEOUT_S, self._reactor)
        except CancelledError:
            raise
        except Exception as error:  # every reason why a connection can't be made
            raise StorageError(f"{_text(host)}: {_reason(error)}") from error
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
            raise StorageError(f"{_text(wire.host)}: {describe(hello)}")
        self._check_set(wire, hello)
        wire.replicated = "setName" in hello or hello.get("msg") == "isdbgrid"
        return hello

    def _check_set(self, wire: Wire, hello: Mapping[str, Any]) -> None:
        wanted, found = self._address.replica_set, hello.get("setName")
        # A member that does not know its set yet says `isreplicaset`.
        if wanted is None or wanted == found or hello.get("isreplicaset"):
            return
        member = f"a member of {found!r}" if found else "no member of a replica set"
        raise ConfigError(f"{KEY}: replicaSet is {wanted!r}, but {_text(wire.host)} is {member}")

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
            self.log.info("MongoDB: connected to the primary {host}", host=_text(wire.host))
        self._ready.add(wire)
        self._give_back(wire)
        self._report(None)

    def _remove(self, wire: Wire) -> None:
        self._ready.discard(wire)
        if wire in self._free:
            self._free.remove(wire)
        if not self._ready and not self._closing:
            self._down_since = self._reactor.seconds()
            self.log.warn("MongoDB: the last connection to {host} is lost", host=_text(wire.host))

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


def _write_concern(wire: Wire, timeout_s: float) -> Document:
    """What makes an acknowledged write survive a crash of the server.

    A server that stands alone does not wait for its journal with `majority` (8.2 acknowledged
    inserts and had lost them after a kill -9); with `w: 1` it does. In a set, `majority` waits for
    the journals of most members. The server gives up before we do, so that it can still say why.
    """
    return {
        "w": "majority" if wire.replicated else 1,
        "j": True,
        "wtimeout": max(int(timeout_s * 800), 1),
    }


def describe(reply: Mapping[str, Any]) -> str:
    """A server's error as one short line, without its text, which can repeat documents."""
    return f"error {reply.get('code', '?')} {reply.get('codeName', '')}".rstrip()


def _continue(reply: Mapping[str, Any]) -> Document:
    return {"saslContinue": 1, "conversationId": reply["conversationId"]}


def _host(text: str) -> Host:
    name, _, port = text.rpartition(":")
    return name.strip("[]"), int(port)


def _text(host: Host) -> str:
    name, port = host
    if port is None:
        return name
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def _reason(error: BaseException | None) -> str:
    """Why a connection failed, in one line; OpenSSL's errors are lists of triples."""
    first: Any = error.args[0] if error is not None and error.args else None
    if isinstance(first, list) and first and isinstance(first[0], tuple):
        return f"TLS: {first[0][-1]}"
    return " ".join(str(error).split()) or type(error).__name__
