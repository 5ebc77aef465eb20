"""Where the proxy's CPU time goes, by function, from what `sampled.py` wrote."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

TOP = 30
WRITE_TIMEOUT_S = 10.0
_PLACE = re.compile(r"\(.*/(?:site-packages/|python3\.\d+/|(?=llmproxy/|bench/))")
#: The same for every stack: how Python and twistd start.
_START = re.compile(r"run|main|start|postApplication|<module>|Sampler|bootstrap", re.IGNORECASE)

Costs = Counter[str]


@contextlib.contextmanager
def sampling(pid: int, output: Path) -> Iterator[None]:
    """Let the process sample itself in the meantime."""
    os.kill(pid, signal.SIGURG)
    yield
    os.kill(pid, signal.SIGURG)
    deadline = time.monotonic() + WRITE_TIMEOUT_S
    while not output.exists():
        if time.monotonic() > deadline:
            raise SystemExit("no profile was written")
        time.sleep(0.05)


def text(output: Path, unit: str, figures: Mapping[str, float]) -> str:
    """The costliest functions by their own time, by their whole time, and the same of llmproxy.

    `figures`: those of the measurement that ran meanwhile. `unit`: what was counted in it. What C
    code and the kernel do is part of the function that called them.
    """
    own: Costs = Counter()
    whole: Costs = Counter()
    for line in output.read_text().splitlines():
        stack, _, cost = line.rpartition(" ")
        frames = [_short(frame) for frame in stack.split(";")]
        own[frames[-1]] += int(cost)
        for frame in set(frames):
            whole[frame] += int(cost)
    everything = own.total() or 1
    each_us = figures["cpu_us"]
    parts = [
        f"{each_us:.0f} us of CPU per {unit}, the sampler's share included;"
        f" {figures['count']:.0f} in {figures['seconds']:.0f} s"
    ]
    ours = Counter({name: cost for name, cost in whole.items() if "(llmproxy/" in name})
    for title, costs in (("own", own), ("whole", whole), ("whole", ours)):
        shown = [(name, cost) for name, cost in costs.most_common() if not _is_start(name)]
        parts += ["", f"{title + ' time, %':>18} {'us':>8}"]
        parts += [
            f"{100 * cost / everything:18.1f} {each_us * cost / everything:8.1f}   {name}"
            for name, cost in shown[:TOP]
        ]
    return "\n".join(parts) + "\n"


def _short(frame: str) -> str:
    """Without the part of the path that is this machine's."""
    return _PLACE.sub("(", frame)


def _is_start(name: str) -> bool:
    return _START.search(name) is not None and any(
        place in name
        for place in ("twisted/scripts", "twisted/application", "__main__", "runpy", "sampled")
    )
