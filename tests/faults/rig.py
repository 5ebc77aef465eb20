"""A real proxy in a process of its own, between clients of `load` and a `synced_backend`."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from load import Load, until
from ports import free_port
from server_process import get_status

from llmproxy.storage.sqlite import connect, prepare

HERE = Path(__file__).parent
START_S = 30.0


class Rig:
    """A folder with a configuration, a database with the keys of `clients`, and logs.

    command: Python's arguments. around: a command that runs another one, as strace does. workers:
    as the setting has it. env: more variables. pass_fds: descriptors that the process inherits.
    """

    def __init__(
        self,
        folder: Path,
        *,
        clients: int,
        command: Sequence[str],
        around: Sequence[str | Path] = (),
        workers: int = 1,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.workers = workers
        self._env, self._pass_fds = env or {}, pass_fds
        self.folder = folder
        self.config = folder / "config.toml"
        self.database = folder / "db.sqlite"
        self.backend_log = folder / "backend.log"
        self.port, self.admin_port = free_port(), free_port()
        self._output = folder / "proxy.log"
        self._command = [*around, sys.executable, *command]
        self._add_keys(clients)

    def _add_keys(self, clients: int) -> None:
        prepare(self.database)
        connection = connect(self.database)
        keys = [(f"{n}", hashlib.sha256(Load.key(n).encode()).hexdigest()) for n in range(clients)]
        connection.executemany("INSERT INTO api_key (id, secret, type) VALUES (?, ?, 'LLM')", keys)
        connection.close()

    def configure(self, *urls: str, models: Sequence[str] = ("m",), drain_s: float = 0) -> None:
        """Write the configuration: each model has its backend."""
        self.config.write_text(self.configuration(*urls, models=models, drain_s=drain_s))

    def configuration(self, *urls: str, models: Sequence[str] = ("m",), drain_s: float = 0) -> str:
        """Its text."""
        backends = "".join(
            f'[backends.{name}]\nurl = "{url}"\ndevice = "gpu"\n'
            for name, url in zip(models, urls, strict=True)
        )
        return (
            f'host = "127.0.0.1"\nport = {self.port}\ndrain_deadline = {drain_s}\n'
            f"workers = {self.workers}\n"
            f'[db]\nuri = "sqlite://{self.database}"\n'
            f'[admin]\nlisten = ["tcp:{self.admin_port}:interface=127.0.0.1"]\n{backends}'
        )

    @contextlib.contextmanager
    def backend(self) -> Iterator[str]:
        """The backend's URL, while it runs."""
        with subprocess.Popen(
            [sys.executable, HERE / "synced_backend.py", self.backend_log],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
            process.communicate()
            assert process.returncode == 0

    def start(self) -> subprocess.Popen[bytes]:
        """Start the proxy; it does not serve yet."""
        with self._output.open("ab") as output:
            return subprocess.Popen(
                [*self._command, "-c", self.config.name],
                cwd=self.folder,
                env={**os.environ, **self._env, "PYTHONPATH": str(HERE.parent.parent)},
                pass_fds=self._pass_fds,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    async def serving(self) -> tuple[subprocess.Popen[bytes], float]:
        """A proxy that serves, and how many seconds its start took."""
        process = self.start()

        def serves() -> bool:
            assert process.poll() is None, self.output()[-3000:]
            return get_status(f"http://127.0.0.1:{self.admin_port}/healthz") == 200

        return process, await until(serves, START_S, "a start")

    @contextlib.asynccontextmanager
    async def running(self) -> Any:
        """A proxy that serves; it is killed if it has not ended by itself."""
        process, _ = await self.serving()
        try:
            yield process
        finally:
            process.kill()
            await asyncio.to_thread(process.wait)

    def output(self) -> str:
        """What the proxies have logged."""
        return self._output.read_text()

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """Ask the database."""
        connection = sqlite3.connect(self.database)
        try:
            return connection.execute(statement).fetchall()
        finally:
            connection.close()

    def open_rows(self) -> int:
        """How many rows are open."""
        return int(self.query("SELECT count(*) FROM ledger WHERE state = 'open'")[0][0])


def cpu_s(pid: int) -> float:
    """CPU time that a process has used, all its threads, user and kernel (proc(5), stat)."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def ended(process: subprocess.Popen[bytes], timeout_s: float) -> tuple[int, float]:
    """The exit code, and how many seconds it took. Raises TimeoutExpired."""
    began = time.monotonic()
    return process.wait(timeout_s), time.monotonic() - began
