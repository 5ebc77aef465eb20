"""One connection to a MongoDB server: commands, their time limits, and logging in.

The wire protocol is txmongo's. Its own authentication knows no SCRAM-SHA-256.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError
from pymongo.errors import NotPrimaryError, PyMongoError
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import Factory
from twisted.python.failure import Failure
from txmongo.protocol import MongoProtocol, Msg

from llmproxy.errors import ConfigError, StorageError
from llmproxy.storage.mongo_uri import KEY, X509, Credentials, Host
from llmproxy.storage.scram import SHA_1, SHA_256, ScramConversation, ScramError, ScramKey

LOGIN_TIMEOUT_S = 5.0

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

        Fails with `Disconnected`, or with `StorageError` where no answer came in time. Then, and
        where the caller waits no longer, the connection is given up: its server may be frozen. The
        command may still be carried out.
        """
        payload = {"documents": list(documents)} if documents else None
        self.used_at = self._clock.seconds()
        try:
            message = Msg.create({**command, "$db": database}, payload, codec_options=_CODEC)
            reply = self.send_msg(message, _CODEC, None, check=False)
            answer: Document = await reply.addTimeout(timeout_s, self._clock)
        except CancelledError:
            self.abort()
            raise
        except DeferredTimeout as error:
            self.abort()
            raise StorageError(
                f"{host_text(self.host)}: no answer within {timeout_s:.1f} s"
            ) from error
        except NotPrimaryError as error:
            raise Disconnected(f"{host_text(self.host)}: not the primary any more") from error
        except (PyMongoError, BSONError) as error:
            raise Disconnected(f"{host_text(self.host)}: {self._reason or error}") from error
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
        self._reason = self._reason or f"connection lost ({reason_text(reason.value)})"
        super().connectionLost(reason)
        waiting, self._closed = self._closed, []
        for deferred in waiting:
            deferred.callback(None)


class WireFactory(Factory):
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
            raise ConfigError(f"{KEY}: {mechanism} at {host_text(wire.host)}: {error}") from error
        except (KeyError, TypeError) as error:
            raise StorageError(f"{host_text(wire.host)}: {mechanism} was not understood") from error

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
                f"{KEY}: MongoDB at {host_text(wire.host)} refuses the user {who.username!r} of"
                f" database {who.source!r}: wrong password, user, authSource or authMechanism"
            )
        raise StorageError(f"{host_text(wire.host)}: {describe(reply)}")


def write_concern(wire: Wire, timeout_s: float) -> Document:
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


def host_text(host: Host) -> str:
    name, port = host
    if port is None:
        return name
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def reason_text(error: BaseException | None) -> str:
    """Why a connection failed, in one line; OpenSSL's errors are lists of triples."""
    first: Any = error.args[0] if error is not None and error.args else None
    if isinstance(first, list) and first and isinstance(first[0], tuple):
        return f"TLS: {first[0][-1]}"
    return " ".join(str(error).split()) or type(error).__name__
