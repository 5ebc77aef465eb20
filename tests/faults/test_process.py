"""The process as an operator meets it: stop, stop now, reload, and a start that can't be.

With one process and with workers alike, but for what is found wrong before that matters.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from figures import LONG, report
from load import Asked, Load, Plan, until
from rig import Rig, ended

COMMAND = ["-m", "llmproxy"]
CLIENTS = 20
RELOADS = 2000 if LONG else 200


@pytest.fixture(params=[1, 2], ids=["one process", "workers"])
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Rig:
    return Rig(tmp_path, clients=CLIENTS, command=COMMAND, workers=request.param)


@pytest.fixture
def alone(tmp_path: Path) -> Rig:
    return Rig(tmp_path, clients=CLIENTS, command=COMMAND)


def plan(*, tokens: int = 24, ms: int = 120, models: tuple[str, ...] = ("m",)) -> Plan:
    return Plan(random.Random(0), models=models, max_tokens=tokens, max_ms=ms)


@asynccontextmanager
async def loaded(rig: Rig, plan: Plan) -> AsyncIterator[tuple[subprocess.Popen[bytes], Load]]:
    """A proxy with clients at work."""
    async with rig.running() as process:
        load = Load(rig.port, CLIENTS, plan)
        load.start()
        try:
            await until(lambda: any(each.rid for each in load.asked), 10, "a first answer")
            yield process, load
        finally:
            await load.stop()


def refuses(port: int) -> bool:
    """Nobody accepts a connection."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def states(rig: Rig) -> Counter[str]:
    return Counter(state for (state,) in rig.query("SELECT state FROM ledger"))


def assert_finished_is_settled(rig: Rig, asked: list[Asked]) -> None:
    rows = dict(rig.query("SELECT rid, state FROM ledger"))
    for each in asked:
        if each.finished and each.status == 200:
            assert rows[each.rid] == "settled", each


def sent_rows(rig: Rig) -> int:
    """How many rows there are, less those whose request was not sent any more."""
    return len(
        rig.query(
            "SELECT rid FROM ledger WHERE state <> 'settled'"
            " OR coalesce(prompt, completion, embedding) IS NOT NULL"
        )
    )


# -- stop ----------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
def test_sigterm_lets_streams_end_then_cuts_the_rest_and_settles_every_row(rig: Rig) -> None:
    async def stop(url: str) -> None:
        rig.configure(url, drain_s=1.0)
        async with loaded(rig, plan(tokens=40, ms=100)) as (process, load):
            await asyncio.sleep(0.5)
            process.terminate()
            refused = await until(lambda: refuses(rig.port), 0.5, "to refuse connections")
            code, took = await asyncio.to_thread(ended, process, 10)
            took += refused
            await load.wait()
            assert code == 0, rig.output()[-3000:]
            assert 0.8 < took < 2.5
            cut = [each for each in load.asked if not each.finished]
            assert len(load.asked) > len(cut) > 0
            # At most one request of each client came too late, and its connection was closed.
            assert sum(each.status == 503 for each in load.asked) <= CLIENTS
            assert_finished_is_settled(rig, load.asked)
            figures = states(rig)
            assert not figures["open"]
            assert not figures["disputed"]
            assert sent_rows(rig) == rig.backend_log.read_text().count("asked ")
            report(
                "SIGTERM",
                requests=len(load.asked),
                cut=len(cut),
                refused_after_s=refused,
                ended_after_s=took,
                **figures,
            )

    with rig.backend() as url:
        asyncio.run(stop(url))
    assert "Traceback" not in rig.output()
    assert "stopped" in rig.output()


@pytest.mark.timeout(60)
def test_a_second_sigterm_cuts_at_once(rig: Rig) -> None:
    async def stop(url: str) -> None:
        rig.configure(url, drain_s=60)
        async with loaded(rig, plan(tokens=40, ms=100)) as (process, load):
            await asyncio.sleep(0.3)
            process.terminate()
            await until(lambda: refuses(rig.port), 0.5, "to refuse connections")
            assert process.poll() is None
            process.terminate()
            code, took = await asyncio.to_thread(ended, process, 10)
            await load.wait()
            assert code == 0, rig.output()[-3000:]
            assert took < 1
            assert any(not each.finished for each in load.asked)
            assert_finished_is_settled(rig, load.asked)
            assert not rig.open_rows()
            report("SIGTERM twice", ended_after_s=took, **states(rig))

    with rig.backend() as url:
        asyncio.run(stop(url))
    assert "Traceback" not in rig.output()


@pytest.mark.timeout(60)
def test_an_idle_proxy_stops_at_once_on_sigterm_and_on_sigint(rig: Rig) -> None:
    async def stop(number: int) -> None:
        async with rig.running() as process:
            process.send_signal(number)
            code, took = await asyncio.to_thread(ended, process, 10)
            assert (code, took < 1) == (0, True)

    rig.configure(drain_s=60, models=())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.run(stop(number))


# -- reload --------------------------------------------------------------------------------------


class Reloading:
    """Sends SIGHUP, and waits for the one line that answers it."""

    def __init__(self, rig: Rig, process: subprocess.Popen[bytes]) -> None:
        self._rig, self._process = rig, process
        self.slowest_s = 0.0

    def counted(self) -> tuple[int, int]:
        """How often it was reloaded, and how often not."""
        text = self._rig.output()
        return text.count(" reloaded; "), text.count("not reloaded: ")

    async def hang_up(self, *, taken: bool) -> None:
        good, bad = self.counted()
        self._process.send_signal(signal.SIGHUP)
        took = await until(lambda: self.counted() != (good, bad), 5, "a reload")
        assert self.counted() == ((good + 1, bad) if taken else (good, bad + 1))
        self.slowest_s = max(self.slowest_s, took)


@pytest.mark.timeout(600 if LONG else 90)
def test_no_request_notices_that_the_configuration_is_reloaded_and_often_is_broken(
    rig: Rig,
) -> None:
    async def reload(url: str) -> None:
        rig.configure(url)
        good = rig.config.read_text()
        other = rig.configuration(url, url, models=("m", "other"))
        broken = good.replace("[backends.m]", "[backends.m")
        half = good[: good.index("[backends.m]") + 20]
        unknown = good + "colour = 1\n"
        writes: list[tuple[Callable[[], object], bool]] = [
            (lambda: rig.config.write_text(other), True),
            (lambda: rig.config.write_text(broken), False),
            (lambda: rig.config.write_text(half), False),
            (lambda: rig.config.write_text(unknown), False),
            (lambda: rig.config.write_bytes(b"\xff\xfe"), False),
            (lambda: rig.config.write_text(""), False),
            (lambda: rig.config.unlink(), False),
            (lambda: rig.config.write_text(good), True),
        ]
        async with loaded(rig, plan(tokens=8, ms=10)) as (process, load):
            reloading = Reloading(rig, process)
            for number in range(RELOADS):
                write, taken = writes[number % len(writes)]
                write()
                await reloading.hang_up(taken=taken)
            rig.config.write_text(good)
            answered = [each for each in load.asked if each.finished]
            assert {each.status for each in answered} == {200}
            assert len(load.asked) - len(answered) <= CLIENTS  # those at work now
            assert process.poll() is None
            reloads, refusals = reloading.counted()
            slowest_s = reloading.slowest_s
            report(
                "SIGHUP",
                reloads=reloads,
                refusals=refusals,
                requests=len(answered),
                failed=0,
                slowest_s=slowest_s,
            )

    with rig.backend() as url:
        asyncio.run(reload(url))
    assert "Traceback" not in rig.output()


@pytest.mark.timeout(60)
def test_a_backend_that_a_reload_adds_serves_and_one_that_it_drops_ends_its_streams(
    rig: Rig,
) -> None:
    async def one(model: str, tokens: int, ms: int) -> Asked:
        load = Load(rig.port, 1, plan(tokens=tokens, ms=ms, models=(model,)))
        load.start()
        await until(lambda: bool(load.asked) and load.asked[0].finished, 10, "an answer")
        await load.stop()
        return load.asked[0]

    async def reload(url: str) -> None:
        rig.configure(url, models=("old",))
        async with rig.running() as process:
            reloading = Reloading(rig, process)
            assert (await one("new", 1, 5)).status == 404
            running = asyncio.create_task(one("old", 24, 60))
            log = rig.backend_log
            await until(lambda: log.exists() and "asked" in log.read_text(), 5, "the request")
            rig.configure(url, models=("new",))
            await reloading.hang_up(taken=True)
            assert (await one("new", 1, 5)).status == 200
            assert (await one("old", 1, 5)).status == 404
            assert (await running).status == 200
            assert not rig.open_rows()

    with rig.backend() as url:
        asyncio.run(reload(url))
    assert "Traceback" not in rig.output()


# -- a start that can't be -----------------------------------------------------------------------


def failed_start(rig: Rig) -> str:
    """What a proxy says that can't start: one line about it, and exit code 1."""
    process = rig.start()
    try:
        code, _ = ended(process, 20)
    finally:
        process.kill()
        process.wait()
    output = rig.output()
    assert code == 1, output
    assert "Traceback" not in output
    said = [line for line in output.splitlines() if "llmproxy: " in line or "can't start" in line]
    assert len(said) == 1, output
    return said[0]


def test_a_port_that_is_taken_ends_the_start_with_one_line(rig: Rig) -> None:
    rig.configure(models=())
    with socket.create_server(("127.0.0.1", rig.port)):
        assert f"can't listen on tcp:{rig.port}" in failed_start(rig)


def test_an_admin_port_that_is_taken_ends_the_start_with_one_line(rig: Rig) -> None:
    rig.configure(models=())
    with socket.create_server(("127.0.0.1", rig.admin_port)):
        assert f"can't listen on tcp:{rig.admin_port}" in failed_start(rig)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "can't be read"),
        (lambda path: (path.unlink(), path.mkdir()), "can't be read"),
        (lambda path: path.write_bytes(b"\xff"), "UTF-8"),
        (lambda path: path.write_text("port = "), "not valid TOML"),
        (lambda path: path.write_text("colour = 1"), "colour"),
        (lambda path: path.write_text('port = "eighty"'), "port"),
        (lambda path: path.write_text('[backends.m]\nurl = "http://h"\ndevise = "g"'), "devise"),
    ],
    ids=["missing", "a folder", "not text", "not TOML", "unknown key", "wrong type", "in a table"],
)
def test_a_configuration_that_can_not_be_used_ends_the_start_with_one_line(
    alone: Rig, spoil: Callable[[Path], object], said: str
) -> None:
    alone.configure(models=())
    spoil(alone.config)
    assert said in failed_start(alone)


def no_database(path: Path) -> None:
    path.write_bytes(b"this is no database, but it is long enough to be looked at. " * 20)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere/db.sqlite")


def not_for_us(path: Path) -> None:
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("nothing is forbidden to this user")


@pytest.mark.parametrize("spoil", [no_database, a_folder, a_dangling_link, not_for_us])
def test_a_database_that_can_not_be_used_ends_the_start_with_one_line(
    alone: Rig, spoil: Callable[[Path], None]
) -> None:
    alone.configure(models=())
    spoil(alone.database)
    assert "db.sqlite" in failed_start(alone)


def test_what_is_wrong_is_told_once_however_many_workers_there_are(rig: Rig) -> None:
    rig.configure(models=())
    rig.config.write_text(rig.config.read_text() + "[backends.m]\n")
    assert "backends.m.url: missing" in failed_start(rig)
    rig.configure(models=())
    no_database(rig.database)
    rig._output.unlink()
    assert "db.sqlite" in failed_start(rig)
