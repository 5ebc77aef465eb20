"""Suites of hostile inputs: how many were tried, how many were met as they should be.

    verdicts = Tally("h1spec")
    for vector in vectors:
        verdicts.add(vector.name, outcome(vector) == vector.expected)
    verdicts.check()

The short form runs with all tests; LLMPROXY_HOSTILE=long, as `make hostile` has it, selects the
long one. Pytest's summary shows a line for each suite, and the sum.
"""

from __future__ import annotations

import os

import pytest

LONG: bool = os.environ.get("LLMPROXY_HOSTILE") == "long"

#: How many failures of a suite are named.
NAMED = 20

_tallies: list[Tally] = []


class Tally:
    """One suite's count."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.tried = 0
        self.failed: list[str] = []
        _tallies.append(self)

    def add(self, name: str, passed: bool, why: str = "") -> None:
        """One input was tried."""
        self.tried += 1
        if not passed:
            self.failed.append(f"{name}: {why}" if why else name)

    @property
    def passed(self) -> int:
        """How many were met as they should be."""
        return self.tried - len(self.failed)

    def check(self, at_least: int = 1) -> None:
        """Fail the test for each input that failed, and when there were too few of them."""
        assert not self.failed, f"{self.suite}: {len(self.failed)} failed: {self.failed[:NAMED]}"
        assert self.tried >= at_least, f"{self.suite}: only {self.tried} inputs"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the counts."""
    if not _tallies:
        return
    terminalreporter.section("hostile inputs")
    for each in sorted(_tallies, key=lambda tally: tally.suite):
        terminalreporter.write_line(f"{each.suite}: {each.tried} tried, {each.passed} passed")
    tried, passed = sum(t.tried for t in _tallies), sum(t.passed for t in _tallies)
    terminalreporter.write_line(f"in all: {tried} tried, {passed} passed")
