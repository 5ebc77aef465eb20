"""The proxies that are measured: how each is installed, configured, started and stopped."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.util
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import machine

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
KEY = "bench-key-0123456789abcdef0123456789abcdef"
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 40.0
PROBE = b'{"model":"bench","messages":[{"role":"user","content":"Hello"}]}'
#: Fixed, so that two runs of the benchmark speak of the same thing.
SGLANG_ROUTER = "sglang-router==0.3.2"
LITELLM = "litellm[proxy]==1.105.0"


class Missing(Exception):
    """A target can't be had here; its text says why, and what to do."""


@dataclass(frozen=True)
class Site:
    """Where a target is started: its folder, its ports, and the cores it may run on."""

    folder: Path
    port: int
    backend_port: int
    cores: frozenset[int]
    descriptors: int

    @property
    def backend_url(self) -> str:
        return f"http://127.0.0.1:{self.backend_port}"


@dataclass
class Target:
    """One proxy. `prepare` raises Missing; `command` writes what it needs and tells how to start.

    most_chunks_per_s: what it is not asked to exceed; it would take for ever. bills: whether it
    writes some. processes: how many it has at least, once it is up.
    """

    name: str
    prepare: Callable[[], str]
    command: Callable[[Site], Sequence[str | Path]]
    environment: dict[str, str] = field(default_factory=dict)
    most_chunks_per_s: float = float("inf")
    bills: bool = False
    processes: int = 1
    version: str = ""


@dataclass(frozen=True)
class Running:
    """A target that answers. `pid`: its first process; None where there is no proxy."""

    port: int
    pid: int | None
    folder: Path

    def pids(self) -> list[int]:
        """All its processes of this moment, the first one first."""
        return [] if self.pid is None else machine.process_tree(self.pid)


# -- llmproxy ----------------------------------------------------------------------------------


def _llmproxy_version() -> str:
    asked = [sys.executable, "-c", "import llmproxy, twisted; print(llmproxy.__version__)"]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=PROJECT, check=False)
    if done.returncode:
        raise Missing(
            f"llmproxy can't be imported by {Path(sys.executable).name}: pip install -e ."
        )
    return done.stdout.strip()


def configure_llmproxy(site: Site, workers: int | None = None) -> Path:
    """One backend, SQLite with durable bills, one valid key; everything else as it comes."""
    settings = f"""
port = {site.port}
host = "127.0.0.1"
{"" if workers is None else f"workers = {workers}"}
[db]
uri = "sqlite://db.sqlite"
[admin]
listen = ["tcp:{machine.free_port()}:interface=127.0.0.1"]
[backends.bench]
url = "{site.backend_url}"
device = "BENCH"
"""
    path = site.folder / "config.toml"
    path.write_text(settings)
    connection = sqlite3.connect(site.folder / "db.sqlite")
    with contextlib.closing(connection), connection:
        connection.executescript((PROJECT / "llmproxy" / "schema.sql").read_text())
        connection.execute(
            "INSERT INTO api_key (id, secret, type) VALUES ('bench', ?, 'LLM')",
            (hashlib.sha256(KEY.encode()).hexdigest(),),
        )
    return path


def llmproxy(
    name: str = "llmproxy", switch: tuple[str, str] | None = None, workers: int | None = None
) -> Target:
    """The proxy itself; `switch`: a variable of its environment that makes it another one."""

    def prepare() -> str:
        if switch is not None:
            _check_switch(*switch)
        return _llmproxy_version()

    def command(site: Site) -> Sequence[str | Path]:
        return [sys.executable, "-m", "llmproxy", "-c", configure_llmproxy(site, workers)]

    environment = {"PYTHONPATH": str(PROJECT), **dict([switch] if switch else [])}
    # Several workers have a process above them.
    processes = 1 if workers is None or workers < 2 else 1 + workers
    return Target(name, prepare, command, environment, bills=True, processes=processes)


def wrapped_llmproxy(wrapper: str, output: Path) -> Target:
    """The same, started by a program of this folder that looks inside, and writes to `output`."""

    def command(site: Site) -> Sequence[str | Path]:
        return [sys.executable, HERE / wrapper, output, "-c", configure_llmproxy(site)]

    environment = {"PYTHONPATH": str(PROJECT)}
    return Target("llmproxy", _llmproxy_version, command, environment, bills=True)


def _check_switch(variable: str, value: str) -> None:
    """A variable that nobody reads would compare the proxy with itself."""
    sources = (PROJECT / "llmproxy").rglob("*.py")
    if not any(variable in source.read_text() for source in sources):
        raise Missing(f"this llmproxy has no switch {variable}")
    if value == "uvloop" and importlib.util.find_spec("uvloop") is None:
        raise Missing("uvloop is not installed: pip install uvloop")


# -- the others --------------------------------------------------------------------------------


def _nginx_path() -> str:
    path = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if path is None:
        raise Missing("nginx is not installed: apt-get install nginx-light")
    return path


def _nginx_version() -> str:
    done = subprocess.run([_nginx_path(), "-v"], capture_output=True, text=True, check=True)
    return done.stderr.strip().partition("/")[2]


def _nginx(site: Site) -> Sequence[str | Path]:
    folders = "\n".join(
        f"  {name}_temp_path {site.folder}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    # Nothing is looked at, logged or kept: this is what it costs to pass bytes on.
    settings = f"""
{"user root;" if os.geteuid() == 0 else ""}
daemon off;
worker_processes 1;
worker_rlimit_nofile {site.descriptors};
pid {site.folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections {site.descriptors - 64}; }}
http {{
  access_log off;
{folders}
  keepalive_requests 1000000000;
  upstream backend {{
    server 127.0.0.1:{site.backend_port};
    keepalive 1024;
    keepalive_requests 1000000000;
  }}
  server {{
    listen 127.0.0.1:{site.port} backlog=4096;
    location / {{
      proxy_pass http://backend;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""
    (site.folder / "nginx.conf").write_text(settings)
    return [_nginx_path(), "-p", site.folder, "-c", site.folder / "nginx.conf"]


def _venv(name: str, requirement: str) -> Path:
    """The bin folder of a virtual environment of its own with this requirement installed."""
    folder = HERE / ".venv" / name
    done = folder / f"installed-{re.sub(r'[^0-9A-Za-z.-]', '_', requirement)}"
    commands: list[list[str | Path]] = [
        [sys.executable, "-m", "venv", folder],
        [folder / "bin" / "python", "-m", "pip", "install", "--quiet", requirement],
    ]
    if not done.exists():
        print(f"installing {requirement} ...", flush=True)
        for command in commands:
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            if made.returncode:
                last = (made.stderr.strip().splitlines() or ["no message"])[-1]
                raise Missing(f"{requirement} can't be installed: {last}")
        done.touch()
    return folder / "bin"


def _sglang_router_version() -> str:
    _venv("sglang-router", SGLANG_ROUTER)
    return SGLANG_ROUTER.partition("==")[2]


def _sglang_router(site: Site) -> Sequence[str | Path]:
    python = _venv("sglang-router", SGLANG_ROUTER) / "python"
    options = {
        "--host": "127.0.0.1",
        "--port": site.port,
        "--worker-urls": site.backend_url,
        "--policy": "round_robin",
        "--log-level": "error",
        "--prometheus-host": "127.0.0.1",
        "--prometheus-port": machine.free_port(),
        "--max-concurrent-requests": -1,
    }
    words = [str(word) for option in options.items() for word in option]
    return [python, "-m", "sglang_router.launch_router", *words]


def _litellm_version() -> str:
    _venv("litellm", LITELLM)
    return LITELLM.partition("==")[2]


def _litellm(site: Site) -> Sequence[str | Path]:
    settings = f"""
model_list:
  - model_name: bench
    litellm_params:
      model: openai/bench
      api_base: {site.backend_url}/v1
      api_key: none
general_settings:
  master_key: {KEY}
"""
    (site.folder / "litellm.yaml").write_text(settings)
    tool = _venv("litellm", LITELLM) / "litellm"
    words = ["--host", "127.0.0.1", "--port", str(site.port), "--num_workers", "1"]
    return [tool, "--config", site.folder / "litellm.yaml", *words]


def all_targets() -> list[Target]:
    """All but `direct`, which has nothing to start. LiteLLM and the variants of llmproxy have to
    be asked for."""
    return [
        llmproxy(),
        Target("nginx", _nginx_version, _nginx),
        Target("sglang-router", _sglang_router_version, _sglang_router),
        Target(
            "litellm",
            _litellm_version,
            _litellm,
            {"LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION", "NO_PROXY": "127.0.0.1"},
            most_chunks_per_s=500,
        ),
        llmproxy("llmproxy-twisted", ("LLMPROXY_HTTP", "twisted")),
        llmproxy("llmproxy-uvloop", ("LLMPROXY_REACTOR", "uvloop")),
    ]


# -- processes ---------------------------------------------------------------------------------


@contextlib.contextmanager
def process(
    command: Sequence[str | Path],
    cores: frozenset[int],
    log: Path,
    environment: dict[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process on these cores. At the end it gets SIGTERM; if that is not enough, it is killed."""
    with log.open("wb") as output:
        started = subprocess.Popen(
            [str(word) for word in command],
            cwd=log.parent,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    try:
        yield started
    finally:
        _stop(started)


def _stop(started: subprocess.Popen[bytes]) -> None:
    tree = machine.process_tree(started.pid) if started.poll() is None else []
    started.terminate()
    try:
        started.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        print(f"process {started.pid} did not stop, and is killed", file=sys.stderr)
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        started.wait()


@contextlib.contextmanager
def running(target: Target, site: Site) -> Iterator[Running]:
    """The target, once a request through it is answered."""
    log = site.folder / "target.log"
    with process(target.command(site), site.cores, log, target.environment) as started:
        _wait(started, target.name, site.port, log)
        _wait_for_processes(started.pid, target)
        yield Running(site.port, started.pid, site.folder)


def _wait(started: subprocess.Popen[bytes], name: str, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _answers(port):
        if started.poll() is not None or time.monotonic() > deadline:
            lines = log.read_text(errors="replace").splitlines()
            raise Missing(f"{name} does not start: " + " | ".join(lines[-5:]))
        time.sleep(0.1)


def _wait_for_processes(pid: int, target: Target) -> None:
    """One of several workers may answer before the others are there."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while (found := len(machine.process_tree(pid))) < target.processes:
        if time.monotonic() > deadline:
            raise Missing(f"{target.name} has {found} processes instead of {target.processes}")
        time.sleep(0.1)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    try:
        connection.request("POST", "/v1/chat/completions", PROBE, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
