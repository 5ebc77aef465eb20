"""Who lives and who is dead, of the processes that share a database."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmproxy.storage.owners import Owners

#: Joins, tells its name, and lives until it is killed or its stdin ends.
PROCESS = """
import sys
from pathlib import Path
from llmproxy.storage.owners import Owners

owners = Owners(Path(sys.argv[1]))
owners.join()
print(owners.me, flush=True)
sys.stdin.read()
"""


@contextmanager
def process(database: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that has joined, and its name."""
    running = subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(database)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with running:
        try:
            assert running.stdout is not None
            yield running, running.stdout.readline().strip()
        finally:
            running.kill()


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "db.sqlite"


@pytest.fixture
def owners(database: Path) -> Iterator[Owners]:
    owners = Owners(database)
    owners.join()
    yield owners
    owners.leave()


def test_a_process_never_takes_itself_for_dead(owners: Owners) -> None:
    assert not owners.is_dead(owners.me)


def test_each_process_has_a_name_of_its_own(database: Path, owners: Owners) -> None:
    assert Owners(database).me != owners.me


def test_a_process_that_was_never_there_is_dead(owners: Owners) -> None:
    assert owners.is_dead("0123456789abcdef")


def test_a_living_process_is_not_dead(database: Path, owners: Owners) -> None:
    with process(database) as (_, name):
        for _ in range(3):  # looking leaves its lock as it is
            assert not owners.is_dead(name)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_process_is_dead_however_it_ended(
    database: Path, owners: Owners, number: signal.Signals
) -> None:
    with process(database) as (running, name):
        running.send_signal(number)
        running.wait()
        assert owners.is_dead(name)


def test_a_process_that_is_stopped_is_not_dead(database: Path, owners: Owners) -> None:
    with process(database) as (running, name):
        running.send_signal(signal.SIGSTOP)
        assert not owners.is_dead(name)


def test_a_child_of_a_process_does_not_keep_it_alive(database: Path, owners: Owners) -> None:
    parent = Owners(database)
    parent.join()
    # A programme that it started; the lock is not among what such a child inherits.
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert parent._lock is not None
        os.close(parent._lock)  # as its end would
        parent._lock = None
        assert owners.is_dead(parent.me)
        child.kill()


def test_who_has_left_is_dead_and_leaves_no_file(database: Path, owners: Owners) -> None:
    second = Owners(database)
    second.join()
    assert not owners.is_dead(second.me)
    second.leave()
    second.leave()
    assert owners.is_dead(second.me)
    assert [path.name for path in database.with_name("db.sqlite-owners").iterdir()] == [owners.me]


def test_the_files_of_the_dead_are_removed_and_those_of_the_living_stay(
    database: Path, owners: Owners
) -> None:
    with process(database) as (running, dead), process(database) as (_, living):
        running.kill()
        running.wait()
        owners.bury_dead()
        owners.bury_dead()
        assert owners.is_dead(dead)
        assert not owners.is_dead(living)
        names = {path.name for path in database.with_name("db.sqlite-owners").iterdir()}
        assert names == {owners.me, living}


def test_the_folder_is_nobody_else_s_to_read(database: Path, owners: Owners) -> None:
    folder = database.with_name("db.sqlite-owners")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / owners.me).stat().st_mode & 0o777 == 0o600


def test_databases_side_by_side_have_owners_of_their_own(tmp_path: Path, owners: Owners) -> None:
    other = Owners(tmp_path / "other.sqlite")
    other.join()
    assert other.is_dead(owners.me)
    other.leave()


def test_a_folder_that_can_t_be_made_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="db"):
        Owners(tmp_path / "missing" / "db").join()
