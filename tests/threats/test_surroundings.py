"""What is around the process fails: the clock leaps, the log's reader stands still, names do not
resolve, the processor is gone for a while. Clients notice nothing that they need not.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import resource
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from leaping import BACK, FORWARD
from load import Load, until
from rig import Rig, ended
from server_process import get_status
from speech import CHAT
from tally import LONG
from test_storage_faults import CLIENTS, Trial

from llmproxy.storage.sqlite import connect

#: How long the process gets no processor.
STILL_S = 10.0 if LONG else 1.2
MIB = 2**20
HERE = Path(__file__).parent
LEAPING, RESOLVING = HERE / "leaping.py", HERE / "resolving.py"


def page(rig: Rig, path: str) -> str:
    """A page of the admin site."""
    with urllib.request.urlopen(f"http://127.0.0.1:{rig.admin_port}{path}", timeout=5) as answer:
        return str(answer.read().decode())


def beats(rig: Rig) -> tuple[int, dict[float, int]]:
    """How often the proxy's heart has beaten, and how often it was at most so late (seconds)."""
    lines = page(rig, "/metrics").splitlines()
    prefix = "llmproxy_loop_lag_seconds_bucket{le="
    values = [line.removeprefix(prefix).split() for line in lines if line.startswith(prefix)]
    counts = {float(bound.strip('"}')): int(float(number)) for bound, number in values}
    return counts[float("inf")], counts


@pytest.mark.timeout(60)
def test_a_clock_that_leaps_by_a_day_changes_no_answer_and_no_bill(tmp_path: Path) -> None:
    trial = Trial(tmp_path, command=[str(LEAPING)])

    def finished() -> int:
        return sum(each.finished for each in trial.load.asked)

    async def goes_on() -> None:
        before, (beaten, _) = finished(), beats(trial.rig)
        await until(lambda: finished() > before + 5 * CLIENTS, 10, "answers")
        await until(lambda: beats(trial.rig)[0] > beaten + 5, 2, "heartbeats")

    async def story() -> None:
        async with trial.running() as process:
            for leap in (FORWARD, BACK, BACK):
                process.send_signal(leap)
                await goes_on()
            await trial.settled()

    asyncio.run(story())
    trial.tell("the clock leaps")
    unfinished = [each for each in trial.load.asked if not each.finished]
    assert len(unfinished) <= CLIENTS, unfinished  # those that were cut at the test's end
    assert {each.status for each in trial.load.asked} <= {200, None}
    days = {day for (day,) in trial.rig.query("SELECT DISTINCT substr(opened, 1, 10) FROM ledger")}
    assert len(days) == 3  # it did leap


# -- names -----------------------------------------------------------------------------------------


async def ask(rig: Rig, model: str, more: str = "") -> tuple[int, float]:
    """The status of an answer to a small request, and how long it took."""
    began = time.monotonic()
    link, out = await asyncio.open_connection("127.0.0.1", rig.port)
    body = CHAT.request(model, f"{model}-{began} 3 2 1", stream=False)
    body = body[:-1] + f',"user":"{more}"}}'.encode()
    lines = [f"POST {CHAT.path} HTTP/1.1", "Host: p", "Content-Type: application/json"]
    lines += [f"Authorization: Bearer {Load.key(0)}", f"Content-Length: {len(body)}", "", ""]
    out.write("\r\n".join(lines).encode() + body)
    status = int((await link.readuntil(b"\r\n")).split()[1])
    out.transport.abort()
    return status, time.monotonic() - began


@pytest.mark.timeout(60)
def test_names_that_do_not_resolve_hold_up_nobody_else(tmp_path: Path) -> None:
    rig = Rig(tmp_path, clients=1, command=[str(RESOLVING)])
    names = {"slow": "slow.test", "nowhere": "nowhere.test", "two": "two.test", "m": "127.0.0.1"}

    async def story(port: str) -> None:
        urls = [f"http://{name}:{port}" for name in names.values()]
        text = rig.configuration(*urls, models=list(names))
        rig.config.write_text(f"timeout_connect = 2.0\n{text}")
        async with rig.running() as process:
            # More than a pool of threads has.
            slow = [asyncio.create_task(ask(rig, "slow")) for _ in range(30)]
            await asyncio.sleep(0.2)
            for model, status in (("m", 200), ("nowhere", 502), ("two", 200), ("m", 200)):
                answered, took = await ask(rig, model)
                assert (answered, took < 1.5) == (status, True), (model, answered, took)
            for answered, took in await asyncio.gather(*slow):
                assert (answered, took < 5) == (502, True), (answered, took)
            every, late = beats(rig)
            assert late[1.0] == every
            process.terminate()
            code, took = await asyncio.to_thread(ended, process, 20)
            assert (code, took < 3) == (0, True), (code, took)

    with rig.backend() as url:
        asyncio.run(story(url.rpartition(":")[2]))
    assert "Traceback" not in rig.output()
    assert not rig.open_rows()


# -- the log ---------------------------------------------------------------------------------------


#: What a shell does with the output of the process that it becomes.
OUTPUTS = {"full": ">/dev/full 2>&1", "closed": ">&- 2>&-", "unread": ">log.pipe 2>&1"}


@contextlib.contextmanager
def unread_pipe(folder: Path) -> Iterator[None]:
    """A pipe that takes a few lines, and then nobody reads."""
    os.mkfifo(folder / "log.pipe")
    end = os.open(folder / "log.pipe", os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 4096)
    try:
        yield
    finally:
        os.close(end)


@pytest.mark.timeout(60)
def test_a_log_that_takes_nothing_takes_nobody_s_time(tmp_path: Path) -> None:
    async def story(output: str, url: str) -> None:
        folder = tmp_path / output
        folder.mkdir()
        around = ["sh", "-c", f'exec "$@" {OUTPUTS[output]}', "sh"]
        rig = Rig(folder, clients=1, command=["-m", "llmproxy"], around=around)
        rig.configure(url)
        with unread_pipe(folder):
            async with rig.running() as process:
                for _ in range(60):
                    status, took = await ask(rig, "m")
                    assert (status, took < 3) == (200, True)
                every, late = beats(rig)
                assert late[1.0] == every
                process.terminate()
                assert (await asyncio.to_thread(ended, process, 20))[0] == 0
        assert rig.output() == ""
        rows = rig.query("SELECT state, count(*) FROM ledger GROUP BY state")
        assert rows == [("settled", 60)]

    async def all_of_them(url: str) -> None:
        await asyncio.gather(*(story(output, url) for output in OUTPUTS))

    host = Rig(tmp_path, clients=0, command=[])
    with host.backend() as url:
        asyncio.run(all_of_them(url))


# -- the processor ---------------------------------------------------------------------------------


@pytest.mark.timeout(60)
def test_a_process_that_stood_still_goes_on_where_it_was(tmp_path: Path) -> None:
    trial = Trial(tmp_path)

    async def story() -> None:
        async with trial.running() as process:
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(STILL_S)
            process.send_signal(signal.SIGCONT)
            await trial.recovered()
            every, late = beats(trial.rig)
            assert every - late[1.0] >= 1  # it knows of it
            await trial.settled()

    asyncio.run(story())
    trial.tell("stands still")
    assert trial.seconds["recovered_in_s"] < 5
    # An opening may have waited too long by then.
    assert {each.status for each in trial.load.asked} <= {200, 503, None}


# -- the memory and the disk -----------------------------------------------------------------------


@pytest.mark.timeout(60)
def test_a_process_without_memory_for_some_serves_the_others(tmp_path: Path) -> None:
    rig = Rig(tmp_path, clients=1, command=["-m", "llmproxy"])

    async def story(url: str) -> None:
        rig.configure(url)
        async with rig.running() as process:
            assert (await ask(rig, "m"))[0] == 200
            allow_mib(process.pid, 24)
            large = [ask(rig, "m", "x" * 16 * MIB) for _ in range(3)]
            assert {status for status, _ in await asyncio.gather(*large)} <= {200, 500, 503}
            for _ in range(5):
                assert (await ask(rig, "m"))[0] == 200
            process.terminate()
            assert (await asyncio.to_thread(ended, process, 20))[0] == 0

    with rig.backend() as url:
        asyncio.run(story(url))
    assert "MemoryError" in rig.output()
    assert not rig.open_rows()
    assert rig.query("SELECT count(*) FROM event_oneoff")[0][0] >= 2 * 6


def allow_mib(pid: int, more: int) -> None:
    """A process gets so much more memory, and then none."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more * MIB
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))


@pytest.mark.timeout(60)
def test_a_damaged_database_refuses_new_work_and_stops_nobody(tmp_path: Path) -> None:
    rig = Rig(tmp_path, clients=1, command=["-m", "llmproxy"])

    async def story(url: str) -> None:
        rig.configure(url)
        async with rig.running() as process:
            assert (await ask(rig, "m"))[0] == 200
            damage(rig.database)
            began = time.monotonic()
            while (answer := await ask(rig, "m"))[0] != 503:  # what it has read is not read again
                assert time.monotonic() - began < 20, answer
            assert get_status(f"http://127.0.0.1:{rig.admin_port}/healthz") == 200
            assert get_status(f"http://127.0.0.1:{rig.admin_port}/readyz") == 503
            assert process.poll() is None

    with rig.backend() as url:
        asyncio.run(story(url))
    assert "Traceback" not in rig.output()
    assert "malformed" in rig.output()


def damage(database: Path) -> None:
    """Nothing is left of its pages but the first one."""
    connection = connect(database)
    connection.execute("PRAGMA user_version = 77")  # whoever has pages in memory reads them again
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    with database.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
