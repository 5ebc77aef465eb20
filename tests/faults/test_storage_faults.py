"""The ledger's store fails: locked, full, read-only, or a system call at a time.

In each, the same must hold: an answer that came to its end has its bill; new work gets 503 with
Retry-After within about 2 s; when the fault ends all is there once, without a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from agreement import BackendLog, Verdict, compare
from figures import LONG, report
from load import Asked, Load, Plan, until
from rig import Rig
from server_process import get_status

from llmproxy.storage.sqlite import connect

CLIENTS = 12
COMMAND = ["-m", "llmproxy"]
BROKEN = Path(__file__).with_name("broken.py")
#: What a refusal may take: 2 s, and the time of a busy machine.
REFUSAL_S = 2.5
#: How soon after a fault new work must be taken again: the longest pause between two tries, one
#: wait for a lock, and the time of a busy machine.
RECOVERY_S = 4.0
OUTAGE_S = 60.0 if LONG else 2.5


class PatientLoad(Load):
    """Clients that pause after a refusal, as Retry-After asks them to."""

    async def _ask(
        self, number: int, link: asyncio.StreamReader, out: asyncio.StreamWriter
    ) -> Asked:
        asked = await super()._ask(number, link, out)
        if any(each.status == 503 for each in self.asked[-CLIENTS:]):
            await asyncio.sleep(0.1)
        return asked


def plan(seed: int) -> Plan:
    return Plan(random.Random(seed), max_tokens=8, max_ms=20)


@dataclass
class Probe:
    """An answer to one small request of its own."""

    status: int
    head: str
    took_s: float


class Trial:
    """A proxy in a process, its backend and its clients, through one fault."""

    def __init__(
        self,
        folder: Path,
        *,
        around: Sequence[str] = (),
        seed: int = 1,
        command: Sequence[str] = COMMAND,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.rig = Rig(folder, clients=CLIENTS + 1, command=command, around=around)
        self.load = PatientLoad(self.rig.port, CLIENTS, plan(seed))
        self.probes: list[Asked] = []
        self.seconds: dict[str, float] = {}

    def around_no_more(self) -> None:
        """The next start is an ordinary one."""
        self.rig._command = [sys.executable, *COMMAND]

    async def probe(self) -> Probe:
        """Ask for something with the key that no other client uses."""
        one = Load(self.rig.port, CLIENTS + 1, plan(len(self.probes)))
        one.generation = 1000 + len(self.probes)
        link, out = await asyncio.open_connection("127.0.0.1", self.rig.port)
        began = time.monotonic()
        head: list[str] = []
        read = link.readuntil

        async def note(separator: bytes = b"\n") -> bytes:
            data = await read(separator)
            head.append(data.decode("latin-1"))
            return data

        link.readuntil = note  # type: ignore[assignment]
        try:
            await one._ask(CLIENTS, link, out)
        finally:
            out.transport.abort()
            self.probes += one.asked
        (asked,) = one.asked
        assert asked.status is not None
        return Probe(asked.status, head[0], time.monotonic() - began)

    async def refused(self) -> None:
        """New work is refused, in time and in form."""
        probe = await self.probe()
        assert probe.status == 503, probe
        assert "retry-after: " in probe.head.lower(), probe
        assert probe.took_s < REFUSAL_S, probe
        self.seconds["refused_in_s"] = max(probe.took_s, self.seconds.get("refused_in_s", 0.0))
        assert get_status(f"http://127.0.0.1:{self.rig.admin_port}/healthz") == 200
        assert get_status(f"http://127.0.0.1:{self.rig.admin_port}/readyz") == 503

    async def recovered(self) -> None:
        """New work is taken again, and nobody had to start anything."""
        began = time.monotonic()
        while (probe := await self.probe()).status != 200:
            assert time.monotonic() - began < RECOVERY_S, probe
            await asyncio.sleep(0.05)
        self.seconds["recovered_in_s"] = time.monotonic() - began
        url = f"http://127.0.0.1:{self.rig.admin_port}/readyz"
        await until(lambda: get_status(url) == 200, 2, "readiness")

    async def settled(self) -> None:
        """The clients go, and no row is open any more."""
        await self.load.stop()
        await until(lambda: not self.rig.open_rows(), 10, "the last settlement")

    def verdict(self) -> Verdict:
        log = BackendLog.read(self.rig.backend_log)
        return compare(self.load.asked + self.probes, log, self.rig.query)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[subprocess.Popen[bytes]]:
        """Proxy and clients at work; afterwards the proxy stops in order."""
        with self.rig.backend() as url:
            self.rig.configure(url)
            async with self.rig.running() as process:
                self.load.start()
                await until(lambda: any(a.finished for a in self.load.asked), 20, "an answer")
                yield process
                process.terminate()
                assert await asyncio.to_thread(process.wait, 20) == 0

    def tell(self, name: str) -> None:
        verdict = self.verdict()
        report(f"storage, {name}", **verdict.figures(), **self.seconds)
        assert not verdict.wrong, verdict.examples


Fault = contextlib.AbstractContextManager[object]


async def through(trial: Trial, fault: Callable[[int], Fault]) -> None:
    """Load, the fault (made for a process id), and its end; all without a restart."""
    async with trial.running() as process:
        await asyncio.sleep(0.3)
        with fault(process.pid):
            # What was on its way meets the fault first; then it is known to last.
            began = time.monotonic()
            await asyncio.sleep(0.2)
            await trial.refused()
            await asyncio.sleep(max(0.0, OUTAGE_S - (time.monotonic() - began)))
            await trial.refused()
        await trial.recovered()
        finished = sum(each.finished for each in trial.load.asked)
        await until(
            lambda: sum(each.finished for each in trial.load.asked) > finished + CLIENTS,
            10,
            "service as before",
        )
        await trial.settled()


# -- locked, full, read-only ---------------------------------------------------------------------


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    other = connect(database)
    other.execute("PRAGMA busy_timeout = 10000")
    other.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


@pytest.mark.timeout(180)
def test_a_locked_database_delays_bills_and_loses_none(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    asyncio.run(through(trial, lambda pid: locked(trial.rig.database)))
    trial.tell("locked")


@contextlib.contextmanager
def small_disk(where: Path) -> Iterator[bool]:
    """A file system of 16 MiB at `where`; False where nobody may mount one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(where)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(where)], check=True)


@contextlib.contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Not a byte is left on a disk."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (65536, 4096):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    assert os.statvfs(disk).f_bavail == 0
    yield
    filler.unlink()


@contextlib.contextmanager
def no_growth(pid: int, database: Path) -> Iterator[None]:
    """No file of a process may grow: what a quota does, and it takes no privilege."""
    sizes = [path.stat().st_size for path in database.parent.glob("*") if path.is_file()]
    old = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (min(4096, *sizes), old[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, old)


@pytest.mark.timeout(180)
def test_a_full_disk_delays_bills_and_loses_none(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk) as mounted:
        trial = Trial(disk)
        trial.rig.backend_log = tmp_path / "backend.log"
        if mounted:
            asyncio.run(through(trial, lambda pid: filled(disk)))
        else:
            asyncio.run(through(trial, lambda pid: no_growth(pid, trial.rig.database)))
        trial.tell("full disk" if mounted else "full disk (by a limit: nobody may mount here)")


@pytest.mark.timeout(180)
def test_a_quota_delays_bills_and_loses_none(tmp_path: Path) -> None:
    trial = Trial(tmp_path)
    asyncio.run(through(trial, lambda pid: no_growth(pid, trial.rig.database)))
    trial.tell("quota")


# -- system calls that fail ----------------------------------------------------------------------


def strace(trace: Path, faults: Sequence[tuple[str, str, str]], paths: Sequence[Path]) -> list[str]:
    """A command around the proxy, in which calls fail: (name, error, which of them).

    The proxy's process stays our child; strace, its grandchild, can be ended before it.
    """
    assert shutil.which("strace"), "strace is needed: apt-get install strace"
    only = [word for path in paths for word in ("-P", str(path))]
    inject = ["-e", f"trace={','.join(name for name, _, _ in faults)}"]
    for name, error, when in faults:
        inject += ["-e", f"inject={name}:error={error}:when={when}"]
    return ["strace", "-D", "-I2", "-f", "-qq", "-o", str(trace), *only, *inject]


def database_files(folder: Path) -> list[Path]:
    return [folder / f"db.sqlite{suffix}" for suffix in ("", "-wal", "-shm", "-journal")]


def tracer_of(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("TracerPid:"))
    return int(line.split()[1])


def end_fault(pid: int) -> None:
    """strace lets go of the process."""
    os.kill(tracer_of(pid), signal.SIGTERM)
    deadline = time.monotonic() + 5
    while tracer_of(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def injected(trace: Path) -> int:
    return trace.read_text(errors="replace").count("(INJECTED)") if trace.exists() else 0


@pytest.mark.parametrize(
    ("calls", "error"),
    [("pwrite64", "EROFS"), ("fdatasync", "EIO")],
)
@pytest.mark.timeout(180)
def test_a_store_that_fails_for_long_delays_bills_and_loses_none(
    tmp_path: Path, calls: str, error: str
) -> None:
    trace = tmp_path / "trace"
    # Some commits succeed first.
    when = {"pwrite64": "60+", "fdatasync": "15+"}[calls]
    around = strace(trace, [(calls, error, when)], database_files(tmp_path))
    trial = Trial(tmp_path, around=around)

    async def story() -> None:
        async with trial.running() as process:
            await until(lambda: injected(trace) > 0, 20, "the fault's begin")
            await asyncio.sleep(0.2)
            await trial.refused()
            await asyncio.sleep(OUTAGE_S / 3)
            await trial.refused()
            end_fault(process.pid)
            await trial.recovered()
            await asyncio.sleep(0.2)
            await trial.settled()

    asyncio.run(story())
    trial.tell(f"{calls} {error} for {OUTAGE_S / 3:.0f} s")


@dataclass(frozen=True)
class Case:
    """Calls that fail: `files` on the database alone, `log` on the log, else everywhere.

    most: about how many of them a thread makes under this load.
    """

    calls: str
    error: str
    where: str
    most: int

    @property
    def name(self) -> str:
        return f"{self.calls}-{self.error}-{self.where}"


CASES = [
    Case("fdatasync", "EIO", "files", 60),
    Case("pwrite64", "EIO", "files", 60),
    Case("pwrite64", "ENOSPC", "files", 60),
    Case("pread64", "EIO", "files", 20),
    Case("openat", "EMFILE", "files", 3),
    Case("openat", "ENOSPC", "files", 3),
    Case("fcntl", "ENOLCK", "files", 60),
    Case("ftruncate", "EIO", "files", 1),
    Case("mmap", "ENOMEM", "files", 1),
    Case("write", "ENOSPC", "log", 60),
    Case("write", "EIO", "log", 60),
    Case("connect", "ETIMEDOUT", "everywhere", 12),
    Case("connect", "ENOBUFS", "everywhere", 12),
    Case("accept4", "EMFILE", "everywhere", 25),
    Case("sendto", "ECONNRESET", "everywhere", 60),
    Case("sendto", "EPIPE", "everywhere", 60),
    Case("recvfrom", "ECONNRESET", "everywhere", 60),
    Case("recvfrom", "EIO", "everywhere", 60),
]


async def with_failing_calls(trial: Trial) -> None:
    """Load while calls fail, a kill, and an ordinary start that finds what was left."""
    with trial.rig.backend() as url:
        trial.rig.configure(url)
        process = trial.rig.start()
        try:
            await _load_while_it_fails(trial, process)
        finally:
            process.kill()
            await asyncio.to_thread(process.wait)
        trial.around_no_more()
        async with trial.rig.running() as process:
            trial.load.start()
            await asyncio.sleep(0.3)
            await trial.settled()
            process.terminate()
            assert await asyncio.to_thread(process.wait, 20) == 0


async def _load_while_it_fails(trial: Trial, process: subprocess.Popen[bytes]) -> None:
    url = f"http://127.0.0.1:{trial.rig.admin_port}/healthz"
    deadline = time.monotonic() + 15
    while process.poll() is None and await asyncio.to_thread(get_status, url) != 200:
        if time.monotonic() > deadline:
            return  # it may be unable to start while the fault lasts
        await asyncio.sleep(0.05)
    for _ in range(2 if process.poll() is None else 0):  # connections break, and are made again
        trial.load.start()
        await asyncio.sleep(0.5)
        await trial.load.stop()


def around_case(case: Case, when: str, place: Path) -> list[str]:
    where: dict[str, Sequence[Path]] = {
        "files": database_files(place),
        "log": [place / "proxy.log"],
        "everywhere": [],
    }
    return strace(place / "trace", [(case.calls, case.error, when)], where[case.where])


def trial_with(place: Path, around: Sequence[str], seed: int) -> tuple[Verdict, int]:
    """What is wrong after calls that failed, and how many failed."""
    trial = Trial(place, around=around, seed=seed)
    asyncio.run(with_failing_calls(trial))
    return trial.verdict(), injected(place / "trace")


#: Many calls fail, one now and then.
MIXED = {
    "store": (
        [
            ("fdatasync", "EIO", "7+9"),
            ("pwrite64", "ENOSPC", "31+97"),
            ("pread64", "EIO", "9+11"),
            ("fcntl", "ENOLCK", "45+61"),
        ],
        True,
    ),
    "network": (
        [
            ("connect", "ETIMEDOUT", "3+5"),
            ("accept4", "EMFILE", "5+7"),
            ("sendto", "ECONNRESET", "23+31"),
            ("recvfrom", "EIO", "17+29"),
        ],
        False,
    ),
}


@pytest.mark.parametrize("mix", MIXED)
@pytest.mark.timeout(120)
def test_after_calls_that_fail_now_and_then_all_is_there_once(tmp_path: Path, mix: str) -> None:
    faults, on_files = MIXED[mix]
    files = database_files(tmp_path) if on_files else []
    seed = random.randrange(10**6)
    verdict, failed = trial_with(tmp_path, strace(tmp_path / "trace", faults, files), seed)
    report(f"storage, {mix} fails now and then", seed=seed, faults=failed, **verdict.figures())
    assert failed
    assert not verdict.wrong, (seed, verdict.examples)


def spread(case: Case) -> list[str]:
    """Which of the calls fail, each in its thread: a number, once or from then on."""
    if LONG:
        return [f"{n}{good}" for n in range(1, case.most + 1) for good in ("", "+")]
    early = max(1, case.most // 4)  # a busy machine must get there, too
    return [f"{random.randint(1, early)}{random.choice(('', '+'))}"]


@pytest.mark.parametrize("case", CASES if LONG else random.sample(CASES, 2), ids=lambda c: c.name)
@pytest.mark.timeout(3600 if LONG else 120)
def test_after_a_call_that_fails_all_is_there_once(tmp_path: Path, case: Case) -> None:
    total: Counter[str] = Counter()
    tried = spread(case)
    for seed, when in enumerate(tried):
        place = tmp_path / str(seed)
        place.mkdir()
        verdict, failed = trial_with(place, around_case(case, when, place), seed)
        assert not verdict.wrong, (when, verdict.examples)
        shutil.rmtree(place)
        total.update({"faults": failed, **verdict.figures()})
    report(f"storage, {case.name}", calls=",".join(tried[:4]), trials=len(tried), **total)
    assert total["faults"]


@pytest.mark.timeout(120)
def test_the_experiment_finds_a_planted_fault(tmp_path: Path) -> None:
    around = around_case(Case("pwrite64", "EIO", "files", 60), "200+", tmp_path)
    trial = Trial(tmp_path, around=around, command=[str(BROKEN), "bill-after-release"])
    asyncio.run(with_failing_calls(trial))
    verdict = trial.verdict()
    report("storage, bill-after-release", **verdict.figures())
    assert verdict.wrong["finished without its bill"]


# -- two proxies on one file ---------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_two_proxies_share_a_file_and_one_s_recovery_leaves_the_other_s_rows(
    tmp_path: Path,
) -> None:
    mortal, other = Trial(tmp_path / "a"), Trial(tmp_path / "b", seed=2)
    other.rig.database = mortal.rig.database
    other.load.generation = 500  # so that no marker is used twice
    asyncio.run(_kill_one_of_two(mortal, other))
    log = BackendLog.read(mortal.rig.backend_log)
    others = BackendLog.read(other.rig.backend_log)
    log.asked += others.asked
    log.told |= others.told
    verdict = compare(mortal.load.asked + other.load.asked, log, mortal.rig.query)
    states = dict(mortal.rig.query("SELECT rid, state FROM ledger"))
    theirs = Counter(states[each.rid] for each in other.load.asked if each.rid is not None)
    report("storage, two proxies", **verdict.figures(), other_settled=theirs["settled"])
    assert not verdict.wrong, verdict.examples
    assert set(theirs) == {"settled"}
    assert verdict.states["orphan"] + verdict.states["estimated"]


async def _kill_one_of_two(mortal: Trial, other: Trial) -> None:
    with mortal.rig.backend() as url:
        mortal.rig.configure(url)
        async with other.running():
            process, _ = await mortal.rig.serving()
            mortal.load.start()
            for _ in range(20 if LONG else 2):
                await asyncio.sleep(0.7)
                process.kill()
                process.wait()
                await mortal.load.wait()
                process, _ = await mortal.rig.serving()
                mortal.load.start()
            await mortal.load.stop()
            await other.load.stop()
            await until(lambda: not mortal.rig.open_rows(), 10, "the last settlement")
            process.terminate()
            assert await asyncio.to_thread(process.wait, 20) == 0
