"""Fixtures for all tests: each module below has its own."""

from __future__ import annotations

from llmproxy.reactor import install

install()  # the one that the proxy runs on, before anything asks for a reactor

pytest_plugins = ("housekeeping", "figures", "tally")
