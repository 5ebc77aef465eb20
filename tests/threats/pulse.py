"""The proxy, and in the file `longest` the longest time, in seconds of processor time, for which it
did nothing else; SIGUSR1 begins anew.

    python pulse.py -c config.toml

Of the wall's clock other processes take their part; of this one nobody does.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

LONGEST = Path("longest")
PERIOD_S = 0.005

_last_s = _longest_s = 0.0


def measure() -> None:
    global _last_s, _longest_s
    now_s = time.thread_time()
    if now_s - _last_s > _longest_s:
        _longest_s = now_s - _last_s
        LONGEST.write_text(str(_longest_s))
    _last_s = time.thread_time()


def begin_anew(*_: object) -> None:
    global _last_s, _longest_s
    _last_s, _longest_s = time.thread_time(), 0.0


def main() -> None:
    from llmproxy import heartbeat
    from llmproxy.__main__ import main as run

    beat = heartbeat.Heartbeat._beat

    def measured(self: heartbeat.Heartbeat) -> None:
        measure()
        beat(self)

    heartbeat.PERIOD_S = PERIOD_S
    heartbeat.Heartbeat._beat = measured  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR1, begin_anew)
    sys.argv[0] = "llmproxy"
    run()


if __name__ == "__main__":
    main()
