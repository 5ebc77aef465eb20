"""Fixtures for all tests: each module below has its own."""

from __future__ import annotations

pytest_plugins = ("housekeeping", "figures")
