"""What the long experiments share: which form runs, and how its figures are told.

The short form runs with all tests; LLMPROXY_FAULTS=long selects the long one.
"""

from __future__ import annotations

import os
import sys

LONG: bool = os.environ.get("LLMPROXY_FAULTS") == "long"


def report(name: str, **figures: object) -> None:
    """Print one line of figures, past pytest's capture: they are the experiment's result."""
    line = " ".join(f"{key}={_text(value)}" for key, value in figures.items())
    stream = sys.__stdout__ or sys.stdout
    stream.write(f"\n[{name}] {line}\n")
    stream.flush()


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
