"""What the proxy counts, in the Prometheus text format.

The numbers are kept in cells of our own, which prometheus_client's collectors read at a scrape:
its own histograms take a lock for every value and try bucket after bucket, which is too much for
something that happens on each chunk of each answer. All of this belongs to the reactor's thread.

With several worker processes each counts for itself: `snapshot` is what one of them tells the
supervisor, and `show` makes the supervisor's own metrics those of all (see `totals.py`).

No label is taken from a client as it is: what is not in a list that is fixed at start, or at a
reload, is counted as `other`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from llmproxy.balancing import Standing
from llmproxy.connections import ADDRESS, IDLE, TOTAL
from llmproxy.endpoints import ENDPOINTS
from llmproxy.model import BUDGETS, Counts, Kind, State
from llmproxy.queueing import FairQueue
from llmproxy.totals import Numbers, Snapshot

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

OTHER = "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
MODELS_PATH, USAGE_PATH = "/v1/models", "/v1/usage"
#: What is not counted by workers, but by the one who speaks for all.
OF_THE_WHOLE = frozenset(
    {
        *("llmproxy_backend_up", "llmproxy_build_info"),
        *("llmproxy_workers", "llmproxy_worker_restarts"),
        "llmproxy_certificate_expiry_seconds",
    }
)
PATHS = frozenset({*ENDPOINTS, MODELS_PATH, USAGE_PATH})
#: What can go wrong with a backend: no connection, no answer in time, and the outcomes.
ERROR_TYPES = frozenset({"connect", "timeout", "refused", "truncated", "stalled", "backend_failed"})

#: The settings for which a request is refused with 429, or with 402 for a budget.
LIMITS = (
    *("failed_keys_per_minute", "requests_per_minute", "concurrent_requests"),
    "tokens_per_minute",
    *BUDGETS,
    "max_concurrent",
)

# 1 ms to 300 s: counting tokens at one end, a long answer of a reasoning model at the other.
DURATION_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0),
)
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0),
)
GAP_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
COMMIT_BUCKETS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)

# Around what a client notices; what should not be is from 50 ms on.
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Count:
    """One number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1) -> None:
        """Count `amount` more."""
        self.value += amount

    def numbers(self) -> Numbers:
        """See `totals.py`."""
        return [self.value]

    def load(self, numbers: Numbers) -> None:
        """The inverse of `numbers`."""
        [self.value] = numbers


class Gauge:
    """One number as it is now: set at each change, or asked for at each scrape."""

    __slots__ = ("_read", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._read: Callable[[], float] | None = None

    def set(self, value: float) -> None:
        """The number from now on."""
        self.value = value

    def follow(self, read: Callable[[], float]) -> None:
        """Ask `read` at each scrape; when it raises, the number shows as NaN."""
        self._read = read

    def now(self) -> float:
        """The number to expose."""
        try:
            return self._read() if self._read else self.value
        except Exception:
            return math.nan

    def numbers(self) -> Numbers:
        """See `totals.py`."""
        return [self.now()]

    def load(self, numbers: Numbers) -> None:
        """The inverse of `numbers`."""
        [self.value] = numbers


class Distribution:
    """How many values fell into each bucket, and their sum."""

    __slots__ = ("_bounds", "_buckets", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._buckets = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value; a bucket takes what is up to its bound, the bound included."""
        self._buckets[bisect_left(self._bounds, value)] += 1
        self.total += value

    def numbers(self) -> Numbers:
        """See `totals.py`."""
        return [*self._buckets, self.total]

    def load(self, numbers: Numbers) -> None:
        """The inverse of `numbers`."""
        *buckets, self.total = numbers
        self._buckets = [int(each) for each in buckets]

    def cumulative(self) -> list[tuple[str, float]]:
        """The `le` labels with their cumulative counts, `+Inf` last."""
        bounds = map(floatToGoString, (*self._bounds, math.inf))
        return list(zip(bounds, accumulate(self._buckets), strict=True))


Cell = TypeVar("Cell", Count, Gauge, Distribution)


class _Registry(CollectorRegistry):
    """A registry that knows its metrics by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.families: dict[str, _Cells[Any]] = {}


class _Cells(Collector, Generic[Cell]):
    """The cells of one metric, by their label values."""

    def __init__(
        self, registry: _Registry, name: str, text: str, labels: Sequence[str] = ()
    ) -> None:
        self._name, self._text, self._labels = name, text, labels
        self.cells: dict[tuple[str, ...], Cell] = {}
        registry.register(self)
        registry.families[name] = self

    def cell(self, *values: str) -> Cell:
        """The cell with these label values, made where it isn't there yet."""
        found = self.cells.get(values)
        if found is None:
            found = self.cells[values] = self._new()
        return found

    def _new(self) -> Cell:
        raise NotImplementedError

    def numbers(self) -> dict[tuple[str, ...], Numbers]:
        """What each cell holds."""
        return {values: cell.numbers() for values, cell in self.cells.items()}

    def load(self, numbers: Mapping[tuple[str, ...], Numbers]) -> None:
        """The inverse of `numbers`; cells that are not in it stay as they are."""
        for values, each in numbers.items():
            self.cell(*values).load(each)


class _Counters(_Cells[Count]):
    def _new(self) -> Count:
        return Count()

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for values, cell in self.cells.items():
            family.add_metric(values, cell.value)
        yield family


class _Gauges(_Cells[Gauge]):
    def _new(self) -> Gauge:
        return Gauge()

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(self._name, self._text, labels=self._labels)
        for values, cell in self.cells.items():
            family.add_metric(values, cell.now())
        yield family


class _Histograms(_Cells[Distribution]):
    def __init__(
        self,
        registry: _Registry,
        name: str,
        text: str,
        bounds: Sequence[float],
        labels: Sequence[str] = (),
    ) -> None:
        super().__init__(registry, name, text, labels)
        self._bounds = bounds

    def _new(self) -> Distribution:
        return Distribution(self._bounds)

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, cell in self.cells.items():
            family.add_metric(values, cell.cumulative(), cell.total)
        yield family


class _Process(Collector):
    """What the kernel says of this process; or of more of them, once that was given to `load`."""

    def __init__(self, registry: _Registry) -> None:
        self._collector = ProcessCollector(registry=None)
        self._shown: dict[str, float] = {}
        registry.register(self)

    def snapshot(self) -> Snapshot:
        """This process's numbers."""
        counts: dict[str, Mapping[tuple[str, ...], Numbers]] = {}
        gauges: dict[str, Mapping[tuple[str, ...], Numbers]] = {}
        for family in self._collector.collect():
            kind = counts if family.type == "counter" else gauges
            kind[family.name] = {(): [family.samples[0].value]}
        return Snapshot(counts, gauges)

    def load(self, snapshot: Snapshot) -> None:
        """Show these numbers from now on."""
        for name, cells in [*snapshot.counts.items(), *snapshot.gauges.items()]:
            if name.startswith("process_"):
                [self._shown[name]] = cells[()]

    def collect(self) -> Iterator[Metric]:
        for family in self._collector.collect():
            shown = self._shown.get(family.name)
            if shown is not None:
                family.samples = [each._replace(value=shown) for each in family.samples]
            yield family


class _PerBackend:
    """The metrics that have a cell for each backend."""

    def __init__(self, registry: _Registry) -> None:
        model = ["model"]
        self.requests = _Counters(
            registry,
            "llmproxy_backend_requests",
            "Requests sent to a backend, by the status of its answer (none: no answer).",
            ["model", "status"],
        )
        self.duration = _Histograms(
            registry,
            "llmproxy_backend_duration_seconds",
            "From the request to a backend to the end of its answer.",
            DURATION_BUCKETS,
            model,
        )
        self.errors = _Counters(
            registry,
            "llmproxy_backend_errors",
            "What went wrong with a backend.",
            ["model", "error_type"],
        )
        self.failovers = _Counters(
            registry,
            "llmproxy_failovers",
            "Requests that went on to another server, as one failed.",
            model,
        )
        self.tokens = _Counters(
            registry, "llmproxy_tokens", "Tokens that were billed.", ["model", "type"]
        )
        self.audio = _Counters(
            registry, "llmproxy_audio_seconds", "Seconds of audio that were billed.", model
        )
        self.first_token = _Histograms(
            registry,
            "llmproxy_time_to_first_token_seconds",
            "From the request to a backend to the first token of its stream.",
            FIRST_TOKEN_BUCKETS,
            model,
        )
        self.gaps = _Histograms(
            registry,
            "llmproxy_chunk_gap_seconds",
            "Between two chunks of a backend's stream.",
            GAP_BUCKETS,
            model,
        )


class BackendMetrics:
    """What is counted for one backend. All times are in seconds."""

    __slots__ = (
        "_duration",
        "_errors",
        "_failovers",
        "_families",
        "_model",
        "_quantities",
        "_requests",
        "chunk_gap",
        "first_token",
    )

    def __init__(self, families: _PerBackend, model: str) -> None:
        self._families, self._model = families, model
        self._requests: dict[int | None, Count] = {}
        self._errors: dict[str, Count] = {}
        self._quantities: dict[Kind, Count] = {
            kind: families.audio.cell(model)
            if kind is Kind.TRANSCRIPTION
            else families.tokens.cell(model, kind.value)
            for kind in Kind
        }
        self._failovers = families.failovers.cell(model)
        self._duration = families.duration.cell(model).observe
        #: Takes the time from the request to the first token of a stream.
        self.first_token = families.first_token.cell(model).observe
        #: Takes the time between two chunks of a stream.
        self.chunk_gap = families.gaps.cell(model).observe

    def request_done(self, status: int | None, seconds: float) -> None:
        """A request ended, with the backend's `status` or without an answer."""
        found = self._requests.get(status)
        if found is None:
            label = "none" if status is None else _status_label(status)
            found = self._requests[status] = self._families.requests.cell(self._model, label)
        found.value += 1
        self._duration(seconds)

    def failed_over(self) -> None:
        """A server failed, and another one is asked."""
        self._failovers.add()

    def error(self, error_type: str) -> None:
        """Something went wrong: one of `ERROR_TYPES`."""
        label = error_type if error_type in ERROR_TYPES else OTHER
        self._families.errors.cell(self._model, label).value += 1

    def billed(self, counts: Counts) -> None:
        """These counts were put on a bill: tokens, and seconds of audio."""
        for kind, quantity in counts.items():
            self._quantities[kind].value += quantity


class Metrics:
    """All metrics of one process, in a registry of their own.

    `version` is the proxy's, `models` the names of the backends.
    """

    def __init__(self, version: str, models: Iterable[str] = ()) -> None:
        self._registry = registry = _Registry()
        self._front(registry)
        self._families = _PerBackend(registry)
        self._up = _Gauges(
            registry,
            "llmproxy_backend_up",
            "Whether a server answers its health check (absent: not known yet).",
            ["model", "server"],
        )
        self._certificates = _Gauges(
            registry,
            "llmproxy_certificate_expiry_seconds",
            "Until when a certificate shown to clients is valid, as Unix time.",
            ["file"],
        )
        self._servers(registry)
        self._ledger(registry)
        build = _Gauges(registry, "llmproxy_build_info", "The proxy's version.", ["version"])
        build.cell(version).set(1)
        self._workers(registry)
        self._process = _Process(registry)
        self._other = BackendMetrics(self._families, OTHER)
        self._backends: dict[str, BackendMetrics] = {}
        self.set_models(models)

    def _servers(self, registry: _Registry) -> None:
        server = ["model", "server"]
        self._in_flight = _Gauges(
            registry, "llmproxy_server_in_flight", "Requests at a server now.", server
        )
        self._circuits = _Gauges(
            registry,
            "llmproxy_server_circuit_open",
            "Processes that leave a server alone after failures.",
            server,
        )
        self._queues = _Gauges(
            registry, "llmproxy_queue_length", "Requests that wait for a place.", ["model"]
        )

    def _front(self, registry: _Registry) -> None:
        self._requests = _Counters(
            registry,
            "llmproxy_requests",
            "Requests of clients, by the status of our answer.",
            ["method", "path", "status"],
        )
        self._request_cells: dict[tuple[bytes, bytes, int], Count] = {}
        self._request_duration = _Histograms(
            registry,
            "llmproxy_request_duration_seconds",
            "From a client's request to the end of our answer.",
            DURATION_BUCKETS,
        ).cell()
        self._active = _Gauges(
            registry, "llmproxy_active_requests", "Requests of clients in flight."
        ).cell()
        #: Takes by how much a beat of `Heartbeat` was late.
        self.loop_lag = (
            _Histograms(
                registry,
                "llmproxy_loop_lag_seconds",
                "How late the process came to something that was due: then all clients wait.",
                LAG_BUCKETS,
            )
            .cell()
            .observe
        )
        refused = _Counters(
            registry,
            "llmproxy_limited_requests",
            "Requests refused with 429, by the setting that they went over.",
            ["limit"],
        )
        self._limited = {limit: refused.cell(limit) for limit in LIMITS}
        #: Connections of clients that are open.
        self.connections = _Gauges(
            registry, "llmproxy_connections", "Connections of clients that are open."
        ).cell()
        shed = _Counters(
            registry,
            "llmproxy_limited_connections",
            "Connections refused, by the setting that they went over; or closed to make room.",
            ["limit"],
        )
        self._limited_connections = {limit: shed.cell(limit) for limit in (TOTAL, ADDRESS, IDLE)}

    def _ledger(self, registry: _Registry) -> None:
        self._rows = _Counters(
            registry, "llmproxy_ledger_rows", "Ledger rows that came into a state.", ["state"]
        )
        self._row_cells = {state: self._rows.cell(state.value) for state in State}
        #: Takes the time that one commit of the ledger took.
        self.ledger_commit = (
            _Histograms(
                registry, "llmproxy_ledger_commit_seconds", "One ledger commit.", COMMIT_BUCKETS
            )
            .cell()
            .observe
        )
        #: Writes that wait for the ledger's next commit.
        self.ledger_pending = _Gauges(
            registry, "llmproxy_ledger_pending", "Writes that wait for the next ledger commit."
        ).cell()
        #: Events in the local journal that the store has not got yet.
        self.delivery_backlog_rows = _Gauges(
            registry, "llmproxy_delivery_backlog_rows", "Events that wait for delivery."
        ).cell()
        #: Seconds since the oldest of these events; 0 when there is none.
        self.delivery_backlog_age = _Gauges(
            registry,
            "llmproxy_delivery_backlog_age_seconds",
            "Age of the oldest event that waits for delivery.",
        ).cell()

    def _workers(self, registry: _Registry) -> None:
        #: Processes that serve.
        self.workers = _Gauges(registry, "llmproxy_workers", "Worker processes that serve.").cell()
        self.workers.set(1)
        #: How often a worker had to be started again.
        self.worker_restarts = _Counters(
            registry, "llmproxy_worker_restarts", "Worker processes that ended and were replaced."
        ).cell()

    def set_models(self, models: Iterable[str]) -> None:
        """Take these backends from now on; what was counted for others stays."""
        names = set(models)
        self._backends = {
            name: self._backends.get(name) or BackendMetrics(self._families, name) for name in names
        }
        for family in (self._up, self._in_flight, self._circuits, self._queues):
            for labels in [labels for labels in family.cells if labels[0] not in names]:
                del family.cells[labels]

    def watch(
        self, servers: Mapping[tuple[str, str], Standing], queues: Mapping[str, FairQueue]
    ) -> None:
        """Show how these servers do and how many wait, by models' names, at each scrape."""
        for family in (self._in_flight, self._circuits, self._queues):
            family.cells.clear()
        for labels, standing in servers.items():
            self._in_flight.cell(*labels).follow(partial(getattr, standing, "in_flight"))
            self._circuits.cell(*labels).follow(partial(getattr, standing, "is_open"))
        for model, queue in queues.items():
            self._queues.cell(model).follow(partial(getattr, queue, "waiting"))

    def for_backend(self, name: str) -> BackendMetrics:
        """What is counted for this backend; names that are not configured share one."""
        return self._backends.get(name, self._other)

    def backend_up(self, name: str, server: str, up: bool | None) -> None:
        """The server answers its health check, or doesn't; None when that isn't known."""
        if up is None:
            self._up.cells.pop((name, server), None)
        elif name in self._backends:
            self._up.cell(name, server).set(up)

    def certificate(self, file: str, ends: float) -> None:
        """The certificate in this file is valid until this Unix time."""
        self._certificates.cell(file).set(ends)

    def request_started(self) -> None:
        """A client's request has come; `request_done` is called for it later, once."""
        self._active.value += 1

    def request_done(self, method: bytes, path: bytes, status: int, seconds: float) -> None:
        """A client's request ended. `path` is as it was sent, without a query."""
        self._active.value -= 1
        found = self._request_cells.get((method, path, status))
        if found is None:
            found = self._request_cell(method, path, status)
        found.value += 1
        self._request_duration.observe(seconds)

    def _request_cell(self, method: bytes, path: bytes, status: int) -> Count:
        sent = method.decode("ascii", "replace"), path.decode("ascii", "replace")
        labels = sent[0] if sent[0] in METHODS else OTHER, _path_label(sent[1])
        cell = self._requests.cell(*labels, _status_label(status))
        if sent == labels:  # else clients could have any number of them kept
            self._request_cells[method, path, status] = cell
        return cell

    def malformed(self, status: int) -> None:
        """What came was no request."""
        self._requests.cell(OTHER, OTHER, _status_label(status)).value += 1

    def limited(self, limit: str) -> None:
        """A request was refused because it went over one of `LIMITS`."""
        self._limited[limit].value += 1

    def connection_limited(self, limit: str) -> None:
        """A connection was refused, or an idle one closed: `limit` as `connections.py` has it."""
        self._limited_connections[limit].value += 1

    def ledger_rows(self, state: State, count: int = 1) -> None:
        """So many ledger rows came into `state`."""
        self._row_cells[state].value += count

    def snapshot(self) -> Snapshot:
        """All that this process has counted, and what the kernel says of it."""
        process = self._process.snapshot()
        return Snapshot(
            {**self._numbers(_Counters, _Histograms), **process.counts},
            {**self._numbers(_Gauges), **process.gauges},
        )

    def _numbers(self, *kinds: type) -> dict[str, Mapping[tuple[str, ...], Numbers]]:
        return {
            name: family.numbers()
            for name, family in self._registry.families.items()
            if isinstance(family, kinds) and name not in OF_THE_WHOLE
        }

    def process_snapshot(self) -> Snapshot:
        """What the kernel says of this process."""
        return self._process.snapshot()

    def show(self, whole: Snapshot) -> None:
        """Show these numbers: those of several processes, added up."""
        for name, cells in [*whole.counts.items(), *whole.gauges.items()]:
            if (family := self._registry.families.get(name)) is not None:
                family.load(cells)
        self._process.load(whole)

    def exposition(self) -> bytes:
        """All metrics in the text format, version 0.0.4 (`CONTENT_TYPE`)."""
        return generate_latest(self._registry)


def _status_label(status: int) -> str:
    return str(status) if 100 <= status <= 599 else OTHER


def _path_label(path: str) -> str:
    if path in PATHS:
        return path
    return MODELS_PATH if path.startswith(MODELS_PATH + "/") else OTHER
