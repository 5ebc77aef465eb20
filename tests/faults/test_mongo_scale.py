"""Three proxies on one MongoDB replica set, whose primary changes while users are at work.

Nobody whose key is known notices. A key that a proxy has not seen yet may get 503 with Retry-After
for as long as there is no primary. In the end the bills of all proxies are in
`billing.events_oneoff`, each exactly once, and nothing waits in a journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mongod
import pytest
from agreement import BackendLog, compare
from figures import LONG, report
from load import Asked, Load, Plan, until
from mongo_rig import CLIENTS, STRANGERS, MongoRig, Stranger, ask_once
from mongod import Mongod, ReplicaSet
from pymongo import WriteConcern
from pymongo.errors import PyMongoError
from rig import cpu_s

from llmproxy.delivery import BATCH_ROWS
from llmproxy.model import Account, Event
from llmproxy.storage.mongo import event_document, key_filter

WORKERS = (1, 1, 2)  # of each proxy
#: How soon after a change of the primary a key that was never seen must be let in, and the last
#: bill be there: an election, and the longest pauses of connections and deliveries.
RECOVERY_S = 20.0
#: How long a look-up of a key may take before it is given up, and some for a machine that is busy.
REFUSAL_S = 2.5
#: Nobody's request stands still. Generous: the machine has other things to do.
STILL_S = 10.0
QUIET_S = 5.0 if LONG else 0.5
ROUNDS = 3 if LONG else 1
SENDERS = 4
BATCHES = 50 if LONG else 2  # of each sender
KEYS = 20_000 if LONG else 500
VALID = {"access_level": "LLM", "user_id": "user", "date_expiry": None}


def p99_ms(asked: Sequence[Asked]) -> float:
    added = sorted(each.added_s for each in asked)
    return 1000 * added[int(0.99 * len(added))]


class Fleet:
    """The proxies, each with a journal of its own, their clients, and strangers who come and go."""

    def __init__(self, folder: Path, replicas: ReplicaSet) -> None:
        self.replicas = replicas
        self.rigs = [self._rig(folder / f"proxy-{n}", workers) for n, workers in enumerate(WORKERS)]
        self.loads = [
            Load(rig.port, CLIENTS, Plan(random.Random(n), max_tokens=12, max_ms=30))
            for n, rig in enumerate(self.rigs)
        ]
        for number, load in enumerate(self.loads):
            load.generation = 100 * number  # so that the markers of all differ
        self.strangers: list[Stranger] = []
        self.figures: dict[str, float] = {}

    def _rig(self, folder: Path, workers: int) -> MongoRig:
        folder.mkdir()
        return MongoRig(folder, self.replicas.client(), self.replicas.seeds, workers=workers)

    @property
    def asked(self) -> list[Asked]:
        return [each for load in self.loads for each in load.asked]

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """What the journals of all say; what all say alike, once."""
        return list(dict.fromkeys(row for rig in self.rigs for row in rig.query(statement)))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[list[subprocess.Popen[bytes]]]:
        """All proxies serve, all clients are known, and strangers come."""
        with self.rigs[0].backend() as url:
            for rig in self.rigs:
                rig.configure(url)
            async with contextlib.AsyncExitStack() as stack:
                starting = (stack.enter_async_context(rig.running()) for rig in self.rigs)
                processes = await asyncio.gather(*starting)
                for load in self.loads:
                    load.start()
                    await until(lambda load=load: load.known == CLIENTS, 20, "answers")  # type: ignore[misc]
                visits = asyncio.create_task(self._visits())
                yield processes
                visits.cancel()

    async def _visits(self) -> None:
        """Strangers, one after the other, at each proxy in turn."""
        for number in range(CLIENTS, CLIENTS + STRANGERS):
            for rig in self.rigs:
                self.strangers.append(await ask_once(rig.port, number))
                await asyncio.sleep(0.1)

    async def endures(self, name: str, change: Callable[[], object]) -> None:
        """The primary changes, and after some seconds strangers are let in by all proxies."""
        before, began = len(self.strangers), time.time()
        await asyncio.to_thread(change)
        changed = len(self.strangers)

        def let_in() -> bool:
            last = self.strangers[changed:][-len(self.rigs) :]
            return [each.asked.status for each in last] == [200] * len(self.rigs)

        await until(let_in, RECOVERY_S, "strangers")
        visits = self.strangers[before:]
        refused = [each for each in visits if each.asked.status != 200]
        assert all(each.asked.status == 503 and each.may_come_again for each in refused), refused
        assert all(each.took_s < REFUSAL_S for each in refused), refused
        self._note(f"{name}_unknown_again_in_s", time.time() - began)
        self._note(f"{name}_unknown_refused", len(refused))
        self._note(f"{name}_p99_ms", p99_ms(self._ended_since(began)))

    def _note(self, name: str, value: float) -> None:
        """The most of all rounds."""
        self.figures[name] = max(value, self.figures.get(name, 0))

    def _ended_since(self, began: float) -> list[Asked]:
        return [each for each in self.asked if each.finished and each.ended_at > began]

    async def quiet(self) -> None:
        """All is well for a while."""
        began = time.time()
        await asyncio.sleep(QUIET_S)
        self._note("quiet_p99_ms", p99_ms(self._ended_since(began)))

    async def delivered(self) -> None:
        """No client has met anything; all stop, and the last bill of all arrives."""
        assert [load.connected for load in self.loads] == [CLIENTS] * len(self.loads)
        for load in self.loads:
            await load.stop()
        for rig in self.rigs:
            await until(lambda rig=rig: not rig.open_rows(), 10, "the last settlement")  # type: ignore[misc]
        waits = [
            await until(lambda rig=rig: not rig.undelivered(), RECOVERY_S, "the last delivery")  # type: ignore[misc]
            for rig in self.rigs
        ]
        self.figures["delivered_in_s"] = sum(waits)
        broken_off = [rig.output().count("Delivery fails") for rig in self.rigs]
        self.figures["deliveries_broken_off"] = sum(broken_off)

    def tell(self, name: str) -> None:
        asked = self.asked
        last = {(each.generation, each.client): each for each in asked}
        unfinished = [each for each in asked if not each.finished and each not in last.values()]
        assert not unfinished, unfinished
        assert {each.status for each in asked if each.finished} == {200}
        assert max(each.added_s for each in asked if each.finished) < STILL_S
        log = BackendLog.read(self.rigs[0].backend_log)
        everybody = asked + [each.asked for each in self.strangers]
        verdict = compare(everybody, log, self.query, self.rigs[0].bills())
        report(f"mongo, {len(self.rigs)} proxies, {name}", **verdict.figures(), **self.figures)
        assert not verdict.wrong, verdict.examples
        assert self.rigs[0].owners_agree()
        assert all("Traceback" not in rig.output() for rig in self.rigs)


@pytest.fixture(scope="module")
def replicas() -> Iterator[ReplicaSet]:
    replicas = ReplicaSet(3)
    try:
        yield replicas
    finally:
        replicas.stop()


def through(fleet: Fleet, name: str, story: Callable[[], Awaitable[None]]) -> None:
    """Run all, with the story in the middle."""

    async def whole() -> None:
        async with fleet.running() as processes:
            await fleet.quiet()
            await story()
            await fleet.delivered()
            for process in processes:
                process.terminate()
            codes = [await asyncio.to_thread(process.wait, 20) for process in processes]
            assert codes == [0] * len(processes)

    asyncio.run(whole())
    fleet.tell(name)


@pytest.mark.timeout(600)
def test_a_step_down_is_nobody_s_and_the_bills_of_all_proxies_arrive_once(
    tmp_path: Path, replicas: ReplicaSet
) -> None:
    fleet = Fleet(tmp_path, replicas)

    async def story() -> None:
        for _ in range(ROUNDS):
            await fleet.endures("step_down", replicas.step_down)
            await asyncio.sleep(QUIET_S)

    through(fleet, "stepped down", story)


LOSSES: dict[str, tuple[Callable[[Mongod], None], Callable[[Mongod], None]]] = {
    "killed": (Mongod.kill, Mongod.start),
    "frozen": (Mongod.pause, Mongod.resume),
}


@pytest.mark.skipif(not LONG, reason="the long form")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_primary_that_returns_is_nobody_s(
    tmp_path: Path, replicas: ReplicaSet, loss: str
) -> None:
    lose, bring_back = LOSSES[loss]
    fleet = Fleet(tmp_path, replicas)

    async def story() -> None:
        for _ in range(ROUNDS):
            lost = await asyncio.to_thread(replicas.primary)
            await fleet.endures(loss, lambda lost=lost: lose(lost))  # type: ignore[misc]
            await asyncio.sleep(QUIET_S)
            bring_back(lost)  # in this thread: what another one starts would end with it
            await asyncio.to_thread(mongod.wait_until, lambda lost=lost: follows(lost))  # type: ignore[misc]
            await asyncio.sleep(QUIET_S)

    through(fleet, loss, story)


def follows(member: Mongod) -> bool:
    """It is a secondary again; one that has been frozen may take itself for the primary first."""
    with contextlib.closing(member.connect()) as client, contextlib.suppress(PyMongoError):
        return bool(client.admin.command("hello")["secondary"])
    return False


# -- how many bills a set takes ------------------------------------------------------------------


def batch(number: int) -> list[mongod.Document]:
    """What a delivery sends at once: the two lines of each of its requests."""
    account = Account(f"{number:036}", f"user-{number}")
    now = datetime.now(UTC)
    products = (
        "an-organisation/a-model-name/gpu/prompt",
        "an-organisation/a-model-name/gpu/completion",
    )
    return [
        event_document(Event(f"{number:027}-{row:08}", now, account, product, row + 1))
        for row in range(BATCH_ROWS)
        for product in products
    ]


class Spent:
    """CPU time of the set's members while something is done, and how long that took."""

    def __init__(self, replicas: ReplicaSet) -> None:
        primary = replicas.primary()
        others = [member for member in replicas.members if member is not primary]
        self._pids = [member.pid for member in (primary, *others)]

    def on(self, work: Callable[[Any], object], tasks: Sequence[object]) -> dict[str, float]:
        """Let some senders do it all; figures for one task."""
        before = [cpu_s(pid) for pid in self._pids]
        began = time.monotonic()
        with ThreadPoolExecutor(SENDERS) as pool:
            list(pool.map(work, tasks))
        took = time.monotonic() - began
        primary, *others = (cpu_s(pid) - s for pid, s in zip(self._pids, before, strict=True))
        each = 1e6 / len(tasks)
        return {
            "per_s": len(tasks) / took,
            "primary_cpu_us": primary * each,
            "secondary_cpu_us": sum(others) / len(others) * each,
        }


def test_bills_of_many_proxies_at_once_are_all_stored(replicas: ReplicaSet) -> None:
    """What it reports is for docs/capacity.md: batches as a delivery sends them."""
    events = replicas.client().billing.events_oneoff
    events.drop()
    durable = events.with_options(write_concern=WriteConcern("majority", j=True))
    batches = [batch(number) for number in range(SENDERS * BATCHES)]
    spent = Spent(replicas).on(lambda each: durable.insert_many(each, ordered=False), batches)
    count = events.count_documents({})
    assert count == len(batches) * len(batches[0])
    size = replicas.client().billing.command("collStats", "events_oneoff")["avgObjSize"]
    report("mongo, bills into three", lines=count, batch=len(batches[0]), bytes_each=size, **spent)


def test_keys_that_many_proxies_look_up_at_once_are_all_found(replicas: ReplicaSet) -> None:
    """What it reports is for docs/capacity.md: queries as a proxy makes them."""
    keys = replicas.client().cgc.api_keys
    keys.drop()
    keys.create_index("secret")
    hashes = [hashlib.sha256(Load.key(number).encode()).hexdigest() for number in range(KEYS)]
    keys.insert_many({"_id": str(n), "secret": each, **VALID} for n, each in enumerate(hashes))
    found: set[str] = set()

    def look_up(secret_hash: str) -> None:
        key = keys.find_one(key_filter(secret_hash, datetime.now(UTC)), {"user_id": 1})
        assert key is not None
        found.add(key["_id"])

    spent = Spent(replicas).on(look_up, hashes)
    assert len(found) == KEYS
    report("mongo, keys looked up", keys=KEYS, **spent)
