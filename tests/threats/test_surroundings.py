"""What is around the process fails: the clock leaps, the log's reader stands still, names do not
resolve, the processor is gone for a while. Clients notice nothing that they need not.
"""

from __future__ import annotations

import asyncio
import signal
import urllib.request
from pathlib import Path

import pytest
from load import until
from rig import Rig
from test_storage_faults import CLIENTS, Trial

LEAPING = Path(__file__).with_name("leaping.py")


def beats(rig: Rig) -> tuple[int, dict[float, int]]:
    """How often the proxy's heart has beaten, and how often it was at most so late (seconds)."""
    with urllib.request.urlopen(f"http://127.0.0.1:{rig.admin_port}/metrics", timeout=5) as page:
        lines = page.read().decode().splitlines()
    prefix = "llmproxy_loop_lag_seconds_bucket{le="
    values = [line.removeprefix(prefix).split() for line in lines if line.startswith(prefix)]
    counts = {float(bound.strip('"}')): int(float(number)) for bound, number in values}
    return counts[float("inf")], counts


@pytest.mark.timeout(60)
def test_a_clock_that_leaps_by_a_day_changes_no_answer_and_no_bill(tmp_path: Path) -> None:
    trial = Trial(tmp_path, command=[str(LEAPING)])

    def finished() -> int:
        return sum(each.finished for each in trial.load.asked)

    async def goes_on() -> None:
        before, (beaten, _) = finished(), beats(trial.rig)
        await until(lambda: finished() > before + 5 * CLIENTS, 10, "answers")
        await until(lambda: beats(trial.rig)[0] > beaten + 5, 2, "heartbeats")

    async def story() -> None:
        async with trial.running() as process:
            for leap in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR2):
                process.send_signal(leap)
                await goes_on()
            await trial.settled()

    asyncio.run(story())
    trial.tell("the clock leaps")
    unfinished = [each for each in trial.load.asked if not each.finished]
    assert len(unfinished) <= CLIENTS, unfinished  # those that were cut at the test's end
    assert {each.status for each in trial.load.asked} <= {200, None}
    days = {day for (day,) in trial.rig.query("SELECT DISTINCT substr(opened, 1, 10) FROM ledger")}
    assert len(days) == 3  # it did leap
