"""MongoDB is gone while users are at work: nobody notices, and every bill arrives once.

Known keys go on working, unknown ones get 503 with Retry-After within 2 s, bills wait in the local
journal. When the server is back, `billing.events_oneoff` holds each event exactly once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import re
import time
from collections import Counter
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
from mongod import Mongod, ReplicaSet
from rig import Rig
from server_process import get_status
from speech import BY_PATH, Speech

from llmproxy.model import Account, Entry, Kind, Outcome, Settlement, State
from llmproxy.storage import rows
from llmproxy.storage.sqlite import connect, prepare

CLIENTS = 12
STRANGERS = 200  # keys that are right, and that the proxy has not seen yet
OUTAGE_S = 30.0 if LONG else 1.8
#: How soon after an outage the last bill must be there: the longest pause of a delivery, and that
#: of a connection.
DELIVERY_S = 15.0
BACKLOG_ROWS = 100_000 if LONG else 5_000
PASSWORD = "for-a-test"


class MongoRig(Rig):
    """A proxy whose keys and bills are in a MongoDB, with its journal in its folder."""

    def __init__(
        self, folder: Path, client: mongod.Client, address: str, *, workers: int = 1
    ) -> None:
        self._client = client
        self._uri = f"mongodb://llmproxy:{PASSWORD}@{address}/?authSource=cgc"
        keys = CLIENTS + STRANGERS
        super().__init__(folder, clients=keys, command=["-m", "llmproxy"], workers=workers)
        self.database = folder / "ledger.sqlite"

    def _add_keys(self, clients: int) -> None:
        client = self._client
        find = {"resource": {"db": "cgc", "collection": "api_keys"}, "actions": ["find"]}
        add = {"resource": {"db": "billing", "collection": "events_oneoff"}, "actions": ["insert"]}
        roles = [("cgc", "apiKeysReader", find), ("billing", "completionBillingWriter", add)]
        with contextlib.suppress(mongod.pymongo.errors.OperationFailure):  # made by another test
            for database, role, may in roles:
                client[database].command("createRole", role, privileges=[may], roles=[])
            named = [{"role": role, "db": database} for database, role, _ in roles]
            client.cgc.command("createUser", "llmproxy", pwd=PASSWORD, roles=named)
        client.cgc.api_keys.drop()
        client.billing.events_oneoff.drop()
        client.cgc.api_keys.insert_many(
            {
                "_id": str(n),
                "secret": hashlib.sha256(Load.key(n).encode()).hexdigest(),
                "access_level": "LLM",
                "user_id": f"user-{n}",
                "date_expiry": None,
            }
            for n in range(clients)
        )

    def configuration(self, *urls: str, **options: Any) -> str:
        text = super().configuration(*urls, **options)
        old = f'uri = "sqlite://{self.database}"\n'
        assert old in text
        return text.replace(old, f'uri = "{self._uri}"\n[ledger]\npath = "{self.database.name}"\n')

    def undelivered(self) -> int:
        """How many bills wait in the journal."""
        statement = (
            "SELECT count(*) FROM ledger WHERE state IN ('settled', 'estimated') AND delivered = 0"
        )
        return int(self.query(statement)[0][0])

    def bills(self) -> dict[str, Counter[tuple[str, int]]]:
        """What is in MongoDB, by request."""
        bills: dict[str, Counter[tuple[str, int]]] = {}
        for event in self._client.billing.events_oneoff.find():
            kind = event["product"].rpartition("/")[2]
            bills.setdefault(event["request_id"], Counter())[kind, event["quantity"]] += 1
        return bills

    def owners_agree(self) -> bool:
        """Each bill names its key's user."""
        events = self._client.billing.events_oneoff.find()
        return all(event["user_id"] == f"user-{event['api_key_id']}" for event in events)


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
        await until(
            lambda: len({a.client for a in self.load.asked if a.finished}) == CLIENTS, 20, "answers"
        )

    async def stranger(self) -> tuple[int | None, str, float]:
        """Ask with a key that was never used: status, header, seconds."""
        number = CLIENTS + len(self.strangers)
        one = Load(self.rig.port, number, Plan(random.Random(number), max_tokens=2, max_ms=5))
        one.generation = 1000 + number
        link, out = await asyncio.open_connection("127.0.0.1", self.rig.port)
        began = time.monotonic()
        heads: list[bytes] = []
        read = link.readuntil

        async def note(separator: bytes = b"\n") -> bytes:
            heads.append(await read(separator))
            return heads[-1]

        link.readuntil = note  # type: ignore[assignment]
        try:
            await one._ask(number, link, out)
        finally:
            out.transport.abort()
            self.strangers += one.asked
        return one.asked[0].status, heads[0].decode("latin-1"), time.monotonic() - began

    async def works_in_the_outage(self, seconds: float) -> None:
        """Known keys work, and unknown ones are told to come back."""
        since = len(self.load.asked)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            status, head, took = await self.stranger()
            assert status == 503, (status, head)
            assert "retry-after: " in head.lower()
            assert took < 2.2, took
            self.seconds["unknown_in_s"] = max(took, self.seconds.get("unknown_in_s", 0.0))
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
            while (await trial.stranger())[0] != 200:
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


@pytest.mark.timeout(180)
def test_a_step_down_is_nobody_s_and_every_bill_arrives_once(tmp_path: Path) -> None:
    replicas = ReplicaSet(3)
    try:
        trial = Trial(tmp_path, replicas.client(), replicas.seeds)

        async def story() -> None:
            with trial.rig.backend() as url:
                trial.rig.configure(url)
                async with trial.rig.running():
                    trial.load.start()
                    await trial.all_known()
                    for _ in range(5 if LONG else 1):
                        await asyncio.to_thread(replicas.step_down)
                        await asyncio.sleep(0.5)
                    # Elections take seconds: the set must have a primary again.
                    await asyncio.to_thread(replicas.primary)
                    await trial.delivered()

        asyncio.run(story())
        assert {each.status for each in trial.load.asked if each.finished} == {200}
        trial.tell("stepped down")
    finally:
        replicas.stop()


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
            rows.OPEN.write(connection, [rows.opening(entry, "gone")])
            settlement = Settlement(
                state=State.SETTLED,
                outcome=Outcome.COMPLETE,
                counts={Kind.PROMPT: number + 1, Kind.COMPLETION: 1},
                finished=opened,
            )
            rows.CLOSE.write(connection, [rows.closing(entry.rid, settlement, bills_here=False)])
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
        fill(rig.database, BACKLOG_ROWS)
        began = time.monotonic()
        async with rig.running() as process:
            await until(lambda: not rig.undelivered(), 300, "the backlog")
            figures["delivered_in_s"] = time.monotonic() - began
            figures["peak_kib"] = resident_kib(process.pid)

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
