"""Three proxies on one MongoDB and one key: what it may ask for is the same as at one proxy.

Of a credit nobody is refused while there is some, what is overspent is a lease for each stream at
most, and a top-up is known to all soon.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

import mongod
import pytest
from credit import ON_THE_WAY, Crowd
from figures import LONG, report
from load import Load, until
from mongo_rig import MongoRig
from mongod import ReplicaSet

WORKERS = (1, 1, 2)  # of each proxy
COUNT = 500 if LONG else 60
TOKENS = 700
Limits = Mapping[str, int]
CREDIT = COUNT * TOKENS // 2
#: How soon a key's new limits hold: `auth_fresh`, and some for a machine that is busy.
KNOWN_S = 3.0


@pytest.fixture(scope="module")
def replicas() -> Iterator[ReplicaSet]:
    replicas = ReplicaSet(3)
    try:
        yield replicas
    finally:
        replicas.stop()


def set_limits(client: mongod.Client, limits: Limits, key_id: str = "0") -> None:
    """Give a key these, as an operator does."""
    client.cgc.api_keys.update_one({"_id": key_id}, {"$set": {"limits": limits}})


def billed(client: mongod.Client) -> int:
    return sum(each["quantity"] for each in client.billing.events_oneoff.find())


def published(client: mongod.Client) -> int:
    """What all proxies know of the first key's tokens."""
    found = client.llmproxy.limits.find_one({"_id": "0"})
    assert found is not None
    return sum(each["ever"][0] for each in found["spent"].values())


async def delivered(rigs: Sequence[MongoRig]) -> None:
    for rig in rigs:
        await until(lambda rig=rig: not rig.open_rows(), 20, "the last settlement")  # type: ignore[misc]
        await until(lambda rig=rig: not rig.undelivered(), 20, "the last delivery")  # type: ignore[misc]


@contextlib.asynccontextmanager
async def running(
    folder: Path, replicas: ReplicaSet, *limits: Limits, proxies: int = len(WORKERS)
) -> AsyncIterator[list[MongoRig]]:
    """The proxies, and keys with these limits."""
    rigs = []
    for number, workers in enumerate(WORKERS[:proxies]):
        (place := folder / f"proxy-{number}").mkdir()
        rigs.append(MongoRig(place, replicas.client(), replicas.seeds, workers=workers))
    for number, each in enumerate(limits):
        set_limits(replicas.client(), each, str(number))
    with rigs[0].backend() as url:
        async with contextlib.AsyncExitStack() as stack:
            for rig in rigs:
                rig.configure(url)
            await asyncio.gather(*(stack.enter_async_context(rig.running()) for rig in rigs))
            yield rigs
    assert all("Traceback" not in rig.output() for rig in rigs)


async def spend(crowd: Crowd, rigs: Sequence[MongoRig]) -> None:
    """Stream until the credit is used up and all proxies say so, and the bills are there."""
    began = time.monotonic()
    await crowd.stream(COUNT)
    took_s = time.monotonic() - began
    await delivered(rigs)
    assert [each.status for each in await crowd.stream(6)] == [402] * 6
    report("mongo, one credit", streams=COUNT, credit=CREDIT, used=crowd.used, took_s=took_s)


@pytest.mark.timeout(300)
def test_proxies_on_one_mongodb_share_a_credit(tmp_path: Path, replicas: ReplicaSet) -> None:
    client = replicas.client()

    async def story() -> None:
        async with running(tmp_path, replicas, {"tokens_total": CREDIT}) as rigs:
            ports = [rig.port for rig in rigs]
            crowd = Crowd(ports, Load.key(0), tokens=TOKENS)
            await spend(crowd, rigs)
            crowd.check(CREDIT, billed(client))
            assert published(client) == billed(client)
            set_limits(client, {"tokens_total": billed(client) + 1000})
            topped_up = time.monotonic()
            for port in ports:
                await answered(port, 200)
            assert time.monotonic() - topped_up < KNOWN_S

    asyncio.run(story())


@pytest.mark.skipif(not LONG, reason="the long form")
@pytest.mark.timeout(300)
def test_a_primary_that_dies_in_the_middle_cuts_nobody_who_has_credit(
    tmp_path: Path, replicas: ReplicaSet
) -> None:
    client = replicas.client()

    async def story() -> None:
        async with running(tmp_path, replicas, {"tokens_total": CREDIT}) as rigs:
            crowd = Crowd([rig.port for rig in rigs], Load.key(0), tokens=TOKENS)
            primary = await asyncio.to_thread(replicas.primary)
            spending = asyncio.create_task(spend(crowd, rigs))
            await until(lambda: crowd.used > CREDIT // 4, 20, "tokens")
            primary.kill()
            await spending
            # While there is no primary each proxy goes by what it knows, so there is no bound.
            for each in crowd.all:
                assert not each.seen or each.seen >= CREDIT - ON_THE_WAY * COUNT
            assert published(client) == billed(client) == crowd.used
        primary.start()

    asyncio.run(story())


@pytest.mark.timeout(120)
def test_without_the_role_keys_are_served_and_one_line_says_what_is_missing(
    tmp_path: Path, replicas: ReplicaSet
) -> None:
    client, role = replicas.client(), {"role": "limitsWriter", "db": "llmproxy"}

    async def story() -> None:
        async with running(tmp_path, replicas, {"tokens_total": 1}, proxies=1) as [rig]:
            client.cgc.command("revokeRolesFromUser", "llmproxy", roles=[role])
            crowd = Crowd([rig.port], Load.key(0), tokens=3)
            for _ in range(2):
                assert {each.status for each in await crowd.stream(5)} == {200}
            await until(
                lambda: "'limitsWriter' of the database 'llmproxy'" in rig.output(), 5, "why"
            )
            client.cgc.command("grantRolesToUser", "llmproxy", roles=[role])
            await answered(rig.port, 402)
            await until(lambda: "can be read again" in rig.output(), 5, "an end")
        assert rig.output().count("limitsWriter") == 1

    asyncio.run(story())


async def answered(port: int, status: int) -> None:
    """A proxy answers the key so, soon."""
    alone = Crowd([port], Load.key(0), tokens=1)
    deadline = time.monotonic() + 5
    while (await alone.ask()).status != status:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


@pytest.mark.timeout(120)
def test_rates_hold_over_all_proxies(tmp_path: Path, replicas: ReplicaSet) -> None:
    limits = {"requests_per_minute": 30}, {"concurrent_requests": 6}

    async def story() -> None:
        async with running(tmp_path, replicas, *limits) as rigs:
            crowd = Crowd([rig.port for rig in rigs], Load.key(0), tokens=1)
            began = time.monotonic()
            await crowd.stream(90)
            more = (time.monotonic() - began) / 2  # one each 2 s
            statuses = Counter(each.status for each in crowd.all)
            assert statuses.keys() == {200, 429}
            assert 30 <= statuses[200] <= 30 + more + 1
            crowd = Crowd([rig.port for rig in rigs], Load.key(1), tokens=400, ms=5)
            await crowd.stream(30)
            assert Counter(each.status for each in crowd.all) == {200: 6, 429: 24}

    asyncio.run(story())
