"""One target, started with a backend of its own to be measured; and its bills, at the end."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bills
import machine
import targets
from measurements import AnyMeasurement, Closed
from targets import HERE, KEY, Running, Site, Target

BUILD = HERE / "build"
DIRECT = "direct"

Figures = dict[str, float]


def build() -> None:
    """Compile the clients and the backend, if they are older than their source."""
    BUILD.mkdir(exist_ok=True)
    compiler = os.environ.get("CC", "gcc")
    if shutil.which(compiler) is None:
        raise SystemExit(f"the benchmark needs a C compiler, and {compiler} is not there")
    headers = max(header.stat().st_mtime for header in HERE.glob("*.h"))
    for name in ("load", "backend"):
        source, program = HERE / f"{name}.c", BUILD / name
        if not program.exists() or program.stat().st_mtime < max(source.stat().st_mtime, headers):
            options = ["-O2", "-Wall", "-Wextra", "-Wshadow"]
            subprocess.run([compiler, *options, "-o", program, source], check=True)


@dataclass(frozen=True)
class Places:
    """The cores of the target, and those of load, backend and driver."""

    target: frozenset[int]
    others: frozenset[int]


class Session:
    """One target, started for its measurements, with a backend of its own."""

    def __init__(
        self, running: Running, backend_pid: int, backend_port: int, places: Places
    ) -> None:
        self.running = running
        self._backend_pid = backend_pid
        self._backend_port = backend_port
        self._places = places

    def backend(self, path: str) -> dict[str, Any]:
        """What the backend answers to GET `path`."""
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self._backend_port}{path}", timeout=10
        ) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def measure(self, what: AnyMeasurement) -> Figures:
        """The figures of load.c for one measurement, and `others_pct`: how much of a core was used
        by processes that have nothing to do with it, from its beginning to its end."""
        if not isinstance(what, Closed):
            self.backend(f"/set?{what.setting}")
        pids = self.running.pids()
        words: list[object] = [BUILD / "load", *what.words(self.running.port), KEY]
        words += [self._backend_pid, *pids]
        cores = tuple(self._places.target | self._places.others)
        began, busy, ours = time.monotonic(), machine.busy_s(cores), self._cpu_s(pids)
        done = subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            check=True,
            preexec_fn=lambda: os.sched_setaffinity(0, self._places.others),
        )
        seconds = time.monotonic() - began
        foreign = machine.busy_s(cores) - busy - (self._cpu_s(pids) - ours)
        if done.stderr:
            print(done.stderr, end="", file=sys.stderr)
        figures: Figures = json.loads(done.stdout)
        figures["others_pct"] = round(max(0.0, 100 * foreign / seconds), 1)
        return figures

    def _cpu_s(self, pids: list[int]) -> float:
        """What the target, the backend, the load (it has ended) and this process have used."""
        own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        used = sum(usage.ru_utime + usage.ru_stime for usage in own)
        return used + sum(machine.cpu_s(pid) for pid in [self._backend_pid, *pids])


class Bench:
    """The limits that all sessions share, and the wrong bills of all of them.

    `cores`: one for the target, and one for all else; they must be known before the driver itself
    stays on one of them. apart: so it is used. shared: both are there for everything.
    """

    def __init__(self, folder: Path, descriptors: int, cores: tuple[int, int]) -> None:
        self._folder = folder
        self._descriptors = descriptors
        target, others = cores
        self.apart = Places(frozenset({target}), frozenset({others}))
        self.shared = Places(frozenset(cores), frozenset(cores))
        self._count = 0
        self.checked = 0
        self.wrong_bills: list[str] = []

    @contextlib.contextmanager
    def session(self, target: Target | None, places: Places | None = None) -> Iterator[Session]:
        """Start a backend and the target (None: no proxy); raises Missing if that can't be."""
        places = places or self.apart
        self._count += 1
        folder = self._folder / f"{self._count}-{target.name if target else DIRECT}"
        (folder / "backend").mkdir(parents=True)
        port = machine.free_port()
        site = Site(folder, machine.free_port(), port, places.target, self._descriptors)
        log = folder / "backend" / "backend.log"
        with targets.process([BUILD / "backend", str(port)], places.others, log) as backend:
            _wait_for(port)
            if target is None:
                yield Session(Running(port, None, folder), backend.pid, port, places)
            else:
                with targets.running(target, site) as running:
                    session = Session(running, backend.pid, port, places)
                    yield session
                    if target.bills:
                        self._check_bills(folder / "db.sqlite", session.backend("/stats"))
        shutil.rmtree(folder)

    def _check_bills(self, database: Path, stats: dict[str, int]) -> None:
        self.checked += 1
        try:
            print("  " + bills.check(database, stats), flush=True)
        except bills.WrongBills as wrong:
            self.wrong_bills.append(str(wrong))
            print(f"  WRONG BILLS: {wrong}", file=sys.stderr, flush=True)


def _wait_for(port: int) -> None:
    for _ in range(100):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit("the backend does not start")
