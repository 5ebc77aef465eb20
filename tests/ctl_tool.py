"""Runs `llmproxyctl` in process, on a configuration in a folder of its own."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from llmproxy import config
from llmproxy.ctl import main
from llmproxy.ctl.common import open_store

MONGODB = '[db]\nuri = "mongodb://u:canary@localhost/db"\n'


class Tool:
    """The command, its configuration file `path`, and what it printed last in `err`."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.path = folder / "config.toml"
        self.path.write_text("")
        self.err = ""
        self._capsys = capsys

    def configure(self, text: str) -> None:
        self.path.write_text(text)

    def run(self, *argv: str, code: int = 0) -> str:
        """Run it; the result is its output. Fails if the exit code is not `code`."""
        self._capsys.readouterr()
        got = main(["-c", str(self.path), *argv])
        captured = self._capsys.readouterr()
        self.err = captured.err
        assert got == code, captured.err
        return captured.out

    def json(self, *argv: str) -> Any:
        return json.loads(self.run(*argv, "--format", "json"))

    def store(self) -> sqlite3.Connection:
        return open_store(config.load(self.path, {}))

    def query(self, statement: str, *parameters: object) -> list[Any]:
        connection = self.store()
        try:
            return connection.execute(statement, parameters).fetchall()
        finally:
            connection.close()

    def add_row(self, rid: str, **columns: object) -> None:
        """A row of the ledger: a settled chat completion but for `columns`."""
        row = {
            "rid": rid,
            "state": "settled",
            "owner": "o",
            "opened": "2026-03-01T10:00:00.000000+00:00",
            "finished": "2026-03-01T10:00:05.000000+00:00",
            "api_key": "key1",
            "path": "/v1/chat/completions",
            "model": "llama",
            "device": "H100",
            "delivered": 1,
        } | columns
        marks = ", ".join("?" * len(row))
        self.query(f"INSERT INTO ledger ({', '.join(row)}) VALUES ({marks})", *row.values())
