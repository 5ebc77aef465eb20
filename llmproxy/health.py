"""Whether servers answer: each one's `/health` is asked at start and then at an interval.

Of a model's servers those that are up go first. Where none is, they get their requests all the
same: a server's own answer tells a client more than we could.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Generic, NoReturn, Protocol, TypeVar

from twisted.application.service import Service
from twisted.internet import error
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent

from llmproxy.upstream import drop

INTERVAL_S = 15.0
TIMEOUT_S = 5.0

log = Logger()


class Health(enum.StrEnum):
    """What is known about a backend."""

    UP = "up"
    DOWN = "down"
    UNKNOWN = "unknown"  # not asked yet


class Checked(Protocol):
    """What a backend is known by; a change of either makes it another backend."""

    @property
    def name(self) -> str:
        """The name that clients use."""

    @property
    def url(self) -> str:
        """Where it listens."""


B = TypeVar("B", bound=Checked)
#: Ask a backend's `/health`, and give the answer's status; to be cancelled at any time.
Fetch = Callable[[B], Awaitable[int]]
#: Told the result of each check: name, URL, and whether it is up (None: not known any more).
Report = Callable[[str, str, bool | None], None]

_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (error.ConnectionRefusedError, "connection refused"),
    (error.DNSLookupError, "host name not found"),
    (error.NoRouteError, "no route to host"),
    (TimeoutError, "no answer in time"),
    (error.TimeoutError, "no connection in time"),
    (error.ConnectionLost, "connection lost"),
    (error.ConnectionDone, "connection closed without an answer"),
)


def judge(status: int) -> tuple[Health, str]:
    """What the status of an answer says, and why.

    Any 5xx is down: vLLM answers so when its engine is dead. All else is up, since servers without
    a `/health` (some for audio) or with a key before it answer 404, 405, 401 or 403.
    """
    return (Health.UP if status < 500 else Health.DOWN), f"status {status}"


def reason_of(error: BaseException | None) -> str:
    """What went wrong, in a few words that hold no address and no secret."""
    reasons = getattr(error, "reasons", None)  # ResponseNeverReceived and its like
    if isinstance(reasons, list) and reasons and isinstance(reasons[0], Failure):
        return reason_of(reasons[0].value)
    for kind, text in _REASONS:
        if isinstance(error, kind):
            return text
    return type(error).__name__


class _Probe(Generic[B]):
    """One backend, with what is known about it."""

    def __init__(self, backend: B) -> None:
        self.backend = backend
        self.health = Health.UNKNOWN
        self.asking: Deferred[None] | None = None

    def give_up(self) -> None:
        """Cancel the check that is under way."""
        if self.asking is not None:
            self.asking.cancel()

    def end(self) -> None:
        """The check has ended."""
        self.asking = None


class HealthChecks(Service, Generic[B]):
    """Asks all `backends` every `interval_s`, at once and each for itself.

    `fetch` has `timeout_s` to answer; a backend whose last check has not ended is not asked again.
    """

    def __init__(
        self,
        backends: Iterable[B],
        fetch: Fetch[B],
        clock: IReactorTime,
        report: Report = lambda name, url, up: None,
        *,
        interval_s: float = INTERVAL_S,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._fetch, self._clock, self._report = fetch, clock, report
        self._interval_s, self._timeout_s = interval_s, timeout_s
        self._probes: dict[tuple[str, str], _Probe[B]] = {}
        self._loop = LoopingCall(self._ask_all)
        self._loop.clock = clock
        self.update(backends)

    @property
    def states(self) -> Mapping[str, Health]:
        """What is known now, by backends' names; with the URL where it has several servers."""
        several = Counter(name for name, _ in self._probes)
        return {
            name if several[name] == 1 else f"{name} at {url}": probe.health
            for (name, url), probe in self._probes.items()
        }

    @property
    def down(self) -> set[tuple[str, str]]:
        """The servers that are down, by name and URL."""
        return {key for key, probe in self._probes.items() if probe.health is Health.DOWN}

    def startService(self) -> None:
        """Ask all for the first time."""
        super().startService()
        self._loop.start(self._interval_s).addErrback(
            lambda failure: log.failure("the health checks have ended", failure)
        )

    def stopService(self) -> None:
        """Ask no more, and give up what is being asked."""
        super().stopService()
        if self._loop.running:
            self._loop.stop()
        for probe in self._probes.values():
            probe.give_up()

    def update(self, backends: Iterable[B]) -> None:
        """Check these from now on; of those that stay (name and URL) the state stays."""
        old = self._probes
        self._probes = {
            key: self._kept(old.get(key), backend)
            for backend in backends
            for key in [(backend.name, backend.url)]
        }
        for key, probe in old.items():
            if self._probes.get(key) is not probe:
                probe.give_up()
                self._report(*key, None)
        if self.running:
            for key, probe in self._probes.items():
                if old.get(key) is not probe:
                    self._ask(probe)

    def _kept(self, probe: _Probe[B] | None, backend: B) -> _Probe[B]:
        if probe is None:
            return _Probe(backend)
        probe.backend = backend
        return probe

    def _ask_all(self) -> None:
        for probe in self._probes.values():
            self._ask(probe)

    def _ask(self, probe: _Probe[B]) -> None:
        if probe.asking is not None:
            return
        probe.asking = asking = Deferred.fromCoroutine(self._check(probe))
        asking.addErrback(lambda failure: log.failure("a health check went wrong", failure))
        asking.addBoth(lambda _: probe.end())

    async def _check(self, probe: _Probe[B]) -> None:
        health, reason = await self._asked(probe.backend)
        name, url, before = probe.backend.name, probe.backend.url, probe.health
        if not self.running or self._probes.get((name, url)) is not probe:
            return  # given up
        probe.health = health
        if health is not before:
            tell = log.info if health is Health.UP else log.warn
            text = "backend {backend} at {server} is {state}: {reason}"
            tell(text, backend=name, server=url, state=health.value, reason=reason)
        self._report(name, url, health is Health.UP)

    async def _asked(self, backend: B) -> tuple[Health, str]:
        answer = Deferred.fromCoroutine(self._status(backend))
        try:
            status = await answer.addTimeout(self._timeout_s, self._clock, _timed_out)
        except Exception as error:  # a cancellation among them: nobody looks at its result
            return Health.DOWN, reason_of(error)
        return judge(status)

    async def _status(self, backend: B) -> int:
        return await self._fetch(backend)


def _timed_out(result: object, timeout_s: float) -> NoReturn:
    # Agents wrap the cancellation in errors of their own.
    raise TimeoutError


def agent_fetch(agent_for: Callable[[B], IAgent]) -> Fetch[B]:
    """Ask through each backend's own agent, with its TLS settings; the answer's body is not read.

    No token is sent, as `/health` needs none, and whoever asks for one is up.
    """

    async def fetch(backend: B) -> int:
        agent = agent_for(backend)
        response = await agent.request(b"GET", f"{backend.url}/health".encode("ascii"), Headers())
        drop(response)
        status: int = response.code
        return status

    return fetch
