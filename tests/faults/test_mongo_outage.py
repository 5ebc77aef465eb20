"""MongoDB is gone while users are at work: nobody notices, and every bill arrives once.

Known keys go on working, unknown ones get 503 with Retry-After within 2 s, bills wait in the local
journal. When the server is back, `billing.events_oneoff` holds each event exactly once.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import mongod
import pytest
from agreement import BackendLog, compare
from figures import LONG, report
from load import Asked, Load, Plan, until
from mongo_rig import CLIENTS, MongoRig, Stranger, ask_once
from mongod import Mongod
from rig import Rig, cpu_s
from server_process import get_status
from speech import BY_PATH, Speech

from llmproxy.model import Account, Entry, Kind, Outcome, Settlement, State
from llmproxy.storage import rows
from llmproxy.storage.sqlite import connect, prepare

OUTAGE_S = 30.0 if LONG else 1.8
#: How soon after an outage the last bill must be there: the longest pause of a delivery, and that
#: of a connection.
DELIVERY_S = 15.0
BACKLOG_ROWS = 100_000 if LONG else 5_000


class Trial:
    """A proxy, its backend, its clients and its MongoDB through an outage."""

    def __init__(
        self, folder: Path, client: mongod.Client, address: str, *, workers: int = 1
    ) -> None:
        self.rig = MongoRig(folder, client, address, workers=workers)
        plan = Plan(random.Random(1), max_tokens=8, max_ms=20)
        self.load = Load(self.rig.port, CLIENTS, plan)
        self.strangers: list[Asked] = []
        self.seconds: dict[str, float] = {}

    async def all_known(self) -> None:
        """Every client has had an answer, so every client's key is known."""
        await until(lambda: self.load.known == CLIENTS, 20, "answers")

    async def stranger(self) -> Stranger:
        """Ask with a key that was never used."""
        asked = await ask_once(self.rig.port, CLIENTS + len(self.strangers))
        self.strangers.append(asked.asked)
        return asked

    async def works_in_the_outage(self, seconds: float) -> None:
        """Known keys work, and unknown ones are told to come back."""
        since = len(self.load.asked)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            stranger = await self.stranger()
            assert stranger.asked.status == 503, stranger
            assert stranger.may_come_again
            assert stranger.took_s < 2.2, stranger
            longest = self.seconds.get("unknown_in_s", 0.0)
            self.seconds["unknown_in_s"] = max(stranger.took_s, longest)
            await asyncio.sleep(min(1.0, seconds / 4))
        during = [each for each in self.load.asked[since:] if each.finished]
        assert len(during) > CLIENTS
        assert {each.status for each in during} == {200}
        self.seconds["served_in_outage"] = len(during)
        admin = f"http://127.0.0.1:{self.rig.admin_port}"
        assert get_status(f"{admin}/readyz") == 200

    async def delivered(self) -> None:
        """The clients stop, and the last bill arrives."""
        await self.load.stop()
        await until(lambda: not self.rig.open_rows(), 10, "the last settlement")
        took = await until(lambda: not self.rig.undelivered(), DELIVERY_S, "the last delivery")
        self.seconds["delivered_in_s"] = took

    def tell(self, name: str) -> None:
        asked = self.load.asked + self.strangers
        log = BackendLog.read(self.rig.backend_log)
        verdict = compare(asked, log, self.rig.query, self.rig.bills())
        report(f"mongo, {name}", **verdict.figures(), **self.seconds)
        assert not verdict.wrong, verdict.examples
        assert self.rig.owners_agree()


Outage = Callable[[], contextlib.AbstractContextManager[object]]


async def through(trial: Trial, outage: Outage) -> None:
    with trial.rig.backend() as url:
        trial.rig.configure(url)
        async with trial.rig.running() as process:
            trial.load.start()
            await trial.all_known()
            with outage():
                await trial.works_in_the_outage(OUTAGE_S)
            began = time.monotonic()
            while (await trial.stranger()).asked.status != 200:
                assert time.monotonic() - began < DELIVERY_S
                await asyncio.sleep(0.2)
            trial.seconds["unknown_again_in_s"] = time.monotonic() - began
            await trial.delivered()
            began = time.monotonic()
            process.terminate()
            assert await asyncio.to_thread(process.wait, 20) == 0
            assert time.monotonic() - began < 4, "the stop waited for something"


@pytest.fixture(scope="module")
def server() -> Iterator[Mongod]:
    with mongod.running(Mongod()) as server:
        yield server


@contextlib.contextmanager
def paused(server: Mongod) -> Iterator[None]:
    server.pause()
    try:
        yield
    finally:
        server.resume()


@contextlib.contextmanager
def killed(server: Mongod) -> Iterator[None]:
    server.kill()
    try:
        yield
    finally:
        server.start()


@contextlib.contextmanager
def failing(server: Mongod, **how: Any) -> Iterator[None]:
    server.fail_command("alwaysOn", failCommands=["find", "insert"], **how)
    try:
        yield
    finally:
        server.fail_command("off")


#: Codes of https://github.com/mongodb/mongo/blob/master/src/mongo/base/error_codes.yml
ERRORS: dict[str, dict[str, Any]] = {
    "connection closed": {"closeConnection": True},
    "NotWritablePrimary": {"errorCode": 10107},
    "HostUnreachable": {"errorCode": 6},
    "HostNotFound": {"errorCode": 7},
    "Unauthorized": {"errorCode": 13},
    "WriteConcernFailed": {"errorCode": 64},
    "NetworkTimeout": {"errorCode": 89},
    "ShutdownInProgress": {"errorCode": 91},
    "PrimarySteppedDown": {"errorCode": 189},
    "ExceededTimeLimit": {"errorCode": 262},
    "SocketException": {"errorCode": 9001},
    "InterruptedAtShutdown": {"errorCode": 11600},
    "InterruptedDueToReplStateChange": {"errorCode": 11602},
    "NotPrimaryNoSecondaryOk": {"errorCode": 13435},
    "NotPrimaryOrSecondary": {"errorCode": 13436},
    "OutOfDiskSpace": {"errorCode": 14031},
}
OUTAGES: dict[str, Callable[[Mongod], contextlib.AbstractContextManager[object]]] = {
    "paused": paused,
    "killed": killed,
    **{
        name: lambda server, how=how: failing(server, **how)  # type: ignore[misc]
        for name, how in (ERRORS.items() if LONG else list(ERRORS.items())[:1])
    },
}


@pytest.mark.parametrize("outage", OUTAGES)
@pytest.mark.timeout(180)
def test_an_outage_is_nobody_s_and_every_bill_arrives_once(
    tmp_path: Path, server: Mongod, outage: str
) -> None:
    trial = Trial(tmp_path, server.client(), server.address)
    asyncio.run(through(trial, lambda: OUTAGES[outage](server)))
    trial.tell(outage)


@pytest.mark.timeout(180)
def test_a_write_concern_that_fails_doubles_nothing(tmp_path: Path, server: Mongod) -> None:
    trial = Trial(tmp_path, server.client(), server.address)

    async def story() -> None:
        with trial.rig.backend() as url:
            trial.rig.configure(url)
            async with trial.rig.running():
                trial.load.start()
                await trial.all_known()
                # The documents are stored, and the answer says that they may not last.
                concern = {"code": 64, "errmsg": "waiting"}
                times = 4 if LONG else 2
                server.fail_command(times, failCommands=["insert"], writeConcernError=concern)
                await asyncio.sleep(0.5)
                await trial.delivered()

    try:
        asyncio.run(story())
    finally:
        server.fail_command("off")
    trial.tell("write concern error")


@pytest.mark.timeout(180)
def test_a_proxy_that_dies_in_an_outage_leaves_its_bills_to_the_next_one(
    tmp_path: Path, server: Mongod
) -> None:
    trial = Trial(tmp_path, server.client(), server.address)

    async def story() -> None:
        with trial.rig.backend() as url:
            trial.rig.configure(url)
            async with trial.rig.running() as process:
                trial.load.start()
                await trial.all_known()
                with killed(server):
                    await asyncio.sleep(OUTAGE_S / 2)
                    process.kill()
                    await trial.load.wait()
                    assert trial.rig.undelivered()
            async with trial.rig.running():
                trial.load.start()
                await trial.all_known()
                await trial.delivered()

    asyncio.run(story())
    trial.tell("killed, and the proxy too")


# -- a long backlog ------------------------------------------------------------------------------


def fill(path: Path, count: int) -> None:
    """A journal as an outage of hours leaves it."""
    prepare(path)
    began = datetime.now(UTC) - timedelta(hours=1)
    with closing(connect(path)) as connection:
        rows.install(connection)
        connection.execute("BEGIN")
        for number in range(count):
            opened = began + timedelta(milliseconds=number)
            account = Account(str(number % CLIENTS), f"user-{number % CLIENTS}")
            entry = Entry(
                rid=f"r{number:08}",
                opened=opened,
                account=account,
                path="/v1/chat/completions",
                model="m",
                device="gpu",
            )
            rows.CHANGE.write(connection, [rows.opening(entry, "gone")])
            settlement = Settlement(
                state=State.SETTLED,
                outcome=Outcome.COMPLETE,
                counts={Kind.PROMPT: number + 1, Kind.COMPLETION: 1},
                finished=opened,
            )
            rows.CHANGE.write(connection, [rows.closing(entry.rid, settlement, bills_here=False)])
        connection.execute("COMMIT")


def resident_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1])


@pytest.mark.timeout(600)
def test_a_backlog_of_hours_is_delivered_once_and_in_bounded_memory(
    tmp_path: Path, server: Mongod
) -> None:
    rig = MongoRig(tmp_path, server.client(), server.address)
    rig.configure("http://127.0.0.1:1")
    figures: dict[str, float] = {}

    async def story() -> None:
        async with rig.running() as process:  # with nothing to deliver
            await asyncio.sleep(0.5)
            figures["idle_kib"] = resident_kib(process.pid)
            idle_s = cpu_s(process.pid)
        fill(rig.database, BACKLOG_ROWS)
        began = time.monotonic()
        async with rig.running() as process:
            await until(lambda: not rig.undelivered(), 300, "the backlog")
            figures["delivered_in_s"] = time.monotonic() - began
            figures["peak_kib"] = resident_kib(process.pid)
            figures["cpu_us_each"] = (cpu_s(process.pid) - idle_s) * 1e6 / BACKLOG_ROWS

    asyncio.run(story())
    events = server.client().billing.events_oneoff
    total = list(events.aggregate([{"$group": {"_id": None, "sum": {"$sum": "$quantity"}}}]))
    report("mongo, backlog", rows=BACKLOG_ROWS, events=events.count_documents({}), **figures)
    assert events.count_documents({}) == 2 * BACKLOG_ROWS
    assert total[0]["sum"] == BACKLOG_ROWS * (BACKLOG_ROWS + 1) // 2 + BACKLOG_ROWS
    assert figures["peak_kib"] - figures["idle_kib"] < 20 * 1024


class OneLongStream(Plan):
    """Every request is for one that takes more than a second."""

    def pick(self) -> tuple[Speech, bool, int, int]:
        return BY_PATH["/v1/chat/completions"], True, 24, 60


async def stream_of_worker_1(rig: Rig) -> Load:
    """A client whose stream is with worker 1 and goes on for a while."""
    rid = re.findall(r"\[1\]  complete (\S+)", rig.output())[-1]
    [(owner,)] = rig.query(f"SELECT owner FROM ledger WHERE rid = '{rid}'")
    while True:
        load = Load(rig.port, 1, OneLongStream(random.Random(3)))
        load.generation = 99
        load.start()
        await until(lambda: bool(rig.open_rows()), 5, "its row")
        if rig.query("SELECT owner FROM ledger WHERE state = 'open'") == [(owner,)]:
            return load
        await load.stop()
        await until(lambda: not rig.open_rows(), 5, "its end")


@pytest.mark.timeout(180)
def test_of_several_workers_one_delivers_the_bills_of_all_and_leaves_last(
    tmp_path: Path, server: Mongod
) -> None:
    trial = Trial(tmp_path, server.client(), server.address, workers=2)
    rig = trial.rig

    async def story(url: str) -> None:
        rig.configure(url, drain_s=10)
        async with rig.running() as process:
            trial.load.start()
            await trial.all_known()
            for number in (0, 1):
                await until(lambda n=number: f"[{n}]  complete" in rig.output(), 20, "both")  # type: ignore[misc]
            await trial.delivered()
            last = await stream_of_worker_1(rig)
            process.terminate()
            assert await asyncio.to_thread(process.wait, 20) == 0
            await last.wait()
            assert last.asked[0].finished
            assert not rig.undelivered()
            assert last.asked[0].rid in rig.bills()

    with rig.backend() as url:
        asyncio.run(story(url))
    assert "Traceback" not in rig.output()
