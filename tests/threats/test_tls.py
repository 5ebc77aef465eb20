"""TLS on both sides: handshakes that hang or break off, certificates that are renewed or wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import pytest_twisted
from backend import ScriptedBackend, json_answer
from certificates import PEM, Authority, Issued, key_bytes
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from OpenSSL import SSL
from ports import free_port
from proxy import ProxyHandle, add_keys, request_bytes, running_proxy
from server_process import running
from twisted.internet import reactor as _reactor
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import ContextFactory
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

from llmproxy import server_tls
from llmproxy.errors import ConfigError
from llmproxy.server_tls import Certificates, Files, without_tls

reactor: Any = _reactor

ROOT = str(Path(__file__).parent.parent.parent)
TIMEOUT_S = 10.0
CHAT = "/v1/chat/completions"
ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
ANSWER = json_answer(200, {"choices": [], "usage": USAGE})
EXPIRY = "llmproxy_certificate_expiry_seconds"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def server(authority: Authority, **more: Any) -> Issued:
    return authority.issue("server", "localhost", "127.0.0.1", **more)


@contextlib.asynccontextmanager
async def tls_proxy(
    folder: Path, issued: Issued, backends: Any = None, **more: Any
) -> AsyncIterator[ProxyHandle]:
    settings = {"cert": str(issued.cert), "key": str(issued.key), **more}
    async with running_proxy(folder, backends or {}, **settings) as proxy:
        yield proxy


# --- clients, in threads -------------------------------------------------------------------------


class Spoken(NamedTuple):
    """What a handshake came to."""

    version: str | None
    suite: str
    serial: int
    protocol: str | None


def trusting(authority: Authority, **more: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.path)
    for name, value in more.items():
        setattr(context, name, value)
    return context


def connect(port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
    return context.wrap_socket(plain, server_hostname="localhost")


def spoken(link: ssl.SSLSocket) -> Spoken:
    shown = x509.load_der_x509_certificate(link.getpeercert(binary_form=True) or b"")
    suite, _, _ = link.cipher() or ("", "", 0)
    return Spoken(link.version(), suite, shown.serial_number, link.selected_alpn_protocol())


def ask(link: ssl.SSLSocket) -> bytes:
    """GET the models; the first line of the answer."""
    link.sendall(request_bytes("GET", "/v1/models"))
    return link.recv(4096).partition(b"\r\n")[0]


def once(port: int, context: ssl.SSLContext) -> tuple[Spoken, bytes]:
    with connect(port, context) as link:
        return spoken(link), ask(link)


def client_hello(context: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.MemoryBIO, bytes]:
    """A client that has said its first message."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return client, incoming, outgoing.read()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest_twisted.ensureDeferred
async def test_a_client_that_trusts_the_root_alone_is_served(tmp_path, authority, version):
    issued = server(authority.below("intermediate"))  # which only the file of the chain has
    context = trusting(authority, minimum_version=version, maximum_version=version)
    context.set_alpn_protocols(["h2", "http/1.1"])
    async with tls_proxy(tmp_path, issued) as proxy:
        found, line = await deferToThread(once, proxy.port, context)
    assert (found.serial, found.protocol) == (issued.serial, "http/1.1")
    assert found.version == version.name.replace("v1_", "v1.")
    assert line == b"HTTP/1.1 200 OK"


@pytest_twisted.ensureDeferred
async def test_an_ssl_endpoint_has_the_same_tls_with_its_chain_in_a_file_of_its_own(
    tmp_path, authority
):
    issued = server(authority.below("intermediate"))
    own, *chain = x509.load_pem_x509_certificates(issued.cert.read_bytes())
    (tmp_path / "own.pem").write_bytes(own.public_bytes(PEM))
    (tmp_path / "chain.pem").write_bytes(b"".join(each.public_bytes(PEM) for each in chain))
    listen = (
        f"ssl:0:privateKey={issued.key}:certKey={tmp_path}/own.pem"
        f":extraCertChain={tmp_path}/chain.pem:interface=127.0.0.1"
    )
    async with running_proxy(tmp_path, {}, host=None, port=None, listen=[listen]) as proxy:
        found, _ = await deferToThread(once, proxy.port, trusting(authority))
        assert found.serial == issued.serial
        renewed = server(authority)
        (tmp_path / "own.pem").write_bytes(renewed.cert.read_bytes())
        (tmp_path / "chain.pem").write_bytes(authority.path.read_bytes())
        proxy.proxy.reload()
        found, _ = await deferToThread(once, proxy.port, trusting(authority))
        assert found.serial == renewed.serial


@pytest.mark.parametrize(
    ("text", "plain", "certificates", "key"),
    [
        ("tcp:80", "tcp:80", None, None),
        ("ssl:443", "tcp:443:interface=:backlog=50", ["server.pem"], "server.pem"),
        (
            "ssl:443:k.pem:c.pem:interface=\\:\\:1:backlog=9",
            "tcp:443:interface=\\:\\:1:backlog=9",
            ["c.pem"],
            "k.pem",
        ),
        (
            "ssl:port=1:certKey=a\\:b.pem:privateKey=k:extraCertChain=x:sslmethod=SSLv23_METHOD",
            "tcp:1:interface=:backlog=50",
            ["a:b.pem", "x"],
            "k",
        ),
        (
            "haproxy:ssl:443:k.pem:c.pem",
            "haproxy:tcp:443:interface=:backlog=50",
            ["c.pem"],
            "k.pem",
        ),
    ],
)
def test_an_endpoint_is_taken_apart_as_twisted_does(text, plain, certificates, key):
    files = certificates and Files(tuple(map(Path, certificates)), Path(key))
    assert without_tls(text) == (plain, files)


@pytest.mark.parametrize("text", ["ssl", "ssl:", "ssl:443:unknown=1", "ssl:1:2:3:4:5:6:7:8:9"])
def test_an_ssl_endpoint_that_makes_no_sense_is_refused(text):
    with pytest.raises(ConfigError, match="can't listen on ssl"):
        without_tls(f"{text}:nonsense=1")


@pytest_twisted.ensureDeferred
async def test_an_openssl_without_the_newest_group_does_without_it(
    tmp_path, authority, monkeypatch
):
    monkeypatch.setattr(server_tls, "GROUPS", b"unheardof:prime256v1")
    async with tls_proxy(tmp_path, server(authority)) as proxy:
        _, line = await deferToThread(once, proxy.port, trusting(authority))
    assert line == b"HTTP/1.1 200 OK"


# --- certificates that can't be used -------------------------------------------------------------


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def unusable(good: Issued, authority: Authority, folder: Path) -> Iterator[tuple[str, Issued, str]]:
    """What is wrong, the files, and what is said of them."""
    other = ec.generate_private_key(ec.SECP256R1())
    garbage = written(folder / "garbage", b"\xff\xfe")
    none = good._replace(cert=folder / "none.pem")
    yield "no file", none, f'can\'t read "{none.cert}": No such file'
    yield "a folder", good._replace(key=folder), f'can\'t read "{folder}": Is a directory'
    yield "no text", good._replace(cert=garbage), f'"{garbage}" is not PEM'
    yield "no certificate", good._replace(cert=good.key), "there is no certificate in PEM"
    yield "no key", good._replace(key=good.cert), "there is no private key in PEM"
    stranger = good._replace(key=written(folder / "other.key", key_bytes(other)))
    yield "another's key", stranger, "the key is not that of the first certificate"
    locked = good._replace(key=written(folder / "locked.key", key_bytes(other, b"pw")))
    yield "a key with a password", locked, "there is no private key in PEM without a password"
    for name, days, said in (
        ("old", (-9, -1), "it ended at 20"),
        ("new", (1, 9), "it begins at 20"),
    ):
        yield name, authority.issue(name, "localhost", days=days), said
    short = rsa.generate_private_key(65537, 1024)
    yield "short", authority.issue("short", "h", key=short), "it can't be used: ee key too small"
    odd = dsa.generate_private_key(2048)
    yield "odd", authority.issue("odd", "h", key=odd), "the key is of a kind that TLS does not use"


def test_a_certificate_that_can_not_be_used_is_refused_with_its_file_and_reason(
    tmp_path, authority
):
    certificates, tried = Certificates(lambda file, ends: None), 0
    for _, issued, said in unusable(server(authority), authority, tmp_path):
        with pytest.raises(ConfigError) as caught:
            certificates.load(Files((issued.cert,), issued.key))
        assert said in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert str(tmp_path) in str(caught.value)
        tried += 1
    assert tried == 11


@pytest.mark.parametrize("workers", [1, 2])
def test_a_proxy_does_not_start_with_a_certificate_that_has_ended(tmp_path, authority, workers):
    issued = server(authority, days=(-9, -1))
    (tmp_path / "config.toml").write_text(
        f"workers = {workers}\nport = {free_port()}\n"
        f'cert = "{issued.cert}"\nkey = "{issued.key}"\n'
        f'[admin]\nlisten = ["tcp:{free_port()}:interface=127.0.0.1"]\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "llmproxy"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    said = f'can\'t start: certificate "{issued.cert}": it ended at '
    assert [line for line in done.stdout.splitlines() if said in line]
    assert "Traceback" not in done.stdout + done.stderr


# --- reload --------------------------------------------------------------------------------------


def shown(folder: Path, proxy: ProxyHandle) -> float:
    """What the metric says of the certificate's end."""
    line = f'{EXPIRY}{{file="{folder}/server.pem"}} '
    [found] = [
        each for each in proxy.proxy.metrics.exposition().decode().splitlines() if line in each
    ]
    return float(found.removeprefix(line))


@pytest_twisted.ensureDeferred
async def test_a_renewed_certificate_is_shown_after_a_reload_and_no_connection_is_dropped(
    tmp_path, authority, logged
):
    context, first = trusting(authority), server(authority)
    async with tls_proxy(tmp_path, first) as proxy:
        old = await deferToThread(connect, proxy.port, context)
        assert shown(tmp_path, proxy) == pytest.approx(time.time() + 90 * 86400, abs=60)
        second = server(authority, days=(-1, 13.5))
        found, _ = await deferToThread(once, proxy.port, context)
        assert found.serial == first.serial  # until it is told

        proxy.proxy.reload()
        found, line = await deferToThread(once, proxy.port, context)
        assert (found.serial, line) == (second.serial, b"HTTP/1.1 200 OK")
        assert await deferToThread(ask, old) == b"HTTP/1.1 200 OK"
        assert spoken(old).serial == first.serial
        assert shown(tmp_path, proxy) == pytest.approx(time.time() + 13.5 * 86400, abs=60)
        await deferToThread(old.close)

        said = [line for line in logged if line.startswith("certificate")]
        assert len(said) == 2
        until = datetime.fromtimestamp(shown(tmp_path, proxy), UTC).strftime("%Y-%m-%dT%H:%M")
        assert said[0].startswith(f'certificate "{first.cert}": renewed, until {until}')
        assert said[1].startswith(f'certificate "{first.cert}": 13 days left, until {until}')
        proxy.proxy.reload()  # nothing is new, but the end is still near
        said = [line for line in logged if line.startswith("certificate")]
        assert [line for line in said[2:] if ": renewed, until" in line] == []
        assert len(said) == 3


@pytest_twisted.ensureDeferred
async def test_a_bad_certificate_at_a_reload_leaves_the_old_one_in_force_with_one_line(
    tmp_path, authority, logged
):
    context, good = trusting(authority), server(authority)
    live = good._replace(cert=tmp_path / "live.pem", key=tmp_path / "live.key")

    def point_to(files: Issued) -> None:
        for link, file in ((live.cert, files.cert), (live.key, files.key)):
            link.unlink(missing_ok=True)
            link.symlink_to(file)

    point_to(good)
    async with tls_proxy(tmp_path, live) as proxy:
        for name, files, _ in list(unusable(good, authority, tmp_path)):
            point_to(files)
            logged.clear()
            proxy.proxy.reload()
            assert len(logged) == 1, name
            assert logged[0].startswith("not reloaded: "), name
            found, _ = await deferToThread(once, proxy.port, context)
            assert found.serial == good.serial
        point_to(good)
        proxy.proxy.reload()
        assert [line for line in logged if line.startswith("reloaded")]


@pytest_twisted.ensureDeferred
async def test_a_certificate_that_has_ended_in_service_holds_up_no_reload_of_the_backends(
    tmp_path, authority, logged, monkeypatch
):
    async with tls_proxy(tmp_path, server(authority)) as proxy:

        class Later(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return datetime.fromtimestamp(time.time() + 100 * 86400, tz)

        monkeypatch.setattr(server_tls, "datetime", Later)
        proxy.proxy.reload()
    assert [line for line in logged if line.startswith("reloaded")]
    assert [line for line in logged if ": 0 days left, until " in line]


def soon(holds: Callable[[], bool]) -> None:
    """Wait until it does."""
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.02)
    raise AssertionError("it never did")


@pytest.mark.timeout(60)
def test_every_worker_shows_a_renewed_certificate_and_so_does_its_successor(tmp_path, authority):
    context, first = trusting(authority), server(authority)
    port, admin_port = free_port(), free_port()
    (tmp_path / "config.toml").write_text(
        f'host = "127.0.0.1"\nport = {port}\nworkers = 2\n'
        f'cert = "{first.cert}"\nkey = "{first.key}"\n'
        f'[admin]\nlisten = ["tcp:{admin_port}:interface=127.0.0.1"]\n'
    )
    log = tmp_path / "server.log"
    add_keys(tmp_path / "db.sqlite")

    def serials(links: list[ssl.SSLSocket]) -> set[int]:
        return {spoken(link).serial for link in links}

    def workers() -> list[int]:
        return [int(pid) for pid in children.read_text().split()]

    with contextlib.ExitStack() as stack:

        def several() -> list[ssl.SSLSocket]:
            """Connections that stay open, so that both workers have some."""
            return [stack.enter_context(connect(port, context)) for _ in range(6)]

        process = stack.enter_context(
            running(
                [sys.executable, "-m", "llmproxy"],
                admin_port=admin_port,
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": ROOT},
            )
        )
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        old = several()
        assert serials(old) == {first.serial}
        second = server(authority)
        process.send_signal(signal.SIGHUP)
        soon(lambda: ": renewed, until" in log.read_text())
        soon(lambda: serials(several()) == {second.serial})
        assert [ask(link) for link in old] == [b"HTTP/1.1 200 OK"] * len(old)

        second.key.write_text("broken")
        process.send_signal(signal.SIGHUP)
        soon(lambda: "not reloaded: " in log.read_text())
        before = workers()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        soon(lambda: len(workers()) == 2 and not {*before} & {*workers()})
        assert serials(several()) == {second.serial}
        with urllib.request.urlopen(f"http://127.0.0.1:{admin_port}/metrics") as answer:
            assert answer.read().count(f'\n{EXPIRY}{{file="{first.cert}"}} '.encode()) == 1
    text = log.read_text()
    assert text.count(": renewed, until") == text.count("not reloaded: ") == 1
    assert "Traceback" not in text


# --- handshakes ----------------------------------------------------------------------------------


def until_closed(port: int, data: bytes, drip_s: float = 0.0) -> float:
    """Send `data`, byte by byte if it drips; how long the connection lasted."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as link:
        with contextlib.suppress(ConnectionError):
            for n in range(len(data)) if drip_s else ():
                link.sendall(data[n : n + 1])
                time.sleep(drip_s)
            link.sendall(b"" if drip_s else data)
            while link.recv(4096):
                pass
        return time.monotonic() - began


@pytest_twisted.ensureDeferred
async def test_a_handshake_has_a_deadline_that_no_dripping_moves_and_holds_nobody_up(
    tmp_path, authority, monkeypatch, logged
):
    assert server_tls.HANDSHAKE_S == 10
    monkeypatch.setattr(server_tls, "HANDSHAKE_S", 0.4)
    context = trusting(authority)
    _, _, hello = client_hello(context)
    async with tls_proxy(tmp_path, server(authority)) as proxy:
        lines = len(logged)
        kept = await deferToThread(connect, proxy.port, context)
        slow = [
            deferToThread(until_closed, proxy.port, b""),
            deferToThread(until_closed, proxy.port, hello[:-1]),
            deferToThread(until_closed, proxy.port, hello),  # its second message never comes
            deferToThread(until_closed, proxy.port, hello, 0.02),
        ]
        await deferLater(reactor, 0.1)
        _, line = await deferToThread(once, proxy.port, context)
        assert line == b"HTTP/1.1 200 OK"
        for each in slow:
            assert 0.3 < await each < 3
        assert await deferToThread(ask, kept) == b"HTTP/1.1 200 OK"  # whose handshake was done
        await deferToThread(kept.close)
        await empty(proxy)
        assert logged[lines:] == []


async def empty(proxy: ProxyHandle) -> None:
    """Wait until the proxy has no connection of a client."""
    site: Any = proxy.proxy._site
    for _ in range(500):
        if not site.connections:
            return
        await deferLater(reactor, 0.01)
    raise AssertionError(f"still there: {site.connections}")


@pytest.mark.parametrize("reset", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_client_that_leaves_in_the_handshake_leaves_nothing_behind(
    tmp_path, authority, logged, reset
):
    context = trusting(authority)
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def leave_after(port: int, size: int) -> None:
        """Speak until `size` bytes are said."""
        _, incoming, data = client_hello(context)
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as link:
            if reset:
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            link.sendall(data[:size])
            if size > len(data):
                incoming.write(link.recv(65536))
                link.sendall(b"\x16\x03\x03\x00\x46\x10" + bytes(size - len(data)))

    def speak(port: int) -> None:
        _, _, data = client_hello(context)
        for size in (*range(0, len(data) + 1, 9), len(data), len(data) + 1, len(data) + 70):
            leave_after(port, size)

    async with tls_proxy(tmp_path, server(authority)) as proxy:
        lines = len(logged)
        await deferToThread(speak, proxy.port)
        await empty(proxy)
        assert logged[lines:] == []


@pytest_twisted.ensureDeferred
async def test_what_is_no_handshake_is_cut_off_without_a_line(
    tmp_path, authority, monkeypatch, logged
):
    monkeypatch.setattr(server_tls, "HANDSHAKE_S", 0.5)
    context = trusting(authority)
    said = [
        request_bytes("GET", "/v1/models"),
        b"\x00" * 100,
        b"\xff" * 20_000,
        b"\x16\x03\x01\x40\x00" + b"\x01" * 0x4000,
        b"\x16\x03\x01\x00\x00" * 100,
        b"\x15\x03\x01\x00\x02\x02\x28",
        b"\x17\x03\x03\x00\x10" + bytes(16),
    ]

    def speak(port: int) -> None:
        for data in said:
            assert until_closed(port, data) < 5

    def refuse(port: int) -> None:
        with pytest.raises(ssl.SSLCertVerificationError):
            once(port, ssl.create_default_context())  # knows no such authority, and says so

    async with tls_proxy(tmp_path, server(authority)) as proxy:
        lines = len(logged)
        await deferToThread(speak, proxy.port)
        await deferToThread(refuse, proxy.port)
        await empty(proxy)
        assert logged[lines:] == []
        assert (await deferToThread(once, proxy.port, context))[1] == b"HTTP/1.1 200 OK"


def old_context() -> SSL.Context:
    """A client's context for TLS 1.2."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    return context


@contextlib.contextmanager
def old_client(
    port: int, context: SSL.Context, session: SSL.Session | None = None
) -> Iterator[SSL.Connection]:
    """A client's connection."""
    with socket.create_connection(("127.0.0.1", port)) as plain:
        link = SSL.Connection(context, plain)
        if session is not None:
            link.set_session(session)
        link.set_connect_state()
        link.do_handshake()
        yield link


@pytest_twisted.ensureDeferred
async def test_a_client_can_not_renegotiate(tmp_path, authority):
    def speak(port: int) -> None:
        with old_client(port, old_context()) as link:
            link.renegotiate()
            with pytest.raises(SSL.Error, match="no renegotiation"):
                link.do_handshake()

    async with tls_proxy(tmp_path, server(authority)) as proxy:
        await deferToThread(speak, proxy.port)


@pytest_twisted.ensureDeferred
async def test_a_client_can_not_resume_a_session(tmp_path, authority):
    lib: Any = SSL._lib  # pyOpenSSL has no name for it

    def speak(port: int) -> bool:
        context = old_context()
        with old_client(port, context) as first:
            session = first.get_session()
            first.shutdown()
        with old_client(port, context, session) as second:
            return bool(lib.SSL_session_reused(cast(Any, second)._ssl))

    async with tls_proxy(tmp_path, server(authority)) as proxy:
        assert not await deferToThread(speak, proxy.port)


# --- towards backends ----------------------------------------------------------------------------


class _Serves(ContextFactory):
    """A context factory of pyOpenSSL's kind; `clients`: whose certificates are asked for."""

    def __init__(self, issued: Issued, clients: Authority | None = None) -> None:
        self._context = context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_session_id(b"test")
        context.use_certificate_chain_file(str(issued.cert))
        context.use_privatekey_file(str(issued.key))
        if clients is not None:
            context.load_verify_locations(str(clients.path))
            context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)

    def getContext(self) -> SSL.Context:
        return self._context


def bad_backends(authority: Authority, folder: Path) -> dict[str, Issued]:
    return {
        "another host": authority.issue("host", "other.example", "127.0.0.2"),
        "ended": authority.issue("ended", "127.0.0.1", days=(-9, -1)),
        "not begun": authority.issue("later", "127.0.0.1", days=(1, 9)),
        "unknown authority": Authority(folder, "unknown").issue("stranger", "127.0.0.1"),
    }


@pytest.mark.filterwarnings("ignore:Passing pyOpenSSL:DeprecationWarning")
@pytest.mark.parametrize("name", ["another host", "ended", "not begun", "unknown authority"])
@pytest_twisted.ensureDeferred
async def test_a_backend_that_can_not_be_trusted_sees_nothing_and_costs_nothing(
    tmp_path, authority, name
):
    issued = bad_backends(authority, tmp_path)[name]
    async with ScriptedBackend([ANSWER], tls=_Serves(issued)) as backend:
        settings = {"url": backend.url, "ca_file": str(authority.path), "token": "secret"}
        async with running_proxy(tmp_path, {"m": settings}) as proxy:
            answer = await proxy.post(CHAT, ASK)
            assert answer.status == 502
            assert answer.json()["error"]["message"] == "The model's server can't be trusted."
            assert await proxy.settled() == [("settled", "backend_failed", None, None)]
            assert proxy.bill() == {}
        assert backend.received == 0


@pytest.mark.parametrize("version", [SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION])
@pytest_twisted.ensureDeferred
async def test_a_backend_that_asks_for_a_certificate_gets_ours(tmp_path, authority, version):
    clients = Authority(tmp_path, "clients")
    ours = clients.below("intermediate").issue("proxy", "proxy.example")
    strange = Authority(tmp_path, "strange").issue("stranger", "proxy.example")
    tls = _Serves(authority.issue("backend", "127.0.0.1"), clients)
    tls.getContext().set_max_proto_version(version)
    async with ScriptedBackend([ANSWER], tls=tls) as backend:
        unknown = {"url": backend.url, "ca_file": str(authority.path)}
        known = {"client_cert_file": str(ours.cert), "client_key_file": str(ours.key)}
        stranger = {"client_cert_file": str(strange.cert), "client_key_file": str(strange.key)}
        backends: Any = {
            "m": {**unknown, **known},
            "any": {"url": backend.url, "verify_ssl": False, **known},
            "none": unknown,
            "stranger": {**unknown, **stranger},
        }
        async with running_proxy(tmp_path, backends) as proxy:
            for model in ("m", "any"):
                assert (await proxy.post(CHAT, {**ASK, "model": model})).status == 200
            seen = backend.received
            for model in ("none", "stranger"):
                assert (await proxy.post(CHAT, {**ASK, "model": model})).status == 502
            assert backend.received == seen
            settled = [("settled", "complete", 3, 2), ("settled", "backend_failed", None, None)]
            assert await proxy.settled(4) == [settled[0], settled[0], settled[1], settled[1]]


class Mute(Protocol):
    """Answers the first bytes with `answer`, and then nothing."""

    def __init__(self, factory: Any) -> None:
        self.seen, self.lost = b"", False
        self._answer: bytes = factory.answer
        factory.links.append(self)

    def dataReceived(self, data: bytes) -> None:
        if not self.seen and self.transport is not None:
            self.transport.write(self._answer)
        self.seen += data

    def connectionLost(self, reason: Failure | None = None) -> None:
        self.lost = True


@contextlib.asynccontextmanager
async def mute_backend(answer: bytes) -> AsyncIterator[tuple[str, list[Mute]]]:
    """A backend's URL that speaks no more of TLS than `answer`, and its connections."""
    factory: Any = Factory()
    factory.answer, factory.links = answer, []
    factory.buildProtocol = lambda address: Mute(factory)
    port = reactor.listenTCP(0, factory, interface="127.0.0.1")
    yield f"https://127.0.0.1:{port.getHost().port}", factory.links
    await port.stopListening()


ALERT = bytes.fromhex("15 0303 0002 02 28")  # handshake failure
#: A ServerHello of TLS 1.1, with a suite of that time (RFC 4346 section 7.4.1.3).
OLD = bytes.fromhex("16 0302 002a 02 000026 0302") + bytes(32) + bytes.fromhex("00 c009 00")


@pytest.mark.parametrize("answer", [b"", ALERT, OLD, b"HTTP/1.1 200 OK\r\n\r\n"])
@pytest_twisted.ensureDeferred
async def test_without_a_handshake_nothing_is_sent_and_nothing_is_to_pay(tmp_path, answer):
    async with mute_backend(answer) as (url, links):
        async with running_proxy(tmp_path, {"m": {"url": url, "timeout": 0.5}}) as proxy:
            asked = await proxy.post(CHAT, ASK)
            assert asked.status == 502
            assert await proxy.settled() == [("settled", "backend_failed", None, None)]
            assert all(b"messages" not in link.seen for link in links)


@pytest_twisted.ensureDeferred
async def test_a_backend_is_offered_what_is_strong_and_nothing_else(tmp_path):
    async with mute_backend(ALERT) as (url, links):
        async with running_proxy(tmp_path, {"m": {"url": url}}) as proxy:
            await proxy.post(CHAT, ASK)
    at = 44 + links[0].seen[43]  # behind the record, the version, the random, the session
    size = int.from_bytes(links[0].seen[at : at + 2], "big")
    suites = links[0].seen[at + 2 : at + 2 + size]
    renegotiation = b"\x00\xff"
    offered = {suites[n : n + 2] for n in range(0, size, 2)} - {renegotiation}
    assert offered == {number.to_bytes(2, "big") for number in STRONG}
    versions = b"\x00\x2b\x00\x05\x04\x03\x04\x03\x03"  # the extension: 1.3 and 1.2
    assert versions in links[0].seen


STRONG = {0x1301, 0x1302, 0x1303, 0xC02B, 0xC02C, 0xC02F, 0xC030, 0xCCA8, 0xCCA9}


@pytest_twisted.ensureDeferred
async def test_authorities_are_read_again_and_other_connections_are_kept(tmp_path, authority):
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.path.read_bytes())
    tls = _Serves(authority.issue("backend", "127.0.0.1"))
    settings = {"ca_file": str(ca)}
    async with ScriptedBackend([ANSWER], tls=tls) as changed, ScriptedBackend([ANSWER]) as other:
        backends = {"m": {"url": changed.url, **settings}, "other": {"url": other.url}}
        async with running_proxy(tmp_path, backends) as proxy:

            async def ask_both() -> list[int]:
                asked = [await proxy.post(CHAT, {**ASK, "model": m}) for m in ("m", "other")]
                return [answer.status for answer in asked]

            assert await ask_both() == [200, 200]
            before = len(changed.connections), len(other.connections)
            proxy.proxy.reload()  # nothing has changed
            assert await ask_both() == [200, 200]
            assert (len(changed.connections), len(other.connections)) == before

            ca.write_bytes(Authority(tmp_path, "next").path.read_bytes())
            proxy.proxy.reload()
            # Neither the open connection nor its session is used: both were trusted before.
            assert await ask_both() == [502, 200]
            ca.write_bytes(ca.read_bytes() + authority.path.read_bytes())
            proxy.proxy.reload()
            assert await ask_both() == [200, 200]
            assert len(other.connections) == before[1]

            ca.write_text("garbage")
            proxy.proxy.reload()  # refused
            assert await ask_both() == [200, 200]
