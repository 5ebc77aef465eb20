"""What proxies share of a key in MongoDB, against a real mongod: sums, races, faults."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any, TypeVar

import mongod
import pymongo.errors
import pytest
import pytest_twisted
from bson import Int64
from deferreds import failure_of, is_waiting, result_of
from mongod import Mongod, ReplicaSet
from twisted.internet import reactor as _reactor
from twisted.internet.defer import CancelledError, Deferred, fail, gatherResults, succeed
from twisted.internet.task import Clock, deferLater
from zope.interface import implementer
from zope.interface.verify import verifyObject

from llmproxy.errors import StorageError
from llmproxy.model import MAX_COUNT, Amount, Claim, Counts, Kind, Share, Spending
from llmproxy.storage import IShares, ISpending
from llmproxy.storage.mongo_limits import (
    LONGEST_PAUSE_S,
    ROLE,
    KeyDocuments,
    MongoShares,
    MongoSpending,
)
from llmproxy.storage.mongo_pool import MongoPool
from llmproxy.storage.mongo_uri import parse
from llmproxy.storage.shared_spending import LAST_ROUND_S, ROUND_S, SharedSpending

reactor: Any = _reactor
TODAY = date(2026, 3, 15)
#: Of three journals; the first would be a place in a list, if the field were one.
JOURNALS = ("0123456789012345", "00000000000000ab", "ffffffffffffffff")
PASSWORD = "for-a-test"
ACTIONS = ["find", "insert", "update"]
PRIVILEGE = {"resource": {"db": "llmproxy", "collection": "limits"}, "actions": ACTIONS}
Document = dict[str, Any]
T = TypeVar("T")


def create_user(client: mongod.Client, **durable: Any) -> None:
    """Somebody who may use the limits, and nothing else."""
    with contextlib.suppress(pymongo.errors.OperationFailure):  # the role is there already
        client.llmproxy.command("createRole", ROLE, privileges=[PRIVILEGE], roles=[])
    roles = [{"role": ROLE, "db": "llmproxy"}]
    client.llmproxy.command("createUser", "limiter", pwd=PASSWORD, roles=roles, **durable)


@pytest.fixture(scope="module")
def shared() -> Mongod:
    server = mongod.standalone()
    create_user(server.client())
    return server


@pytest.fixture
def server(shared: Mongod) -> Iterator[Mongod]:
    """The shared server, without documents and without faults."""
    shared.client().llmproxy.limits.drop()
    yield shared
    shared.ensure_running()
    shared.fail_command("off")


@contextlib.asynccontextmanager
async def pool(hosts: str) -> AsyncIterator[MongoPool]:
    """A proxy's connections."""
    opened = MongoPool(reactor, parse(f"mongodb://limiter:{PASSWORD}@{hosts}/?authSource=llmproxy"))
    await opened.start(5.0)
    try:
        yield opened
    finally:
        await opened.close()


@contextlib.asynccontextmanager
async def three(hosts: str) -> AsyncIterator[list[MongoPool]]:
    async with pool(hosts) as one, pool(hosts) as two, pool(hosts) as three:
        yield [one, two, three]


@contextlib.asynccontextmanager
async def spending(server: Mongod) -> AsyncIterator[MongoSpending]:
    async with pool(server.address) as opened:
        yield MongoSpending(KeyDocuments(opened, reactor))


def spent(number: int, tokens: int = 0, cost: int = 0, **more: Any) -> Spending:
    """A reading of one journal, which has used so much today and nothing before."""
    amount = Amount(tokens, cost)
    every: dict[str, Any] = {
        "today": TODAY,
        "day": amount,
        "month": amount,
        "ever": amount,
        "number": number,
    }
    return Spending(**(every | more))


def document(server: Mongod, key_id: str = "key-1") -> Document:
    found = server.client().llmproxy.limits.find_one({"_id": key_id})
    assert found is not None
    return found


def change(server: Mongod, **fields: Any) -> None:
    """Change fields of the first journal's part, as if that had been so."""
    values = {f"spent.{JOURNALS[0]}.{name}": value for name, value in fields.items()}
    server.client().llmproxy.limits.update_one({"_id": "key-1"}, {"$set": values}, upsert=True)


# What was spent


@pytest_twisted.ensureDeferred
async def test_a_journal_s_totals_become_exactly_this_document(server: Mongod) -> None:
    mine = Spending(TODAY, Amount(1, 2), Amount(3, 4), Amount(2**40, 6), Amount(7, 8), 9)
    async with spending(server) as spent:
        assert await spent.exchange("key-1", JOURNALS[0], mine) == mine
    found = document(server)
    part = found["spent"][JOURNALS[0]]
    assert abs(part.pop("at").replace(tzinfo=UTC) - datetime.now(UTC)) < timedelta(seconds=5)
    expected = {
        "number": Int64(9),
        "day": ["2026-03-15", Int64(1), Int64(2)],
        "month": ["2026-03", Int64(3), Int64(4)],
        "ever": [Int64(2**40), Int64(6)],
        "held": [Int64(7), Int64(8)],
    }
    assert found == {"_id": "key-1", "spent": {JOURNALS[0]: expected}}
    counts = [part["number"], *part["day"][1:], *part["month"][1:], *part["ever"], *part["held"]]
    assert {type(count) for count in counts} == {Int64}


@pytest_twisted.ensureDeferred
async def test_each_learns_what_all_have_used_and_keys_are_apart(server: Mongod) -> None:
    async with three(server.address) as pools:
        ask = [MongoSpending(KeyDocuments(each, reactor)).exchange for each in pools]
        # All at once, so that all make the document.
        first = [
            each("key-1", journal, spent(1, 10 ** (2 * n), 1, held=Amount(10**n)))
            for n, (each, journal) in enumerate(zip(ask, JOURNALS, strict=True))
        ]
        found = await gatherResults(first)
        assert max(each.ever.tokens for each in found) == 10101
        for each, journal in zip(ask, JOURNALS, strict=True):
            total = await each("key-2", journal, spent(1, 5))
        assert total.ever.tokens == 15
        total = await ask[0]("key-1", JOURNALS[0], spent(2, 2, 1))
    assert total == spent(2, 10102, 3, held=Amount(110))


@pytest_twisted.ensureDeferred
async def test_what_is_published_again_is_the_same(server: Mongod) -> None:
    async with spending(server) as shared:
        for _ in range(3):
            total = await shared.exchange("key-1", JOURNALS[0], spent(1, 10))
    assert total.ever.tokens == 10


@pytest.mark.parametrize(
    ("today", "day", "month"),
    [
        (TODAY, 11, 11),
        (date(2026, 3, 16), 1, 11),
        (date(2026, 4, 1), 1, 1),
        (date(2027, 3, 15), 1, 1),
    ],
)
@pytest_twisted.ensureDeferred
async def test_days_and_months_that_are_over_count_for_ever_only(
    server: Mongod, today: date, day: int, month: int
) -> None:
    async with spending(server) as shared:
        await shared.exchange("key-1", JOURNALS[0], spent(1, 10))
        total = await shared.exchange("key-1", JOURNALS[1], spent(1, 1, today=today))
    assert (total.day.tokens, total.month.tokens, total.ever.tokens) == (day, month, 11)


@pytest_twisted.ensureDeferred
async def test_who_has_read_first_and_publishes_last_replaces_nothing_and_learns(
    server: Mongod,
) -> None:
    async with spending(server) as shared:
        await shared.exchange("key-1", JOURNALS[1], spent(1, 1))
        await shared.exchange("key-1", JOURNALS[0], spent(8, 80))
        late = await shared.exchange("key-1", JOURNALS[0], spent(7, 70))
        assert (late.ever.tokens, late.number) == (81, 7)
        assert document(server)["spent"][JOURNALS[0]]["number"] == 8
        assert (await shared.exchange("key-1", JOURNALS[0], spent(9, 90))).ever.tokens == 91


@pytest_twisted.ensureDeferred
async def test_a_journal_that_was_put_back_from_a_backup_is_heard_after_a_minute(
    server: Mongod,
) -> None:
    async with spending(server) as shared:
        await shared.exchange("key-1", JOURNALS[0], spent(1000, 80))
        change(server, at=datetime.now(UTC) - timedelta(seconds=61))
        await shared.exchange("key-1", JOURNALS[0], spent(7, 90))
    assert document(server)["spent"][JOURNALS[0]]["number"] == 7


@pytest_twisted.ensureDeferred
async def test_what_is_held_counts_for_as_long_as_its_journal_is_heard_of(server: Mongod) -> None:
    async with spending(server) as shared:
        await shared.exchange("key-1", JOURNALS[0], spent(1, 10, held=Amount(100, 200)))
        for silent_s, held in ((50, Amount(101, 202)), (70, Amount(1, 2))):
            change(server, at=datetime.now(UTC) - timedelta(seconds=silent_s))
            mine = spent(silent_s, 1, held=Amount(1, 2))
            total = await shared.exchange("key-1", JOURNALS[1], mine)
            assert (total.held, total.day.tokens) == (held, 11)


@pytest_twisted.ensureDeferred
async def test_absurd_sums_are_the_most_and_no_error(server: Mongod) -> None:
    async with spending(server) as shared:
        for journal in JOURNALS:
            total = await shared.exchange("key-1", journal, spent(1, MAX_COUNT, MAX_COUNT - 1))
    assert total == spent(1, MAX_COUNT, MAX_COUNT)


BROKEN: list[Mapping[str, Any]] = [
    {"ever": None},
    {"ever": [1]},
    {"ever": ["many", 1]},
    {"day": 7},
    {"held": {}, "at": "now"},
]


@pytest.mark.parametrize("fields", BROKEN, ids=str)
@pytest_twisted.ensureDeferred
async def test_what_is_not_understood_is_an_error_and_no_sum(
    server: Mongod, fields: Mapping[str, Any]
) -> None:
    async with spending(server) as shared:
        await shared.exchange("key-1", JOURNALS[0], spent(1, 10))
        change(server, **fields)
        with pytest.raises(StorageError, match="as we make it"):
            await shared.exchange("key-1", JOURNALS[1], spent(1, 1))


# Faults


#: Another one has made the document in the same moment.
MADE: Document = {
    "errorCode": 11000,
    "errorExtraInfo": {"keyPattern": {"_id": 1}, "keyValue": {"_id": "key-1"}},
}
FAULTS: list[Document] = [
    {"closeConnection": True},
    {"errorCode": 10107},  # NotWritablePrimary
    {"errorCode": 11600},  # InterruptedAtShutdown
    MADE,
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest_twisted.ensureDeferred
async def test_a_fault_that_passes_is_not_seen(server: Mongod, fault: Document) -> None:
    async with spending(server) as shared:
        server.fail_command(1, failCommands=["findAndModify"], **fault)
        assert await shared.exchange("key-1", JOURNALS[0], spent(1, 1)) == spent(1, 1)


LASTING: list[tuple[Document, str]] = [
    ({"errorCode": 50}, "error 50"),
    (MADE, "error 11000"),
    ({"closeConnection": True}, "connection lost"),
    ({"blockConnection": True, "blockTimeMS": 1500}, "no answer within 1.0 s"),
]


@pytest.mark.parametrize(("fault", "error"), LASTING, ids=str)
@pytest_twisted.ensureDeferred
async def test_a_fault_that_lasts_is_an_error_within_a_second(
    server: Mongod, fault: Document, error: str
) -> None:
    async with spending(server) as shared:
        server.fail_command("alwaysOn", failCommands=["findAndModify"], **fault)
        began = time.monotonic()
        with pytest.raises(StorageError, match=error):
            await shared.exchange("key-1", JOURNALS[0], spent(1, 1))
        assert time.monotonic() - began < 1.4


@pytest_twisted.ensureDeferred
async def test_an_exchange_without_an_answer_may_have_been_one(server: Mongod) -> None:
    async with spending(server) as shared:
        server.pause()
        asked = shared.exchange("key-1", JOURNALS[0], spent(1, 10))
        await deferLater(reactor, 0.05)
        asked.cancel()
        with pytest.raises(CancelledError):
            await asked
        server.resume()
        total = await shared.exchange("key-1", JOURNALS[0], spent(2, 11))
    assert total.ever.tokens == 11


@pytest_twisted.ensureDeferred
async def test_who_lacks_the_role_is_told_which(server: Mongod) -> None:
    server.client().llmproxy.command("revokeRolesFromUser", "limiter", roles=[ROLE])
    try:
        async with spending(server) as shared:
            with pytest.raises(StorageError, match=f"'{ROLE}' of the database 'llmproxy'"):
                await shared.exchange("key-1", JOURNALS[0], spent(1, 1))
    finally:
        server.client().llmproxy.command("grantRolesToUser", "limiter", roles=[ROLE])


# The proxy's own, and all


@implementer(ISpending)
class Own:
    """What one proxy's file says: so much is used, and so much is held."""

    def __init__(self) -> None:
        self.tokens, self.held = 0, 0
        self.asked: list[tuple[str, Mapping[str, Counts]]] = []

    def of(self, key_id: str, running: Mapping[str, Counts]) -> Deferred[Spending]:
        self.asked.append((key_id, running))
        return succeed(spent(len(self.asked), self.tokens, held=Amount(self.held)))


class Others:
    """What other proxies are told: tokens used and held of each key, as it comes. They have used
    one of each; `away`: they can't be told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []
        self.away = False

    def exchange(self, key_id: str, journal: str, mine: Spending) -> Deferred[Spending]:
        assert journal == JOURNALS[0]
        if self.away:
            return fail(StorageError("away"))
        self.told.append((key_id, mine.ever.tokens, mine.held.tokens))
        return succeed(mine._replace(ever=Amount(mine.ever.tokens + 1)))


class Proxy:
    """One proxy's side, on a clock."""

    def __init__(self) -> None:
        self.own, self.others, self.clock = Own(), Others(), Clock()
        self.spending = SharedSpending(self.own, JOURNALS[0], self.others.exchange, self.clock)
        self.spending.startService()

    def ask(self, key_id: str) -> int:
        return result_of(self.spending.of(key_id, {})).ever.tokens

    def told_in(self, rounds: int) -> list[tuple[str, int, int]]:
        self.others.told.clear()
        for _ in range(rounds):
            self.clock.advance(ROUND_S)
        return list(self.others.told)

    def stop(self) -> None:
        result_of(self.spending.stopService())
        assert not self.clock.getDelayedCalls()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    opened = Proxy()
    yield opened
    opened.stop()


def test_a_proxy_says_what_all_have_used(proxy: Proxy) -> None:
    assert verifyObject(ISpending, proxy.spending)
    running = {"r1": {Kind.COMPLETION: 5}}
    proxy.own.tokens = 10
    assert result_of(proxy.spending.of("key-1", running)).ever.tokens == 11
    assert proxy.own.asked == [("key-1", running)]


def test_others_are_told_of_what_is_in_flight_until_it_has_ended(proxy: Proxy) -> None:
    proxy.ask("key-1")
    proxy.own.held = 300  # its row is opened after that
    assert proxy.told_in(3) == [("key-1", 0, 300)] * 3
    proxy.own.tokens, proxy.own.held = 200, 0
    assert proxy.told_in(5) == [("key-1", 200, 0)] * 2
    proxy.ask("key-1")
    proxy.ask("key-2")
    assert proxy.told_in(5) == [("key-1", 200, 0), ("key-2", 200, 0)] * 2


def test_others_that_are_away_are_told_when_they_are_back(proxy: Proxy) -> None:
    proxy.ask("key-1")
    proxy.others.away = True
    assert proxy.told_in(5) == []
    proxy.others.away = False
    assert proxy.told_in(1) == [("key-1", 0, 0)]


def test_others_are_told_the_last_when_a_proxy_stops() -> None:
    proxy = Proxy()
    proxy.ask("key-1")
    proxy.own.tokens = 7
    proxy.others.told.clear()
    proxy.stop()
    assert proxy.others.told == [("key-1", 7, 0)]


def test_a_stop_waits_for_a_second_at_most() -> None:
    proxy = Proxy()
    proxy.ask("key-1")
    silent: Deferred[Spending] = Deferred()
    proxy.spending._exchange = lambda *_: silent
    stopping = proxy.spending.stopService()
    assert is_waiting(stopping)
    proxy.clock.advance(LAST_ROUND_S)
    result_of(stopping)
    assert not proxy.clock.getDelayedCalls()


# What is left of rates


@contextlib.asynccontextmanager
async def shares(server: Mongod) -> AsyncIterator[MongoShares]:
    async with pool(server.address) as opened:
        yield MongoShares(KeyDocuments(opened, reactor))


def one_more(share: Share) -> Share:
    """A change that is seen if it is lost."""
    return share._replace(requests_full_at=share.requests_full_at + 1)


@pytest_twisted.ensureDeferred
async def test_a_share_becomes_exactly_this_document_and_is_read_from_it(server: Mongod) -> None:
    share = Share(1_767_000_000.25, 1e9, {"$host.1": Claim(3, 1_767_000_020.5), "b": Claim(0, 2)})
    async with shares(server) as shared:
        assert verifyObject(IShares, shared)
        assert await shared.change("key-1", lambda _: share) == share
    found = document(server)
    assert found.pop("version") > 0
    assert found == {
        "_id": "key-1",
        "share": {
            "requests_full_at": 1_767_000_000.25,
            "tokens_full_at": 1e9,
            "claims": [["$host.1", Int64(3), 1_767_000_020.5], ["b", Int64(0), 2]],
        },
    }
    assert type(found["share"]["claims"][0][1]) is Int64
    async with shares(server) as shared:
        assert await shared.change("key-1", lambda there: there) == share


@pytest_twisted.ensureDeferred
async def test_of_many_changes_at_once_none_is_lost_or_made_twice(server: Mongod) -> None:
    async def changes(shared: MongoShares) -> None:
        for _ in range(50):
            await shared.change("key-1", one_more)

    async with three(server.address) as pools:
        at_once = [MongoShares(KeyDocuments(each, reactor)) for each in pools for _ in range(2)]
        await gatherResults([Deferred.fromCoroutine(changes(each)) for each in at_once])
        share = await at_once[0].change("key-1", lambda there: there)
    assert share.requests_full_at == 300


class Counted:
    """Connections that count what is asked; `twice`: everything is carried out twice, as if the
    first answer had been lost."""

    def __init__(self, pool: MongoPool, *, twice: bool = False) -> None:
        self.asked = 0
        self._pool = pool
        self._twice = twice

    async def ask(self, *what: Any, **more: Any) -> Document:
        self.asked += 1
        if self._twice:
            await self._pool.ask(*what, **more)
        return await self._pool.ask(*what, **more)


@pytest_twisted.ensureDeferred
async def test_a_change_takes_one_round_trip_and_one_more_where_another_one_was_first(
    server: Mongod,
) -> None:
    async with pool(server.address) as connections, shares(server) as other:
        counted: Any = Counted(connections)
        shared = MongoShares(KeyDocuments(counted, reactor))
        for _ in range(3):
            await shared.change("key-1", one_more)
        assert counted.asked == 3
        await other.change("key-1", one_more)
        assert (await shared.change("key-1", one_more)).requests_full_at == 5
        assert counted.asked == 5


@pytest_twisted.ensureDeferred
async def test_a_change_that_was_carried_out_twice_is_one(server: Mongod) -> None:
    async with pool(server.address) as connections:
        counted: Any = Counted(connections, twice=True)
        shared = MongoShares(KeyDocuments(counted, reactor))
        for number in range(1, 4):
            assert (await shared.change("key-1", one_more)).requests_full_at == number
        assert counted.asked == 3


@pytest_twisted.ensureDeferred
async def test_a_removed_document_begins_anew_even_if_it_is_made_by_another(server: Mongod) -> None:
    async with shares(server) as shared, shares(server) as other:
        for _ in range(2):
            await shared.change("key-1", one_more)
        server.client().llmproxy.limits.drop()
        assert (await shared.change("key-1", one_more)).requests_full_at == 1
        server.client().llmproxy.limits.drop()
        await other.change("key-1", one_more)
        assert (await shared.change("key-1", one_more)).requests_full_at == 2


@pytest_twisted.ensureDeferred
async def test_shares_and_what_was_spent_leave_each_other_alone(server: Mongod) -> None:
    async with spending(server) as spent_by_all, shares(server) as shared:
        for number in (1, 2):
            await spent_by_all.exchange("key-1", JOURNALS[0], spent(number, 10 * number))
            share = await shared.change("key-1", one_more)
        total = await spent_by_all.exchange("key-1", JOURNALS[1], spent(1, 1))
    assert (share.requests_full_at, total.ever.tokens) == (2, 21)


class Slow:
    """Connections that take some time for each command; `contested`: they lead to a document that
    is another one each time."""

    def __init__(self, clock: Clock, takes_s: float, *, contested: bool) -> None:
        self.asked = 0
        self._clock, self._takes_s, self._contested = clock, takes_s, contested

    async def ask(self, _: str, command: Document, **__: Any) -> Document:
        self.asked += 1
        self._clock.advance(self._takes_s)
        values = command["update"][0]["$set"]
        version = self.asked if self._contested else values["version"]["$cond"][1]
        share = values["share"]["$cond"][1]["$literal"]
        return {"ok": 1, "value": {"version": version, "share": share}}


def test_who_never_gets_a_turn_is_told_so_after_a_second() -> None:
    clock = Clock()
    contested: Any = Slow(clock, 0.3, contested=True)
    shared = MongoShares(KeyDocuments(contested, clock))
    failure = failure_of(shared.change("key-1", one_more), StorageError)
    assert "too many change the share" in str(failure)
    assert contested.asked == 4


def test_who_was_first_gives_others_some_time_to_be_so() -> None:
    clock = Clock()
    for takes_s, longest_s in ((0.02, 0.04), (0.9, LONGEST_PAUSE_S)):
        slow: Any = Slow(clock, takes_s, contested=False)
        shared = MongoShares(KeyDocuments(slow, clock))
        result_of(shared.change("key-1", one_more))
        next_one = shared.change("key-1", one_more)
        paused_s = clock.getDelayedCalls()[0].getTime() - clock.seconds()
        assert 0 < paused_s <= longest_s + 1e-9
        clock.advance(longest_s + 1e-9)  # sums of floats
        assert result_of(next_one).requests_full_at == 2


UNREADABLE: list[Document] = [
    {"share": {}},
    {"share": 7},
    {"share": {"requests_full_at": 0, "tokens_full_at": 0, "claims": [["a", 1]]}},
    {"version": "new"},
]


@pytest.mark.parametrize("fields", UNREADABLE, ids=str)
@pytest_twisted.ensureDeferred
async def test_a_share_that_is_not_understood_is_an_error(server: Mongod, fields: Any) -> None:
    async with shares(server) as shared, shares(server) as other:
        await other.change("key-1", one_more)
        server.client().llmproxy.limits.update_one({"_id": "key-1"}, {"$set": fields})
        with pytest.raises(StorageError, match="`share` of a key is not as we make it"):
            await shared.change("key-1", one_more)


# A replica set


@pytest.fixture(scope="module")
def replicas() -> ReplicaSet:
    replicas = mongod.replica_set()
    create_user(replicas.client(), writeConcern={"w": 3})
    return replicas


@pytest_twisted.ensureDeferred
async def test_after_a_step_down_the_sums_are_what_the_journals_say(replicas: ReplicaSet) -> None:
    before = replicas.primary()
    async with three(replicas.seeds) as pools:
        shared = [MongoSpending(KeyDocuments(each, reactor)) for each in pools]
        for number in (1, 2, 3):
            if number == 2:
                replicas.step_down()
            for each, journal in zip(shared, JOURNALS, strict=True):
                mine = spent(number, number)
                total, _ = await in_the_end(lambda: each.exchange("key-1", journal, mine))  # noqa: B023
    assert total.ever.tokens == 9
    assert replicas.primary() is not before


@pytest_twisted.ensureDeferred
async def test_after_a_step_down_no_change_of_a_share_is_lost(replicas: ReplicaSet) -> None:
    failures = 0
    async with three(replicas.seeds) as pools:
        shared = [MongoShares(KeyDocuments(each, reactor)) for each in pools]
        for number in (1, 2, 3):
            if number == 2:
                replicas.step_down()
            for each in shared:
                share, failed = await in_the_end(lambda: each.change("key-2", one_more))  # noqa: B023
                failures += failed
    # Whether one that failed was made is not known.
    assert 9 <= share.requests_full_at <= 9 + failures


async def in_the_end(ask: Callable[[], Deferred[T]]) -> tuple[T, int]:
    """The answer as soon as there is a primary, and how often there was none."""
    deadline = time.monotonic() + 20
    for failures in itertools.count():
        began = time.monotonic()
        try:
            return await ask(), failures
        except StorageError:
            assert time.monotonic() - began < 1.4
            assert time.monotonic() < deadline
            await deferLater(reactor, 0.05)
    raise AssertionError("it never ends")
