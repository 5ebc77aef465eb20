"""A new version is deployed under load: the port stays open, no answer breaks, no bill is lost.

A hand-over (SIGUSR2), with one process and with workers; and a restart on a socket of systemd's.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import mongod
import pytest
from agreement import BackendLog, Verdict, compare
from channels import only_ours
from figures import LONG, report
from load import Asked, Broken, Load, Plan, until
from mongod import Mongod
from rig import Rig
from server_process import get_status
from test_mongo_outage import MongoRig

COMMAND = ["-m", "llmproxy"]
CLIENTS = 500 if LONG else 24
#: By how many workers there are.
HANDOVERS = {1: 100, 2: 100} if LONG else {1: 2, 2: 1}
BOTH = [1, 2]
FEW = BOTH if LONG else [1]
#: How soon a new process serves, on a busy machine.
START_S = 60.0
PR_SET_CHILD_SUBREAPER = 36


class Deploying(Load):
    """Clients that come again, on a new connection where an answer was its connection's last.

    Every second one makes a connection for each request. `broken` has what none of them should see.
    """

    def __init__(self, port: int, clients: int, plan: Plan) -> None:
        super().__init__(port, clients, plan)
        self.broken: list[str] = []
        self._over = False

    async def finish(self) -> None:
        """Let every answer come to its end."""
        self._over = True
        await self.wait()

    async def _client(self, number: int) -> None:
        await asyncio.sleep(self._plan.random.random() * 0.1)
        while not self._over:
            try:
                await self._connection(number)
            except (Broken, asyncio.IncompleteReadError, OSError) as error:
                self.broken.append(f"{number}: {error!r}")
                return

    async def _connection(self, number: int) -> None:
        link, out = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            while not self._over:
                if (await self._ask(number, link, out)).closes or number % 2:
                    return
        finally:
            out.transport.abort()


class Service:
    """A proxy whose process changes: `pid` is the one that serves."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.process = rig.start()
        self.pid = self.process.pid
        self.ended: dict[int, int] = {}

    def count(self, words: str) -> int:
        """In how many lines of the log they stand."""
        return self.rig.output().count(words)

    async def serves(self, times: int = 1) -> None:
        """Wait until so many processes have said that they serve."""
        await until(lambda: self.count(" serves ") >= times, START_S, "a start")

    def send(self, number: int, pid: int | None = None) -> None:
        os.kill(pid or self.pid, number)

    async def hand_over(self, *, signals: int = 1) -> int:
        """Ask for a hand-over; the id of the process that was relieved."""
        before = self.count("handed over to process")
        old = self.pid
        for _ in range(signals):
            self.send(signal.SIGUSR2)
            await asyncio.sleep(0)
        await until(lambda: self.count("handed over to process ") > before, START_S, "a hand-over")
        self.pid = int(re.findall(r"handed over to process (\d+)", self.rig.output())[-1])
        return old

    async def fails_to_hand_over(self, times: int) -> None:
        """Ask for a hand-over that can't be, for the given number of times."""
        self.send(signal.SIGUSR2)
        await until(lambda: self.count("not handed over: ") == times, START_S, "a failure")

    def exit_code(self, pid: int) -> int | None:
        """How a process ended, which is no child of ours unless its parent has ended, too."""
        if pid not in self.ended:
            if pid == self.process.pid:
                code = self.process.poll()
                if code is not None:
                    self.ended[pid] = code
            else:
                with suppress(ChildProcessError):
                    found, status = os.waitpid(pid, os.WNOHANG)
                    if found:
                        self.ended[pid] = os.waitstatus_to_exitcode(status)
        return self.ended.get(pid)

    async def end_of(self, pid: int, within_s: float = 15.0) -> int:
        await until(lambda: self.exit_code(pid) is not None, within_s, f"the end of {pid}")
        return self.ended[pid]

    async def restart(self) -> None:
        """Stop it, and start it again."""
        times = self.count(" serves ")
        await self.stop()
        self.process = self.rig.start()
        self.pid = self.process.pid
        await self.serves(times + 1)

    async def stop(self) -> None:
        """As an operator does it, and in order."""
        self.send(signal.SIGTERM)
        assert await self.end_of(self.pid) == 0, self.rig.output()[-3000:]


@pytest.fixture(autouse=True)
def orphans_are_ours() -> Iterator[None]:
    """As with systemd: what is left by a process that ends is a child of this one."""
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def rig(tmp_path: Path, workers: int) -> Rig:
    return Rig(tmp_path, clients=CLIENTS, command=COMMAND, workers=workers)


@asynccontextmanager
async def serving(rig: Rig) -> AsyncIterator[Service]:
    """A proxy that serves; whichever process it is by then is killed if it has not ended."""
    service = Service(rig)
    try:
        await service.serves()
        yield service
    finally:
        for pid in {service.process.pid, service.pid} - service.ended.keys():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        service.process.wait()


def plan(*, tokens: int = 12, ms: int = 60) -> Plan:
    return Plan(random.Random(0), max_tokens=tokens, max_ms=ms)


def verdict_on(
    rig: Rig, load: Deploying, bills: Mapping[str, Counter[tuple[str, int]]] | None = None
) -> Verdict:
    """What clients, backend and ledger say; each request was answered, and billed once."""
    verdict = compare(load.asked, BackendLog.read(rig.backend_log), rig.query, bills)
    assert load.broken == []
    assert not verdict.wrong, verdict
    assert [each for each in load.asked if not (each.finished and each.status == 200)] == []
    assert verdict.states == {"settled": len(load.asked)}
    assert "Traceback" not in rig.output()
    return verdict


def runs(pid: int) -> bool:
    """Whether it has not ended, even if its parent has not asked how yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# -- a hand-over ---------------------------------------------------------------------------------


@only_ours
@pytest.mark.timeout(3600 if LONG else 90)
@pytest.mark.parametrize("workers", BOTH)
def test_no_client_notices_that_the_process_changes_and_every_answer_is_billed_once(
    rig: Rig,
) -> None:
    async def story(url: str) -> None:
        rig.configure(url, drain_s=60)
        async with serving(rig) as service:
            load = Deploying(rig.port, CLIENTS, plan(tokens=20, ms=400 if LONG else 100))
            load.start()
            old: list[int] = []
            slowest_s, handovers = 0.0, HANDOVERS[rig.workers]
            for _ in range(handovers):
                await asyncio.sleep(0.3)
                began = time.monotonic()
                old.append(await service.hand_over(signals=2))
                slowest_s = max(slowest_s, time.monotonic() - began)
                assert connects(rig.port)
                assert get_status(f"http://127.0.0.1:{rig.admin_port}/readyz") == 200
            await asyncio.sleep(0.3)
            await load.finish()
            assert {await service.end_of(pid, 90) for pid in old} == {0}
            await service.stop()
            verdict = verdict_on(rig, load)
            assert service.count("handed over to process") == handovers
            assert service.count(" serves ") == handovers + 1
            assert not refuses_a_dead_owner(rig)
            report(
                f"hand-over, {rig.workers} workers" if rig.workers > 1 else "hand-over",
                handovers=handovers,
                clients=CLIENTS,
                broken=len(load.broken),
                slowest_s=slowest_s,
                **verdict.figures(),
            )

    with rig.backend() as url:
        asyncio.run(story(url))


@pytest.mark.timeout(90)
@pytest.mark.parametrize("workers", FEW)
def test_a_new_process_that_can_not_start_changes_nothing(rig: Rig) -> None:
    async def story(url: str) -> None:
        rig.configure(url, drain_s=20)
        good = rig.config.read_text()
        async with serving(rig) as service:
            load = Deploying(rig.port, CLIENTS, plan())
            load.start()
            await asyncio.sleep(0.2)
            with socket.create_server(("127.0.0.1", 0)) as taken:
                busy = good.replace(f":{rig.admin_port}:", f":{taken.getsockname()[1]}:")
                for number, text in enumerate((f"colour = 1\n{good}", busy), 1):
                    rig.config.write_text(text)
                    await service.fails_to_hand_over(number)
            assert get_status(f"http://127.0.0.1:{rig.admin_port}/readyz") == 200
            await asyncio.sleep(0.2)
            await load.finish()
            await service.stop()
            verdict_on(rig, load)
            assert service.process.pid == service.pid
            assert service.count("not handed over: it has ended; what it said tells why") == 2
            assert service.count("handed over to process") == 0

    with rig.backend() as url:
        asyncio.run(story(url))


@pytest.mark.timeout(90)
@pytest.mark.parametrize("workers", BOTH)
def test_sigterm_during_a_hand_over_stops_both(rig: Rig) -> None:
    async def story(url: str) -> None:
        rig.configure(url, drain_s=20)
        async with serving(rig) as service:
            load = Load(rig.port, CLIENTS, plan())
            load.start()
            await until(lambda: any(each.rid for each in load.asked), 10, "an answer")
            service.send(signal.SIGUSR2)
            await until(lambda: service.count("a new process is started") == 1, 5, "its start")
            await asyncio.sleep(0.2)
            service.send(signal.SIGTERM)
            assert await service.end_of(service.pid) == 0
            await load.wait()
            await until(no_children, 30, "the end of the other one")
            assert not connects(rig.port)
            assert not rig.open_rows()
            assert_finished_is_settled(rig, load.asked)
            assert service.count("not handed over: this process is told to stop") == 1

    with rig.backend() as url:
        asyncio.run(story(url))


@pytest.mark.timeout(90)
@pytest.mark.parametrize("workers", FEW)
def test_a_stop_soon_after_a_hand_over_waits_for_the_streams_of_both(rig: Rig) -> None:
    async def story(url: str) -> None:
        rig.configure(url, drain_s=20)
        async with serving(rig) as service:
            load = Load(rig.port, CLIENTS, plan(tokens=24, ms=100))
            load.start()
            await until(lambda: any(each.rid for each in load.asked), 10, "an answer")
            old = await service.hand_over()
            streams = [each for each in load.asked if each.rid and not each.finished]
            service.send(signal.SIGTERM)
            await until(lambda: not runs(service.pid), 30, "its end")
            assert await service.end_of(old, 0.2) == 0  # it has ended first
            assert await service.end_of(service.pid) == 0
            await load.wait()
            assert streams
            assert all(each.finished for each in streams)
            assert not rig.open_rows()
            assert_finished_is_settled(rig, load.asked)

    with rig.backend() as url:
        asyncio.run(story(url))


@pytest.mark.timeout(90)
@pytest.mark.parametrize("workers", [1])  # those of a supervisor outlive it, and end in order
def test_what_a_process_leaves_open_that_is_killed_while_it_drains_is_closed_at_once(
    rig: Rig,
) -> None:
    async def story(url: str) -> None:
        rig.configure(url, drain_s=30)
        async with serving(rig) as service:
            load = Load(rig.port, CLIENTS, plan(tokens=40, ms=200))
            load.start()
            await until(lambda: rig.open_rows() > CLIENTS // 3, 10, "streams")
            old = await service.hand_over()
            assert rig.open_rows()
            service.send(signal.SIGKILL, old)
            await load.wait()
            await until(lambda: not rig.open_rows(), 5, "a recovery")
            await service.stop()
            assert service.count(" rows of an ended process are now ")
            assert_finished_is_settled(rig, load.asked)

    with rig.backend() as url:
        asyncio.run(story(url))


@pytest.fixture(scope="module")
def server() -> Iterator[Mongod]:
    with mongod.running(Mongod()) as server:
        yield server


@only_ours
@pytest.mark.timeout(180)
@pytest.mark.parametrize("workers", FEW)
def test_two_that_deliver_from_one_journal_store_each_bill_once(
    tmp_path: Path, server: Mongod, workers: int
) -> None:
    rig = MongoRig(tmp_path, server.client(), server.address, workers=workers)

    async def story(url: str) -> None:
        rig.configure(url, drain_s=20)
        async with serving(rig) as service:
            load = Deploying(rig.port, 12, plan(tokens=8, ms=30))
            load.start()
            old = []
            for _ in range(2):
                await asyncio.sleep(0.3)
                old.append(await service.hand_over())
            await asyncio.sleep(0.3)
            await load.finish()
            assert {await service.end_of(pid) for pid in old} == {0}
            await service.stop()
            assert not rig.undelivered()
            verdict_on(rig, load, rig.bills())

    with rig.backend() as url:
        asyncio.run(story(url))


def assert_finished_is_settled(rig: Rig, asked: list[Asked]) -> None:
    rows = dict(rig.query("SELECT rid, state FROM ledger"))
    done = [each for each in asked if each.finished and each.status == 200]
    assert done
    assert [each for each in done if rows[each.rid] != "settled"] == []


def refuses_a_dead_owner(rig: Rig) -> list[str]:
    """Lock files that are left of processes that have ended."""
    return [file.name for file in (rig.folder / "db.sqlite-owners").glob("[!.]*")]


def command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return ""


def no_children() -> bool:
    """None is left of the processes that a test has started; but its backend."""
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    with suppress(ChildProcessError):
        for pid in children:
            if not command(pid):
                os.waitpid(int(pid), os.WNOHANG)
    return not any("llmproxy" in command(pid) for pid in children)


# -- systemd -------------------------------------------------------------------------------------


class Systemd:
    """Has the port, starts the service on it, and hears what is said: sd_listen_fds(3),
    sd_notify(3)."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.port = self.listener.getsockname()[1]
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(folder / "notify"))
        self._notify.setblocking(False)
        number = self.listener.fileno()
        script = f'export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=s; exec "$@" 3<&{number}'
        self.rig = Rig(
            folder,
            clients=CLIENTS,
            command=COMMAND,
            around=["bash", "-c", script, "bash"],
            workers=workers,
            env={"NOTIFY_SOCKET": str(folder / "notify")},
            pass_fds=[number],
        )
        self.rig.port = self.port

    def configure(self, url: str) -> None:
        self.rig.configure(url, drain_s=20)
        text = re.sub(r"(?m)^(host|port) = .*\n", "", self.rig.config.read_text())
        self.rig.config.write_text(f'listen = ["systemd:domain=INET:index=0"]\n{text}')

    def told(self) -> list[str]:
        """What it has been told since the last time."""
        found = []
        with suppress(BlockingIOError):
            while True:
                found.append(self._notify.recv(4096).decode())
        return found

    def close(self) -> None:
        self.listener.close()
        self._notify.close()


@pytest.fixture(params=FEW, ids=str)
def systemd(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Systemd]:
    played = Systemd(tmp_path, request.param)
    yield played
    played.close()


@only_ours
@pytest.mark.timeout(600 if LONG else 90)
def test_restarts_on_a_socket_of_systemd_s_refuse_nobody(systemd: Systemd) -> None:
    restarts = 20 if LONG else 1

    async def story(url: str) -> None:
        systemd.configure(url)
        rig = systemd.rig
        async with serving(rig) as service:
            load = Deploying(rig.port, CLIENTS, plan(ms=30))
            load.start()
            told = []  # the kernel keeps no more than some ten that nobody takes
            for _ in range(restarts):
                await asyncio.sleep(0.3)
                await service.restart()
                told += systemd.told()
            await asyncio.sleep(0.3)
            await load.finish()
            await service.stop()
            told += systemd.told()
            assert told == ["READY=1", "STOPPING=1"] * (restarts + 1)
            verdict = verdict_on(rig, load)
            report("restart, systemd's socket", restarts=restarts, **verdict.figures())

    with systemd.rig.backend() as url:
        asyncio.run(story(url))


@pytest.mark.timeout(90)
def test_systemd_is_told_which_process_serves_on_its_socket(systemd: Systemd) -> None:
    async def story() -> None:
        rig = systemd.rig
        systemd.configure("http://127.0.0.1:9")
        async with serving(rig) as service:
            assert systemd.told() == ["READY=1"]
            for _ in range(2):
                old = await service.hand_over()
                assert await service.end_of(old) == 0
                assert systemd.told() == [f"MAINPID={service.pid}"]
                assert get_status(f"http://127.0.0.1:{rig.port}/v1/models") == 401
            await service.stop()
            assert systemd.told() == ["STOPPING=1"]
            assert connects(rig.port)

    asyncio.run(story())


# -- other ways to start it ----------------------------------------------------------------------


@pytest.mark.timeout(90)
def test_twistd_hands_over_its_pidfile_and_the_file_of_a_unix_socket(tmp_path: Path) -> None:
    twistd = ["-c", "from twisted.scripts.twistd import run; run()", "-n", "--pidfile=p.pid"]
    rig = Rig(tmp_path, clients=0, command=[*twistd, "llmproxy"])
    pidfile, path = tmp_path / "p.pid", tmp_path / "http.sock"
    rig.configure(models=())
    text = re.sub(r"(?m)^(host|port) = .*\n", "", rig.config.read_text())
    good = f'listen = ["unix:{path}:mode=600"]\n{text}'
    rig.config.write_text(good)

    def answers() -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            return b" 404 " in client.recv(100)

    async def story() -> None:
        async with serving(rig) as service:
            rig.config.write_text(f"colour = 1\n{good}")
            await service.fails_to_hand_over(1)
            assert int(pidfile.read_text()) == service.pid
            rig.config.write_text(good)
            for _ in range(2):
                old = await service.hand_over()
                assert await service.end_of(old) == 0
                assert int(pidfile.read_text()) == service.pid
                assert os.readlink(f"{path}.lock") == str(service.pid)
                assert path.stat().st_mode & 0o777 == 0o600
                assert answers()
            await service.stop()

    asyncio.run(story())
    assert {each.name for each in tmp_path.iterdir()} & {"p.pid", "p.pid.old", path.name} == set()
    assert not os.path.lexists(f"{path}.lock")
    assert "Traceback" not in rig.output()
