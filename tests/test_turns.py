"""Tests of the turns that processes take: two `Turns` in two threads stand for two processes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmproxy.storage.turns import Turns

HOLDER = """
import fcntl, sys
lock = open(sys.argv[1])
fcntl.flock(lock, fcntl.LOCK_EX)
print("mine", flush=True)
sys.stdin.read()
"""


class Pool:
    """A pool that runs what it is given at once, in the caller's thread."""

    def runWithConnection(self, do: Callable[..., Any], *args: Any) -> Any:
        return do("connection", *args)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    (tmp_path / "db.sqlite-owners").mkdir()
    return tmp_path / "db.sqlite"


def pool_of(turns: Turns) -> Any:
    pool: Any = Pool()
    return turns.around(pool)


@pytest.fixture
def pools(database: Path) -> Iterator[tuple[Any, Any]]:
    both = Turns(database), Turns(database)
    for turns in both:
        turns.join()
    yield pool_of(both[0]), pool_of(both[1])
    for turns in both:
        turns.leave()


def test_what_is_done_in_turn_gets_its_connection_and_gives_its_result(pools):
    assert pools[0].runWithConnection(lambda *args: args, 1, 2) == ("connection", 1, 2)


def test_one_waits_until_the_other_has_done(pools):
    first, second = pools
    entered, leave, done = threading.Event(), threading.Event(), threading.Event()

    def hold(connection: object) -> None:
        entered.set()
        assert leave.wait(5)

    threads = [
        threading.Thread(target=first.runWithConnection, args=(hold,)),
        threading.Thread(target=second.runWithConnection, args=(lambda _: done.set(),)),
    ]
    threads[0].start()
    assert entered.wait(5)
    threads[1].start()
    assert not done.wait(0.05)
    leave.set()
    assert done.wait(5)
    for thread in threads:
        thread.join()


def test_the_turn_is_given_back_when_what_is_done_fails(pools):
    with pytest.raises(ZeroDivisionError):
        pools[0].runWithConnection(lambda _: 1 // 0)
    assert pools[1].runWithConnection(lambda _: "done") == "done"


def test_a_process_that_is_killed_gives_its_turn_back(database: Path, pools: tuple[Any, Any]):
    lock = database.parent / "db.sqlite-owners" / ".turn"
    command = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"mine\n"
        done = threading.Event()
        waiting = threading.Thread(target=pools[0].runWithConnection, args=(lambda _: done.set(),))
        waiting.start()
        assert not done.wait(0.05)
        holder.kill()
        assert done.wait(5)
        waiting.join()


def test_who_has_not_joined_waits_for_nobody(database: Path, pools: tuple[Any, Any]):
    alone = pool_of(Turns(database))
    assert pools[0].runWithConnection(lambda _: alone.runWithConnection(lambda _: "done")) == "done"
