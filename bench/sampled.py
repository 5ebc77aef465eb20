"""llmproxy with a sampler inside: `python sampled.py OUTPUT ARGS...`, for `run.py --profile`.

SIGURG starts the sampling; the second one stops it and writes OUTPUT, a line for each stack:
functions from the outermost to the innermost, with semicolons between, and the CPU time in ns.

Samples are weighed with the CPU time that each thread has used since the last one. So what other
processes do on the core does not show, as it would with a sampler that counts waiting for the
core, and neither does the cost of tracing calls.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

#: In CPU time; the kernel makes it a multiple of its tick.
INTERVAL_S = 0.001
Stack = tuple[str, ...]


class Sampler:
    """States: off; on, between the two signals."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._on = False
        self._sampling = False
        self._wakeup = -1
        self._used: dict[int, int] = {}
        self._costs: Counter[Stack] = Counter()

    def toggle(self, number: int, frame: FrameType | None) -> None:
        """SIGURG: start or stop."""
        self._on = not self._on
        if self._on:
            self._used = {ident: _cpu_ns(ident) for ident in sys._current_frames()}
            self._wakeup = signal.set_wakeup_fd(-1)  # else each sample wakes the reactor up
            # Not ITIMER_REAL: waking up an idle process would be most of what it sees.
            signal.setitimer(signal.ITIMER_PROF, INTERVAL_S, INTERVAL_S)
            return
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.set_wakeup_fd(self._wakeup)
        lines = (f"{';'.join(stack)} {cost}\n" for stack, cost in self._costs.items())
        partial = self._output.with_suffix(".partial")
        partial.write_text("".join(lines))
        partial.rename(self._output)

    def sample(self, number: int, frame: FrameType | None) -> None:
        """SIGPROF: see who has worked."""
        if self._sampling:
            return
        self._sampling = True
        here = threading.get_ident()
        for ident, theirs in sys._current_frames().items():
            used = _cpu_ns(ident)
            cost = used - self._used.get(ident, used)
            self._used[ident] = used
            if cost > 0:
                self._costs[_stack(frame if ident == here else theirs)] += cost
        self._used[here] = _cpu_ns(here)  # what sampling costs is not the proxy's
        self._sampling = False


def _cpu_ns(ident: int) -> int:
    return time.clock_gettime_ns(time.pthread_getcpuclockid(ident))


def _stack(frame: FrameType | None) -> Stack:
    names = []
    while frame is not None:
        code = frame.f_code
        names.append(f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno})")
        frame = frame.f_back
    return tuple(reversed(names))


def main() -> None:
    """Run llmproxy; nothing is sampled until it is asked for."""
    sampler = Sampler(Path(sys.argv.pop(1)))
    signal.signal(signal.SIGPROF, sampler.sample)
    signal.siginterrupt(signal.SIGPROF, False)
    signal.signal(signal.SIGURG, sampler.toggle)
    from llmproxy.__main__ import main as run

    run()


if __name__ == "__main__":
    main()
