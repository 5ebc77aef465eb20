"""`make bench`: what the proxy costs, beside other proxies, in one run on one machine.

Each target runs alone on one core; the clients (load.c), the stand-in LLM server (backend.c) and
this driver run on another. A session starts one target, takes every measurement once, and stops
it; the sessions of the targets take turns, so that what else the machine does hits all of them.
Every session of llmproxy ends with a comparison of its bills with the backend's own count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bills
import machine
import plot
import profiling
import report
import targets
from targets import HERE, KEY, Missing, Running, Site, Target

BUILD = HERE / "build"
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs"
DIRECT = "direct"
#: One stream takes two descriptors of a proxy.
DESCRIPTORS_PER_STREAM = 2
SPARE_DESCRIPTORS = 1024

Figures = dict[str, float]


@dataclass(frozen=True)
class Closed:
    """A closed loop: `warm_s` seconds that don't count, then `window_s` that do."""

    connections: int
    warm_s: float
    window_s: float

    @property
    def key(self) -> str:
        return f"closed-{self.connections}"

    @property
    def size(self) -> tuple[int, float]:
        return 0, self.connections

    @property
    def seconds(self) -> float:
        return self.warm_s + self.window_s


@dataclass(frozen=True)
class Streams:
    """Open streams: they begin within `ramp_s` seconds; measured is the window after that."""

    streams: int
    rate: float
    ramp_s: float
    window_s: float

    @property
    def key(self) -> str:
        return f"streams-{self.streams}x{self.rate:g}"

    @property
    def size(self) -> tuple[int, float]:
        return self.streams, self.rate

    @property
    def seconds(self) -> float:
        return 1.6 * self.ramp_s + self.window_s + 1.2


Measurement = Closed | Streams


@dataclass(frozen=True)
class Plan:
    """What is measured in a session, how often, and what only in the first `growth_sessions`."""

    sessions: int
    always: tuple[Measurement, ...]
    growth: tuple[Streams, ...]
    growth_sessions: int

    @property
    def seconds(self) -> float:
        """For one target, without starting and stopping it."""
        always = self.sessions * sum(one.seconds for one in self.always)
        return always + self.growth_sessions * sum(one.seconds for one in self.growth)


GROWTH_RATE = 4
GROWTH = (10, 100, 1000, 5000)
QUICK_GROWTH = (10, 1000, 5000)


def _streams(count: int, rate: float, begin_per_s: float, window_s: float) -> Streams:
    """Streams that begin at a rate which leaves room for those that have begun."""
    return Streams(count, rate, max(0.5, count / begin_per_s), window_s)


QUICK = Plan(
    sessions=1,
    always=(
        Closed(32, 0.7, 2.0),
        Closed(1, 0.3, 1.5),
        _streams(100, 50, 500, 2.0),
        _streams(1000, 20, 500, 2.0),
    ),
    growth=tuple(_streams(count, GROWTH_RATE, 600, 2.0) for count in QUICK_GROWTH),
    growth_sessions=1,
)
FULL = Plan(
    sessions=3,
    always=(
        Closed(32, 2.0, 6.0),
        Closed(1, 1.0, 4.0),
        _streams(100, 50, 250, 6.0),
        _streams(1000, 20, 250, 6.0),
    ),
    growth=tuple(_streams(count, GROWTH_RATE, 250, 6.0) for count in GROWTH),
    growth_sessions=2,
)


def build() -> None:
    """Compile the clients and the backend, if they are older than their source."""
    BUILD.mkdir(exist_ok=True)
    compiler = os.environ.get("CC", "gcc")
    if shutil.which(compiler) is None:
        raise SystemExit(f"the benchmark needs a C compiler, and {compiler} is not there")
    for name in ("load", "backend"):
        source, program = HERE / f"{name}.c", BUILD / name
        newest = max(source.stat().st_mtime, (HERE / "common.h").stat().st_mtime)
        if not program.exists() or program.stat().st_mtime < newest:
            options = ["-O2", "-Wall", "-Wextra", "-Wshadow"]
            subprocess.run([compiler, *options, "-o", program, source], check=True)


class Session:
    """One target, started for its measurements, with a backend of its own."""

    def __init__(self, running: Running, backend_pid: int, backend_port: int) -> None:
        self.running = running
        self._backend_pid = backend_pid
        self._backend_port = backend_port

    def backend(self, path: str) -> dict[str, Any]:
        """What the backend answers to GET `path`."""
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self._backend_port}{path}", timeout=10
        ) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def measure(self, what: Measurement) -> Figures:
        """The figures of load.c for one measurement."""
        words: list[object] = [BUILD / "load"]
        if isinstance(what, Closed):
            words += ["closed", self.running.port, what.connections, what.warm_s, what.window_s]
        else:
            self.backend(f"/set?rate={what.rate}")
            words += ["streams", self.running.port, what.streams, what.ramp_s, what.window_s]
            words.append(what.rate)
        words += [KEY, self._backend_pid, *self.running.pids]
        done = subprocess.run(
            [str(word) for word in words], capture_output=True, text=True, check=True
        )
        if done.stderr:
            print(done.stderr, end="", file=sys.stderr)
        figures: Figures = json.loads(done.stdout)
        return figures


class Bench:
    """The places and limits that all sessions share."""

    def __init__(self, folder: Path, descriptors: int) -> None:
        self._folder = folder
        self._descriptors = descriptors
        self._target_core, self._other_core = machine.cores()
        self._count = 0
        self.wrong_bills: list[str] = []

    @contextlib.contextmanager
    def session(self, target: Target | None) -> Iterator[Session]:
        """Start a backend and the target (None: no proxy); raises Missing if that can't be."""
        self._count += 1
        folder = self._folder / f"{self._count}-{target.name if target else DIRECT}"
        (folder / "backend").mkdir(parents=True)
        port = machine.free_port()
        site = Site(folder, machine.free_port(), port, self._target_core, self._descriptors)
        log = folder / "backend" / "backend.log"
        with targets.process([BUILD / "backend", str(port)], self._other_core, log) as backend:
            _wait_for(port)
            if target is None:
                yield Session(Running(port, [], folder), backend.pid, port)
            else:
                with targets.running(target, site) as running:
                    session = Session(running, backend.pid, port)
                    yield session
                    if target.name == "llmproxy":
                        self._check_bills(folder / "db.sqlite", session.backend("/stats"))
        shutil.rmtree(folder)

    def _check_bills(self, database: Path, stats: dict[str, int]) -> None:
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


def fitting(plan: Plan, target: Target | None, most_streams: int) -> Plan:
    """The plan, without what the target can't take, and what the limit of open files forbids."""
    most = float("inf") if target is None else target.most_chunks_per_s

    def fits(what: Measurement) -> bool:
        if isinstance(what, Closed):
            return True
        return what.streams <= most_streams and what.streams * what.rate <= most

    return replace(
        plan,
        always=tuple(filter(fits, plan.always)),
        growth=tuple(what for what in plan.growth if fits(what)),
    )


def one_session(bench: Bench, target: Target | None, plan: Plan, number: int) -> dict[str, Figures]:
    """All the figures of one session, by the measurement's key."""
    found: dict[str, Figures] = {}
    with bench.session(target) as session:
        if session.running.pids:
            found["idle"] = {"rss_kib": machine.rss_kib(session.running.pids)}
        todo = plan.always + (plan.growth if number < plan.growth_sessions else ())
        # Few streams before many: else closing those of one measurement is counted in the next.
        for what in sorted(todo, key=lambda what: what.size):
            found[what.key] = session.measure(what)
            print(f"  {what.key:18} {report.brief(found[what.key])}", flush=True)
    return found


def available(wanted: Sequence[str]) -> list[Target | None]:
    """The targets that can be had here; a line for each that can't."""
    found: list[Target | None] = [None]
    for target in targets.all_targets():
        if target.name in wanted:
            try:
                target.version = target.prepare()
            except Missing as why:
                print(f"{target.name}: skipped. {why}")
                continue
            found.append(target)
    return found


def run(bench: Bench, plan: Plan, chosen: list[Target | None], most_streams: int) -> report.Runs:
    """All sessions of all targets, in turns."""
    runs: report.Runs = {}
    for number in range(plan.sessions):
        for target in list(chosen):
            name = DIRECT if target is None else target.name
            print(f"{name} ({number + 1} of {plan.sessions})", flush=True)
            try:
                fit = fitting(plan, target, most_streams)
                runs.setdefault(name, []).append(one_session(bench, target, fit, number))
            except Missing as why:
                print(f"{name}: skipped. {why}")
                chosen.remove(target)
    return runs


def tell_noise() -> dict[int, float]:
    """Warn if the cores are not ours alone."""
    busy = machine.busy_percent(machine.cores())
    for core, percent in busy.items():
        if percent > 5:
            print(
                f"WARNING: core {core} is {percent:.0f} % busy with something else; "
                "compare the ratios, not the figures"
            )
    return busy


def descriptors_for(plan: Plan) -> tuple[int, int]:
    """The limit of open files that could be had, and how many streams it allows."""
    streams = max(what.streams for what in plan.growth)
    wanted = DESCRIPTORS_PER_STREAM * streams + SPARE_DESCRIPTORS
    limit = machine.raise_descriptor_limit(wanted)
    most = (limit - SPARE_DESCRIPTORS) // DESCRIPTORS_PER_STREAM
    if limit < wanted:
        print(
            f"WARNING: only {limit} open files are allowed (ulimit -n), {wanted} are needed: "
            f"no measurement with more than {most} streams"
        )
    return limit, most


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="bench/run.py")
    parser.add_argument("--quick", action="store_true", help="3 minutes instead of 15")
    parser.add_argument("--litellm", action="store_true", help="measure LiteLLM too")
    parser.add_argument("--only", metavar="NAMES", help="these targets, with commas between them")
    parser.add_argument("--sessions", type=int, help="how often each target is measured")
    parser.add_argument("--profile", action="store_true", help="profile llmproxy, nothing else")
    parser.add_argument("--publish", action="store_true", help="put the results into docs/")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    if options.sessions:
        plan = replace(plan, sessions=options.sessions)
    names = ["llmproxy", "nginx", "sglang-router", *(["litellm"] if options.litellm else [])]
    wanted = options.only.split(",") if options.only else names

    build()
    RESULTS.mkdir(exist_ok=True)
    limit, most_streams = descriptors_for(plan)
    target_core, other_core = machine.cores()
    if target_core == other_core:
        print("WARNING: there is only one core; proxies and clients share it")
    busy = tell_noise()
    os.sched_setaffinity(0, {other_core})
    # On the disk that the project is on: /tmp may be memory, where nothing is ever durable.
    with tempfile.TemporaryDirectory(prefix="run-", dir=BUILD) as folder:
        bench = Bench(Path(folder), limit)
        if options.profile:
            profile(bench, Path(folder))
            end(bench)
            return
        about = machine.description(Path(folder))
        chosen = available(wanted)
        print(f"about {1 + len(chosen) * (plan.seconds + 4 * plan.sessions) / 60:.0f} minutes")
        runs = run(bench, plan, chosen, most_streams)
    versions = {target.name: target.version for target in chosen if target is not None}
    result = report.Result(
        about=about,
        busy_before={str(core): round(percent, 1) for core, percent in busy.items()},
        versions=versions,
        quick=options.quick,
        runs=runs,
    )
    publish(result, to_docs=options.publish and not bench.wrong_bills)
    end(bench)


def end(bench: Bench) -> None:
    """Wrong bills make the run a failure, whatever its figures are."""
    if bench.wrong_bills:
        raise SystemExit(f"WRONG BILLS in {len(bench.wrong_bills)} session(s)")


def publish(result: report.Result, *, to_docs: bool) -> None:
    """Print the results, and write them down."""
    text = report.tables(result)
    print("\n" + text)
    (RESULTS / "latest.json").write_text(result.to_json())
    (RESULTS / "latest.md").write_text(text)
    (RESULTS / "latest.svg").write_text(plot.draw(result))
    print(f"written: {', '.join(f'bench/results/latest.{kind}' for kind in ('json', 'md', 'svg'))}")
    if to_docs:
        report.put_into(DOCS / "performance.md", text)
        (DOCS / "performance.svg").write_text(plot.draw(result))
        print("written: docs/performance.md, docs/performance.svg")


def profile(bench: Bench, folder: Path) -> None:
    """Where the time of llmproxy goes, per request and per chunk."""
    closed, streams = Closed(32, 2.0, 20.0), Streams(100, 50, 1.0, 30.0)
    for what, unit in ((closed, "request"), (streams, "chunk")):
        output = folder / f"{what.key}.profile"
        target = next(one for one in targets.all_targets() if one.name == "llmproxy")
        target.command = targets.sampled_llmproxy(output)
        with bench.session(target) as session:
            with profiling.sampling(session.running.pids[0], output):
                figures = session.measure(what)
            text = profiling.text(output, unit, figures)
        (RESULTS / f"profile-{unit}.txt").write_text(text)
        print(text)
        print(f"written: bench/results/profile-{unit}.txt")


if __name__ == "__main__":
    main()
