"""Starts the proxy as a process of its own, as an operator does, and waits until it serves."""

from __future__ import annotations

import contextlib
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0
STEP_S = 0.05


def get_status(url: str) -> int | None:
    """The status of the answer to GET `url`; None if nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


@contextlib.contextmanager
def running(
    command: Sequence[str | Path],
    *,
    admin_port: int,
    cwd: Path,
    env: Mapping[str, str],
    pass_fds: Sequence[int] = (),
) -> Iterator[subprocess.Popen[str]]:
    """The process that `command` starts, once its admin site says that it is healthy.

    At the end it gets SIGTERM, and must stop in `STOP_TIMEOUT_S` without an error.
    """
    log = cwd / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            env=dict(env),
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        _wait_until_healthy(process, admin_port, log)
        yield process
        process.terminate()
        code = process.wait(STOP_TIMEOUT_S)
        assert code == 0, f"exit code {code}\n{log.read_text()}"
    finally:
        process.kill()
        process.wait()


def _wait_until_healthy(process: subprocess.Popen[str], admin_port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while get_status(f"http://127.0.0.1:{admin_port}/healthz") != 200:
        ended = process.poll()
        assert ended is None, f"exit code {ended}\n{log.read_text()}"
        assert time.monotonic() < deadline, f"does not become healthy\n{log.read_text()}"
        time.sleep(STEP_S)
