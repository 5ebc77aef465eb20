"""The proxy, and at each SIGUSR1 in the file `pulse.json` for how long it kept everybody waiting,
in seconds, since the one before (see `Pulse`).

    python pulse.py -c config.toml
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "pulse.json"
PERIOD_S = 0.005
LATE_S = 0.05


@dataclass
class Pulse:
    """What there was between two beats of the reactor, at most; they come each PERIOD_S.

    whole_s: all the time.
    held_s: the same without that in which the reactor's thread was ready, and others had the
    processors (proc(5): schedstat). So it is what we did, and waits for locks, disks and pages.
    busy_s: what we did: processor time of all our threads, as any of them can have the
    interpreter's lock; no more than `held_s`.
    beats, late, held: how many there were; that came LATE_S late; of those, without the waits for a
    processor.
    """

    busy_s: float = 0.0
    held_s: float = 0.0
    whole_s: float = 0.0
    beats: int = 0
    late: int = 0
    held: int = 0


async def pulse_of(pid: int, folder: Path) -> Pulse:
    """The pulse of the proxy in `folder` since the last time; it begins anew."""
    file = folder / FILE
    file.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR1)
    while not file.exists():
        await asyncio.sleep(0.01)
    return Pulse(**json.loads(file.read_text()))


class Finger:
    """On the pulse of the thread that makes it."""

    def __init__(self) -> None:
        own = f"/proc/self/task/{threading.get_native_id()}/schedstat"
        self._schedstat = os.open(own, os.O_RDONLY)
        self._pulse = Pulse()
        self._last = self._clocks()

    def tell(self, *_: object) -> None:
        """Write it down, and begin anew."""
        unfinished = Path(FILE + ".new")
        unfinished.write_text(json.dumps(asdict(self._pulse)))
        unfinished.rename(FILE)
        self._pulse, self._last = Pulse(), self._clocks()

    def beat(self) -> None:
        """It is alive."""
        pulse, now = self._pulse, self._clocks()
        whole_s, busy_s, ready_s = (b - a for a, b in zip(self._last, now, strict=True))
        self._last = now
        held_s = whole_s - ready_s
        pulse.busy_s = max(pulse.busy_s, min(busy_s, held_s))
        pulse.held_s = max(pulse.held_s, held_s)
        pulse.whole_s = max(pulse.whole_s, whole_s)
        pulse.beats += 1
        pulse.late += whole_s > PERIOD_S + LATE_S
        pulse.held += held_s > PERIOD_S + LATE_S

    def _clocks(self) -> tuple[float, float, float]:
        """Now; processor time of all threads; for how long this one was ready, and did not run."""
        ready_ns = int(os.pread(self._schedstat, 100, 0).split()[1])
        return time.monotonic(), time.process_time(), ready_ns / 1e9


def main() -> None:
    from llmproxy import heartbeat
    from llmproxy.__main__ import main as run

    finger, beat = Finger(), heartbeat.Heartbeat._beat

    def measured(self: heartbeat.Heartbeat) -> None:
        finger.beat()
        beat(self)

    heartbeat.PERIOD_S = PERIOD_S
    heartbeat.Heartbeat._beat = measured  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR1, finger.tell)
    sys.argv[0] = "llmproxy"
    run()


if __name__ == "__main__":
    main()
