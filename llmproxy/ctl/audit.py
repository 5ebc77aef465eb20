"""`llmproxyctl audit`: what was billed for a backend against what the backend itself counted.

    sample ... sample ... sample ... (nothing in flight) ... last sample
    |<-- the backend's increases, and the ledger's rows opened --->|

The counters are those of vLLM (https://docs.vllm.ai/en/latest/usage/metrics.html).
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import ssl
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from llmproxy import config
from llmproxy.config import Backend, Config
from llmproxy.ctl.common import CommandError, add_format, emit, opened, read_page, say
from llmproxy.ctl.usage import summed
from llmproxy.model import Kind, utcnow
from llmproxy.storage.sqlite import to_text

PROMPT = "vllm:prompt_tokens_total"
COMPLETION = "vllm:generation_tokens_total"
MODEL_LABEL = "model_name"
#: More than any server's metrics.
#: How long after its last answer a backend may take to count it.
LAG_S = 1.0

#: A counter's name and labels.
Series = tuple[str, tuple[tuple[str, str], ...]]
Sample = Mapping[Series, float]


@dataclass(slots=True)
class Increase:
    """How much counters grew over samples. A counter that fell was reset to 0 in between."""

    totals: dict[str, float] = field(default_factory=lambda: {PROMPT: 0, COMPLETION: 0})
    resets: int = 0
    _last: dict[Series, float] = field(default_factory=dict)
    _started: bool = False

    def add(self, sample: Sample) -> None:
        """The next sample; the first one is the base line."""
        reset = False
        for series, value in sample.items():
            before = self._last.get(series, 0.0)
            if value < before:
                before, reset = 0.0, True
            if self._started:
                self.totals[series[0]] += value - before
        self.resets += reset
        self._last.update(sample)
        self._started = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Billed:
    """What the ledger has for a backend in a window.

    `edges`: requests in flight when it began or ended, of which only a part is in the window.
    """

    prompt: int
    completion: int
    requests: int
    unresolved: int
    edges: int


@dataclass(frozen=True, slots=True)
class Tools:
    """What a watch needs of the world."""

    fetch: Callable[[Backend], str]
    now: Callable[[], datetime] = utcnow
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def add_parser(groups: Any) -> None:
    """Add the command."""
    parser = groups.add_parser(
        "audit", help="compare what is billed with a vLLM backend's own counters"
    )
    parser.add_argument("backend", metavar="BACKEND", help="its name in the configuration")
    parser.add_argument("--watch", type=_seconds, required=True, metavar="SECONDS")
    parser.add_argument(
        "--interval",
        type=_seconds,
        default=10.0,
        metavar="SECONDS",
        help="between samples; bounds what is lost when the backend restarts (default: 10)",
    )
    parser.add_argument(
        "--wait",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="longest wait at the end for requests in flight (default: 60)",
    )
    add_format(parser)
    parser.set_defaults(run=_audit)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e8:
        raise argparse.ArgumentTypeError(f"not a number of seconds above 0: {text}")
    return seconds


def _audit(arguments: argparse.Namespace, config: Config) -> int:
    backend = config.backends.get(arguments.backend)
    if backend is None:
        raise CommandError(f"no backend is called {arguments.backend}")
    tools = Tools(fetch)
    with opened(config) as connection:
        increase, billed = watch(
            connection,
            backend,
            tools,
            watch_s=arguments.watch,
            interval_s=arguments.interval,
            wait_s=arguments.wait,
        )
    return _report(increase, billed, arguments.format)


def watch(
    connection: sqlite3.Connection,
    backend: Backend,
    tools: Tools,
    *,
    watch_s: float,
    interval_s: float,
    wait_s: float,
) -> tuple[Increase, Billed]:
    """Sample the backend for `watch_s`, and on for up to `wait_s` until nothing is in flight.

    Raises CommandError when the first or last sample can't be had; others may be missing.
    """
    increase = Increase()
    before = tools.now()
    increase.add(_counters(tools, backend))
    began = tools.now()
    edges = _in_flight(connection, backend, before, began)
    end = tools.monotonic() + watch_s
    while (left := end - tools.monotonic()) > 0:
        tools.sleep(min(interval_s, left))
        if tools.monotonic() < end:
            _sample(increase, backend, tools)
    give_up = tools.monotonic() + wait_s
    while _in_flight(connection, backend, tools.now(), tools.now()):
        if tools.monotonic() >= give_up:
            break
        tools.sleep(min(interval_s, LAG_S))
        _sample(increase, backend, tools)
    tools.sleep(LAG_S)
    ended = tools.now()
    increase.add(_counters(tools, backend))
    edges += _in_flight(connection, backend, ended, tools.now())
    return increase, _billed(connection, backend, began, ended, edges)


def _counters(tools: Tools, backend: Backend) -> Sample:
    """Those of all its servers."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for server in config.servers_of(backend):
        alone = config.member(backend, server)
        for (name, labels), value in read_counters(tools.fetch(alone), alone).items():
            found[name, (*labels, ("server", server.url))] = value
    return found


def _sample(increase: Increase, backend: Backend, tools: Tools) -> None:
    try:
        increase.add(_counters(tools, backend))
    except CommandError as error:
        say(f"a sample is missing: {error}")


def _in_flight(
    connection: sqlite3.Connection, backend: Backend, since: datetime, until: datetime
) -> int:
    """How many requests were at the backend at some time between the two."""
    (number,) = connection.execute(
        "SELECT count(*) FROM ledger WHERE model = ? AND device = ? AND opened <= ? "
        "AND (state = 'open' OR finished >= ?)",
        (backend.name, backend.device, to_text(until), to_text(since)),
    ).fetchone()
    return int(number)


def _billed(
    connection: sqlite3.Connection, backend: Backend, began: datetime, ended: datetime, edges: int
) -> Billed:
    window = "model = ? AND device = ? AND opened > ? AND opened < ?"
    bounds = (backend.name, backend.device, to_text(began), to_text(ended))
    (unresolved,) = connection.execute(
        f"SELECT count(*) FROM ledger WHERE state IN ('disputed', 'orphan') AND {window}", bounds
    ).fetchone()
    row: Any = next(iter(summed(connection, ("model",), window, bounds)), None)
    _, requests, *totals = row or (None, 0, *(0 for _ in Kind))
    sums = dict(zip(Kind, totals, strict=True))
    return Billed(
        # A backend counts what embeddings, reranks and scores read as prompts.
        prompt=sums[Kind.PROMPT] + sums[Kind.EMBEDDING],
        completion=sums[Kind.COMPLETION],
        requests=requests,
        unresolved=unresolved,
        edges=edges,
    )


def _report(increase: Increase, billed: Billed, form: str) -> int:
    rows = [
        (name, ours, theirs, ours - theirs)
        for name, ours, theirs in (
            ("prompt", billed.prompt, round(increase.totals[PROMPT])),
            ("completion", billed.completion, round(increase.totals[COMPLETION])),
        )
    ]
    say(f"{billed.requests} requests billed")
    if billed.unresolved:
        say(f"{billed.unresolved} requests are disputed or orphan, and not billed")
    if billed.edges:
        say(f"{billed.edges} requests were in flight at the window's ends: expect a difference")
    if increase.resets:
        say(f"the backend's counters were reset {increase.resets} times: some may be missing")
    emit(("tokens", "billed", "counted", "difference"), rows, form)
    return int(any(difference for _, _, _, difference in rows))


def read_counters(text: str, backend: Backend) -> Sample:
    """The token counters of the backend's model, from metrics in Prometheus' text format.

    A server with one model may call it as it likes. Raises CommandError.
    """
    try:
        found = [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name in (PROMPT, COMPLETION)
        ]
    except (ValueError, KeyError, IndexError) as error:
        raise CommandError(f"{backend.url}/metrics can't be read") from error
    if {sample.name for sample in found} != {PROMPT, COMPLETION}:
        raise CommandError(f"{backend.url}/metrics has no {PROMPT}: is it vLLM?")
    models = {sample.labels.get(MODEL_LABEL, "") for sample in found}
    wanted = backend.model or backend.name
    if len(models) > 1 and wanted not in models:
        raise CommandError(f"{backend.url}/metrics has no {wanted}, but {', '.join(models)}")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for sample in found
        if len(models) == 1 or sample.labels.get(MODEL_LABEL, "") == wanted
    }


def fetch(backend: Backend) -> str:
    """The backend's metrics, asked for with its token. Raises CommandError."""
    url = f"{backend.url}/metrics"
    request = urllib.request.Request(url)
    if backend.token:
        request.add_unredirected_header("Authorization", f"Bearer {backend.token}")
    return read_page(request, urllib.request.HTTPSHandler(context=_tls(backend)), _NoRedirect())


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other; the token is for the backend alone."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _tls(backend: Backend) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=backend.ca)
    if backend.client_cert is not None and backend.client_key is not None:
        _load_identity(context, backend.client_cert, backend.client_key)
    if not backend.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _load_identity(context: ssl.SSLContext, chain: str, key: str) -> None:
    """The module `ssl` takes files alone; this one is in memory, where nobody else can read it."""
    with os.fdopen(os.memfd_create("identity"), "wb") as file:
        file.write(f"{chain}\n{key}\n".encode())
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
