"""Taking turns: one commit at a time among processes, and nobody waits for the dead."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import pytest_twisted
from backend import ScriptedBackend, json_answer
from proxy import reactor, running_proxy
from twisted.internet.task import deferLater

from llmproxy.storage.owners import Owners
from llmproxy.storage.sqlite import prepare
from llmproxy.storage.turnstile import Turnstile

#: Has its turn, says so, and keeps it until its stdin ends.
HOLDER = """
import sys
from pathlib import Path
from llmproxy.storage.turnstile import Turnstile

turnstile = Turnstile(Path(sys.argv[1]))
turnstile.open()
with turnstile:
    print("mine", flush=True)
    sys.stdin.read()
"""

#: Opens and settles rows in some loops at once for a time; then says how many.
WRITER = Path(__file__).with_name("ledger_writer.py")
PROCESSES = 3


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has its turn."""
    running = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "mine\n"
            yield running
        finally:
            running.kill()


@contextmanager
def writer(database: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A process that is about to write; it begins when its stdin ends."""
    running = subprocess.Popen(
        [sys.executable, WRITER, database, str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "ready\n"
            yield running
        finally:
            running.kill()


@pytest.fixture
def turnstile(tmp_path: Path) -> Iterator[Turnstile]:
    turnstile = Turnstile(tmp_path / ".turnstile")
    turnstile.open()
    yield turnstile
    turnstile.close()


class Passing:
    """A thread that waits for its turn, has it, and gives it back."""

    def __init__(self, turnstile: Turnstile) -> None:
        self._turnstile = turnstile
        self.passed = threading.Event()
        self._thread = threading.Thread(target=self._pass)
        self._thread.start()

    def _pass(self) -> None:
        with self._turnstile:
            self.passed.set()

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


def test_one_s_turn_comes_when_the_other_s_is_over(tmp_path: Path, turnstile: Turnstile) -> None:
    other = Turnstile(tmp_path / ".turnstile")
    other.open()
    with other:
        passing = Passing(turnstile)
        assert not passing.passed.wait(0.1)
    passing.join()
    with other:  # and it was given back
        pass
    other.close()


def test_a_turn_ends_with_an_exception(tmp_path: Path, turnstile: Turnstile) -> None:
    with pytest.raises(sqlite3.OperationalError), turnstile:
        raise sqlite3.OperationalError("disk I/O error")
    with holder(tmp_path / ".turnstile"):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_nobody_waits_for_a_process_that_has_died(
    tmp_path: Path, turnstile: Turnstile, number: signal.Signals
) -> None:
    with holder(tmp_path / ".turnstile") as running:
        passing = Passing(turnstile)
        assert not passing.passed.wait(0.1)
        running.send_signal(number)
        passing.join()


def test_who_has_not_opened_it_waits_for_nobody(tmp_path: Path, turnstile: Turnstile) -> None:
    with turnstile, Turnstile(tmp_path / ".turnstile"):
        pass


def test_a_turnstile_that_was_closed_is_nobody_s(tmp_path: Path, turnstile: Turnstile) -> None:
    other = Turnstile(tmp_path / ".turnstile")
    other.open()
    other.close()
    other.close()
    with turnstile, other:
        pass


def test_the_lock_is_no_process_s_and_is_not_buried(tmp_path: Path) -> None:
    owners = Owners(tmp_path / "db.sqlite")
    owners.join()
    lock = owners.folder / ".turnstile"
    turnstile = Turnstile(lock)
    turnstile.open()
    owners.bury_dead()
    assert lock.exists()
    assert lock.stat().st_mode & 0o777 == 0o600
    turnstile.close()
    owners.leave()


def test_a_folder_that_is_missing_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        Turnstile(tmp_path / "missing" / ".turnstile").open()


@pytest.mark.timeout(60)
def test_processes_that_write_without_a_pause_all_get_their_turns(tmp_path: Path) -> None:
    database = tmp_path / "db.sqlite"
    prepare(database)
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(writer(database, 2.0)) for _ in range(PROCESSES)]
        for process in writers:
            assert process.stdin is not None
            process.stdin.close()
        told = [json.loads(process.stdout.read()) for process in writers if process.stdout]
    with closing(sqlite3.connect(database)) as connection:
        rows = dict(connection.execute("SELECT owner, count(*) FROM ledger GROUP BY owner"))
        states = connection.execute("SELECT DISTINCT state FROM ledger").fetchall()
        bill = connection.execute("SELECT count(*), sum(quantity) FROM event_oneoff").fetchone()
    assert rows == {each["owner"]: each["rows"] for each in told}
    assert states == [("settled",)]
    assert bill == (2 * sum(rows.values()), 5 * sum(rows.values()))
    assert min(rows.values()) > max(rows.values()) / 2, rows
    # With SQLite's own waiting it is 100 ms at least, and mostly several times that.
    assert max(each["longest_s"] for each in told) < 1, told


@pytest_twisted.ensureDeferred
async def test_a_proxy_takes_its_turn_with_others_on_its_file(tmp_path: Path) -> None:
    ask = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    completion = {"id": "c", "object": "chat.completion", "choices": [], "usage": usage}
    async with (
        ScriptedBackend([json_answer(200, completion)]) as backend,
        running_proxy(tmp_path, {"chat": {"url": backend.url}}) as proxy,
    ):
        other = Turnstile(tmp_path / "db.sqlite-owners" / ".turnstile")
        other.open()
        with other:
            refused = await proxy.post("/v1/chat/completions", ask)
        other.close()
        assert refused.status == 503
        for _ in range(50):  # it notices soon, and not at once
            answer = await proxy.post("/v1/chat/completions", ask)
            if answer.status == 200:
                break
            await deferLater(reactor, 0.1)
        assert answer.status == 200
