"""What a stream costs in memory whose client does not read, while the backend sends what it can.

The same with streams that are read. Both are measured with few streams and then with many, in
a proxy of their own: the difference of the two, divided by the number of streams between them, has
nothing in it of what all share, or of memory that the process had but did not use.

The kernel's buffers are not part of a process's resident memory.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence

from measurements import Count, Slow, Streams
from sessions import Bench, Figures, Session
from tables import number, table
from targets import Target

FEW, MANY = 100, 400
WARM_UP = Count(connections=16, count=400, chunks=5)
#: Chunks enough that neither the proxy nor the kernel can take them all.
CHUNKS = 4000
POLL_S = 0.25


def measure(bench: Bench, target: Target) -> Figures:
    """KiB per stream that is read, and that is not; `held`: how many of MANY the backend could not
    go on with, at the same time; `lost`: streams that were not whole in the end."""
    read, _ = _measure(bench, target, [Streams(n, 20, n / 200, 2.0) for n in (FEW, MANY)])
    unread, held = _measure(bench, target, [Slow(n, n / 200, 15.0, CHUNKS) for n in (FEW, MANY)])
    return {
        "streams": MANY,
        "held": held,
        "lost": sum(one["lost"] + one["wrong"] for one in (*read, *unread)),
        "read_kib": _each_kib(read),
        "slow_kib": _each_kib(unread),
    }


def _measure(
    bench: Bench, target: Target, whats: Sequence[Streams | Slow]
) -> tuple[list[Figures], int]:
    with bench.session(target) as session:
        session.measure(WARM_UP)
        held = _MostHeld(session)
        try:
            return [session.measure(what) for what in whats], held.most
        finally:
            held.stop()


def _each_kib(found: Sequence[Figures]) -> float:
    few, many = found
    return (many["rss_kib"] - few["rss_kib"]) / (MANY - FEW)


class _MostHeld:
    """Asks the backend again and again how many streams are held up."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        while not self._over.wait(POLL_S):
            with contextlib.suppress(OSError):  # it has too much to do
                self.most = max(self.most, self._session.backend("/stats")["held"])

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def brief(figures: Mapping[str, float]) -> str:
    """In one line."""
    return (
        f"  slow readers: {figures['slow_kib']:.1f} KiB each, {figures['read_kib']:.1f} KiB if they"
        f" read; {figures['held']:.0f} of {figures['streams']:.0f} held up,"
        f" {figures['lost']:.0f} lost"
    )


def text(found: Mapping[str, Mapping[str, float]]) -> str:
    """As a table, with a column for each proxy."""
    rows = [
        ("memory of a stream that is read, KiB", "read_kib"),
        ("memory of one that is not, KiB", "slow_kib"),
        ("streams that the backend had to hold up", "held"),
        ("streams lost", "lost"),
    ]
    cells = [
        [title, *(number(figures[what]) for figures in found.values())] for title, what in rows
    ]
    head = f"{MANY} streams at full speed whose clients take a byte a second:"
    return f"{head}\n\n{table(['', *found], cells)}"
