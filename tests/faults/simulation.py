"""A simulation of the proxy: one seed is one history, with everything that can go wrong in it.

    clients ~~ Site, Channel, Exchange, Forward, GroupCommit, SQLite, Delivery ~~ backends
    (fake)     (the real ones, one or two processes)                              (fake)

Time, network, threads and the death of processes are simulated; the proxy's code and SQLite are
real. After each history the promises are checked: one row per request that was sent, nothing
complete without its bill, nothing billed twice, the backend's own number, and no byte of an answer
that the backend did not send.

    python tests/faults/simulation.py --seed 7 -v      replays one history, with what happened
    python tests/faults/simulation.py --count 10000    looks for a history that breaks a promise
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a command it is used in a checkout
    sys.path.insert(0, str(Path(__file__).parents[2]))

from simulated_network import (
    EPOCH,
    THERE,
    SimReactor,
    SimTransport,
    World,
    attach,
    socket_pair,
)
from simulated_peers import BackendEnd, Client, Seen
from simulated_store import SimPool, Sink, Store
from simulated_traffic import DRAIN_S, MODELS, Ask, make_ask
from simulated_verdict import Verdict
from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent, globalLogPublisher
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy import auth, config, exchange, site, upstream
from llmproxy.auth import Authenticator
from llmproxy.backends import Backends
from llmproxy.checkpoints import Checkpoints
from llmproxy.config import Backend, Config, Prices
from llmproxy.delivery import Delivery
from llmproxy.exchange import Services
from llmproxy.limits import Limits
from llmproxy.metrics import Metrics
from llmproxy.model import Kind, State, product
from llmproxy.prices import PriceList
from llmproxy.resource import make_root
from llmproxy.site import Site
from llmproxy.storage import journal
from llmproxy.storage.journal import SQLiteLedger
from llmproxy.storage.memory import MemoryShares
from llmproxy.storage.owners import Owners
from llmproxy.storage.sqlite import SQLiteAccounts
from llmproxy.upstream import Upstream

#: A history that is not quiet after this time hangs.
LONGEST_S = 400.0
#: When a backend notices that a client has left: 0.2 s, and what the network takes.
STOPPED_S = 0.2 + 0.4
#: What a history may take.
MOST_STEPS = 200_000
MARK = re.compile(rb"mark-(\d+)-")


class BrokenPromise(AssertionError):
    """A history in which a promise did not hold."""


class SimOwners(Owners):
    """Which processes of the history live."""

    def __init__(self, me: str, dead: set[str]) -> None:
        self.me = me
        self._dead = dead

    def is_dead(self, owner: str) -> bool:
        return owner in self._dead

    def bury(self, owner: str) -> None:
        if owner not in self._dead:
            raise BrokenPromise(f"{owner} was buried alive")


@cache
def settings() -> Config:
    """The configuration of the simulated proxies."""
    backends = {
        name: {
            "url": f"http://127.0.0.1:{8001 + number}",
            "device": "sim",
            "usage": usage,
            "on_disconnect": on_disconnect,
            "drain_timeout": DRAIN_S,
        }
        for number, (name, (usage, on_disconnect)) in enumerate(MODELS.items())
    }
    mapping = {
        "timeout_read": 5,
        "timeout_connect": 1,
        "keepalive_interval": 2,
        "limits": {"concurrent_requests": 100},
        "backends": backends,
    }
    return config.parse(mapping, Path("/nowhere"))


@cache
def shared_metrics() -> Metrics:
    """Making them takes longer than a history does."""
    return Metrics("simulated", settings().backends)


class Process:
    """One proxy, from its start to its death."""

    def __init__(self, history: History, name: str) -> None:
        self.name = name
        self._history = history
        self.world = history.world
        self.reactor = SimReactor(history.world)
        self.reactor.accept = history.accept_backend
        self.listening = False
        self.heirs_of = set(history.dead)
        self.pools = [SimPool(self.world, self.reactor, history.store) for _ in range(2)]
        pool: Any = self.pools[0]
        self.ledger = SQLiteLedger(
            pool, self.reactor, SimOwners(name, history.dead), bills_here=history.bills_here
        )
        self.delivery: Delivery | None = None
        if not history.bills_here:
            jitter = self.world.rng.random
            self.delivery = Delivery(self.ledger, history.sink, self.reactor, jitter=jitter)
            self.ledger.notify = self.delivery.notify
            self.delivery.startService()
        self.services = self._services()
        root = make_root(self.services, 0)
        self.site = Site(
            root,
            self.reactor,
            metrics=shared_metrics(),
            monotonic=self.reactor.seconds,
            origin="*",
        )
        self.ledger.recover().addCallback(self._recovered, history)

    def _services(self) -> Services:
        accounts_pool: Any = self.pools[1]
        backends = Backends(self._connect, self.reactor)
        backends.swap(settings().backends)
        checkpoints = Checkpoints(self.ledger, self.reactor)
        checkpoints.startService()
        return Services(
            config=settings(),
            clock=self.reactor,
            monotonic=self.reactor.seconds,
            authenticator=Authenticator(
                SQLiteAccounts(accounts_pool), self.reactor, fresh_s=1, stale_max_s=300
            ),
            backends=backends,
            ledger=self.ledger,
            checkpoints=checkpoints,
            metrics=shared_metrics(),
            prices=PriceList(Prices()),
            limits=Limits(
                settings().limits,
                MemoryShares(),
                self.name,
                self.reactor,
                self.reactor.seconds,
                shared_metrics().limited,
            ),
        )

    def _connect(self, backend: Backend) -> Upstream:
        return upstream.connect(backend, self.reactor, 1)

    def _recovered(self, found: Mapping[State, int], history: History) -> None:
        self.world.say(f"{self.name}: recovered {dict(found)}")
        history.check_recovery(self)
        self.listening = True

    def connect(self, clients: SimReactor, client: Client) -> SimTransport | None:
        """A client's connection; None if it is refused."""
        if not self.listening or self.reactor.dead:
            return None
        theirs, ours = socket_pair(self.world)
        channel: Any = self.site.buildProtocol(THERE)
        transport = attach(self.reactor, ours, channel)
        transport.on_lost = lambda: self._history.lost(client)
        return attach(clients, theirs, client)

    @property
    def quiet(self) -> bool:
        """Nothing is in flight here."""
        return self.reactor.dead or (
            self.listening and not self.services.exchanges and not self.ledger.writer.pending
        )

    def kill(self) -> None:
        for pool in self.pools:
            pool.crash()
        self.reactor.kill()

    def stop(self) -> None:
        """As the service does at its end."""
        if self.reactor.dead:
            return
        self.services.checkpoints.stopService()
        if self.delivery is not None:
            self.delivery.stopService()
        self.services.backends.close()
        for transport in list(self.reactor.transports):  # in a fixed order, unlike the site's set
            if transport.protocol in self.site.connections:
                transport.protocol.close()

    def leftovers(self) -> list[str]:
        """What should be gone after `stop`."""
        if self.reactor.dead:
            return []
        found = [f"exchange of {self.name} still runs" for _ in self.services.exchanges]
        assert self.services.limits is not None
        found += [f"{key_id} is still counted" for key_id in self.services.limits.in_flight]
        found += [f"connection of {self.name} is open" for _ in self.reactor.transports]
        followed = self.services.checkpoints._streams
        found += [f"checkpoints of {self.name} still follow {rid}" for rid in followed]
        return found + [f"delayed call: {call}" for call in self.reactor.getDelayedCalls()]


class History:
    """Everything that happens from one seed."""

    def __init__(self, seed: int, say: Callable[[str], None]) -> None:
        rng = random.Random(seed)
        self.world = World(rng, self._say)
        self._tell = say
        self.store = Store(self.world, SCHEMA_HOOK[0])
        self.sink = Sink(self.world)
        self.sink.keyed = not SCHEMA_HOOK[0]
        self.bills_here = rng.random() < 0.6
        self.dead: set[str] = set()
        self.crashed: set[int] = set()
        self.log: dict[int, Ask] = {}
        self.in_part: set[int] = set()
        self.left_at: dict[int, float] = {}
        self.seen: dict[int, Seen] = {}
        self.clients, self.backends = SimReactor(self.world), SimReactor(self.world)
        self.processes: dict[str, Process] = {}
        self.all_processes: list[Process] = []
        self.ends: list[Client] = []
        self.faults: list[str] = []
        self._refusals = rng.choice((0.0, 0.0, 0.1, 0.5))
        self._rids = 0
        self._ending = False
        self.tally: Counter[str] = Counter(histories=1)
        self._make(rng)

    def _make(self, rng: random.Random) -> None:
        self.asks = {n: make_ask(rng, n) for n in range(1, rng.randint(1, 6) + 1)}
        for number in self.asks:
            self.store.add_key(f"key-{number}")
            self.seen[number] = Seen()
        self.store.add_key("expired", "2001-01-01")
        slots = ["a", "b"] if rng.random() < 0.3 else ["a"]
        for slot in slots:
            self._start(slot)
        waiting = list(self.asks.values())
        while waiting:
            taken = rng.choice((1, 1, 2, 3))
            client = Client(self, rng.choice(slots), waiting[:taken])
            waiting = waiting[taken:]
            self.ends.append(client)
            begins = 0.01 + rng.random() * rng.choice((0.0, 0.1, 2.0))
            self.world.callLater(begins, self._begin, client)
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            crash_s = rng.random() * rng.choice((0.05, 0.3, 1.0, 3.0))
            ends = self._crash if rng.random() < 0.75 else self._retire
            self.world.callLater(crash_s, ends, rng.choice(slots))

    def _begin(self, client: Client) -> None:
        if not self.processes[client.process].listening and self.world.seconds() < EPOCH + 60:
            self.world.callLater(0.3, self._begin, client)
        else:
            client.begin()

    def _say(self, text: str) -> None:
        self._tell(f"{self.world.seconds() - EPOCH:9.4f}  {text}")

    def _start(self, slot: str) -> None:
        name = f"{slot}{len(self.all_processes)}"
        self.processes[slot] = process = Process(self, name)
        self.all_processes.append(process)
        self._say(f"{name} starts")

    def _crash(self, slot: str) -> None:
        process = self.processes[slot]
        if process.reactor.dead or self._ending:
            return
        self._say(f"{process.name} dies")
        self.tally["killed"] += 1
        self._bury(slot, process)

    def _bury(self, slot: str, process: Process) -> None:
        self._interrupt(slot)
        process.kill()
        self.dead.add(process.name)
        self.world.callLater(self.world.rng.random(), self._start, slot)

    def _interrupt(self, slot: str) -> None:
        """From now on the requests that are in flight here may end in any way."""
        for row in self.store.rows():
            if row["owner"] == self.processes[slot].name and row["state"] == State.OPEN:
                self.crashed.add(int(row["api_key"].removeprefix("key-")))
        for client in self.ends:
            if client.process == slot and not client.over:
                self.crashed.update(ask.number for ask in client.asks)

    def _retire(self, slot: str) -> None:
        """A stop in order: nothing new, a little patience, then the rest is cut."""
        process = self.processes[slot]
        if process.reactor.dead or self._ending or not process.listening:
            return
        self._say(f"{process.name} is told to stop")
        self.tally["stopped"] += 1
        process.listening = False
        process.services.draining = True
        self.world.callLater(self.world.rng.random(), self._cut, slot, process)

    def _cut(self, slot: str, process: Process) -> None:
        if process.reactor.dead:
            return
        self._interrupt(slot)
        for running in sorted(process.services.exchanges, key=lambda e: e._request.rid):
            running.cut()
        self._await_end(slot, process)

    def _await_end(self, slot: str, process: Process) -> None:
        if process.reactor.dead:
            return
        if process.services.exchanges or process.ledger.writer.pending:
            self.world.callLater(0.05, self._await_end, slot, process)
            return
        self._say(f"{process.name} stops")
        mine = [row for row in self.store.rows() if row["owner"] == process.name]
        if any(row["state"] == State.OPEN for row in mine):
            self.broken(f"{process.name} stopped in order and left an open row")
        process.stop()
        self.world.callLater(2.0, self._end, slot, process)

    def _end(self, slot: str, process: Process) -> None:
        if not process.reactor.dead:
            self._bury(slot, process)

    def accept_backend(self, reactor: SimReactor) -> SimTransport | None:
        """A connection to a backend."""
        if self.world.rng.random() < self._refusals:
            self._say("backend refuses a connection")
            return None
        _, theirs = socket_pair(self.world)
        return attach(self.backends, theirs, BackendEnd(self))

    # -- promises that can be checked while it happens -------------------------------------

    def broken(self, text: str) -> None:
        """A promise was not kept."""
        self._say(f"BROKEN: {text}")
        self.faults.append(text)

    def _asked(self, data: bytes) -> int | None:
        match = MARK.search(data)
        return int(match[1]) if match else None

    def arrived(self, request: bytes) -> Ask:
        """A request is at a backend: it has an open row."""
        number = self._asked(request)
        if number is None:
            raise BrokenPromise("a backend got what no client sent")
        ask = self.asks[number]
        self._say(f"request {number} is at {ask.model} ({ask.endpoint.path})")
        if number in self.log:
            self.broken(f"request {number} was sent twice")
        if ask.refusal is not None:
            self.broken(f"request {number} was forwarded; it should have got {ask.refusal}")
        self.log[number] = ask
        self._check_open(number)
        return ask

    def arrived_in_part(self, data: bytes) -> None:
        """A part of a request is at a backend."""
        number = self._asked(data)
        if number is not None:
            self.in_part.add(number)

    def lost(self, client: Client) -> None:
        """A proxy's connection to a client has ended."""
        for ask in client.asks:
            self.left_at[ask.number] = self.world.seconds()

    def stopped(self, ask: Ask) -> None:
        """A connection ended before its answer did."""
        left_at = self.left_at.get(ask.number)
        if left_at is not None and ask.model.endswith("cancel") and ask.number not in self.crashed:
            late_s = self.world.seconds() - left_at
            if late_s > STOPPED_S:
                self.broken(f"request {ask.number} was cancelled {late_s:.2f} s late")

    def _check_open(self, number: int) -> None:
        row = self.store.row_of(number)
        if row is None:
            self.broken(f"request {number} was sent before its row was written")
        elif row["state"] != State.OPEN and number not in self.crashed:
            self.broken(f"request {number} was sent when its row was {row['state']}")

    def check_release(self, ask: Ask, seen: Seen) -> None:
        """The end of an answer is out: its bill is durable."""
        plan = ask.plan
        if seen.status != 200 or seen.released or ask.number not in self.log:
            return
        if plan.is_result and (not plan.stream or plan.marker in seen.body or seen.whole):
            seen.released = True
            row = self.store.row_of(ask.number)
            state = row["state"] if row else "not there"
            self._say(f"request {ask.number}: the end of its answer came, its row is {state}")
            if state in ("open", "not there"):
                self.broken(f"request {ask.number}: released while its row was {state}")

    def check_recovery(self, process: Process) -> None:
        """Rows of the dead are closed, rows of the living are not."""
        for row in self.store.rows():
            if row["owner"] in process.heirs_of and row["state"] == State.OPEN:
                self.broken(f"row {row['rid']} of dead {row['owner']} is open after recovery")
            if row["owner"] not in self.dead and self._closed_by_recovery(row):
                self.broken(f"row {row['rid']} of living {row['owner']} was closed by recovery")

    def _closed_by_recovery(self, row: Mapping[str, Any]) -> bool:
        return row["state"] != State.OPEN and row["outcome"] is None

    # -- from beginning to end -------------------------------------------------------------

    def run(self) -> None:
        """Let it happen, then check what is left."""
        for number, ask in self.asks.items():
            what = f"{ask.plan.status} lie={ask.plan.lie!r} broken={ask.plan.broken}"
            where = f"{ask.endpoint.path} {ask.model} stream={ask.plan.stream}"
            self._say(f"ask {number}: {where} refusal={ask.refusal}, plan: {what}")
        self._until(lambda: self._quiet, "not quiet")
        self._say("all is quiet")
        self._ending = True
        for process in self.all_processes:
            process.stop()
        self._until(lambda: not self.world.calls, "delayed calls are left")
        self._check()

    def _until(self, done: Callable[[], bool], text: str) -> None:
        deadline, steps = self.world.seconds() + LONGEST_S, 0
        look_at = 0.0
        while self.world.calls:
            if self.world.seconds() >= look_at:
                if done():
                    return
                look_at = self.world.seconds() + 0.2
            self.world.step()
            steps += 1
            if self.world.seconds() > deadline or steps > MOST_STEPS:
                calls = [str(call) for call in self.world.calls[:5]]
                self.broken(f"{text} after {steps} steps: {calls}")
                return

    @property
    def _quiet(self) -> bool:
        return (
            all(client.over for client in self.ends)
            and all(process.quiet for process in self.processes.values())
            and not any(process.reactor.dead for process in self.processes.values())
            and (self.bills_here or not self._undelivered())
        )

    def _undelivered(self) -> int:
        (waiting, _) = self.store.connection.execute(
            journal.BACKLOG, (journal.COUNTED_BACKLOG,)
        ).fetchone()
        return int(waiting)

    def _check(self) -> None:
        for process in self.all_processes:
            self.faults += process.leftovers()
        rows = self.store.rows()
        by_number = {n: [r for r in rows if r["api_key"] == f"key-{n}"] for n in self.asks}
        known = sum(map(len, by_number.values()))
        if known != len(rows):
            self.broken("a row belongs to no request")
        for number, ask in self.asks.items():
            Verdict(self, ask, by_number[number]).check()
        self._check_bill(rows)
        self.tally.update(f"{row['state']}" for row in rows)
        self.tally.update(
            requests=len(self.asks),
            sent=len(self.log),
            failed_commits=self.store.failures,
            whole_answers=sum(s.whole and s.status == 200 for s in self.seen.values()),
            clients_left=sum(client.left for client in self.ends),
        )

    def _check_bill(self, rows: Sequence[Mapping[str, Any]]) -> None:
        due: Counter[tuple[str, str, int, str]] = Counter()
        for row in rows:
            if row["state"] in (State.SETTLED, State.ESTIMATED):
                for kind in Kind:
                    if row[kind] is not None:
                        name = product(row["model"], row["device"], kind)
                        due[(row["rid"], name, row[kind], row["api_key"])] += 1
        billed = Counter(self._billed())
        for event in billed - due:
            self.broken(f"on the bill, but not due: {event}")
        for event in due - billed:
            self.broken(f"due, but not on the bill: {event}")

    def _billed(self) -> list[tuple[str, str, int, str]]:
        if self.bills_here:
            statement = "SELECT rid, product, quantity, api_key FROM event_oneoff"
            return list(self.store.connection.execute(statement))
        return [(e.rid, e.product, e.quantity, e.account.key_id) for e in self.sink.events]

    def next_rid(self) -> str:
        self._rids += 1
        return f"rid-{self._rids:04}"

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.world.seconds(), UTC)


#: SQL that a planted fault runs after the schema.
SCHEMA_HOOK = [""]


@implementer(ILogObserver)
class LoggedFailures:
    """A failure that is logged is a fault of the history in which that happened."""

    def __init__(self, history: History) -> None:
        self._history = history

    def __call__(self, event: LogEvent) -> None:
        if "log_failure" in event or event["log_level"] is LogLevel.critical:
            failure = event.get("log_failure")
            trace = failure.getTraceback() if failure is not None else ""
            self._history.broken(f"logged: {formatEvent(event)}\n{trace}")


@contextlib.contextmanager
def pinned(history: History) -> Iterator[None]:
    """Ids and times of the proxy come from the history, so that it repeats exactly."""
    places = [(exchange, "utcnow"), (auth, "utcnow"), (journal, "utcnow"), (site, "new_request_id")]
    before = [getattr(module, name) for module, name in places]
    observer = LoggedFailures(history)
    for module, name in places:
        setattr(module, name, history.now if name == "utcnow" else history.next_rid)
    globalLogPublisher.addObserver(observer)
    try:
        yield
    finally:
        globalLogPublisher.removeObserver(observer)
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


@dataclass
class Result:
    """Of one history, or of many: the broken promises by seed, and how much happened."""

    faults: dict[int, list[str]] = field(default_factory=dict)
    tally: Counter[str] = field(default_factory=Counter)


def play(seed: int, say: Callable[[str], None] = lambda text: None) -> Result:
    """Play the history of a seed."""
    history = History.__new__(History)
    with pinned(history):
        try:
            history.__init__(seed, say)  # type: ignore[misc]
            history.run()
            faults = history.faults
        except Exception as error:  # an exception that reaches the reactor is a fault of the proxy
            faults = [f"raised: {Failure(error).getTraceback()}"]
        finally:
            if "store" in vars(history):
                history.store.connection.close()
    result = Result({seed: faults} if faults else {})
    result.tally.update(getattr(history, "tally", {}))
    return result


def describe(seed: int) -> str:
    """Play a history again, and tell all that happened."""
    lines: list[str] = []
    faults = play(seed, lines.append).faults.get(seed, [])
    again = f"python tests/faults/simulation.py --seed {seed} -v"
    return "\n".join([f"seed {seed}:", *lines, *faults, f"replay: {again}"])


def play_all(seeds: Sequence[int], limit: int = 1) -> Result:
    """Play many histories, until `limit` of them are broken."""
    total = Result()
    with without_collector():
        for start in range(0, len(seeds), BATCH):
            batch = seeds[start : start + BATCH]
            for seed in batch:
                result = play(seed)
                total.faults |= result.faults
                total.tally += result.tally
                if len(total.faults) >= limit:
                    return total
            if leaked := garbage():
                text = f"seeds {batch[0]} to {batch[-1]} left behind: {leaked}"
                total.faults.setdefault(batch[0], []).append(text)
    return total


#: How many histories are played between two collections of garbage.
BATCH = 20


def garbage() -> list[str]:
    """Collect it; the failures of Deferreds that nobody handled are logged then."""
    logged: list[str] = []

    @implementer(ILogObserver)
    def observer(event: LogEvent) -> None:
        if "log_failure" in event:
            logged.append(event["log_failure"].getTraceback())

    globalLogPublisher.addObserver(observer)
    try:
        gc.collect()
    finally:
        globalLogPublisher.removeObserver(observer)
    return logged


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Histories leave cycles behind: one collection for many is quicker, and tells whose it is."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--limit", type=int, default=10, help="broken histories to look for")
    parser.add_argument("-v", action="store_true", help="tell what happens")
    arguments = parser.parse_args()
    if arguments.v:
        print(describe(arguments.seed))
        return 0
    began = time.monotonic()
    seeds = range(arguments.seed, arguments.seed + arguments.count)
    result = play_all(seeds, limit=arguments.limit)
    for seed, faults in result.faults.items():
        print(f"seed {seed}: {faults[0][:1000]}")
    seconds = time.monotonic() - began
    print(dict(result.tally))
    print(f"{len(result.faults)} broken, {seconds:.1f} s")
    return bool(result.faults)


if __name__ == "__main__":
    sys.exit(main())
