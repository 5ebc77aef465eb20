"""kill -9 at random moments under 200 streams: what was finished is billed, once, and right.

A client notes what it got, a backend notes what it did (`synced_backend.py`), and the ledger must
agree with both. A request is known in the ledger by the X-Request-ID that its client saw; where a
kill came before the header, by its client's key and the time: of each client and run of the proxy
only the last request can have no header.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path

import pytest
from figures import LONG, report
from load import Asked, Load, Plan, until
from rig import Rig

from llmproxy.storage.sqlite import from_text

BROKEN = Path(__file__).with_name("broken.py")
CLIENTS = 200
KILLS = 1000 if LONG else 20
#: How long the load lasts before a kill; one in four lasts long, so that there are checkpoints.
LOAD_S, LONG_LOAD_S = (0.05, 0.8), (1.2, 2.2)
#: How soon after a start no row of a dead process may be open any more.
RECOVERY_S = 5.0
COLUMNS = "rid, api_key, state, opened, prompt, completion, embedding, transcription"
KINDS = ("prompt", "completion", "embedding", "transcription")


@dataclass(frozen=True)
class Row:
    """A row of the ledger, and what is on the bill for it."""

    rid: str
    key: str
    state: str
    opened: float
    counts: Mapping[str, int]
    bill: Mapping[str, Sequence[int]]


@dataclass
class BackendLog:
    """What the backend says that it did, by marker."""

    asked: Counter[str] = field(default_factory=Counter)
    told: dict[str, tuple[int, int]] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> BackendLog:
        log = cls()
        for line in path.read_text().splitlines():
            word, *words = line.split()
            if word == "asked":
                log.asked[words[0]] += 1
            elif word == "told":
                log.told[words[0]] = (int(words[1]), int(words[2]))
            elif word == "made":
                log.made[words[0]] = int(words[1])
        return log


@dataclass
class Findings:
    """What must be empty, and figures."""

    wrong: dict[str, list[str]] = field(default_factory=dict)
    states: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    finished: int = 0
    sent: int = 0
    slowest_start_s: float = 0.0

    def note(self, what: str, which: str) -> None:
        self.wrong.setdefault(what, []).append(which)


class Experiment:
    """A proxy in a process that is killed, its backend, its clients, and the three records."""

    def __init__(self, folder: Path, command: Sequence[str], seed: int) -> None:
        self.rig = Rig(folder, clients=CLIENTS, command=command)
        self.random = random.Random(seed)
        self.load = Load(self.rig.port, CLIENTS, Plan(random.Random(seed + 1)))
        self.starts: list[float] = []
        self.findings = Findings()

    def run(self, kills: int) -> Findings:
        """All of it; the findings say what is wrong."""
        with self.rig.backend() as url:
            self.rig.configure(url)
            asyncio.run(self._kill_and_start(kills))
        self._verify()
        return self.findings

    async def _kill_and_start(self, kills: int) -> None:
        for number in range(kills):
            if number % 10 == 5:  # in the middle of a start, too
                process = self.rig.start()
                await asyncio.sleep(self.random.uniform(0.2, 0.8))
                self._kill(process)
            process = await self._serving()
            self.starts.append(time.time())
            self.load.start()
            await asyncio.sleep(self.random.uniform(*(LOAD_S if number % 4 else LONG_LOAD_S)))
            self._kill(process)
            await self.load.wait()
        process = await self._serving()
        process.terminate()
        assert await asyncio.to_thread(process.wait, 10) == 0

    @staticmethod
    def _kill(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

    async def _serving(self) -> subprocess.Popen[bytes]:
        process, took = await self.rig.serving()
        self.findings.slowest_start_s = max(self.findings.slowest_start_s, took)
        await until(lambda: not self.rig.open_rows(), RECOVERY_S - took, "a recovery")
        return process

    # -- afterwards ------------------------------------------------------------------------

    def _verify(self) -> None:
        rows, log = self._rows(), BackendLog.read(self.rig.backend_log)
        findings, asked = self.findings, self.load.asked
        findings.requests, findings.sent = len(asked), len(log.asked)
        findings.finished = sum(each.finished for each in asked)
        findings.states.update(row.state for row in rows.values())
        rows_of = self._assign(rows)
        for each in asked:
            self._check(each, rows_of.get(each.marker, []), log)
        for marker, times in log.asked.items():
            if times != 1:
                findings.note("sent to the backend twice", marker)
        for file in self.rig.folder.glob("db.sqlite-owners/*"):
            if file.name != ".turnstile":  # which is no process's
                findings.note("a lock file of the dead", file.name)
        for each in asked:
            if each.status not in (None, 200):
                findings.note(f"refused with {each.status}", each.marker)

    def _rows(self) -> dict[str, Row]:
        bills: dict[str, dict[str, list[int]]] = {}
        for rid, product, quantity in self.rig.query(
            "SELECT rid, product, quantity FROM event_oneoff"
        ):
            kind = product.removeprefix("m/gpu/")
            bills.setdefault(rid, {}).setdefault(kind, []).append(quantity)
        rows = {}
        for rid, key, state, opened, *numbers in self.rig.query(f"SELECT {COLUMNS} FROM ledger"):
            counts = {kind: n for kind, n in zip(KINDS, numbers, strict=True) if n is not None}
            at = from_text(opened).astimezone(UTC).timestamp()
            rows[rid] = Row(rid, key, state, at, counts, bills.pop(rid, {}))
        for rid in bills:
            self.findings.note("a bill without a row", rid)
        return rows

    def _assign(self, rows: Mapping[str, Row]) -> dict[str, list[Row]]:
        """The rows of each request, by its marker."""
        assigned: dict[str, list[Row]] = {}
        known = {each.rid: each for each in self.load.asked if each.rid is not None}
        headless = {
            (each.client, each.generation): each for each in self.load.asked if each.rid is None
        }
        for row in rows.values():
            generation = sum(start <= row.opened for start in self.starts) - 1
            request = known.get(row.rid) or headless.get((int(row.key), generation))
            if request is None:
                self.findings.note("a row of no request", str(row))
            else:
                assigned.setdefault(request.marker, []).append(row)
        return assigned

    def _check(self, asked: Asked, rows: Sequence[Row], log: BackendLog) -> None:
        note, marker = self.findings.note, asked.marker
        if len(rows) > 1:
            note("more than one row", marker)
        if marker in log.asked and not rows:
            note("sent without a row", marker)
        if asked.finished and asked.status == 200 and not rows:
            note("finished without a bill", marker)
        for row in rows:
            self._check_row(asked, row, log)

    def _check_row(self, asked: Asked, row: Row, log: BackendLog) -> None:
        note, marker = self.findings.note, asked.marker
        if any(len(quantities) > 1 for quantities in row.bill.values()):
            note("billed twice", marker)
        billed = {kind: sum(quantities) for kind, quantities in row.bill.items()}
        owed = dict(row.counts)
        if billed != (owed if row.state in ("settled", "estimated") else {}):
            note("the bill is not the row's", f"{marker} {row}")
        if asked.finished and asked.status == 200 and row.state != "settled":
            note("finished without a bill", f"{marker} {row.state}")
        if row.state == "settled" and asked.status in (None, 200):
            told = log.told.get(marker)
            if told is None or row.counts != asked.speech.bill(*told):
                note("settled with another number than the backend's", f"{marker} {row} {told}")
        if row.state == "estimated" and row.counts.get("completion", 0) > log.made[marker]:
            note("estimated at more than was made", f"{marker} {row}")
        if row.state not in ("settled", "estimated", "orphan"):
            note("in a state that a kill does not explain", f"{marker} {row.state}")


def figures_of(findings: Findings) -> dict[str, object]:
    states, wrong = findings.states, findings.wrong
    return {
        "requests": findings.requests,
        "sent": findings.sent,
        "finished": findings.finished,
        **{state: states[state] for state in ("settled", "estimated", "orphan")},
        "lost": len(wrong.get("finished without a bill", ())),
        "without_row": len(wrong.get("sent without a row", ())),
        "doubled": len(wrong.get("billed twice", ())),
        "wrong": sum(map(len, wrong.values())),
        "slowest_start_s": findings.slowest_start_s,
    }


@pytest.mark.timeout(7200 if LONG else 180)
def test_what_was_finished_before_a_kill_is_billed_once(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    findings = Experiment(tmp_path, ["-m", "llmproxy"], seed).run(KILLS)
    report("kill", seed=seed, kills=KILLS, **figures_of(findings))
    assert findings.wrong == {}
    assert findings.finished > KILLS
    assert findings.states["estimated"]
    assert findings.states["orphan"]


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("bill-after-release", "finished without a bill"),
        ("bill-at-the-end", "sent without a row"),
        ("bill-again", "the bill is not the row's"),
    ],
)
@pytest.mark.timeout(180)
def test_the_experiment_finds_a_planted_fault(tmp_path: Path, fault: str, found: str) -> None:
    command = [str(BROKEN), fault]
    findings = Experiment(tmp_path, command, seed=1).run(kills=3)
    report(f"kill, {fault}", kills=3, **figures_of(findings))
    assert findings.wrong.get(found)
