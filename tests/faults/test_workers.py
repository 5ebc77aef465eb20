"""Several worker processes behind one port: one of them dies, all stop, and the bills are right.

What holds for one process and for many alike is in `test_process.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import pytest
from certificates import make_certificate
from figures import LONG, report
from load import Load, Plan, until
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families
from rig import Rig, ended
from test_kill import Experiment, Row, figures_of

COMMAND = ["-m", "llmproxy"]
ROOT = Path(__file__).parent.parent.parent
WORKERS = 2
RESTARTS = "llmproxy_worker_restarts_total[]"
#: Fewer than where the whole proxy is killed, as it takes as long again.
CLIENTS = 60
KILLS = 200 if LONG else 3
#: How soon a worker that was killed has its successor, and its requests are closed.
SUCCESSOR_S = 5.0


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """The workers of a supervisor."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


def alive(pids: Iterable[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def admin(rig: Rig, path: str) -> str:
    """A page of the admin site."""
    with urllib.request.urlopen(f"http://127.0.0.1:{rig.admin_port}{path}", timeout=5) as answer:
        return str(answer.read().decode())


def metrics(rig: Rig) -> dict[str, float]:
    """All samples that are shown."""
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(admin(rig, "/metrics"))
        for sample in family.samples
    }


def summed(rig: Rig, name: str) -> float:
    return sum(value for key, value in metrics(rig).items() if key.partition("[")[0] == name)


def serving(rig: Rig) -> str:
    return str(json.loads(admin(rig, "/readyz"))["checks"]["workers"])


def answered_by(rig: Rig, *words: str, since: int = 0) -> set[str]:
    """The workers in whose lines these words stand; without the output's first characters."""
    lines = [x for x in rig.output()[since:].splitlines() if all(word in x for word in words)]
    return {found[1] for x in lines if (found := re.search(r" llmproxy\.\w+\[(\d)\]  ", x))}


async def replace_all(rig: Rig, process: subprocess.Popen[bytes]) -> None:
    """Kill all workers, and wait until their successors serve."""
    restarts = metrics(rig)[RESTARTS] + WORKERS
    for pid in children(process):
        os.kill(pid, signal.SIGKILL)
    await until(lambda: metrics(rig)[RESTARTS] == restarts, 5, "the end of all")
    await until(lambda: serving(rig) == "2 of 2", 10, "successors")


def plan(models: tuple[str, ...] = ("m",), *, tokens: int = 6, ms: int = 20) -> Plan:
    return Plan(random.Random(0), models=models, max_tokens=tokens, max_ms=ms)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path, clients=CLIENTS, command=COMMAND, workers=WORKERS)


# -- one port ------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
def test_all_workers_serve_on_one_port_and_their_metrics_add_up(rig: Rig) -> None:
    async def story(url: str) -> None:
        rig.configure(url)
        async with rig.running():
            load = Load(rig.port, 20, plan())
            load.start()
            await until(lambda: answered_by(rig, "complete") == {"0", "1"}, 20, "both")
            await load.stop()
            await until(lambda: not rig.open_rows(), 10, "the last settlement")
            rows = len(rig.query("SELECT rid FROM ledger"))
            name = "llmproxy_request_duration_seconds_count"
            await until(lambda: summed(rig, name) >= rows, 5, "the last report")
            [(tokens,)] = rig.query(
                "SELECT sum(quantity) FROM event_oneoff WHERE product NOT LIKE '%transcription'"
            )
            assert summed(rig, "llmproxy_tokens_total") == tokens
            assert summed(rig, "llmproxy_active_requests") == 0
            shown = metrics(rig)
            assert shown["llmproxy_ledger_rows_total[('state', 'open')]"] == rows
            assert shown["llmproxy_workers[]"] == WORKERS
            assert shown["llmproxy_loop_lag_seconds_count[]"] > 0
            assert shown[f"llmproxy_backend_up[('model', 'm'), ('server', '{url}')]"] == 1
            assert serving(rig) == "2 of 2"
            # Each backend is asked by one process for all: at start, and not again so soon.
            assert rig.output().count(f"backend m at {url} is up") == 1

    with rig.backend() as url:
        asyncio.run(story(url))
    assert "Traceback" not in rig.output()


# -- a worker dies -------------------------------------------------------------------------------


class Shifts(Load):
    """Each generation has clients of its own: a worker that is busy may read a request when its
    client has left, and the next generation is at work."""

    def start(self) -> None:
        self.generation += 1
        first = self.generation * CLIENTS
        self._tasks = [asyncio.create_task(self._client(first + n)) for n in range(CLIENTS)]


class WorkerKills(Experiment):
    """One worker after the other is killed under load; the supervisor and the others go on."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, COMMAND, seed, clients=CLIENTS * KILLS, workers=WORKERS)
        # Short streams: after each kill all that were left have to end.
        self.load = Shifts(self.rig.port, CLIENTS, Plan(random.Random(seed + 1), max_ms=40))
        self.went_on = 0
        self.slowest_s = 0.0
        self.fell: list[str] = []

    async def _kill_and_start(self, kills: int) -> None:
        async with self.rig.running() as process:
            for number in range(kills):
                self.load.start()
                await asyncio.sleep(self.random.uniform(0.4, 1.2))
                await self._kill_one(process, number)
                await self.load.stop()
                await until(lambda: not self.rig.open_rows(), 10, "the last settlement")
            process.terminate()
            assert (await asyncio.to_thread(ended, process, 10))[0] == 0

    def _generation(self, row: Row) -> int:
        return int(row.key) // CLIENTS

    async def _kill_one(self, process: subprocess.Popen[bytes], number: int) -> None:
        rig, before = self.rig, metrics(self.rig)
        finished = sum(each.finished for each in self.load.asked)
        victim = self.random.choice(children(process))
        dead = self._owners()
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        while before[RESTARTS] == number or serving(rig) != "2 of 2":
            assert time.monotonic() - began < SUCCESSOR_S
            before = self._compare(before)
            await asyncio.sleep(0.05)
        await until(lambda: not self._open_rows_of_the_dead(dead), SUCCESSOR_S, "a recovery")
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        self.went_on += sum(each.finished for each in self.load.asked) - finished
        assert self._compare(before)[RESTARTS] == number + 1

    def _owners(self) -> set[str]:
        folder = self.rig.folder / "db.sqlite-owners"
        return {file.name for file in folder.iterdir() if not file.name.startswith(".")}

    def _open_rows_of_the_dead(self, before: set[str]) -> int:
        gone = before - self._owners()
        assert len(gone) <= 1
        if not gone:
            return 1  # nobody has looked yet
        [owner] = gone
        statement = f"SELECT count(*) FROM ledger WHERE state = 'open' AND owner = '{owner}'"
        return int(self.rig.query(statement)[0][0])

    def _compare(self, before: dict[str, float]) -> dict[str, float]:
        now = metrics(self.rig)
        counted = ("_total[", "_count[", "_bucket[", "_sum[")
        self.fell += [
            key
            for key, value in before.items()
            if any(kind in key for kind in counted) and now.get(key, 0.0) < value
        ]
        return now


@pytest.mark.timeout(3600 if LONG else 120)
def test_a_worker_that_is_killed_is_replaced_and_no_bill_is_lost_or_doubled(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    experiment = WorkerKills(tmp_path, seed)
    findings = experiment.run(KILLS)
    report(
        "worker kill",
        seed=seed,
        kills=KILLS,
        went_on=experiment.went_on,
        slowest_successor_s=experiment.slowest_s,
        **figures_of(findings),
    )
    output = experiment.rig.output()
    assert findings.wrong == {}
    assert experiment.fell == []
    assert experiment.went_on > CLIENTS  # who was with the other worker
    assert findings.states["orphan"] + findings.states["estimated"]
    assert len(re.findall(r"worker \d ended: signal 9 \(SIGKILL\); started again", output)) == KILLS
    assert "Traceback" not in output


# -- reload --------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
def test_a_reload_reaches_all_workers_and_those_that_are_started_later(rig: Rig) -> None:
    async def served_by_both(model: str) -> None:
        words, since = (f"model={model} ", "status=200"), len(rig.output())
        load = Load(rig.port, 16, plan((model,)))
        load.start()
        await until(lambda: answered_by(rig, *words, since=since) == {"0", "1"}, 20, "both")
        await load.stop()

    async def story(url: str) -> None:
        rig.configure(url)
        async with rig.running() as process:
            rig.config.write_text(rig.configuration(url, url, models=("m", "new")))
            process.send_signal(signal.SIGHUP)
            await until(lambda: rig.output().count(" reloaded; ") == 1, 5, "a reload")
            await served_by_both("new")
            # Whatever the file says meanwhile, a worker gets what was found good.
            rig.config.write_text("broken = ")
            process.send_signal(signal.SIGHUP)
            await until(lambda: rig.output().count("not reloaded: ") == 1, 5, "a refusal")
            await replace_all(rig, process)
            await served_by_both("new")

    with rig.backend() as url:
        asyncio.run(story(url))
    assert "Traceback" not in rig.output()


# -- stop ----------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
def test_a_worker_that_gets_sigterm_drains_and_is_replaced(rig: Rig) -> None:
    async def story(url: str) -> None:
        rig.configure(url, drain_s=10)
        async with rig.running() as process:
            load = Load(rig.port, 20, plan(tokens=8, ms=30))
            load.start()
            await until(lambda: answered_by(rig, "complete") == {"0", "1"}, 20, "both")
            [victim, _] = children(process)
            os.kill(victim, signal.SIGTERM)
            await until(lambda: victim not in children(process), 10, "its end")
            await until(lambda: serving(rig) == "2 of 2", 10, "a successor")
            await load.stop()
            await until(lambda: not rig.open_rows(), 10, "the last settlement")
            assert not rig.query("SELECT rid FROM ledger WHERE outcome IS NULL")
            assert "ended: exit code 0; started again" in rig.output()

    with rig.backend() as url:
        asyncio.run(story(url))
    assert "Traceback" not in rig.output()


@pytest.mark.timeout(60)
def test_what_a_terminal_sends_to_all_is_the_supervisor_s_to_answer(rig: Rig) -> None:
    """Ctrl-C and a terminal that is closed reach all processes of a group."""

    async def story(url: str) -> None:
        rig.configure(url, drain_s=10)
        async with rig.running() as process:
            load = Load(rig.port, 20, plan(tokens=8, ms=60))
            load.start()
            await until(lambda: answered_by(rig, "complete") == {"0", "1"}, 20, "both")
            for pid in children(process):
                os.kill(pid, signal.SIGHUP)
                os.kill(pid, signal.SIGINT)
            process.send_signal(signal.SIGINT)
            code, _ = await asyncio.to_thread(ended, process, 15)
            await load.wait()
            assert code == 0
            assert not rig.open_rows()
            assert not rig.query("SELECT rid FROM ledger WHERE outcome IS NULL")

    with rig.backend() as url:
        asyncio.run(story(url))
    assert "Traceback" not in rig.output()


@pytest.mark.timeout(60)
def test_workers_whose_supervisor_is_killed_end_their_streams_and_leave(rig: Rig) -> None:
    async def story(url: str) -> None:
        rig.configure(url, drain_s=10)
        async with rig.running() as process:
            load = Load(rig.port, 20, plan(tokens=8, ms=40))
            load.start()
            await until(lambda: answered_by(rig, "complete") == {"0", "1"}, 20, "both")
            workers = children(process)
            process.kill()
            await until(lambda: not alive(workers), 10, "the workers' end")
            await load.wait()
            with socket.create_server(("127.0.0.1", rig.port)):
                pass  # the port is free again
            assert not rig.open_rows()
            assert {state for (state,) in rig.query("SELECT DISTINCT outcome FROM ledger")} <= {
                *("complete", "refused")
            }

    with rig.backend() as url:
        asyncio.run(story(url))
    assert "Traceback" not in rig.output()


# -- a start that can't be -----------------------------------------------------------------------


def test_a_worker_that_can_not_start_makes_the_start_fail_with_its_reason(rig: Rig) -> None:
    rig.configure(models=())
    (rig.folder / "db.sqlite-owners").write_text("where workers have their locks")
    process = rig.start()
    try:
        code, _ = ended(process, 20)
    finally:
        process.kill()
        process.wait()
    output = rig.output()
    assert code == 1, output
    assert output.count("can't start: ") == 1
    assert f"can't start: database {rig.database}: File exists" in output
    assert "Traceback" not in output


# -- other ways to start it ----------------------------------------------------------------------


def test_twistd_starts_workers_and_all_log_into_its_file(tmp_path: Path) -> None:
    command = ["-c", "from twisted.scripts.twistd import run; run()"]
    options = ["--nodaemon", "--pidfile=", "--logfile=twistd.log", "llmproxy"]
    rig = Rig(tmp_path, clients=0, command=[*command, *options], workers=WORKERS)
    rig.configure(models=())
    asyncio.run(start_and_stop(rig))
    lines = (tmp_path / "twistd.log").read_text().splitlines()
    assert sum(line.endswith("]  stopped") for line in lines) == WORKERS
    assert lines[-1].endswith("llmproxy.supervisor  stopped")
    assert all(re.match(r"\d{4}-\S+Z [A-Z]+ \S+  ", line) for line in lines)


@pytest.mark.parametrize("option", ["--syslog", "--logger=twisted.logger.globalLogPublisher"])
def test_a_log_that_workers_can_not_write_to_is_refused(rig: Rig, option: str) -> None:
    rig.configure(models=())
    words = ["-c", "from twisted.scripts.twistd import run; run()", "-n", "--pidfile=", option]
    command = [sys.executable, *words, "llmproxy", "-c", str(rig.config)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=rig.folder, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "llmproxy: workers: more than 1 need the log on stdout or in a --logfile\n"
    )


def test_lines_in_json_tell_whose_they_are(rig: Rig) -> None:
    rig.configure(models=())
    rig.config.write_text('log_format = "json"\n' + rig.config.read_text())
    asyncio.run(start_and_stop(rig))
    stops = [json.loads(line) for line in rig.output().splitlines() if '"stopped"' in line]
    said = sorted((line["namespace"], line.get("worker", "")) for line in stops[:-1])
    assert said == [("llmproxy.proxy", 0), ("llmproxy.proxy", 1)]
    assert "worker" not in stops[-1]


async def start_and_stop(rig: Rig) -> None:
    async with rig.running() as process:
        process.terminate()
        code, _ = await asyncio.to_thread(ended, process, 10)
        assert code == 0, rig.output()


def test_workers_serve_on_a_unix_socket_and_with_tls(rig: Rig) -> None:
    file, path, port = make_certificate(rig.folder), rig.folder / "http.sock", free_port()
    rig.configure(models=())
    listen = f'["unix:{path}:mode=600", "ssl:{port}:privateKey={file}:certKey={file}"]'
    text = re.sub(r"(?m)^(host|port) = .*\n", "", rig.config.read_text())
    rig.config.write_text(f"listen = {listen}\n{text}")
    request = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"

    async def refused(link: asyncio.StreamReader, out: asyncio.StreamWriter) -> bool:
        out.write(request)
        line = await link.readline()
        out.transport.abort()
        return b" 404 " in line

    async def story() -> None:
        trusting = ssl.create_default_context(cafile=file)
        async with rig.running() as process:
            for _ in range(2):
                assert await refused(*await asyncio.open_unix_connection(path))
                tls = await asyncio.open_connection("localhost", port, ssl=trusting)
                assert await refused(*tls)
                await replace_all(rig, process)
            assert path.stat().st_mode & 0o777 == 0o600
            process.terminate()
            assert (await asyncio.to_thread(ended, process, 10))[0] == 0

    asyncio.run(story())
    assert not path.exists()
    assert "Traceback" not in rig.output()


# -- several servers -----------------------------------------------------------------------------


@pytest.mark.timeout(60)
def test_workers_hear_which_servers_are_down(rig: Rig) -> None:
    async def work(requests: int) -> None:
        load = Load(rig.port, 20, plan())
        load.start()
        await until(lambda: len(load.asked) > requests, 20, "requests")
        await load.stop()
        await until(lambda: not rig.open_rows(), 10, "the last settlement")

    async def story(url: str) -> None:
        gone = f"http://127.0.0.1:{free_port()}"
        text = rig.configuration(url).replace(f'url = "{url}"', f'urls = ["{gone}", "{url}"]')
        rig.config.write_text(
            text.replace('device = "gpu"', 'device = "gpu"\ncircuit_failures = 99')
        )
        async with rig.running() as process:
            await until(lambda: f"{gone} is down" in rig.output(), 10, "a health check")
            await asyncio.sleep(0.2)
            await work(100)
            await replace_all(rig, process)  # the successors must be told, too
            await work(100)
            servers = rig.query("SELECT server, count(*) > 100 FROM attempt GROUP BY 1")
            assert servers == [(url, 1)]

    with rig.backend() as url:
        asyncio.run(story(url))
