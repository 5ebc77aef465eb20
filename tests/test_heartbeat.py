"""The heartbeat: how late the reactor is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from proxy import running_proxy
from twisted.internet import reactor as _reactor
from twisted.internet.task import Clock, deferLater

from llmproxy.heartbeat import PERIOD_S, Heartbeat

reactor: Any = _reactor


def test_a_beat_tells_how_much_later_it_came_and_the_next_one_begins_anew() -> None:
    clock, told = Clock(), list[float]()
    heartbeat = Heartbeat(clock, told.append)
    heartbeat.startService()
    for seconds in (PERIOD_S, PERIOD_S + 0.3, PERIOD_S):
        clock.advance(seconds)
    assert told == pytest.approx([0.0, 0.3, 0.0], abs=1e-9)
    heartbeat.stopService()
    assert not clock.getDelayedCalls()


def over(exposition: bytes, bound: str) -> int:
    """How many beats were later than the bound of a bucket."""
    values = {
        line.split()[0]: float(line.split()[1])
        for line in exposition.decode().splitlines()
        if line.startswith("llmproxy_loop_lag_seconds")
    }
    name = 'llmproxy_loop_lag_seconds_bucket{le="%s"}'
    return int(values[name % "+Inf"] - values[name % bound])


@pytest_twisted.ensureDeferred
async def test_what_keeps_the_reactor_is_seen_in_the_metrics(tmp_path: Path) -> None:
    async with running_proxy(tmp_path, {}) as proxy:
        before = over(proxy.proxy.metrics.exposition(), "0.25")
        time.sleep(0.25 + 2 * PERIOD_S)
        await deferLater(reactor, 2 * PERIOD_S)
        assert over(proxy.proxy.metrics.exposition(), "0.25") == before + 1
