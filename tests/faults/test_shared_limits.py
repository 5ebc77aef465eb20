"""Limits of a key over several processes: what one of them lets in, the others know."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from collections import Counter
from pathlib import Path

import pytest
from credit import Crowd
from figures import LONG
from load import Load, until
from rig import Rig
from test_workers import children

from llmproxy.shares import CLAIM_S

COUNT = 60


class Limited:
    """A proxy of two workers, whose first key has these limits."""

    def __init__(self, folder: Path, **limits: int) -> None:
        self.rig = Rig(folder, clients=2, command=["-m", "llmproxy"], workers=2)
        connection = sqlite3.connect(self.rig.database)
        columns, marks = ", ".join(limits), ", ".join("?" * len(limits))
        connection.execute(
            f"INSERT INTO key_limit (api_key, {columns}) VALUES ('0', {marks})",
            tuple(limits.values()),
        )
        connection.commit()
        connection.close()

    def crowd(self, key: int = 0, **asks: int) -> Crowd:
        return Crowd([self.rig.port], Load.key(key), **asks)

    async def both_serve(self) -> None:
        """Wait until both workers do: the proxy is ready when one of them is."""
        while len(self.rig.query("SELECT DISTINCT owner FROM ledger")) < 2:
            await self.crowd(key=1, tokens=1).stream(8)


async def statuses(crowd: Crowd, count: int = COUNT) -> Counter[int]:
    return Counter(each.status for each in await crowd.stream(count))


@pytest.mark.timeout(60)
def test_a_key_has_its_requests_of_a_minute_once(tmp_path: Path) -> None:
    limited = Limited(tmp_path, requests_per_minute=20)

    async def story(url: str) -> None:
        limited.rig.configure(url)
        async with limited.rig.running():
            await limited.both_serve()
            told = await statuses(limited.crowd(tokens=3))
            assert 20 <= told[200] <= 22, told
            assert told[200] + told[429] == COUNT
            assert await statuses(limited.crowd(key=1, tokens=3)) == {200: COUNT}

    with limited.rig.backend() as url:
        asyncio.run(story(url))


@pytest.mark.timeout(60)
def test_a_key_has_so_many_requests_in_flight_at_once(tmp_path: Path) -> None:
    limited = Limited(tmp_path, concurrent_requests=7)

    async def story(url: str) -> None:
        limited.rig.configure(url)
        async with limited.rig.running():
            await limited.both_serve()
            for _ in range(2):  # places that are free again can be had again
                told = await statuses(limited.crowd(tokens=50, ms=20))
                assert told == {200: 7, 429: COUNT - 7}
                await until(lambda: not limited.rig.open_rows(), 10, "the last settlement")
                await asyncio.sleep(0.6)

    with limited.rig.backend() as url:
        asyncio.run(story(url))


@pytest.mark.timeout(60)
def test_a_key_has_its_tokens_of_a_minute_once(tmp_path: Path) -> None:
    limited = Limited(tmp_path, tokens_per_minute=1000)

    async def story(url: str) -> None:
        limited.rig.configure(url)
        async with limited.rig.running():
            await limited.both_serve()
            # It holds some 30 at first, and takes 1505 in the end, at one of the workers.
            assert await statuses(limited.crowd(tokens=1500), 1) == {200: 1}
            await until(lambda: not limited.rig.open_rows(), 10, "the last settlement")
            await asyncio.sleep(0.6)
            owed = await statuses(limited.crowd(tokens=1), 12)
            assert owed == {429: 12}, "what one worker has billed the other does not know"

    with limited.rig.backend() as url:
        asyncio.run(story(url))


@pytest.mark.skipif(not LONG, reason="it takes as long as the claims of the dead count")
@pytest.mark.timeout(90)
def test_the_places_of_a_worker_that_was_killed_are_free_again(tmp_path: Path) -> None:
    limited = Limited(tmp_path, concurrent_requests=4)

    async def story(url: str) -> None:
        limited.rig.configure(url)
        async with limited.rig.running() as process:
            long = asyncio.create_task(limited.crowd(tokens=2000, ms=50).stream(4))
            await until(lambda: limited.rig.open_rows() == 4, 10, "four in flight")
            for pid in children(process):
                os.kill(pid, signal.SIGKILL)
            assert [each.ended for each in await long] == [False] * 4
            alone = limited.crowd(tokens=1)

            async def let_in() -> int:
                return (await alone.ask()).status

            while (await let_in()) != 200:
                await asyncio.sleep(0.5)
            assert len(alone.all) > 1, "they were never counted"
            assert len(alone.all) < 2 * CLAIM_S + 20

    with limited.rig.backend() as url:
        asyncio.run(story(url))
