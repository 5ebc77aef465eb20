"""Do three records agree: what clients got, what the backend did, and what the ledger holds?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from load import Asked

KINDS = ("prompt", "completion", "embedding", "transcription")
Query = Any  # a function from a statement to its rows


@dataclass
class BackendLog:
    """What `synced_backend` says that it did, by marker."""

    asked: Counter[str] = field(default_factory=Counter)
    told: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> BackendLog:
        log = cls()
        for word, *words in map(str.split, path.read_text().splitlines()):
            if word == "asked":
                log.asked[words[0]] += 1
            elif word == "told":
                log.told[words[0]] = (int(words[1]), int(words[2]))
        return log


@dataclass(frozen=True)
class Row:
    state: str
    counts: Mapping[str, int]


@dataclass
class Verdict:
    """`wrong` must be empty; the rest are figures."""

    wrong: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    states: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    refused: int = 0
    sent: int = 0

    def note(self, what: str, which: object) -> None:
        self.wrong[what] += 1
        self.examples.setdefault(what, str(which))

    def figures(self) -> dict[str, int]:
        return {
            "sent": self.sent,
            "finished": self.finished,
            "refused": self.refused,
            **dict(sorted(self.states.items())),
            "unbilled": self.wrong["finished without its bill"],
            "doubled": self.wrong["sent twice"] + self.wrong["the bill is not the row's"],
            "wrong": sum(self.wrong.values()),
        }


def compare(
    asked: Sequence[Asked],
    log: BackendLog,
    ledger: Query,
    bills: Mapping[str, Counter[tuple[str, int]]] | None = None,
) -> Verdict:
    """Everything that is wrong. `bills`: by rid, where they are not in the ledger's database."""
    verdict = Verdict(sent=len(log.asked))
    verdict.finished = sum(each.finished and each.status == 200 for each in asked)
    verdict.refused = sum(each.status not in (None, 200) for each in asked)
    rows = _rows(ledger)
    verdict.states.update(row.state for row in rows.values())
    _check_bills(verdict, rows, _bills(ledger) if bills is None else bills)
    for each in asked:
        if each.rid is not None:
            _check(verdict, each, rows.get(each.rid), log)
    _check_headless(verdict, asked, rows, log)
    for marker, times in log.asked.items():
        if times > 1:
            verdict.note("sent twice", marker)
    if (check := ledger("PRAGMA integrity_check")) != [("ok",)]:
        verdict.note("the file is damaged", check)
    return verdict


def _rows(ledger: Query) -> dict[str, Row]:
    found = ledger("SELECT rid, state, prompt, completion, embedding, transcription FROM ledger")
    return {
        rid: Row(state, {k: n for k, n in zip(KINDS, counts, strict=True) if n is not None})
        for rid, state, *counts in found
    }


def _bills(ledger: Query) -> dict[str, Counter[tuple[str, int]]]:
    bills: dict[str, Counter[tuple[str, int]]] = {}
    for rid, product, quantity in ledger("SELECT rid, product, quantity FROM event_oneoff"):
        bills.setdefault(rid, Counter())[product.rpartition("/")[2], quantity] += 1
    return bills


def _check_bills(
    verdict: Verdict, rows: Mapping[str, Row], bills: Mapping[str, Counter[tuple[str, int]]]
) -> None:
    for rid, row in rows.items():
        owed = row.counts.items() if row.state in ("settled", "estimated") else ()
        if bills.get(rid, Counter()) != Counter(owed):
            verdict.note("the bill is not the row's", f"{rid} {row} {bills.get(rid)}")
    for rid in bills.keys() - rows.keys():
        verdict.note("a bill without a row", rid)


def _check(verdict: Verdict, asked: Asked, row: Row | None, log: BackendLog) -> None:
    marker = asked.marker
    if row is None:
        if marker in log.asked:
            verdict.note("sent without a row", asked)
        return
    told = log.told.get(marker)
    owed = None if told is None else asked.speech.bill(*told)
    if asked.finished and asked.status == 200 and (row.state != "settled" or row.counts != owed):
        verdict.note("finished without its bill", f"{asked} {row} {told}")
    if row.state == "settled" and row.counts and row.counts != owed:
        verdict.note("settled with another number than the backend's", f"{asked} {row} {told}")
    if row.state == "open":
        verdict.note("still open", asked)


def _check_headless(
    verdict: Verdict, asked: Sequence[Asked], rows: Mapping[str, Row], log: BackendLog
) -> None:
    """Requests whose client saw no header: there must be as many rows for them as were sent."""
    headless = [each.marker for each in asked if each.rid is None]
    others = len(rows.keys() - {each.rid for each in asked})
    sent = sum(marker in log.asked for marker in headless)
    if not sent <= others <= len(headless):
        verdict.note("sent without a row", f"{sent} of {len(headless)} were sent, {others} rows")
