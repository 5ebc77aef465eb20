"""What the long experiments share: which form runs, and how its figures are told.

The short form runs with all tests; LLMPROXY_FAULTS=long selects the long one.
"""

from __future__ import annotations

import os

import pytest

LONG: bool = os.environ.get("LLMPROXY_FAULTS") == "long"

_lines: list[str] = []


def report(name: str, **figures: object) -> None:
    """Tell an experiment's result: one line, in pytest's summary at the end."""
    line = f"{name}: " + " ".join(f"{key}={_text(value)}" for key, value in figures.items())
    _lines.append(line)
    print(line)


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what was reported."""
    if _lines:
        terminalreporter.section("figures")
        for line in _lines:
            terminalreporter.write_line(line)
