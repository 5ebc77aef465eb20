"""The proxy on a system whose clock leaps: on by a day at `FORWARD`, back by a day at `BACK`.

    python leaping.py -c config.toml

The clock itself is the whole machine's; so it is what Python's functions say of it that leaps.
"""

from __future__ import annotations

import signal
import sys
import time
from datetime import datetime, timedelta, tzinfo
from typing import Self

# The others mean something to the proxy, or end it.
FORWARD, BACK = signal.SIGRTMIN, signal.SIGRTMIN + 1
DAY_S = 24 * 3600.0

_seconds, _nanoseconds = time.time, time.time_ns
_leapt_s = 0.0


class LeapingDatetime(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return super().now(tz) + timedelta(seconds=_leapt_s)


def leap(seconds: float) -> None:
    global _leapt_s
    _leapt_s += seconds


def main() -> None:
    # Before anything has taken them from their modules.
    time.time = lambda: _seconds() + _leapt_s
    time.time_ns = lambda: _nanoseconds() + int(_leapt_s * 1e9)
    signal.signal(FORWARD, lambda *_: leap(DAY_S))
    signal.signal(BACK, lambda *_: leap(-DAY_S))
    from llmproxy import model
    from llmproxy.__main__ import main as run

    model.datetime = LeapingDatetime  # type: ignore[attr-defined]
    sys.argv[0] = "llmproxy"
    run()


if __name__ == "__main__":
    main()
