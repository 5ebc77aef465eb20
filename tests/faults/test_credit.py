"""One credit, many streams, several processes: nobody is refused while there is some, and what is
overspent is a lease for each stream at most."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path

import pytest
from credit import Crowd
from figures import LONG, report
from load import Load, until
from rig import Rig

COUNT = 500 if LONG else 60
TOKENS = 700


def set_credit(rig: Rig, tokens: int) -> None:
    """Give the first key so much, as an operator does."""
    connection = sqlite3.connect(rig.database, timeout=5)
    connection.execute(
        "INSERT INTO key_limit (api_key, tokens_total) VALUES ('0', ?)"
        " ON CONFLICT DO UPDATE SET tokens_total = excluded.tokens_total",
        (tokens,),
    )
    connection.commit()
    connection.close()


def billed(rig: Rig) -> int:
    return int(rig.query("SELECT coalesce(sum(quantity), 0) FROM event_oneoff")[0][0])


@pytest.mark.timeout(240)
def test_workers_on_one_file_share_a_credit(tmp_path: Path) -> None:
    rig = Rig(tmp_path, clients=2, command=["-m", "llmproxy"], workers=2)
    credit = COUNT * TOKENS // 2

    async def story(url: str) -> None:
        rig.configure(url)
        set_credit(rig, credit)
        async with rig.running():
            crowd = Crowd([rig.port], Load.key(0), tokens=TOKENS)
            began = time.monotonic()
            await crowd.stream(COUNT)
            took_s = time.monotonic() - began
            await until(lambda: not rig.open_rows(), 20, "the last settlement")
            assert [each.status for each in await crowd.stream(6)] == [402] * 6
            crowd.check(credit, billed(rig))
            owners = rig.query("SELECT DISTINCT owner FROM ledger")
            assert len(owners) == 2, "one worker had all"
            over = billed(rig) - credit
            report("credit of workers", streams=COUNT, credit=credit, over=over, took_s=took_s)
            set_credit(rig, credit + over + 10)
            await asyncio.sleep(1.1)
            assert (await crowd.ask()).status == 200

    with rig.backend() as url:
        asyncio.run(story(url))
