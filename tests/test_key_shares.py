"""What processes share of the rates of keys, as stores keep it: nothing of a change is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as _reactor
from twisted.internet.defer import DeferredList

from llmproxy.errors import StorageError
from llmproxy.model import Claim, Share
from llmproxy.storage import IShares
from llmproxy.storage.journal import GroupCommit
from llmproxy.storage.memory import MemoryShares
from llmproxy.storage.rows import install
from llmproxy.storage.shares import SQLiteShares
from llmproxy.storage.sqlite import make_pool, prepare

reactor: Any = _reactor
SHARE = Share(1.5, 1_800_000_000.25, {"me": Claim(3, 2.5), "other": Claim(1, 1.0)})


def plus_one(share: Share) -> Share:
    return share._replace(requests_full_at=share.requests_full_at + 1)


class Files:
    """Writers on one file, as several processes have them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "db.sqlite"
        prepare(self.path)
        self._pools: list[Any] = []

    def writer(self) -> GroupCommit:
        pool = make_pool(self.path, reactor, install)
        self._pools.append(pool)
        return GroupCommit(pool, reactor)

    def close(self) -> None:
        for pool in self._pools:
            pool.close()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    opened = Files(tmp_path)
    yield opened
    opened.close()


@pytest.fixture(params=["memory", "sqlite"])
def open_shares(request: Any, files: Files) -> Callable[[], IShares]:
    """The store as one more process sees it."""
    memory = MemoryShares()
    return lambda: memory if request.param == "memory" else SQLiteShares(files.writer())


@pytest_twisted.ensureDeferred
async def test_a_share_is_as_it_was_put_there_and_each_key_has_its_own(
    open_shares: Callable[[], IShares],
) -> None:
    shares, other = open_shares(), open_shares()
    assert await shares.change("alice", lambda share: SHARE) == SHARE
    assert await other.change("alice", lambda share: share) == SHARE
    assert await other.change("bob", lambda share: share) == Share()


@pytest_twisted.ensureDeferred
async def test_no_change_of_several_processes_is_lost(open_shares: Callable[[], IShares]) -> None:
    processes = [open_shares() for _ in range(3)]
    changes = [each.change("alice", plus_one) for _ in range(50) for each in processes]
    await DeferredList(changes, fireOnOneErrback=True)
    assert (await processes[0].change("alice", plus_one)).requests_full_at == 151


@pytest_twisted.ensureDeferred
async def test_a_change_that_fails_fails_alone(files: Files, flush_logged_errors: Any) -> None:
    shares = SQLiteShares(files.writer())
    broken = shares.change("alice", lambda share: 1 // 0)  # type: ignore[arg-type, return-value]
    beside = shares.change("alice", plus_one)
    with pytest.raises(ZeroDivisionError):
        await broken
    assert (await beside).requests_full_at == 1


@pytest_twisted.ensureDeferred
async def test_while_the_file_can_t_be_written_nothing_is_kept(files: Files) -> None:
    writer = files.writer()
    writer._failing_since = reactor.seconds() - 60
    with pytest.raises(StorageError):
        await SQLiteShares(writer).change("alice", plus_one)
    assert writer.pending == 0
