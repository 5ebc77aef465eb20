"""One request's life: accept -> authenticate -> admit -> forward -> meter -> settle.

    key --> Account --> Order --> [row open] --> Ending --> [row settled] --> release

Nobody cancels an exchange. When the client leaves, its forward is drained or stopped, and the
exchange goes on to the one settlement of its row. What the client gets last is released after
that settlement is durable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from llmproxy import dialects
from llmproxy.admission import Admission
from llmproxy.answers import Answer
from llmproxy.auth import Authenticator, key_of
from llmproxy.backends import Backends, Model, Route
from llmproxy.billing import NOTHING, settlement
from llmproxy.budgets import Budget, Budgets, Hold
from llmproxy.checkpoints import Checkpoints
from llmproxy.config import Backend, Config
from llmproxy.downstream import Downstream
from llmproxy.endpoints import Endpoint
from llmproxy.errors import (
    CLIENT_GONE,
    BackendTimeout,
    ProxyError,
    StorageError,
    TooManyRequests,
    Unavailable,
)
from llmproxy.failover import may_be_repeated, went_well
from llmproxy.forward import Admitted, Ending, Forward, Lease, Order, Pace, Timing
from llmproxy.limits import Limits
from llmproxy.logs import Line
from llmproxy.metrics import BackendMetrics, Metrics
from llmproxy.model import BILLED, Account, Attempt, Entry, Kind, Outcome, Settlement, State, utcnow
from llmproxy.policy import Ask
from llmproxy.prices import PriceList
from llmproxy.queueing import FairQueue
from llmproxy.steps import Turns
from llmproxy.storage import ILedger
from llmproxy.upload import ClientGone
from llmproxy.upstream import NotSent

if TYPE_CHECKING:
    from llmproxy.site import Request

log = Logger()
_DONE = Line(
    log,
    "{outcome} {rid} key={key_id} model={model} path={path} status={status}"
    " backend_status={backend_status} state={state}"
    " prompt={prompt} completion={completion} embedding={embedding} audio_s={audio_s}"
    " ms={duration_ms} ttft_ms={ttft_ms}",
)
T = TypeVar("T")

# Python 3.11 takes longer to get a member of an enumeration than to do anything with it.
_OPEN = State.OPEN
_KINDS = tuple(Kind)
#: Endings that are not the server's doing.
_NO_FAULT = (Outcome.COMPLETE, Outcome.CLIENT_GONE, Outcome.OUT_OF_BUDGET)
_NOT_SENT = Ending(Outcome.REFUSED, NOTHING, ProxyError("Something went wrong on our side."))


@dataclass(slots=True, kw_only=True)
class Services:
    """What all exchanges share. `exchanges`: those in flight. `draining`: no new ones. `limits`,
    `budgets`: None where keys have none."""

    config: Config
    clock: IReactorTime
    monotonic: Callable[[], float]
    authenticator: Authenticator
    backends: Backends
    ledger: ILedger
    checkpoints: Checkpoints
    metrics: Metrics
    prices: PriceList
    limits: Limits | None = None
    budgets: Budgets | None = None
    exchanges: set[Exchange] = field(default_factory=set)
    draining: bool = False
    turns: Turns = field(init=False)

    def __post_init__(self) -> None:
        self.turns = Turns(self.clock)


class Exchange:
    """One request of a client, from its header to the settlement of its row."""

    __slots__ = (
        "_admission",
        "_admitted",
        "_began",
        "_credit",
        "_down",
        "_endpoint",
        "_first_token_s",
        "_forward",
        "_forward_began",
        "_held",
        "_is_cut",
        "_key_id",
        "_limits",
        "_metrics",
        "_request",
        "_services",
    )

    def __init__(self, endpoint: Endpoint, request: Request, services: Services) -> None:
        self._endpoint = endpoint
        self._request = request
        self._services = services
        self._down = Downstream(request, services.clock, services.config.timeout_read)
        self._key_id: str | None = None
        self._admission = Admission(
            endpoint,
            request,
            services.config,
            services.backends,
            services.clock,
            services.turns,
        )
        self._admitted: Admitted | None = None
        self._forward: Forward | None = None
        self._metrics: BackendMetrics | None = None
        self._is_cut = False
        self._limits: Limits | None = None  # those that concern the key
        self._held = 0  # tokens
        self._credit: Hold | None = None
        self._began = services.monotonic()
        self._forward_began = 0.0
        self._first_token_s: float | None = None

    async def run(self) -> None:
        """Serve the request. Never raises."""
        self._services.exchanges.add(self)
        try:
            await self._serve()
        except ProxyError as error:
            self._tell(error)
        except ClientGone:
            self._down.abort()
        except Exception:
            log.failure("exchange {rid} failed", rid=self._request.rid)
            self._tell(ProxyError("Something went wrong on our side."))
        finally:
            self._services.exchanges.discard(self)
            # They know each other: else only the garbage collector would end them.
            self._forward = self._admitted = None

    def cut(self) -> None:
        """The proxy stops, and waits no longer: what was metered so far is settled."""
        self._is_cut = True
        if self._forward is not None:
            self._forward.stop()
        else:
            self._down.abort()

    async def _serve(self) -> None:
        if self._services.draining:
            raise Unavailable("The service is stopping; try again shortly.")
        account = await self._authenticate()
        self._key_id = account.key_id
        limits = self._services.limits
        if limits is not None and limits.concern(account):
            await self._enter(limits, account)
        try:
            self._admitted = await self._admission.admit(account)
            if self._limits is not None:
                await self._hold(self._limits, account, self._admitted.ask())
            model = self._admitted.model
            queue = model.queue
            if not queue.enter_at_once():
                await self._wait(queue, account.key_id)
            try:
                entry = self._entry(account, model.backend)
                budgets = self._services.budgets
                if budgets is not None and (own := budgets.of(account)):
                    entry = await self._afford(budgets, own, entry)
                await self._open(entry)
                ending = await self._send(entry, model)
                closing = await self._settle(entry, ending)
            finally:
                queue.leave()
        finally:  # before the client has its answer's end, and can ask again
            if self._limits is not None:
                self._leave(self._limits, account)
        status = self._told(ending)
        self._release(ending)
        self._note_end(entry, closing, status)  # nobody waits for that

    # -- authenticate, admit ---------------------------------------------------------------

    async def _authenticate(self) -> Account:
        key = key_of(self._request.fields, self._endpoint.dialect)
        authenticator = self._services.authenticator
        known = authenticator.known(key)
        return known or await authenticator.authenticate(key, self._request.peer)

    async def _enter(self, limits: Limits, account: Account) -> None:
        try:
            if (entering := limits.enter(account)) is not None:
                await self._while_there(entering)
            self._limits = limits
        finally:
            self._request.more_fields = limits.fields(account)

    async def _hold(self, limits: Limits, account: Account, ask: Ask) -> None:
        try:
            tokens = limits.most(account, ask.prompt + ask.answer)
            if (holding := limits.hold(account, tokens)) is not None:
                await self._while_there(holding)
            self._held = tokens
        finally:
            self._request.more_fields = limits.fields(account)

    def _leave(self, limits: Limits, account: Account) -> None:
        if self._held:  # it was not served
            limits.correct(account, self._held, 0)
        limits.leave(account)

    async def _wait(self, queue: FairQueue, key_id: str) -> None:
        """Wait for a place, as long as the client does. Raises TooManyRequests, ClientGone."""
        try:
            await self._while_there(queue.wait(key_id))
        except TooManyRequests:
            self._services.metrics.limited("max_concurrent")
            raise

    async def _while_there(self, waited_for: Deferred[T]) -> T:
        """Wait for something, as long as the client does. Raises ClientGone."""
        try:
            self._down.when_gone(waited_for.cancel)
            return await waited_for
        except CancelledError:
            raise ClientGone from None
        finally:
            self._down.when_gone(None)

    def _entry(self, account: Account, backend: Backend) -> Entry:
        now = utcnow()
        return Entry(
            rid=self._request.rid,
            opened=now,
            account=account,
            path=self._endpoint.path,
            model=backend.name,
            device=backend.device,
            price=self._services.prices.at(backend.name, now),
        )

    async def _afford(self, budgets: Budgets, own: tuple[Budget, ...], entry: Entry) -> Entry:
        """The entry with what is held for it by its key's own budgets. Raises InsufficientQuota,
        TooManyRequests, ClientGone."""
        admitted = self._admitted
        assert admitted is not None
        asks = entry.account, own, admitted.ask(), entry.price
        credit = budgets.at_once(*asks)
        if credit is None:
            looking = Deferred.fromCoroutine(budgets.hold(*asks))
            credit = await self._while_there(looking)
        self._credit = credit
        return entry._replace(held=credit.amount)

    def _lease(self, entry: Entry) -> Lease | None:
        """What may be passed on of an answer in a stream; None: all of it."""
        credit = self._credit
        if credit is None or credit.lease is None:
            return None
        return Lease(credit.lease, partial(credit.more, entry.rid))

    # -- open, forward, settle, release ----------------------------------------------------

    async def _open(self, entry: Entry) -> None:
        try:
            await self._services.ledger.open(entry)
        except StorageError:
            raise Unavailable("Requests can't be taken right now; try again shortly.") from None
        self._services.metrics.ledger_rows(_OPEN)

    async def _send(self, entry: Entry, model: Model) -> Ending:
        """Ask one server, and another one as long as that is allowed and helps."""
        ending = _NOT_SENT
        tried: list[Route] = []
        several = len(model.routes) > 1
        order = self._order(tried)
        while order is not None:
            if not several:
                self._admitted = None  # it has the body, which could be large
            ending = await self._attempt(entry, order)
            if not several:
                break
            tried.append(order.route)
            self._note_attempt(entry, len(tried), order.route, ending)
            order = self._again(model, ending, tried)
        return ending

    def _order(self, tried: list[Route]) -> Order | None:
        """The request for the next server. None if there is no other, or it can't be made."""
        admitted = self._admitted
        assert admitted is not None
        now = self._services.monotonic()
        route = admitted.model.choose(now, affinity=admitted.affinity, tried=tried)
        try:
            return None if route is None else admitted.order(route)
        except Exception:  # its row is open, and must be closed all the same
            log.failure("exchange {rid} failed", rid=self._request.rid)
            return None

    def _again(self, model: Model, ending: Ending, tried: list[Route]) -> Order | None:
        """The request for another server, if there is one and it may be asked."""
        begun_too = model.backend.retry_begun
        if self._down.started or self._down.gone or self._is_cut:
            return None
        if not may_be_repeated(ending, begun_too=begun_too):
            return None
        order = self._order(tried)
        if order is not None and self._metrics is not None:
            self._metrics.failed_over()
        return order

    def _note_attempt(self, entry: Entry, number: int, route: Route, ending: Ending) -> None:
        """Each attempt is a fact, though one is billed."""
        attempt = Attempt(
            entry.rid, number, utcnow(), route.backend.url, ending.outcome, ending.status
        )
        noted = self._services.ledger.note(attempt)
        noted.addErrback(lambda failure: log.failure("an attempt is not noted", failure))

    async def _attempt(self, entry: Entry, order: Order) -> Ending:
        route = order.route
        went = None
        route.enter()
        try:
            ending = await self._begun(entry, order).run()
            if order.meter is not None:
                self._services.checkpoints.forget(entry.rid)
            self._measure(ending)
            went = went_well(ending)
        finally:
            route.leave(went, self._services.monotonic())
        return ending

    def _begun(self, entry: Entry, order: Order) -> Forward:
        services, backend = self._services, order.route.backend
        config = services.config
        timing = Timing(backend.timeout or config.timeout_read, config.keepalive_interval)
        self._metrics = services.metrics.for_backend(backend.name)
        self._forward_began = services.clock.seconds()
        lease = self._lease(entry)
        pace = Pace(self._first_token_came, self._metrics.chunk_gap)
        forward = Forward(order, self._down, services.clock, services.turns, timing, pace, lease)
        self._forward = forward
        if self._is_cut:
            forward.stop()
        if order.meter is not None:  # else it has no counts before its end
            services.checkpoints.follow(entry.rid, order.meter.counts)
        return forward

    async def _settle(self, entry: Entry, ending: Ending) -> Settlement:
        closing = settlement(ending.outcome, ending.reading, utcnow(), ending.status)
        await self._services.ledger.settle(entry, closing)
        if self._limits is not None:
            self._correct(self._limits, entry.account, closing)
        return closing

    def _correct(self, limits: Limits, account: Account, closing: Settlement) -> None:
        """What was held is as much as was billed; of what nobody knows, it stays."""
        if closing.state in BILLED:
            taken = sum(n for kind, n in closing.counts.items() if kind is not Kind.TRANSCRIPTION)
            limits.correct(account, self._held, taken)
        self._held = 0

    def _release(self, ending: Ending) -> None:
        last = ending.last
        if isinstance(last, Answer):
            self._down.answer(last.status, last.fields, last.body)
        elif isinstance(last, bytes):
            self._down.finish(last)
        else:
            self._tell(last)

    def _tell(self, error: ProxyError) -> None:
        """Tell the client, in its own dialect, and so that a cut answer can't pass for whole."""
        if self._down.started:
            self._down.write(dialects.error_event(self._endpoint.dialect, error))
            self._down.abort()
            return
        if self._forward is None:  # else its row and its line tell more
            self._request.log_refusal(error, self._key_id, self._admission.model)
        self._down.answer(*dialects.error_answer(self._endpoint.dialect, error))

    # -- what is measured ------------------------------------------------------------------

    def _first_token_came(self, now: float) -> None:
        self._first_token_s = seconds = now - self._forward_began
        if self._metrics is not None:
            self._metrics.first_token(seconds)

    def _measure(self, ending: Ending) -> None:
        metrics = self._metrics
        if metrics is None:
            return
        metrics.request_done(ending.status, self._services.clock.seconds() - self._forward_began)
        if ending.outcome not in _NO_FAULT:
            metrics.error(_error_type(ending))

    def _told(self, ending: Ending) -> int:
        """The status that the client gets, or would have got."""
        if self._down.gone and not self._down.started:
            return CLIENT_GONE
        if isinstance(ending.last, bytes) or self._down.started:
            return 200
        return ending.last.status

    def _note_end(self, entry: Entry, closing: Settlement, status: int) -> None:
        self._services.metrics.ledger_rows(closing.state)
        if closing.state in BILLED and self._metrics is not None:
            self._metrics.billed(closing.counts)
        self._log(entry, closing, status)

    def _log(self, entry: Entry, closing: Settlement, status: int) -> None:
        prompt, completion, embedding, audio_s = map(closing.counts.get, _KINDS)
        first_token_s = self._first_token_s
        _DONE(
            str(closing.outcome),
            entry.rid,
            entry.account.key_id,
            entry.model,
            entry.path,
            status,
            closing.status,
            str(closing.state),
            prompt,
            completion,
            embedding,
            audio_s,
            _ms(self._services.monotonic() - self._began),
            None if first_token_s is None else _ms(first_token_s),
        )


def _error_type(ending: Ending) -> str:
    """What went wrong with the backend, as the metrics have it."""
    if isinstance(ending.last, NotSent):
        return "connect"
    if isinstance(ending.last, BackendTimeout) and ending.outcome is Outcome.BACKEND_FAILED:
        return "timeout"
    return ending.outcome


def _ms(seconds: float) -> float:
    return round(10_000 * seconds) / 10  # half the time of a `round` to one place
