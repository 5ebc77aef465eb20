"""The power fails, at any moment: what was only in the kernel's memory is gone.

strace notes what the proxy writes and when it has synced it. From that, the files are made as a
disk would have them if the power had failed at a moment: nothing that was not synced is there. The
moments are those that a promise is about: a client has just got the end of its answer (so the bill
must be there), a backend has just got a request (so its row must be).
"""

from __future__ import annotations

import asyncio
import random
import re
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from figures import LONG, report
from load import Asked, Load, Plan
from rig import Rig, ended

CLIENTS = 20
LOAD_S = 20.0 if LONG else 2.0
MOMENTS = 2000 if LONG else 80
BROKEN = Path(__file__).with_name("broken.py")
#: `1795450965.53 pwrite64(4<PATH>, "DATA", 12, 0) = 12 <0.000006>`, strings in hexadecimal.
CALL = re.compile(r"(\d+\.\d+) (\w+)\(\d+<([^>]*)>(?:, (.*))?\) += (-?\d+).* <(\d+\.\d+)>$")


@pytest.fixture(autouse=True)
def there_is_strace() -> None:
    assert shutil.which("strace"), "strace is needed: apt-get install strace"


@dataclass(frozen=True)
class Call:
    """A system call on a file: when it was over, and what it wrote."""

    over: float
    name: str
    file: str
    offset: int = 0
    data: bytes = b""


def unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def calls(traces: Sequence[Path], files: Sequence[Path]) -> list[Call]:
    """What was done to these files, in its order."""
    wanted = {str(file) for file in files}
    found = []
    for line in (line for trace in traces for line in trace.read_text().splitlines()):
        match = CALL.match(line)
        if match is None or (path := unhex(match[3]).decode()) not in wanted:
            continue
        began, name, _, args, result, took = match.groups()
        over = float(began) + float(took)
        if name == "pwrite64":
            data, size, offset = args.split(", ")
            assert int(result) == int(size)
            found.append(Call(over, name, path, int(offset), unhex(data.strip('"'))))
        elif name == "ftruncate":
            found.append(Call(over, name, path, int(args)))
        else:
            found.append(Call(over, "sync", path))
    return sorted(found, key=lambda call: call.over)


class Disk:
    """Some files as a disk surely has them; what was written since the last sync waits."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.synced = {
            str(file): bytearray(file.read_bytes() if file.exists() else b"") for file in files
        }
        self._waiting: dict[str, list[Call]] = {name: [] for name in self.synced}

    def see(self, call: Call) -> None:
        if call.name != "sync":
            self._waiting[call.file].append(call)
            return
        content = self.synced[call.file]
        for write in self._waiting[call.file]:
            if write.name == "ftruncate":
                del content[write.offset :]
            end = write.offset + len(write.data)
            content.extend(bytes(max(end - len(content), 0)))
            content[write.offset : end] = write.data
        self._waiting[call.file].clear()

    def write(self, folder: Path) -> Path:
        """Write it down; the database's path."""
        folder.mkdir(exist_ok=True)
        for name, content in self.synced.items():
            (folder / Path(name).name).write_bytes(content)
        return folder / Path(next(iter(self.synced))).name


@dataclass(frozen=True, order=True)
class Moment:
    """From now on this must survive: a row, or (`billed`) its bill."""

    at: float
    rid: str
    billed: bool


class Experiment:
    """A proxy under load and strace, and afterwards the power fails at many moments."""

    def __init__(self, folder: Path, command: Sequence[str]) -> None:
        trace = "pwrite64,fdatasync,fsync,ftruncate"
        strace = ["strace", "-D", "-ff", "-ttt", "-T", "-y", "-xx", "-s70000", f"-etrace={trace}"]
        around: list[str | Path] = [*strace, "-esignal=none", "-qqq", "-o", folder / "trace"]
        self.rig = Rig(folder, clients=CLIENTS, command=command, around=around)
        self._files = [self.rig.database, Path(f"{self.rig.database}-wal")]
        self.moments: list[Moment] = []
        self.lost: list[Moment] = []

    def run(self) -> None:
        """All of it; `lost` says what did not survive."""
        disk = Disk(self._files)
        with self.rig.backend() as url:
            self.rig.configure(url)
            asked = asyncio.run(self._load())
        every = sorted(self._moments(asked))
        chosen = random.Random(0).sample(every, min(MOMENTS, len(every)))
        self.moments = sorted(chosen)
        for moment in self._failures(disk):
            if not self._survives(moment, disk):
                self.lost.append(moment)

    async def _load(self) -> list[Asked]:
        load = Load(self.rig.port, CLIENTS, Plan(random.Random(0), max_tokens=6, max_ms=30))
        async with self.rig.running() as process:
            load.start()
            await asyncio.sleep(LOAD_S)
            await load.stop()
            process.terminate()
            await asyncio.to_thread(ended, process, 10)
        return load.asked

    def _moments(self, asked: Sequence[Asked]) -> Iterator[Moment]:
        rids = {each.marker: each.rid for each in asked if each.rid is not None}
        for line in self.rig.backend_log.read_text().splitlines():
            word, *words = line.split()
            if word == "asked" and words[0] in rids:
                yield Moment(float(words[1]), rids[words[0]], billed=False)
        for each in asked:
            if each.finished and each.rid is not None:
                yield Moment(each.ended_at, each.rid, billed=True)

    def _failures(self, disk: Disk) -> Iterator[Moment]:
        """Each moment, with the disk as it was then."""
        done = calls(sorted(self.rig.folder.glob("trace.*")), self._files)
        assert done
        at = 0
        for moment in self.moments:
            while at < len(done) and done[at].over <= moment.at:
                disk.see(done[at])
                at += 1
            yield moment

    def _survives(self, moment: Moment, disk: Disk) -> bool:
        copy = disk.write(self.rig.folder / "after")
        connection = sqlite3.connect(copy)
        try:
            rows = connection.execute(
                "SELECT state, (SELECT count(*) FROM event_oneoff AS e WHERE e.rid = l.rid)"
                " FROM ledger AS l WHERE rid = ?",
                (moment.rid,),
            ).fetchall()
        finally:
            connection.close()
        if moment.billed:
            return len(rows) == 1 and rows[0][0] == "settled" and rows[0][1] > 0
        return len(rows) == 1


@pytest.mark.timeout(900 if LONG else 60)
def test_what_was_promised_survives_a_power_failure(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path, ["-m", "llmproxy"])
    experiment.run()
    report("power", moments=len(experiment.moments), lost=len(experiment.lost))
    assert len(experiment.moments) >= MOMENTS / 2
    assert experiment.lost == []


@pytest.mark.timeout(60)
def test_without_synchronous_full_it_would_not(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path, [str(BROKEN), "synchronous-normal"])
    experiment.run()
    lost = experiment.lost
    bills = sum(moment.billed for moment in lost)
    report("power, synchronous=NORMAL", moments=len(experiment.moments), lost=len(lost))
    assert bills
    assert bills < len(lost)
