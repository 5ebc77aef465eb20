"""One request to one backend: send it, read its answer, meter it, and say how it ended.

    upstream --header--> _answered --200, stream--> _stream --> Ending
                             |-------200, JSON----> _whole ---> Ending
                             |-------anything else> _refused -> Ending

Every ending is a value; nothing is raised. What the client gets last, the end of a stream or the
whole of a JSON answer, is kept in the `Ending`, to be released when the bill is durable.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IProtocol, IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.http_headers import Headers

from llmproxy import headers, usage
from llmproxy.agent import Response, nothing
from llmproxy.answers import Answer, refusal
from llmproxy.backends import Model, Route
from llmproxy.billing import NOTHING
from llmproxy.downstream import Downstream
from llmproxy.errors import (
    BackendError,
    BackendTimeout,
    InsufficientQuota,
    ProxyError,
    Unavailable,
)
from llmproxy.jsonbytes import InvalidJSON
from llmproxy.meter import StreamMeter
from llmproxy.model import Counts, Outcome, Reading
from llmproxy.parts import BLOCK, Parts
from llmproxy.policy import Ask
from llmproxy.relay import BodyEnd, BodyReader
from llmproxy.steps import Turns
from llmproxy.story import begin
from llmproxy.upload import ClientGone
from llmproxy.upstream import NotSent, RequestBody, drop, translate

#: Longest JSON answer of a backend that is read.
MAX_ANSWER = 64 * 1024 * 1024
#: A JSON answer of this size and more is read in parts; others' streams go on meanwhile.
LARGE = 1024 * 1024
#: Longest refusal of a backend that is read.
MAX_REFUSAL = 1024 * 1024
#: How long a backend may take to close a stream after its last event.
END_GRACE_S = 1.0
#: What goes out while a backend is silent before its first token; clients ignore comments
#: (WHATWG HTML, section 9.2.6).
KEEPALIVE = b": keep-alive\n\n"
#: Every proxy on the way is asked to pass a stream on as it comes.
STREAM_FIELDS = [(b"Cache-Control", b"no-cache"), (b"X-Accel-Buffering", b"no")]
# Python 3.11 takes longer to get a member of an enumeration than to do anything with it.
_COMPLETE, _WHOLE, _UNFRAMED = Outcome.COMPLETE, BodyEnd.WHOLE, BodyEnd.UNFRAMED
#: More events than come; Python 3.11 is slow to compare a whole number with infinity.
_NO_END = sys.maxsize
_BROKEN = BackendError("The model's server broke off its answer.")
_SILENT = BackendTimeout("The model's server fell silent in the middle of its answer.")
_STOPPING = Unavailable("The service is stopping; try again shortly.")


# What each stage makes and the next one reads, and nobody changes. Python 3.11 reads a slot in a
# sixth of the time of a named tuple's field; to make them frozen would take as long as that saves.


@dataclass(slots=True)
class Order:
    """An admitted request: where it goes, as what, and how its answer is read.

    meter: for an answer in a stream, if one was asked for. read: the usage in a whole answer.
    convert: turns a whole answer into what the client asked for: Content-Type, pieces of a body.
    """

    route: Route
    path: str
    headers: Headers
    body: RequestBody
    read: Callable[[bytes], Reading]
    meter: StreamMeter | None = None
    convert: Callable[[bytes], tuple[bytes, Iterable[bytes]]] | None = None


@dataclass(slots=True)
class Admitted:
    """A request that may go to one of a model's servers.

    order: what it is for this one; None when it can't be sent there (any more). ask: what it takes
    at most. affinity: what it has in common with requests that had better go to the same server.
    """

    model: Model
    order: Callable[[Route], Order | None]
    ask: Callable[[], Ask]
    affinity: bytes = b""


@dataclass(slots=True)
class Ending:
    """How a forward ended. `last`: what the client gets once the row is settled, the rest of a
    stream, a whole answer, or an error. `status`: the backend's, None if there was none."""

    outcome: Outcome
    reading: Reading
    last: Answer | bytes | ProxyError
    status: int | None = None


class Lease(NamedTuple):
    """What a stream may pass on: `first`, so many events with content; then what `more` says, which
    is told the counts so far, and raises InsufficientQuota where there is no more."""

    first: int
    more: Callable[[Counts], Awaitable[int]]


class Pace(NamedTuple):
    """Who is told how fast a stream comes.

    first_token: when its first content came, as the clock has it. gap: the seconds between two of
    its chunks, each time.
    """

    first_token: Callable[[float], None]
    gap: Callable[[float], None]


class Timing(NamedTuple):
    """In seconds: how long a backend may be silent, and when a comment goes out (0: never)."""

    silence_s: float
    keepalive_s: float


class Forward:
    """States: sending; reading; over. The client may leave, and `stop` may come, in any of them."""

    __slots__ = (
        "_clock",
        "_down",
        "_drain_until",
        "_lease",
        "_lease_until",
        "_order",
        "_pace",
        "_parts",
        "_reader",
        "_sending",
        "_sent",
        "_size",
        "_status",
        "_stopped",
        "_timed_out",
        "_timers",
        "_timing",
        "_too_much",
        "_turns",
        "_until",
        "_used_up",
    )

    log = Logger()

    def __init__(
        self,
        order: Order,
        down: Downstream,
        clock: IReactorTime,
        turns: Turns,
        timing: Timing,
        pace: Pace,
        lease: Lease | None = None,
    ) -> None:
        self._order = order
        self._down = down
        self._clock = clock
        self._turns = turns
        self._timing = timing
        self._pace = pace
        self._sending: Deferred[Response] | None = None
        self._reader: BodyReader | None = None
        self._status: int | None = None
        self._stopped = False
        self._sent = False
        self._timed_out = False
        self._too_much = False
        self._lease = lease
        # Up to which event with content; `_until` is the first of them.
        self._drain_until = _NO_END
        self._lease_until = _NO_END if lease is None else lease.first
        self._until = self._lease_until
        self._used_up: InsufficientQuota | None = None
        self._timers: dict[str, IDelayedCall] = {}
        self._parts: list[bytes] = []
        self._size = 0

    async def run(self) -> Ending:
        """Do it all."""
        try:
            if self._stopped or self._down.gone:
                return Ending(Outcome.CLIENT_GONE, NOTHING, _STOPPING)
            self._down.when_gone(self._client_left)
            return await self._answered(await self._send())
        except (ProxyError, ClientGone) as error:
            return self._failed(error)
        except Exception:
            self.log.failure("forward failed")
            return self._failed(ProxyError("Something went wrong on our side."))
        finally:
            self._over()

    def stop(self) -> None:
        """End it now. What was metered so far counts."""
        self._stopped = True
        if self._reader is not None:
            self._reader.stop()
        elif self._sending is not None:
            self._sending.cancel()

    def _client_left(self) -> None:
        backend = self._order.route.backend
        if backend.on_disconnect == "cancel":
            self.stop()
        else:
            self._later("drain", backend.drain_timeout, self.stop)
            if self._order.meter is not None:
                passed = self._order.meter.content_events
                self._drain_until = passed + backend.drain_max_tokens + 1
                self._until = min(self._drain_until, self._lease_until)
            if self._reader is not None:
                self._reader.resumeProducing()

    # -- sending ---------------------------------------------------------------------------

    async def _send(self) -> Response:
        """The header of the backend's answer. Raises BackendError, ProxyError, ClientGone."""
        order = self._order
        order.body.on_sent = self._was_sent
        self._sending = order.route.upstream.send(order.path, order.headers, order.body)
        try:
            return await self._sending
        except Exception as error:
            failure = translate(error)
            if self._timed_out and not isinstance(failure, NotSent):
                failure = self._timeout()
            raise failure from error
        finally:
            self._sending = None
            self._cancel("answer")

    def _was_sent(self) -> None:
        self._sent = True
        self._later("answer", self._timing.silence_s, self._no_answer)

    def _no_answer(self) -> None:
        self._timed_out = True
        if self._sending is not None:
            self._sending.cancel()

    def _timeout(self) -> BackendError:
        return BackendTimeout("The model's server did not answer in time.")

    def _failed(self, error: Exception) -> Ending:
        """There is no answer, or none that can be used."""
        meter = self._order.meter
        reading = Reading() if meter is None else meter.reading()
        if isinstance(error, NotSent) or not self._sent:
            reading = NOTHING
        if self._stopped or not isinstance(error, ProxyError):
            return self._ending(Outcome.CLIENT_GONE, reading, _STOPPING)
        ours = isinstance(error, BackendError) or self._sent
        return self._ending(Outcome.BACKEND_FAILED if ours else Outcome.REFUSED, reading, error)

    # -- reading ---------------------------------------------------------------------------

    def _answered(self, response: Response) -> Awaitable[Ending]:
        self._sent = True
        self._status = response.code
        if response.code != 200:
            return self._refused(response)
        kind = headers.media_type(response.fields)
        if kind == b"text/event-stream" and self._order.meter is not None:
            return self._stream(response, self._order.meter)
        if kind == b"application/json" or kind.endswith(b"+json"):
            return self._whole(response)
        drop(response)
        raise BackendError("The model's server failed to answer.")

    def _read(self, response: Response, sink: Callable[[bytes, float], None]) -> BodyReader:
        """Begin to read the body; `ended` of the reader tells how that went."""
        self._reader = reader = BodyReader(sink, self._clock, self._timing.silence_s)
        response.deliverBody(cast(IProtocol, reader))
        if self._stopped:
            reader.stop()
        return reader

    async def _refused(self, response: Response) -> Ending:
        end = await self._read(response, self._collect_up_to(MAX_REFUSAL)).ended
        body = b"".join(self._parts) if end in (_WHOLE, _UNFRAMED) else b""
        token = self._order.route.backend.token
        last = refusal(response.code, body, headers.for_client(response.fields), token)
        # 2xx may have been a result that we can't read; anything else is none.
        reading = Reading() if response.code < 300 else NOTHING
        return Ending(Outcome.REFUSED, reading, last, response.code)

    async def _whole(self, response: Response) -> Ending:
        body, end = response.at_once(), _WHOLE
        if body is None:
            end = await self._read(response, self._collect_up_to(MAX_ANSWER)).ended
            if self._too_much:
                return self._ending(Outcome.BACKEND_FAILED, Reading(), _BROKEN)
            if end not in (_WHOLE, _UNFRAMED):
                return self._cut_short(end, Reading())
            body = b"".join(self._parts)
        reading = self._order.read(body if len(body) < LARGE else await self._in_short(body))
        if end is _UNFRAMED and not reading.answered:  # closed in the middle
            return self._ending(Outcome.TRUNCATED, reading, _BROKEN)
        answer = Answer(200, body, headers.for_client(response.fields))
        if self._order.convert is not None:
            try:
                answer = await self._converted(*self._order.convert(body))
            except BackendError as error:  # the work was done, and gave nothing: not ours to judge
                unclear = reading._replace(exact=False, raw=reading.raw or "")
                return self._ending(Outcome.BACKEND_FAILED, unclear, error)
        return self._ending(self._or_gone(_COMPLETE), reading, answer)

    async def _converted(self, content_type: bytes, pieces: Iterable[bytes]) -> Answer:
        body = bytearray()
        for number, piece in enumerate(pieces):
            if number:  # others' streams go on between two
                await deferLater(self._clock, 0)
            body += piece
        return Answer(200, bytes(body), [(b"Content-Type", content_type)])

    async def _in_short(self, body: bytes) -> bytes:
        """A large answer with nothing but what tells its usage, which is never long."""
        parts: Parts[None] = Parts(body, None, lambda place, name: None)
        try:
            await self._turns.do(parts)
        except InvalidJSON:  # so this is, too; usage is looked for at its end
            return b"," + body[-BLOCK:]
        telling = {member.key: member for member in parts.members if member.key in usage.NAMES}
        short = [
            body[member.key_start : member.value_end]
            for member in telling.values()
            if member.value_end - member.value_start < BLOCK
        ]
        return b"{%b}" % b",".join(short)

    def _collect_up_to(self, limit: int) -> Callable[[bytes, float], None]:
        def collect(data: bytes, now: float) -> None:
            self._size += len(data)
            self._parts.append(data)
            if self._size > limit and self._reader is not None:
                self._too_much = True
                self._reader.stop()

        return collect

    async def _stream(self, response: Response, meter: StreamMeter) -> Ending:
        self._down.start(200, [*headers.for_client(response.fields), *STREAM_FIELDS])
        self._keep_alive()
        reader = self._read(response, self._passing_on(meter))
        if not reader.ended.called:
            self._down.attach(reader)
        end = await reader.ended
        self._down.detach()
        return self._stream_ending(end, meter)

    def _passing_on(self, meter: StreamMeter) -> Callable[[bytes, float], None]:
        feed, write, count_gap = meter.feed, self._down.write, self._pace.gap
        last, has_content = 0.0, False

        def pass_on(data: bytes, now: float) -> None:
            nonlocal last, has_content
            passed = feed(data)
            if meter.oversized and self._reader is not None:
                self._reader.stop(BodyEnd.BROKEN)  # it could be the end, and that can't go unread
                return
            write(passed)
            if last:
                count_gap(now - last)
            last = now
            if not has_content and meter.content_events:
                has_content = True
                self._pace.first_token(now)
            if meter.ended and self._reader is not None:
                self._reader.finish_within(END_GRACE_S)
            elif meter.content_events >= self._until:
                self._at_bound(meter)

        return pass_on

    def _at_bound(self, meter: StreamMeter) -> None:
        if meter.content_events >= self._drain_until:
            self.stop()
        elif self._lease is not None and self._reader is not None:
            self._lease_until, self._until = _NO_END, self._drain_until
            self._reader.hold()
            begin(self._ask_for_more(self._lease, self._reader, meter))

    async def _ask_for_more(self, lease: Lease, reader: BodyReader, meter: StreamMeter) -> None:
        """Read on when there is another lease, or end the stream."""
        try:
            more = await lease.more(meter.reading().counts)
        except InsufficientQuota as error:
            self._used_up = error
            reader.stop()
            return
        except Exception:  # a fault of ours must not hold the stream for ever
            self.log.failure("forward failed")
            reader.release()
            return
        self._lease_until = meter.content_events + more
        self._until = min(self._drain_until, self._lease_until)
        reader.release()

    def _stream_ending(self, end: BodyEnd, meter: StreamMeter) -> Ending:
        rest = meter.finish()
        reading = meter.reading()
        whole = meter.ended or end in (_WHOLE, _UNFRAMED)
        if meter.failed and whole:  # some servers end an error with their dialect's last event
            return self._ending(self._or_gone(Outcome.BACKEND_FAILED), _no_result(reading), rest)
        if meter.ended:
            return self._ending(self._or_gone(_COMPLETE), reading, rest)
        return self._cut_short(end, reading)

    def _or_gone(self, outcome: Outcome) -> Outcome:
        return Outcome.CLIENT_GONE if self._down.gone else outcome

    def _cut_short(self, end: BodyEnd, reading: Reading) -> Ending:
        if self._used_up is not None and not self._down.gone:
            return self._ending(Outcome.OUT_OF_BUDGET, reading, self._used_up)
        if self._down.gone or end is BodyEnd.STOPPED:
            return self._ending(Outcome.CLIENT_GONE, reading, _STOPPING)
        if end is BodyEnd.STALLED:
            return self._ending(Outcome.STALLED, reading, _SILENT)
        return self._ending(Outcome.TRUNCATED, reading, _BROKEN)

    def _ending(
        self, outcome: Outcome, reading: Reading, last: Answer | bytes | ProxyError
    ) -> Ending:
        return Ending(outcome, reading, last, self._status)

    # -- timers ----------------------------------------------------------------------------

    def _keep_alive(self) -> None:
        if self._timing.keepalive_s:
            self._later("keep-alive", self._timing.keepalive_s, self._comfort)

    def _comfort(self) -> None:
        """The backend is still silent: show the client, and all on the way, that we are not."""
        meter = self._order.meter
        if meter is not None and not meter.content_events and not meter.ended:
            self._down.write(KEEPALIVE)
            self._keep_alive()

    def _later(self, name: str, seconds: float, act: Callable[[], None]) -> None:
        self._timers[name] = self._clock.callLater(seconds, self._fire, name, act)

    def _fire(self, name: str, act: Callable[[], None]) -> None:
        del self._timers[name]
        act()

    def _cancel(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _over(self) -> None:
        body = self._order.body
        body.stopProducing()  # the answer may have come before all was sent
        body.on_sent = nothing
        self._down.when_gone(None)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._reader = None


def _no_result(reading: Reading) -> Reading:
    """An error event and nothing else is a refusal: there is nothing to charge."""
    if reading.exact or reading.raw is not None or any(reading.counts.values()):
        return reading
    return reading._replace(counts={}, exact=True)
