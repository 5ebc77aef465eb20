"""The worker processes: started, watched, started again when one ends, and stopped.

    starting -> serving -> ended -> (a pause, longer each time if it ends again at once) -> starting

A worker that cannot start makes the first start of all fail; later it is tried again, for ever.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessTerminated
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from llmproxy.control import FROM_SUPERVISOR, Decoder, Message, encode
from llmproxy.errors import ConfigError
from llmproxy.totals import Checks, Snapshot, Totals

#: Who has served so long was well, and is started again at once when it ends.
STEADY_S = 10.0
#: The pause before the second attempt to start a worker again, doubled each time; the longest one.
RETRY_S, RETRY_MAX_S = 0.5, 30.0

log = Logger()


def pause_before(attempt: int) -> float:
    """Seconds before a worker is started again; `attempt` counts from 0 since it was steady."""
    return min(RETRY_S * 2 ** (min(attempt, 20) - 1), RETRY_MAX_S) if attempt else 0.0


def how_ended(error: BaseException | None) -> str:
    """How a process ended, in a few words."""
    if not isinstance(error, ProcessTerminated):
        return "exit code 0"
    number: int | None = error.signal
    if number is None:
        return f"exit code {error.exitCode}"
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:  # a real-time signal
        return f"signal {number}"


class Worker(ProcessProtocol):
    """One worker process, as the supervisor sees it.

    `serving_since` is None until it serves; `checks` is what it last said of itself; `failure`
    why it could not start, where it said that.
    """

    def __init__(
        self,
        number: int,
        heard: Callable[[Worker, Message], None],
        ended: Callable[[Worker, str], None],
    ) -> None:
        self.number = number
        self.serving_since: float | None = None
        self.checks: Checks = {}
        self.failure = ""
        self._decoder = Decoder()
        self._heard, self._ended = heard, ended

    def send(self, kind: str, **content: object) -> None:
        """Tell it something; nothing happens if it is about to end."""
        with contextlib.suppress(KeyError):  # its end of the pipe is closed
            self.transport.writeToChild(FROM_SUPERVISOR, encode(kind, **content))  # type: ignore[union-attr]

    def kill(self) -> None:
        """End it at once."""
        self.transport.signalProcess("KILL")  # type: ignore[union-attr]

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        """It says something."""
        for message in self._decoder.feed(data):
            self._heard(self, message)

    def processEnded(self, reason: Failure) -> None:
        """It has ended, and all that it said has been heard."""
        self._ended(self, self.failure or how_ended(reason.value))


class Workers:
    """Keeps `count` workers at work, from `start` to `stop`.

    `launch` starts a process that speaks with the given protocol, and tells it what to do.
    `lingers`: worker 0 stays until the others have ended.
    """

    def __init__(
        self, reactor: Any, count: int, launch: Callable[[Worker], None], *, lingers: bool
    ) -> None:
        self.count = count
        self.totals = Totals()
        self.on_change: Callable[[], None] = lambda: None
        self.restarts = 0
        self._reactor = reactor
        self._launch = launch
        self._lingers = lingers
        self._alive: dict[int, Worker] = {}
        self._attempts = [0] * count
        self._pauses: dict[int, IDelayedCall] = {}
        self._started: Deferred[None] = Deferred()
        self._stopped: Deferred[None] | None = None
        self._failed = False

    @property
    def serving(self) -> Sequence[Worker]:
        """Those that serve."""
        return [each for each in self._alive.values() if each.serving_since is not None]

    @property
    def missing(self) -> Sequence[int]:
        """The numbers of those whose process has ended, and is not there again."""
        return [number for number in range(self.count) if number not in self._alive]

    def start(self) -> Deferred[None]:
        """Fires when all serve; ConfigError when one can't."""
        for number in range(self.count):
            self._spawn(number)
        return self._started

    def send(self, kind: str, **content: object) -> None:
        """Tell all of them."""
        for worker in self._alive.values():
            worker.send(kind, **content)

    def stop(self, patience_s: float, *, relieved: bool = False) -> Deferred[None]:
        """Tell all to end; fires when they have. Who has not after `patience_s` is killed.

        `relieved`: others accept the clients by now.
        """
        stopped: Deferred[None] = Deferred()
        self._stopped = stopped
        for pause in self._pauses.values():
            pause.cancel()
        self._pauses.clear()
        for worker in self._alive.values():
            lingers = self._lingers and worker.number == 0
            worker.send("stop", linger=lingers, relieved=relieved)
        late = self._reactor.callLater(patience_s, self._kill)
        stopped.addCallback(lambda _: late.cancel() if late.active() else None)
        self._stopping()
        return stopped

    def _spawn(self, number: int) -> None:
        self._pauses.pop(number, None)
        self._alive[number] = worker = Worker(number, self._heard, self._ended)
        self._launch(worker)

    def _heard(self, worker: Worker, message: Message) -> None:
        if message["kind"] == "failed":
            worker.failure = message["reason"]
            return
        worker.checks = message["checks"]
        self.totals.update(worker, Snapshot.from_json(message["metrics"]))
        if worker.serving_since is None and message["kind"] == "ready":
            worker.serving_since = self._reactor.seconds()
            self._changed()

    def _ended(self, worker: Worker, how: str) -> None:
        del self._alive[worker.number]
        self.totals.retire(worker)
        self._changed()
        if self._stopped is not None:
            self._stopping()
        elif not self._started.called:
            self._failed = True
            reason = worker.failure or f"worker {worker.number} ended: {how}"
            self._started.errback(ConfigError(reason))
        elif not self._failed:
            self._restart(worker, how)

    def _restart(self, worker: Worker, how: str) -> None:
        number, since = worker.number, worker.serving_since
        if since is not None and self._reactor.seconds() - since >= STEADY_S:
            self._attempts[number] = 0
        pause_s = pause_before(self._attempts[number])
        self._attempts[number] += 1
        self.restarts += 1
        log.error(
            "worker {number} ended: {how}; started again in {pause_s} s",
            number=number,
            how=how,
            pause_s=pause_s,
        )
        self._pauses[number] = self._reactor.callLater(pause_s, self._spawn, number)

    def _changed(self) -> None:
        if not self._started.called and len(self.serving) == self.count:
            self._started.callback(None)
        self.on_change()

    def _stopping(self) -> None:
        if self._lingers and list(self._alive) == [0]:
            self._alive[0].send("leave")
        if not self._alive and self._stopped is not None and not self._stopped.called:
            self._stopped.callback(None)

    def _kill(self) -> None:
        for worker in self._alive.values():
            log.error("worker {number} does not stop, and is killed", number=worker.number)
            worker.kill()
